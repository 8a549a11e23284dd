"""The student's loop on scripted sources: what it does about a broker or a disk that misbehaves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from student_case import SCHEMA, record_batch, student_config

from das.errors import Fatal, Retryable
from das.example_poll import PollRows
from das.example_source import ExampleMessage
from das.position import Position, Positions
from das.telemetry import NullTelemetry
from foundation_model.snapshot_folder import SnapshotFolder
from vertical_models.checkpoint import Resumed
from vertical_models.online import StudentLoop
from vertical_models.trainer import StudentTrainer


@dataclass
class Script:
    """A source that delivers a script of messages and errors."""

    steps: list[list[ExampleMessage] | Exception]
    ended: bool = False
    refuse_commits: bool = False
    committed: list[Positions] = field(default_factory=list)

    def poll(self, timeout_s: float, max_messages: int) -> list[ExampleMessage]:
        """The next step; the end after the last."""
        if not self.steps:
            self.ended = True
            return []
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def commit(self, positions: Positions) -> None:
        """Remember, or refuse."""
        if self.refuse_commits:
            raise Retryable("the broker is away")
        self.committed.append(positions)


def _message(offset: int) -> ExampleMessage:
    return ExampleMessage(0, offset, offset, PollRows(record_batch(8, seed=offset), 0, 8), 0, 0)


@contextmanager
def _scripted(script: Script, tmp_path: Path, **changes: Any) -> Iterator[StudentLoop]:
    config = student_config(distillation={"mode": "none"}, **changes)
    folder = SnapshotFolder(tmp_path / "snapshots", 2, NullTelemetry())
    trainer = StudentTrainer(config, SCHEMA)
    yield StudentLoop(script, None, trainer, Resumed({0: Position(0)}), folder, results=tmp_path / "vm.json")
    folder.close()


def test_a_source_that_goes_back_stops_the_student(tmp_path: Path) -> None:
    script = Script([[_message(0), _message(1)], [_message(1)]])
    with _scripted(script, tmp_path) as loop, pytest.raises(Fatal, match="delivered offset 1 again"):
        loop.run(threading.Event())


def test_a_broker_that_is_away_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vertical_models.online.RETRY_S", 0.01)
    script = Script([[_message(0)], Retryable("away"), Retryable("away"), [_message(1)]], refuse_commits=True)
    with _scripted(script, tmp_path) as loop:
        loop.run(threading.Event())
        assert loop.results()["rows"] == 16
        assert loop.positions == {0: Position(2)}


def test_a_broker_that_stays_away_ends_the_process(tmp_path: Path) -> None:
    script = Script([Retryable("away")] * 100)
    with _scripted(script, tmp_path, poll_timeout_s=0.01) as loop, pytest.raises(Retryable):
        loop.run(threading.Event())


def test_nothing_is_committed_when_the_disk_refuses_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Path:
        raise Retryable("disk full")

    script = Script([[_message(0)]])
    with _scripted(script, tmp_path) as loop:
        monkeypatch.setattr("foundation_model.snapshot_folder.write_snapshot", full)
        loop.run(threading.Event())
    assert script.committed == []
