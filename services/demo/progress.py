"""How far the demo is: a rich panel on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from services.status import Collector, Status, summary_line

PLAIN_S = 5.0
LIVE_S = 1.0
WINDOW_POINTS = 15


class Progress:
    """Shows `collector`'s newest picture each time `tick` is called."""

    def __init__(self, collector: Collector, console: Console) -> None:
        self._collector = collector
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.tick_s = LIVE_S if self._live else PLAIN_S

    def start(self) -> None:
        """Begin to show."""
        if self._live:
            self._live.start()

    def tick(self) -> None:
        """Show the newest picture."""
        status = self._collector.latest
        left = ""
        if status and status["phase"] != "starting":
            left_s = seconds_left(list(self._collector.history), status)
            left = " | time left: -" if left_s is None else f" | time left: {left_s:.0f} s"
        if self._live is None:
            self.say(f"{summary_line(status)}{left}")
        elif status:
            self._live.update(_panel(status, left), refresh=True)

    def say(self, text: str) -> None:
        """Print one line above the panel."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the panel away."""
        if self._live:
            self._live.stop()


def seconds_left(history: Sequence[dict[str, Any]], status: Status) -> float | None:
    """Rows that the teacher has not trained yet over its recent speed; None before there is a speed."""
    if not status or not status["rows_expected"]:
        return None
    recent = [point["events_per_s"] for point in history[-WINDOW_POINTS:]]
    speed = sum(recent) / len(recent) if recent else 0.0
    left = max(0.0, status["rows_expected"] - status["rows_trained"])
    return left / speed if speed > 0 else None


def _panel(status: Status, left: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{summary_line(status).partition(' | NE')[0]}{left}", title_justify="left"
    )
    for heading in ("process", "state", "rows", "rows/s", "lag", "hit rate", "NE (recent)", "memory", "restarts"):
        table.add_column(heading, justify="left" if heading in ("process", "state") else "right")
    for row in status["processes"]:
        seen = row.get("hits", 0.0) + row.get("misses", 0.0)
        nes = " ".join(f"{key} {value:.3f}" for key, value in list(row.get("ne", {}).items())[:1])
        table.add_row(
            row["name"],
            row["state"],
            _count(row.get("rows")),
            _count(row.get("rows_per_s")),
            _lag(row),
            f"{row['hits'] / seen:.2%}" if seen else "",
            nes,
            f"{row['rss_bytes'] / 2**20:,.0f} MiB" if "rss_bytes" in row else "",
            str(row["restarts"]),
        )
    return table


def _lag(row: dict[str, Any]) -> str:
    """What waits for the process, with its unit; nothing waits for a replay or a server."""
    if row["kind"] not in ("das", "teacher", "student") or row.get("lag") is None:
        return ""
    return f"{row['lag']:,.0f} {'records' if row['kind'] == 'das' else 'messages'}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
