"""Errors that name their remedy: quarantine it, try again, stop, or fix the configuration."""

from __future__ import annotations


class ExfmError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(ExfmError):
    """The user's configuration is wrong; the message says which field and what to set instead."""


class Poison(ExfmError):
    """One message cannot be used; it goes to the quarantine topic and the stream goes on.

    `reason` is a short, bounded word (a metric label); `detail` is for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Retryable(ExfmError):
    """A dependency is away for now; back off inside a deadline and try again."""


class Fatal(ExfmError):
    """Going on would lose or corrupt data; the process must exit non-zero."""
