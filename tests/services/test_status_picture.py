"""The picture of a pipeline whose processes end: final counts from what they wrote, and no number that is not final."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from services.status import Collector, summary_line

KINDS = {"das": "das", "teacher": "teacher", "one": "student", "replay": "replay"}


class Pipeline:
    """States as the supervisor gives them, of processes that wrote what ours write and answer nothing."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.state = dict.fromkeys(KINDS, "running")
        self.collector = Collector(run_dir, self.states)

    def states(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "kind": kind, "state": self.state[name], "pid": None, "restarts": 0}
            for name, kind in KINDS.items()
        ]

    def write(self, path: str, content: dict[str, Any]) -> Path:
        file = self.run_dir / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content) + "\n", encoding="utf-8")
        return file

    def collect(self, *ended: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The picture after more processes ended, and the rows in it by process."""
        self.state |= dict.fromkeys(ended, "finished")
        picture = self.collector.collect()
        return picture, {row["name"]: row.get("rows") for row in picture["processes"]}


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return Pipeline(tmp_path / "shop")


def test_what_ended_has_its_final_counts_even_if_it_was_never_scraped(pipeline: Pipeline) -> None:
    pipeline.write("logs/replay.log", {"event": "replayed", "impressions": 60_000, "complete": True})
    picture, rows = pipeline.collect("replay", "das")
    assert rows == {"replay": 60_000, "das": None, "teacher": None, "one": None}
    assert picture["rows_expected"] == 60_000
    pipeline.write("results/teacher.json", {"rows": 60_000, "hit_rate": None})
    pipeline.write("results/one.json", {"rows": 500, "hit_rate": 0.9})
    picture, rows = pipeline.collect("teacher", "one")
    assert rows == {"replay": 60_000, "das": 60_000, "teacher": 60_000, "one": 500}
    assert (picture["hit_rate"], picture["rows_trained"], picture["pipeline"]) == (pytest.approx(0.9), 60_000, "shop")


def test_a_replay_that_was_told_to_stop_sent_what_it_says_and_not_its_table(pipeline: Pipeline) -> None:
    pipeline.write("logs/replay.log", {"event": "replayed", "impressions": 17, "complete": False})
    picture, rows = pipeline.collect("replay")
    assert (rows["replay"], picture["rows_expected"]) == (17, 0)


def test_results_of_an_earlier_run_are_no_final_counts(pipeline: Pipeline) -> None:
    old = pipeline.write("results/teacher.json", {"rows": 7})
    os.utime(old, (1, 1))
    assert pipeline.collect("das", "teacher")[1] == {"das": None, "teacher": None, "one": None, "replay": None}


def test_phases_from_start_to_end_and_nothing_waits_for_who_has_ended(pipeline: Pipeline) -> None:
    picture, _ = pipeline.collect()
    assert picture["phase"] == "starting"
    assert "starting processes, 0 of 4 ready" in summary_line(picture)
    pipeline.write("results/one.json", {"rows": 5, "hit_rate": None})
    assert pipeline.collect("one")[0]["phase"] == "running"
    assert pipeline.collect("replay")[0]["phase"] == "sent"
    picture, _ = pipeline.collect("das", "teacher")
    assert picture["phase"] == "ended"
    assert picture["lags"] == {"das": None, "teacher": None, "student": None}
