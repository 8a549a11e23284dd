"""Fixtures of the teacher loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from teacher_process import Spec
from teacher_rig import SpecMaker

from das import fault


@pytest.fixture
def make_spec(
    kafka_bootstrap: str, redis_url: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SpecMaker]:
    """Makes specs over one stream of COUNTS messages; `folder` tells run folders apart."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for the server of `start_process`

    def make(folder: str = "run", **changes: Any) -> Spec:
        return Spec(kafka_bootstrap, redis_url, prefix, str(tmp_path / folder), changes)

    yield make
    fault.arm(None)
