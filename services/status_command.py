"""`exfm status`: one screen on what every process does now, whoever started it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from services.process import EXIT_OK
from services.settings import Settings, load
from services.status import Collector, Status
from services.supervisor import children_of
from services.up import LIVE

INTERVAL_S = 2.0
FIRST_S = 1.0
"""Between the two looks that the first rates need."""
MAX_LAG_ROWS = 24
WIDTH = 140
"""Columns where there is no terminal."""

NOT_STARTED, NO_ANSWER, NOT_READY, READY = "not started", "no answer", "not ready", "ready"
STYLES = {NO_ANSWER: "red", NOT_READY: "yellow", READY: "green"}
HEADINGS = ("process", "state", "rows", "rows/s", "version", "hit rate", "gap p50", "gap p95", "quarantined", "memory")


def run(settings_file: Path, *, once: bool = False, as_json: bool = False) -> int:
    """Show the picture until Ctrl-C, or once where nobody watches; returns the exit code."""
    settings = load(settings_file, os.environ)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    collector = Collector(settings.run_dir, lambda: announced(settings))
    try:
        picture = first_look(collector)
        if as_json:
            _print_json(picture)
        if once or not console.is_terminal:
            if not as_json:
                console.print(screen(picture, settings.run_dir))
            return EXIT_OK
        _follow(collector, console, settings.run_dir, as_json=as_json)
    except KeyboardInterrupt:
        pass
    return EXIT_OK


def announced(settings: Settings) -> list[dict[str, Any]]:
    """The processes that the settings describe, then others that announced themselves in the run folder."""
    pids = {}
    for path in sorted((settings.run_dir / "ports").glob("*.json")):
        try:
            pids[path.stem] = int(json.loads(path.read_text(encoding="utf-8"))["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            pids[path.stem] = 0
    kinds = {child.name: child.kind for child in children_of(settings)}
    kinds |= {name: kinds.get(_process_of(name), "other") for name in pids if name not in kinds and name != LIVE}
    return [
        {"name": name, "kind": kind, "state": NOT_STARTED, "pid": pids.get(name), "restarts": 0}
        for name, kind in kinds.items()
    ]


def _process_of(instance: str) -> str:
    """The process that a further instance (`das-2`) is one of."""
    process, _, number = instance.rpartition("-")
    return process if number.isdecimal() else instance


def first_look(collector: Collector) -> Status:
    """A picture with rates: two looks, a moment apart."""
    collector.collect()
    time.sleep(FIRST_S)
    return with_states(collector.collect())


def with_states(picture: Status) -> Status:
    """The picture with the state of each process as seen from outside; numbers of the silent ones are dropped."""
    processes = []
    for row in picture["processes"]:
        if row["pid"] is None or row["ready"] is None:
            state = NOT_STARTED if row["pid"] is None else NO_ANSWER
            processes.append({key: row[key] for key in ("name", "kind", "pid")} | {"state": state})
        else:
            processes.append({**row, "state": READY if row["ready"] else NOT_READY})
    return {
        "when_ms": picture["when_ms"],
        "events_per_s": picture["events_per_s"],
        "hit_rate": picture["hit_rate"],
        "teacher_version": next((row.get("snapshot") for row in processes if row["kind"] == "teacher"), None),
        "processes": processes,
    }


def screen(picture: Status, run_dir: Path) -> Group:
    """The picture as tables."""
    version = "-" if picture["teacher_version"] is None else f"{picture['teacher_version']:.0f}"
    when = time.strftime("%H:%M:%S", time.localtime(picture["when_ms"] / 1000))
    title = (
        f"{run_dir} at {when} | {picture['events_per_s']:,.0f} events/s | "
        f"hit rate {_share(picture['hit_rate']) or '-'} | teacher version {version}"
    )
    return Group(title, _processes(picture["processes"]), _lags(picture["processes"]))


def _processes(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("process", "state") else "right", no_wrap=True)
    for row in rows:
        seen = row.get("hits", 0.0) + row.get("misses", 0.0)
        gap = row.get("freshness_s") or {}
        state = row["state"] + (" (no logits)" if row.get("degraded") else "")
        table.add_row(
            row["name"],
            f"[{STYLES[row['state']]}]{state}[/]" if row["state"] in STYLES else state,
            _count(row.get("rows")),
            _count(row.get("rows_per_s")),
            _count(row.get("snapshot")),
            _share(row["hits"] / seen if seen else None),
            _seconds(gap.get("p50")),
            _seconds(gap.get("p95")),
            _count(row.get("quarantined")),
            f"{row['rss_bytes'] / 2**20:,.0f} MiB" if "rss_bytes" in row else "",
        )
    return table


def _lags(rows: list[dict[str, Any]]) -> Table:
    """Lag per process, topic and partition; the oldest only where all do not fit on a screen."""
    table = Table("lag of", "topic", "partition", "records", "seconds", box=box.SIMPLE_HEAD)
    lags = [(row["name"], lag) for row in rows for lag in row.get("lags", ())]
    if len(lags) > MAX_LAG_ROWS:
        table.caption = f"{len(lags) - MAX_LAG_ROWS} more with a smaller lag; all of them with --json"
        lags = sorted(lags, key=lambda item: (item[1]["seconds"], item[1]["records"]), reverse=True)[:MAX_LAG_ROWS]
    for name, lag in lags:
        table.add_row(name, lag["topic"], lag["partition"], _count(lag["records"]), f"{lag['seconds']:,.1f}")
    return table


def _follow(collector: Collector, console: Console, run_dir: Path, *, as_json: bool) -> None:
    """Refresh until Ctrl-C."""
    if as_json:
        while True:
            time.sleep(INTERVAL_S)
            _print_json(with_states(collector.collect()))
    with Live(screen(with_states(collector.latest), run_dir), console=console, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(INTERVAL_S)
            live.update(screen(with_states(collector.collect()), run_dir), refresh=True)


def _print_json(picture: Status) -> None:
    print(json.dumps(picture, allow_nan=False), flush=True)


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _seconds(value: float | None) -> str:
    """A span in the unit in which it is short."""
    if value is None:
        return ""
    for limit, unit, size in ((1.0, "ms", 1e-3), (120.0, "s", 1.0), (7200.0, "min", 60.0), (172_800.0, "h", 3600.0)):
        if value < limit:
            return f"{value / size:.3g} {unit}"
    return f"{value / 86_400:.3g} d"
