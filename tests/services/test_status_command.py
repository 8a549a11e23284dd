"""`exfm status` on real processes that nobody supervises: what answers, what is silent, and what they published."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pipeline import settings as pipeline_settings
from rich.console import Console

from services.settings import load
from services.status import Samples, quantile
from services.status_command import announced, screen

PROBE = """
import sys
from pathlib import Path
from services.process import run

def work(context):
    gauge, count, observe = context.telemetry.gauge, context.telemetry.count, context.telemetry.observe
{body}
    context.set_ready()
    while not context.stop.wait(0.05):
        count("exfm_rows_trained_total", 10)

sys.exit(run(sys.argv[1], Path(sys.argv[2]), work))
"""
TEACHER = """
    gauge("exfm_snapshot_version", 41)
    gauge("exfm_lag_records", 12, topic="examples", partition="1")
    gauge("exfm_lag_seconds", 3.5, topic="examples", partition="1")
    gauge("exfm_lag_records", 0, topic="examples", partition="0")
    gauge("exfm_lag_seconds", 0, topic="examples", partition="0")
"""
STUDENT = """
    count("exfm_logit_rows_total", 90, outcome="hit")
    count("exfm_logit_rows_total", 10, outcome="miss")
    for seconds in [2] * 90 + [20] * 10:
        observe("exfm_freshness_gap_seconds", seconds)
"""
Start = Callable[[str, str], subprocess.Popen[bytes]]


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    """Settings of das, teacher and the students plain and distilled; nothing of it runs."""
    return pipeline_settings(tmp_path, rows=1, replay=None)


@pytest.fixture
def start(settings_file: Path) -> Iterator[Start]:
    """Starts a process of ours that publishes numbers; killed at the end of the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start_one(name: str, body: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", PROBE.format(body=body), name, str(settings_file)]
        started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        ports = settings_file.parent / "run" / "ports" / f"{name}.json"
        end_s = time.monotonic() + 20
        while not ports.exists():
            assert time.monotonic() < end_s
            time.sleep(0.02)
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.wait()


def status(settings_file: Path, *options: str) -> str:
    command = [sys.executable, "-m", "services.cli", "status", "--settings", str(settings_file), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def test_numbers_and_states_come_from_the_processes_themselves(settings_file: Path, start: Start) -> None:
    start("teacher", TEACHER)
    start("plain", STUDENT)
    start("das-2", "    pass")
    ended = start("das", "    pass")
    ended.kill()
    ended.wait()
    now = json.loads(status(settings_file, "--json"))
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in now["processes"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "das": "no answer",
        "teacher": "ready",
        "plain": "ready",
        "distilled": "not started",
        "das-2": "ready",
    }
    assert {name: row["kind"] for name, row in rows.items() if name.startswith("das")} == {"das": "das", "das-2": "das"}
    assert now["teacher_version"] == 41
    assert now["hit_rate"] == 0.9
    assert 50 < now["events_per_s"] < 250  # 200 a second, on a busy machine
    assert rows["teacher"]["lags"] == [
        {"topic": "examples", "partition": "0", "records": 0, "seconds": 0},
        {"topic": "examples", "partition": "1", "records": 12, "seconds": 3.5},
    ]
    assert rows["plain"]["freshness_s"] == pytest.approx({"p50": 1 + 1.5 * 50 / 90, "p95": 20.0})
    assert rows["das"].keys() == {"name", "kind", "pid", "state"}


def test_without_a_terminal_one_plain_screen_is_printed(settings_file: Path, start: Start) -> None:
    start("teacher", TEACHER)
    start("plain", STUDENT)
    text = status(settings_file)
    assert "hit rate 90.00% | teacher version 41" in text
    assert "\x1b" not in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["plain"][1] == "ready"
    assert lines["plain"][-6:-3] == ["s", "20", "s"]
    assert lines["distilled"] == ["distilled", "not", "started"]
    assert "teacher   examples   1           12        3.5" in text


def test_a_port_that_someone_else_has_by_now_is_no_answer(settings_file: Path, start: Start) -> None:
    start("teacher", TEACHER)
    ports = settings_file.parent / "run" / "ports"
    (ports / "das.json").write_bytes((ports / "teacher.json").read_bytes())
    (ports / "plain.json").write_text("{", encoding="utf-8")
    rows = json.loads(status(settings_file, "--once", "--json"))["processes"]
    assert {row["name"]: row["state"] for row in rows} == {
        "das": "no answer",
        "teacher": "ready",
        "plain": "no answer",
        "distilled": "not started",
    }


def test_more_partitions_than_fit_are_cut_to_the_oldest(settings_file: Path) -> None:
    lags = [{"topic": "examples", "partition": str(n), "records": 1.0, "seconds": float(n)} for n in range(100)]
    row = {**announced(load(settings_file))[0], "state": "ready", "lags": lags}
    picture = {"when_ms": 0, "events_per_s": 0.0, "hit_rate": None, "teacher_version": None, "processes": [row]}
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(screen(picture, Path("run")))
    text = console.export_text()
    assert "99.0" in text
    assert " 3.0" not in text
    assert len(text.splitlines()) < 45


@pytest.mark.parametrize(("q", "value"), [(0.5, 0.5), (0.75, 1.5), (0.99, 2.0)])
def test_a_quantile_lies_where_its_bucket_says(q: float, value: float) -> None:
    counts = {"1.0": 4.0, "2.0": 6.0, "+Inf": 8.0}
    samples: Samples = {("wait_bucket", (("le", bound),)): count for bound, count in counts.items()}
    assert quantile(samples, "wait", {0.5: 0.25, 0.75: 0.625, 0.99: 0.99}[q]) == value
    assert quantile(samples, "other", q) is None
