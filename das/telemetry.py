"""How the lower layers report: by name, to whatever the process wired in.

Names, types, units and labels are fixed in `services/metrics.py`, whose implementation refuses unknown ones.
"""

from __future__ import annotations

from typing import Protocol


class Telemetry(Protocol):
    """Receives counts, levels and observations."""

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add `amount` to the counter `name`."""

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set the gauge `name`."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to the histogram `name`."""


class NullTelemetry:
    """Drops everything; for libraries used outside a process of ours."""

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Drop."""

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Drop."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Drop."""


class RecordingTelemetry:
    """Keeps every value in memory, keyed by name and sorted labels; for tests and one-off tools."""

    def __init__(self) -> None:
        self.counters: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to the counter."""
        key = (name, tuple(sorted(labels.items())))
        self.counters[key] = self.counters.get(key, 0) + amount

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Remember the level."""
        self.gauges[name, tuple(sorted(labels.items()))] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Count the observation."""
        self.count(name, 1, **labels)

    def total(self, name: str, **labels: str) -> float:
        """Sum of a counter over all label sets that contain `labels`."""
        want = set(labels.items())
        return sum(v for (n, have), v in self.counters.items() if n == name and want <= set(have))
