"""How we connect to Redis: explicit timeouts, no retries hidden in the client, errors that name the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, cast
from urllib.parse import urlsplit

import redis
from pydantic import Field, field_validator, model_validator
from redis.backoff import NoBackoff
from redis.retry import Retry

from das.config import Config
from das.errors import ConfigError, Fatal, Retryable

TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
TLS_OPTIONS = frozenset({*TLS_FILES, "ssl_cert_reqs", "ssl_check_hostname", "ssl_ciphers"})
OPTIONS = frozenset({"username", "db", "client_name", "protocol", "health_check_interval"})
_BUSY = ("OOM ", "MISCONF ", "NOREPLICAS ", "BUSY ", "UNKILLABLE ")


class RedisConfig(Config):
    """Where the logit store is."""

    url: str = "redis://127.0.0.1:6379/0"
    """redis://host:port/db, rediss:// for TLS, or unix:///path. No password: it would be logged with the config."""
    password_file: Path | None = None
    """A file with the password of the (ACL) user, and nothing else."""
    socket_timeout_s: float = Field(2.0, gt=0, le=60)
    """The longest wait for one answer, and for a connection."""
    cluster: bool = False
    """Whether url names a node of a Redis Cluster; the others are found through it."""
    options: dict[str, str | int | bool] = Field(default_factory=dict)
    """Passed to redis-py: username, client_name, ssl_ca_certs, ssl_certfile, ssl_keyfile and the like."""

    @field_validator("url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ValueError("start it with redis://, rediss:// or unix://")
        if parts.password is not None:
            raise ValueError("the url is logged: put the password into a file and name it in password_file")
        if parts.query:
            raise ValueError("move what follows the '?' to options")
        return url

    @model_validator(mode="after")
    def _known_options(self) -> Self:
        known = OPTIONS | TLS_OPTIONS if self.url.startswith("rediss:") else OPTIONS
        unknown = sorted(self.options.keys() - known)
        if unknown and TLS_OPTIONS.issuperset(unknown):
            raise ValueError(f"options {unknown} need a url that starts with rediss://")
        if unknown:
            raise ValueError(f"options {unknown} cannot be set; known: {', '.join(sorted(known))}")
        return self

    @property
    def address(self) -> str:
        """Host and port, or the socket's path: what may be printed."""
        parts = urlsplit(self.url)
        return parts.path if parts.scheme == "unix" else f"{parts.hostname or 'localhost'}:{parts.port or 6379}"


def connect(config: RedisConfig) -> redis.Redis:
    """A client; it connects at its first call, for a cluster now. Raises ConfigError on a file that cannot be read.

    A cluster's client is returned as the plain one: their commands are the same, but MGET and MSET in a pipeline.
    """
    options: dict = dict(config.options)
    if config.password_file is not None:
        try:
            options["password"] = config.password_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"redis.password_file: {error}") from None
    for name in TLS_FILES:
        if name in options and not Path(options[name]).is_file():
            raise ConfigError(f"redis.options.{name}: no file {options[name]}")
    kind = cast(type[redis.Redis], redis.RedisCluster) if config.cluster else redis.Redis
    return kind.from_url(
        config.url,
        socket_timeout=config.socket_timeout_s,
        socket_connect_timeout=config.socket_timeout_s,
        retry=Retry(NoBackoff(), 0),
        decode_responses=False,
        **options,
    )


@contextmanager
def errors_named(address: str) -> Iterator[None]:
    """Turn what redis-py raises into Retryable (away, full, busy) or Fatal (will not heal by waiting)."""
    try:
        yield
    except (redis.AuthenticationError, redis.exceptions.AuthorizationError) as error:
        raise Fatal(f"redis at {address} refused our user: {error}; set username and password_file") from error
    except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.RedisClusterException) as error:
        raise Retryable(f"redis at {address} is away: {error}") from error
    except redis.OutOfMemoryError as error:
        raise Retryable(
            f"redis at {address} is full (maxmemory): {error}; raise maxmemory or shorten the TTL"
        ) from error
    except (redis.ReadOnlyError, redis.exceptions.ClusterError, redis.exceptions.TryAgainError) as error:
        raise Retryable(f"redis at {address} cannot take this now: {error}") from error
    except redis.ResponseError as error:
        kind = Retryable if str(error).startswith(_BUSY) else Fatal
        raise kind(f"redis at {address} refused a command: {error}") from error
