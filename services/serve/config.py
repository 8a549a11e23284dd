"""Settings of the teacher HTTP API."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from das.config import Config
from das.errors import ConfigError

MIN_TOKEN_CHARS = 16


class ServeConfig(Config):
    """Where the API listens and what one client may ask of it.

    Request memory is bounded by about `max_concurrent * max_body_bytes`, times a small factor for the parsed rows.
    """

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65_535)  # 0 = any free port
    token: SecretStr | None = None  # better: token_file
    token_file: Path | None = None  # one bearer token a line, so that a new one can overlap the old
    max_body_bytes: int = Field(8 << 20, ge=1024, le=1 << 30)
    max_rows: int = Field(1024, ge=1, le=65_536)
    max_concurrent: int = Field(16, ge=1, le=4096)
    deadline_s: float = Field(5.0, gt=0, le=600)
    reload_s: float = Field(2.0, gt=0, le=3600)
    snapshots: Path | None = None  # the folder to follow; by default that of the run_dir's own teacher
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(1, ge=1, le=1024)  # CPU threads of torch
    grace_s: float = Field(10.0, ge=0, le=600)  # how long a stop waits for requests under way

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def load_tokens(config: ServeConfig) -> tuple[bytes, ...]:
    """The accepted bearer tokens; empty on a loopback address without any.

    Raises ConfigError when the API would listen beyond this machine without a token, or a token is short.
    """
    tokens = config.token.get_secret_value().split() if config.token else []
    if config.token_file:
        try:
            tokens += [line.strip() for line in config.token_file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"serve.token_file: cannot read {config.token_file}: {error}") from None
    tokens = [token for token in tokens if token]
    if any(len(token) < MIN_TOKEN_CHARS for token in tokens):
        raise ConfigError(f"serve.token_file: a token has fewer than {MIN_TOKEN_CHARS} characters; make a longer one")
    if not tokens and (config.token_file or not config.is_loopback):
        raise ConfigError(
            f"serve.token_file: listening on {config.host} needs a bearer token; write one to a file "
            "(openssl rand -hex 32) and name it here, or set serve.host to 127.0.0.1"
        )
    return tuple(token.encode() for token in tokens)
