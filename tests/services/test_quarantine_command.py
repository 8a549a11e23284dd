"""`exfm quarantine`: a real quarantine on a real broker, listed, and sent back once each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from das.deadline import Deadline
from das.errors import Poison
from das.quarantine import Quarantine, QuarantineLimit
from das.stream import KafkaConfig, KafkaSink, Record, TopicPartition, TopicsConfig, create_topics, read_tail
from das.telemetry import RecordingTelemetry

TRACE = {"trace": b"\x01"}


class Rig:
    """Settings on topics of its own, a quarantine to fill, and the command."""

    def __init__(self, bootstrap: str, prefix: str, folder: Path) -> None:
        names = {name: f"{prefix}-{name}" for name in TopicsConfig.model_fields}
        self.kafka = KafkaConfig(bootstrap=bootstrap, topics=TopicsConfig(**names))
        self.settings = folder / "settings.yaml"
        kafka = {"bootstrap": bootstrap, "topics": names}
        data = {"run_dir": str(folder / "run"), "schema_file": "schema.yaml", "kafka": kafka}
        self.settings.write_text(json.dumps(data), encoding="utf-8")
        create_topics(self.kafka)
        self.sink = KafkaSink(self.kafka)

    def put(self, *offsets: int, topic: str = "impressions", reason: str = "json", detail: str = "bad") -> None:
        """Quarantine records that were read at `offsets` of partition 1."""
        name = getattr(self.kafka.topics, topic)
        quarantine = Quarantine(
            self.sink, self.kafka.topics.quarantine, RecordingTelemetry(), QuarantineLimit(max_share=1.0)
        )
        for offset in offsets:
            record = Record(name, 1, offset, 1_650_000_000_000, b"k%d" % offset, b"v\xff%d" % offset, TRACE)
            quarantine.put(record, Poison(reason, detail))
        quarantine.flush()

    def run(self, *arguments: str, code: int = 0, **environ: str) -> str:
        command = [sys.executable, "-m", "services.cli", "quarantine", *arguments, "--settings", str(self.settings)]
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=50, check=False, env={**os.environ, **environ}
        )
        assert run.returncode == code, run.stderr
        assert "Traceback" not in run.stderr
        return run.stdout if code == 0 else run.stderr

    def sent(self, topic: str = "impressions") -> list[tuple[int, bytes | None, bytes | None, dict[str, bytes]]]:
        """Everything in both partitions of a topic."""
        name = getattr(self.kafka.topics, topic)
        tails = [read_tail(self.kafka, TopicPartition(name, p), 1000, Deadline.after(10)) for p in (0, 1)]
        return [(r.partition, r.key, r.value, r.headers) for tail in tails for r in tail]

    def keys(self, topic: str = "impressions") -> list[bytes | None]:
        return [key for _, key, _, _ in self.sent(topic)]


@pytest.fixture
def rig(kafka_bootstrap: str, prefix: str, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(kafka_bootstrap, prefix, tmp_path)
    yield rig
    rig.sink.close()


def test_records_go_back_unchanged_and_never_twice(rig: Rig) -> None:
    rig.put(7, 8)
    rig.put(3, topic="feedback", reason="late")
    assert rig.run("replay", "--dry-run").startswith("would replay 3")
    assert rig.sent() == []
    assert rig.run("replay") == f"replayed 3, {rig.kafka.topics.feedback} 1, {rig.kafka.topics.impressions} 2\n"
    assert rig.sent() == [(1, b"k%d" % n, b"v\xff%d" % n, TRACE) for n in (7, 8)]
    assert rig.keys("feedback") == [b"k3"]
    rig.put(9)
    assert rig.run("replay").startswith("replayed 1,")
    assert rig.run("replay").startswith("replayed 0,")
    assert rig.keys() == [b"k7", b"k8", b"k9"]


def test_a_reason_that_was_replayed_alone_is_left_out_later(rig: Rig) -> None:
    rig.put(1, reason="json")
    rig.put(2, reason="late")
    rig.put(3, reason="json")
    assert rig.run("replay", "--reason", "late").startswith("replayed 1,")
    rig.put(4, reason="late")
    listed = [json.loads(line) for line in rig.run("list", "--json").splitlines()]
    assert [(row["offset"], row["replayed"]) for row in listed] == [(1, False), (2, True), (3, False), (4, False)]
    assert rig.run("replay").endswith("already replayed 1\n")
    assert rig.run("replay", "--reason", "late").startswith("replayed 0,")
    assert sorted(rig.keys()) == [b"k1", b"k2", b"k3", b"k4"]


def test_what_a_reader_could_not_decode_or_saw_twice_is_not_sent(rig: Rig) -> None:
    rig.put(5, 5)
    rig.put(1, topic="examples")
    rig.sink.send(rig.kafka.topics.quarantine, 0, None, b"no headers")
    rig.sink.flush(10)
    assert rig.run("replay").endswith("not replayable 2, repeated 1\n")
    assert rig.keys() == [b"k5"]
    assert rig.sent("examples") == []


@pytest.mark.faults
def test_killed_before_it_remembers_only_that_batch_is_sent_again(rig: Rig) -> None:
    rig.put(*range(150))
    rig.run("replay", code=-signal.SIGKILL, EXFM_FAULTS="quarantine.after_replay:2:kill")
    assert len(rig.keys()) == 150
    assert rig.run("replay").startswith("replayed 50,")
    assert rig.keys()[:150] == [b"k%d" % n for n in range(150)]


def test_list_shows_the_newest_with_origin_and_no_terminal_codes(rig: Rig) -> None:
    rig.put(*range(10))
    rig.put(77, topic="feedback", reason="type", detail="price is '\x1b[31m[bold]'")
    text = rig.run("list", "--limit", "2")
    assert "2 of 11 record(s)" in text
    (line,) = (line for line in text.splitlines() if "feedback" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")][1:] == [
        "type", rig.kafka.topics.feedback, "1", "77", "", "price is '\\x1b[31m[bold]'",
    ]  # fmt: skip
    assert "\x1b" not in text
    (row,) = map(json.loads, rig.run("list", "--json", "--reason", "type").splitlines())
    assert (row["topic"], row["partition"], row["offset"]) == (rig.kafka.topics.feedback, 1, 77)
    assert row["time_ms"] > 1_700_000_000_000


def test_a_missing_topic_is_one_line(rig: Rig) -> None:
    override = {"EXFM_KAFKA__TOPICS__QUARANTINE": "absent-topic"}
    assert "no topic 'absent-topic'" in rig.run("list", code=2, **override)
