"""How the replay runs, and the bounds of what it remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from das.config import Config


class ServingLogConfig(Config):
    """Caps of the histories and counters; the least recently used keys are forgotten first."""

    max_users: int = Field(200_000, ge=2)
    """Users whose histories are kept."""
    max_keys: int = Field(400_000, ge=2)
    """Keys of each counter group, for example (user, tag) pairs."""
    max_pending: int = Field(1_000_000, ge=1)
    """Outcomes that are recorded but not yet known; more means a delay far longer than the log can carry."""


class ReplayConfig(Config):
    """One replay of a recorded data set."""

    dataset: Path
    """The mapping YAML (see DatasetConfig)."""
    data: Path | None = None
    """The table, in place of the mapping's own `data`."""
    speed: Literal["max", "realtime"] | Annotated[float, Field(gt=0)] = "max"
    """`realtime`, a factor (10 is ten times as fast as recorded), or `max`: as fast as the broker takes it."""
    limit: int | None = Field(None, ge=1)
    """Stop after this many impressions."""
    end_of_stream: bool = True
    """Close every partition with an end-of-stream message, which makes the joiner flush its open windows."""
    resume: bool = True
    """Go on after what an earlier run of the same replay left in the topics; other records there are an error."""
    flush_s: float = Field(60.0, gt=0, le=600)
    """How long the last sends may take to be acknowledged."""
    log: ServingLogConfig = ServingLogConfig()

    @property
    def factor(self) -> float | None:
        """How many times as fast as recorded; None is unlimited."""
        if self.speed == "max":
            return None
        return 1.0 if self.speed == "realtime" else self.speed
