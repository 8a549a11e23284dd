"""`exfm up` on a short stream: every process to its end, with and without kill -9 on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pipeline import Up, metric, settings

ROWS = 2500
TRAINERS = ("kunlun", "plain", "distilled")
VICTIMS = (("das", 300), ("teacher", 400), ("distilled", 300))


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """The stream without faults."""
    run = Up(settings(tmp_path_factory.mktemp("golden"), rows=ROWS))
    try:
        assert run.finish() == 0, run.stderr[-3000:] + run.logs()
        yield run
    finally:
        run.close()


def comparable(results: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on timing or crashes."""
    return {key: results[key] for key in ("name", "arm", "rows", "hit_rate", "portfolios")}


def test_every_row_is_trained_by_the_teacher_and_its_domain_by_the_students(golden: Up) -> None:
    teacher, plain, distilled = (golden.results(name) for name in ("teacher", "plain", "distilled"))
    assert teacher["rows"] == ROWS
    assert 0 < plain["rows"] == distilled["rows"] < ROWS
    assert distilled["hit_rate"] == 1.0
    assert plain["hit_rate"] is None
    by_portfolio = {(p["domain"], p["objective"]): p for p in teacher["portfolios"]}
    for portfolio in plain["portfolios"]:
        same = by_portfolio[portfolio["domain"], portfolio["objective"]]
        assert (portfolio["rows"], portfolio["positives"]) == (same["rows"], same["positives"])


@pytest.mark.faults
@pytest.mark.timeout(180)
def test_kill_9_of_teacher_student_and_joiner_changes_no_result(golden: Up, tmp_path: Path) -> None:
    run = Up(settings(tmp_path, rows=ROWS))
    counters = {"das": "exfm_examples_rows_total"}
    try:
        for name, rows in VICTIMS:
            counter = counters.get(name, "exfm_rows_trained_total")
            run.until(f"{name} is under way", lambda n=name, c=counter, r=rows: metric(run.get(n, "/metrics"), c) >= r)
            os.kill(run.port(name)["pid"], signal.SIGKILL)
        assert run.finish() == 0, run.stderr[-3000:] + run.logs()
    finally:
        run.close()
    for name, _ in VICTIMS:
        assert f"{name} crashed (killed by SIGKILL); restart 1 in 0.2 s" in run.stdout
    for name in ("teacher", "plain", "distilled"):
        assert comparable(run.results(name)) == comparable(golden.results(name))
