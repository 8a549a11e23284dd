"""`exfm bench demo`: the demo with the teacher on one device, beside the same demo with the teacher on one CPU thread.

Two runs each: at full speed for throughput, and paced for the latency from an impression's arrival to the step that
trained on it. The latency includes the attribution window, which the pace divides as it does all event time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from das.errors import Fatal
from services.bench.document import Row, write

TIMEOUT_S = 1200.0


def run(json_file: Path, out: Path, *, device: str, rows: int | None, pace: float, paced_rows: int) -> None:
    """Run all four demos below `out` and write the rows. Raises Fatal when a demo fails."""
    ours, base = (_demo(out / f"full-{d}", d, "max", rows) for d in (device, "cpu"))
    paced, paced_base = (_demo(out / f"paced-{d}", d, str(pace), paced_rows) for d in (device, "cpu"))
    baseline = "the same demo, teacher on cpu, 1 thread"
    table = [
        Row("teacher.events_per_s", _rate(ours), "events/s", baseline, _rate(base), extra=_shared(ours)),
        Row("teacher.events_per_busy_s", _busy_rate(ours), "events/s", baseline, _busy_rate(base)),
        Row("loop.wall", ours["wall_s"], "s", baseline, base["wall_s"], smaller_is_better=True),
    ]
    for quantile in ("p50", "p99"):
        value, other = (d["teacher"]["event_to_trained_s"][quantile] for d in (paced, paced_base))
        extra = {"pace": pace, "rows": paced_rows, "events_per_s": _rate(paced)}
        name = f"event_to_trained.{quantile}"
        table.append(Row(name, value, "s", f"{baseline}, same pace", other, smaller_is_better=True, extra=extra))
    for portfolio in ("all/click", "1/click"):
        value, other = (_auc(d, portfolio) for d in (ours, base))
        table.append(Row(f"teacher.auc.{portfolio}", value, "AUC", baseline, other))
    write(json_file, "demo", table)


def _demo(folder: Path, device: str, speed: str, rows: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "services.cli", "demo", "--out", str(folder), "--device", device, "--speed", speed]
    command += [] if rows is None else ["--rows", str(rows)]
    if subprocess.run(command, timeout=TIMEOUT_S).returncode != 0:
        raise Fatal(f"a demo failed: {' '.join(command)}; see {folder / 'logs'}")
    results: dict[str, Any] = json.loads((folder / "demo-results.json").read_text(encoding="utf-8"))
    results["teacher"] = json.loads((folder / "results" / "teacher.json").read_text(encoding="utf-8"))
    return results


def _rate(results: dict[str, Any]) -> float:
    return float(results["teacher"]["rows_per_s"])


def _busy_rate(results: dict[str, Any]) -> float:
    """Events per second of the teacher's working time: what it would do if it never waited for input."""
    return _rate(results) / float(results["teacher"]["busy_share"])


def _auc(results: dict[str, Any], portfolio: str) -> float:
    rows = (r for r in results["table"] if r["kind"] == "teacher" and r["portfolio"] == portfolio)
    return float(next(rows)["auc"])


def _shared(results: dict[str, Any]) -> dict[str, Any]:
    hits = [r["hit_rate"] for r in results["table"] if r["hit_rate"] is not None]
    return {
        "device": results["teacher"]["device"],
        "busy_share": results["teacher"]["busy_share"],
        "impressions": results["impressions_replayed"],
        "min_hit_rate": min(hits),
    }
