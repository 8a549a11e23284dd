"""`exfm bench das` at a tiny size, on real servers: every row is there, measured and finite; no number is judged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import redis

from das.errors import ConfigError
from services.bench import das_store
from services.embedded import Server

ROWS = {
    *("store.write", "store.write_ttl", "store.read", "store.bytes_per_event"),
    *("examples.decode", "joiner.rate", "joiner.two_workers"),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, kafka_bootstrap: str) -> dict[str, dict[str, Any]]:
    """The rows by name."""
    file = tmp_path_factory.mktemp("bench") / "das.json"
    command = [sys.executable, "-m", "services.cli", "bench", "das", "--json", str(file), "--events", "50000"]
    command += ["--repeats", "1", "--kafka", kafka_bootstrap]
    run = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["bench"] == "das"
    return {row["name"]: row for row in document["rows"]}


def test_every_row_has_a_value_a_baseline_and_a_ratio(rows: dict[str, dict[str, Any]]) -> None:
    assert set(rows) == ROWS
    for row in rows.values():
        assert row["baseline"]
        for field in ("value", "baseline_value", "ratio"):
            assert math.isfinite(row[field]), (row["name"], field)
            assert row[field] > 0, (row["name"], field)


def test_rows_say_what_they_were_measured_on(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["store.bytes_per_event"]["server"]
    assert rows["store.bytes_per_event"]["allocator"]
    assert rows["store.bytes_per_event"]["events"] == 50_000
    assert 30 <= rows["examples.decode"]["columns"] <= 40
    assert sum(rows["joiner.rate"]["profile"].values()) == pytest.approx(1, abs=0.01)
    assert rows["joiner.two_workers"]["cpu_us_per_impression"] > 0


def test_a_database_with_keys_is_refused_and_kept(own_redis: Server, admin: redis.Redis) -> None:
    admin.set("mine", "1")
    with pytest.raises(ConfigError, match="empty database"):
        das_store.measure(f"redis://{own_redis.address}/0", events=1, memory_events=1, repeats=1)
    assert admin.get("mine") == b"1"
