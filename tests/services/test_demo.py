"""`exfm demo` on the first rows: true numbers, proven counts, and nothing outside its run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROWS = 2000
ROOT = Path(__file__).parents[2]
STUDENT_PORTFOLIOS = {"1/click", "1/long_view", "0/click", "4/click"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder around a finished demo in `out`; `home` and `tmp` beside it are where stray files would land."""
    folder = tmp_path_factory.mktemp("demo")
    for name in ("home", "tmp", "cwd"):
        (folder / name).mkdir()
    environ = {
        **os.environ,
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "EXFM_KAFKA__BOOTSTRAP": "127.0.0.1:1",
    }
    command = [sys.executable, "-m", "services.cli", "demo", "--rows", str(ROWS), "--out", str(folder / "out")]
    environ["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=110, check=False, cwd=folder / "cwd", env=environ
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder, run


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "demo-results.json").read_text(encoding="utf-8"))
    return found


def test_every_impression_is_in_examples_once(demo: tuple[Path, Any]) -> None:
    document = results(demo[0])
    assert document["ok"]
    assert document["problems"] == []
    assert document["impressions_replayed"] == ROWS
    assert document["examples"]["rows"] == document["examples"]["distinct"] == ROWS
    assert document["examples"]["quarantined"] == 0


def test_table_has_a_row_per_portfolio_and_arm_and_the_teacher(demo: tuple[Path, Any]) -> None:
    table = results(demo[0])["table"]
    arms = {(row["portfolio"], row["arm"]) for row in table}
    assert {(p, arm) for p in STUDENT_PORTFOLIOS for arm in ("none", "distilled", "teacher")} <= arms
    assert ("all/click", "teacher") in arms
    rows = {(row["portfolio"], row["arm"]): row for row in table}
    for portfolio in STUDENT_PORTFOLIOS:
        assert (
            len(
                {
                    (rows[portfolio, arm]["rows"], rows[portfolio, arm]["positives"])
                    for arm in ("none", "distilled", "teacher")
                }
            )
            == 1
        )
        assert rows[portfolio, "distilled"]["hit_rate"] >= 0.999
    assert rows["all/click", "teacher"]["rows"] == pytest.approx(0.7 * ROWS, abs=2)


def test_document_says_what_it_was_measured_on(demo: tuple[Path, Any]) -> None:
    document = results(demo[0])
    assert document["machine"]["cores"] >= 1
    assert document["versions"]["torch"]
    assert document["config"]["replay"]["limit"] == ROWS
    assert 100 << 20 < document["memory_peak_bytes"] < 8 << 30
    assert document["wall_s"] > 0


def test_progress_table_and_picture_are_shown(demo: tuple[Path, Any]) -> None:
    folder, run = demo
    assert "EXFM_KAFKA__BOOTSTRAP is not used: the demo brings its own servers" in run.stdout
    assert "events/s" in run.stdout
    assert "starting processes, " in run.stdout
    assert "1/long_view     distilled" in run.stdout
    assert f"{ROWS:,} distinct of {ROWS:,} impressions replayed, 0 duplicates" in run.stdout
    assert (folder / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_outside_the_run_folder(demo: tuple[Path, Any]) -> None:
    folder, _ = demo
    stray = [path for name in ("home", "tmp", "cwd") for path in (folder / name).rglob("*")]
    assert stray == []
