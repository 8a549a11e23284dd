"""The cause of a crash, as `exfm up` repeats it from a process's log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.supervisor import _cause

OLD = json.dumps({"level": "error", "error": "an earlier start"}) + "\n"
TRACE = "Traceback (most recent call last):\n  File\nKeyError: 'a bug'"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            json.dumps({"level": "error", "error": "redis at a:1\n is away", "pad": "x" * 9000}) + "\nerror: b\n",
            "redis at a:1 is away",
        ),
        (json.dumps({"level": "error", "event": "crashed", "exception": TRACE}) + "\n", "KeyError: 'a bug'"),
        (TRACE + "\n", "KeyError: 'a bug'"),
        (json.dumps({"level": "info", "event": "started"}) + "\n", ""),
    ],
)
def test_the_newest_start_names_its_cause_in_one_line(tmp_path: Path, log: str, cause: str) -> None:
    path = tmp_path / "das.log"
    path.write_text(OLD + log, encoding="utf-8")
    assert _cause(path, len(OLD)) == cause
