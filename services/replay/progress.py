"""How far the replay is: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
LINE_EVERY_S = 10.0


class ReplayProgress:
    """Shows impressions done, rate, time left and the event time reached. `total` may be unknown."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._started_s = self._shown_s = time.monotonic()
        self._first: int | None = None
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("replay"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task("replay", total=total, note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, impressions: int, event_time_ms: int) -> None:
        """Show that this many impressions are done, up to this event time."""
        self._first = impressions if self._first is None else self._first
        now_s = time.monotonic()
        if self._bar is None and now_s - self._shown_s < LINE_EVERY_S:
            return
        self._shown_s = now_s
        rate = (impressions - self._first) / max(now_s - self._started_s, 1e-9)
        reached = time.strftime("%Y-%m-%d %H:%M", time.gmtime(event_time_ms / 1000))
        if self._bar is not None:
            self._bar.update(self._task, completed=impressions, note=f"{rate:,.0f}/s at {reached}")
        else:
            of = "" if self._total is None else f" of {self._total:,}"
            log.info("replayed %s%s impressions, %.0f/s, event time %s UTC", f"{impressions:,}", of, rate, reached)
