"""A monotonic deadline, passed to everything that waits."""

from __future__ import annotations

import time
from typing import Self


class Deadline:
    """A point in monotonic time. One deadline is shared by all steps of one wait."""

    def __init__(self, at_s: float) -> None:
        self._at_s = at_s

    @classmethod
    def after(cls, seconds: float) -> Self:
        """A deadline `seconds` from now."""
        return cls(time.monotonic() + seconds)

    @property
    def left_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._at_s - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether no time is left."""
        return self.left_s <= 0.0
