"""Structured logs: one JSON object per line, to stderr and optionally to a file. Secrets are masked."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any, Literal

import structlog

from das.config import Config

Level = Literal["debug", "info", "warning", "error"]
MASK = "***"

_SECRET_KEY = re.compile(r"pass(word|wd|phrase)?$|secret|token|api_?key|credential|authorization|private_key", re.I)
_URL_LOGIN = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.I)
_INLINE = re.compile(
    r"(?P<key>\b\w*(?:password|passwd|passphrase|secret|token|api_?key|authorization)\w*['\"]?\s*[=:]\s*)"
    r"(?P<value>['\"][^'\"]*['\"]|(?:bearer\s+|basic\s+)?[^\s,;)}\]]+)",
    re.I,
)


class LogConfig(Config):
    """What a process writes to its log."""

    level: Level = "info"
    file: Path | None = None
    """Also append to this file; stderr is always written."""


def redact(value: Any, key: str = "") -> Any:
    """`value` with passwords, tokens and URL logins masked, at any depth."""
    if key and _SECRET_KEY.search(key) and value not in (None, "", False):
        return MASK
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v) for v in value]
    if isinstance(value, str):
        return _INLINE.sub(rf"\g<key>{MASK}", _URL_LOGIN.sub(rf"\g<scheme>{MASK}@", value))
    return value


def configure(process: str, config: LogConfig, *, stderr: bool = True) -> None:
    """Route the standard library's and structlog's records through one JSON renderer. Called once by a main."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]

    def finish(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {"process": process, **{k: redact(v, k) for k, v in event.items()}}

    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            finish,
            structlog.processors.JSONRenderer(default=str),
        ],
    )
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)] if stderr else []
    if config.file is not None:
        config.file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(config.file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=config.level.upper(), handlers=handlers, force=True)
    level: int = logging.getLevelName(config.level.upper())
    logging.getLogger("kafka").setLevel(max(logging.WARNING, level))
    logging.getLogger("kafka.net.selector").setLevel(max(logging.ERROR, level))  # it warns of every busy moment
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The structured logger of one module."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
