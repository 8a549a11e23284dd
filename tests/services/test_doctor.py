"""`exfm doctor` on a real broker and Redis: silent where all is well, and what it says about each thing that is not."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
import yaml

from das.examples import (
    END_OF_STREAM,
    HEADER_CONTROL,
    HEADER_SCHEMA,
    JoinedRow,
    encode_examples,
)
from das.messages import MessageCodec
from das.schema import FeatureSchema
from das.stream import KafkaConfig, KafkaSink, TopicsConfig, create_topics
from foundation_model.snapshot import write_snapshot
from services.doctor import Line, disk_line, examine, reread_lines, topic_line, within
from services.embedded import start_redis
from services.settings import load
from services.topics import Topic
from services.wiring import logit_store

EVERYWHERE = "0.0.0.0"  # noqa: S104
SCHEMA: dict[str, Any] = {
    "name": "small",
    "domains": ["0"],
    "objectives": [{"name": "click", "window_s": 10}],
    "features": [{"kind": "categorical", "name": "item"}],
}


class Clinic:
    """Settings on topics of their own, and what to break about them."""

    def __init__(self, bootstrap: str, redis_url: str, prefix: str, folder: Path) -> None:
        self.folder = folder
        names = {name: f"{prefix}-{name}" for name in TopicsConfig.model_fields}
        self.kafka = KafkaConfig(bootstrap=bootstrap, topics=TopicsConfig(**names))
        self.data: dict[str, Any] = {
            "run_dir": str(folder / "run"),
            "schema_file": str(folder / "schema.yaml"),
            "kafka": {"bootstrap": bootstrap, "topics": names},
            "redis": {"url": redis_url},
            "teacher": {"name": prefix},
            "serve": {},
        }
        (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA), encoding="utf-8")
        self.schema = FeatureSchema.parse(SCHEMA)
        self.sink: KafkaSink | None = None

    def settings(self, **changes: Any) -> Path:
        path = self.folder / "settings.yaml"
        path.write_text(json.dumps({**self.data, **changes}), encoding="utf-8")
        return path

    def examine(self, **changes: Any) -> dict[str, list[Line]]:
        found: dict[str, list[Line]] = {}
        for line in examine(self.settings(**changes)):
            found.setdefault(line.what, []).append(line)
        return found

    def put_example(self, **changes: Any) -> None:
        """One message of one row, then an end of stream."""
        impression = {"impression_id": "i", "event_time": 1_650_000_000_000, "domain": "0", "features": {"item": 7}}
        row = JoinedRow(MessageCodec(self.schema).impression(impression), 1_650_000_000_001, (1,))
        value = changes.pop("value", encode_examples([row], self.schema))
        headers = {HEADER_SCHEMA: b"%016x" % self.schema.fingerprint, **changes}
        self.sink = self.sink or KafkaSink(self.kafka)
        self.sink.send(self.kafka.topics.examples, 1, None, value, headers)
        self.sink.send(self.kafka.topics.examples, 1, None, b"", {HEADER_CONTROL: END_OF_STREAM})
        self.sink.flush(10)

    def snapshot(self, version: int, **changes: Any) -> Path:
        stands = {"schema_fingerprint": self.schema.fingerprint, "trained_through_ms": 1, "steps": 1, "positions": {}}
        tensors = {"model": {"w": torch.ones(3)}, "state": {"m": torch.ones(3)}, "config": {}}
        return write_snapshot(self.folder / "run" / "teacher", version, **{**tensors, **stands, **changes})


@pytest.fixture
def clinic(kafka_bootstrap: str, redis_url: str, prefix: str, tmp_path: Path) -> Iterator[Clinic]:
    clinic = Clinic(kafka_bootstrap, redis_url, prefix, tmp_path)
    create_topics(clinic.kafka)
    yield clinic
    if clinic.sink:
        clinic.sink.close()


def to_fix(found: dict[str, list[Line]]) -> str:
    """The only line that needs action."""
    (line,) = (line for lines in found.values() for line in lines if line.level == "FIX")
    return f"{line.what}: {line.text}"


def doctor(settings: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli", "doctor", "--settings", str(settings)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_pipeline_that_is_well_needs_no_action(clinic: Clinic) -> None:
    clinic.put_example()
    clinic.snapshot(3)
    with logit_store(load(clinic.settings()), clinic.data["teacher"]["name"]) as store:
        store.put(1, {0: b"block"}, 1)
    run = doctor(clinic.settings())
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    assert "FIX" not in run.stdout
    assert "skip" not in run.stdout
    assert "[1] offset 0" in run.stdout
    assert "1 rows of our schema" in run.stdout
    assert "[0] at 0, 0 behind the end" in run.stdout
    assert "[1] at 1, 1 behind the end" in run.stdout  # the end of stream
    assert "version 3" in run.stdout


def test_what_is_down_is_one_line_each_and_no_trace(clinic: Clinic) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts, and never answers
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        began_s = time.monotonic()
        run = doctor(clinic.settings(kafka={"bootstrap": "127.0.0.1:1"}, redis={"url": f"redis://{address}/0"}))
    assert time.monotonic() - began_s < 25
    assert run.returncode == 1
    assert run.stderr == ""
    fix = [line for line in run.stdout.splitlines() if line.startswith("FIX")]
    assert len(fix) == 2
    assert "127.0.0.1:1" in fix[0]
    assert "set kafka.bootstrap" in fix[0]
    assert address in fix[1]
    assert "set redis.url" in fix[1]


def test_refused_settings_are_named_with_exit_2(clinic: Clinic) -> None:
    run = doctor(clinic.settings(teacher={"modle": "small"}))
    assert run.returncode == 2
    assert "did you mean 'model'" in run.stdout
    (clinic.folder / "schema.yaml").unlink()
    assert "schema.yaml: no such file" in to_fix(clinic.examine())


def test_topics_that_are_missing_or_uneven_are_named(clinic: Clinic) -> None:
    found = clinic.examine(kafka={**clinic.data["kafka"], "partitions": 3})
    assert [line.level for line in found["topics"]] == ["FIX", "FIX", "FIX", "ok"]
    assert "has 2 partition(s), the settings say 3" in found["topics"][0].text
    assert [line.level for line in found["examples"] + found["watermark"]] == ["skip", "skip"]
    absent = {**clinic.data["kafka"]["topics"], "quarantine": "absent-topic"}
    found = clinic.examine(kafka={**clinic.data["kafka"], "topics": absent})
    assert to_fix(found) == "topics: absent-topic is not there; run: exfm topics create"


@pytest.mark.parametrize(
    ("kept_ms", "level"), [(86_400_000, "ok"), (None, "ok"), (86_399_999, "FIX"), (-1, "warn"), (86_400_001, "warn")]
)
def test_a_topic_must_be_kept_as_long_as_logits(kept_ms: int | None, level: str) -> None:
    line = topic_line("examples", Topic(2, kept_ms), 2, KafkaConfig(retention_ms=86_400_000))
    assert line.level == level
    assert level == "ok" or "set kafka.retention_ms to" in line.text


def test_inputs_must_be_kept_for_what_a_restarted_joiner_reads_again(clinic: Clinic) -> None:
    assert [line.level for line in clinic.examine()["topics"]] == ["ok"] * 4
    joiner = {"allowed_lateness_ms": 100_000, "dedup_ms": 40_000, "linger_ms": 60_000}  # and a window of 10 s
    kept_ms = clinic.kafka.retention_ms
    lines = clinic.examine(joiner={**joiner, "dedup_ms": kept_ms})["topics"]
    assert [line.level for line in lines] == ["ok"] * 4 + ["warn"] * 2
    assert f"keep it for {kept_ms + 110_000} ms" in lines[-1].text
    assert (
        reread_lines(
            "feedback", Topic(2, 170_000), load(clinic.settings(joiner=joiner)).joiner.reread_ms(clinic.schema)
        )
        == []
    )
    assert reread_lines("feedback", Topic(2, 169_999), 170_000)[0].level == "warn"
    assert reread_lines("feedback", Topic(2, -1), 170_000) == []


def test_examples_of_another_schema_are_named(clinic: Clinic) -> None:
    clinic.put_example(**{HEADER_SCHEMA: b"00000000deadbeef"})
    assert "written with schema 00000000deadbeef" in to_fix(clinic.examine())
    clinic.put_example(value=b"no Arrow")
    assert "offset 2" in to_fix(clinic.examine())


def test_a_watermark_past_the_end_and_logits_that_are_missing_are_told(clinic: Clinic) -> None:
    clinic.put_example()
    assert clinic.examine()["watermark"][0].level == "warn"
    with logit_store(load(clinic.settings()), clinic.data["teacher"]["name"]) as store:
        store.put(0, {}, 9)
    assert "[0] ends at 0, logits reach 9" in to_fix(clinic.examine())


def test_a_redis_that_evicts_needs_action_and_one_that_forgets_is_a_warning(clinic: Clinic, tmp_path: Path) -> None:
    server = start_redis(tmp_path / "redis", append_only=False)
    url = f"redis://{server.address}/0"
    try:
        found = clinic.examine(redis={"url": url})
        assert [line.level for line in found["redis"]] == ["ok", "warn"]
        with redis.Redis.from_url(url) as client:
            client.config_set("maxmemory", "100mb")
            client.config_set("maxmemory-policy", "allkeys-lru")
        assert "CONFIG SET maxmemory-policy noeviction" in to_fix(clinic.examine(redis={"url": url}))
    finally:
        server.stop()


def test_the_table_to_replay_is_looked_at(clinic: Clinic) -> None:
    assert clinic.examine()["dataset"] == [Line("ok", "dataset", "no replay")]
    assert "absent.yaml: no such file" in to_fix(clinic.examine(replay={"dataset": "absent.yaml"}))


def test_damaged_and_foreign_snapshots_are_told(clinic: Clinic) -> None:
    clinic.snapshot(1)
    (clinic.snapshot(2) / "model.safetensors").write_bytes(b"torn")
    (line,) = clinic.examine()["snapshots"]
    assert (line.level, "1 is used, 2 is damaged" in line.text) == ("warn", True)
    clinic.snapshot(3, schema_fingerprint=7)
    assert "has schema 0000000000000007" in to_fix(clinic.examine())
    for version in (1, 3):
        shutil.rmtree(clinic.folder / "run" / "teacher" / str(version))
    assert "none of 1" in to_fix(clinic.examine())


def test_a_run_dir_that_cannot_be_written_and_an_open_api_are_told(clinic: Clinic) -> None:
    (clinic.folder / "file").touch()
    assert "cannot write to" in to_fix(clinic.examine(run_dir=str(clinic.folder / "file" / "run")))
    assert "listening on 0.0.0.0 needs a bearer token" in to_fix(clinic.examine(serve={"host": EVERYWHERE}))
    found = clinic.examine(health={"host": EVERYWHERE})
    assert [line.level for line in found["access"]] == ["ok", "warn"]


@pytest.mark.parametrize(("free", "snapshots", "level"), [(3, 0, "ok"), (1, 0, "warn"), (5, 6, "FIX"), (0, 0, "FIX")])
def test_the_disk_must_hold_the_snapshots_once_more(free: int, snapshots: int, level: str) -> None:
    assert disk_line(free << 30, snapshots << 30).level == level


def test_embedded_servers_are_awaited_until_exfm_up_runs(clinic: Clinic) -> None:
    embedded = {"kafka": True, "redis": True}
    found = clinic.examine(embedded=embedded)
    assert {line.level for lines in found.values() for line in lines} == {"ok", "skip"}
    servers = clinic.folder / "run" / "servers"
    servers.mkdir(parents=True)
    broker, store = clinic.kafka.bootstrap, clinic.data["redis"]["url"].removeprefix("redis://").removesuffix("/0")
    (servers / "addresses.json").write_text(json.dumps({"broker": broker, "redis": store}), encoding="utf-8")
    found = clinic.examine(embedded=embedded, kafka={"topics": clinic.data["kafka"]["topics"]}, redis={})
    assert broker in found["broker"][0].text
    assert store in found["redis"][0].text


def test_a_check_that_hangs_ends_at_its_deadline() -> None:
    hang: Callable[[], list[Line]] = lambda: [Line("ok", "x", "")] * bool(time.sleep(3) or 1)  # noqa: E731
    began_s = time.monotonic()
    (line,) = within(0.2, "broker", hang)
    assert time.monotonic() - began_s < 1
    assert (line.level, line.what) == ("FIX", "broker")
