"""A stream of examples on the real broker, and the teacher on it, in this process or as one of its own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from teacher_case import SCHEMA, messages, teacher_config

from das import fault
from das.deadline import Deadline
from das.example_source import ExampleSource, start_positions
from das.examples import HEADER_CONTROL, HEADER_FORMAT, HEADER_JOIN, HEADER_ROWS, HEADER_SEQ
from das.join_state import JoinState, ReleaseKey, encode_state
from das.logit_store import LogitStore, RedisConfig
from das.quarantine import Quarantine, QuarantineLimit
from das.stream import KafkaConfig, KafkaSink, KafkaSource, TopicsConfig, create_topics, wait_for_broker
from das.telemetry import NullTelemetry, RecordingTelemetry, Telemetry
from foundation_model.online import TeacherLoop, resume
from foundation_model.snapshot_folder import SnapshotFolder
from foundation_model.trainer import TeacherTrainer


class Spec(msgspec.Struct, frozen=True):
    """Where the stream, the store and the run folder are, and how this teacher differs from the test one."""

    bootstrap: str
    redis_url: str
    prefix: str
    folder: str
    changes: dict[str, Any] = {}
    partitions: int = 2
    stop_at_end: bool = True

    def kafka(self) -> KafkaConfig:
        """The broker, with topics of this test only."""
        names = {name: f"{self.prefix}-{name}" for name in TopicsConfig.model_fields}
        return KafkaConfig(bootstrap=self.bootstrap, partitions=self.partitions, topics=TopicsConfig(**names))

    def store(self) -> LogitStore:
        """The teacher's part of the store."""
        teacher = teacher_config(**self.changes).name
        redis = RedisConfig(url=self.redis_url)
        return LogitStore(redis, topic=self.kafka().topics.examples, teacher=teacher, ttl_s=600)


def publish(spec: Spec, counts: list[int], *, end: bool = True, starts: list[int] | None = None) -> None:
    """Put `counts[p]` messages into each partition p, as the joiner would, and the end of the stream.

    `starts`: how many messages of each partition are there already; None for topics that do not exist yet.
    """
    config = spec.kafka()
    if starts is None:
        wait_for_broker(config, Deadline.after(20))
        create_topics(config)
    sink = KafkaSink(config)
    for partition, count in enumerate(counts):
        first = starts[partition] if starts else 0
        values = list(messages(count, seed=partition + 10 * first))
        for seq, value in enumerate([*values, b""] if end else values, start=first):
            sink.send(config.topics.examples, partition, b"", value, _headers(seq, value))
    sink.flush(20)
    sink.close()


def _headers(seq: int, value: bytes) -> dict[str, bytes]:
    state = JoinState(
        seq=seq,
        key=ReleaseKey(1000 * seq, "x"),
        first_release_ms=1000 * seq,
        last_release_ms=1000 * seq,
        next=(0, 0),
        replay=(0, 0),
        replay_max_ms=(0, 0),
        ends=(0, 0),
        ended=(False, False),
    )
    headers = {HEADER_FORMAT: b"1", HEADER_SEQ: b"%d" % seq, HEADER_JOIN: encode_state(state)}
    if value:
        return headers | {HEADER_ROWS: b"16"}
    return headers | {HEADER_ROWS: b"0", HEADER_CONTROL: b"end-of-stream"}


@contextmanager
def teacher(spec: Spec, telemetry: Telemetry | None = None, **parts: Any) -> Iterator[TeacherLoop]:
    """A teacher ready to run, resumed from its folder; `parts` replaces model, store or positions."""
    telemetry = telemetry or NullTelemetry()
    config, kafka = teacher_config(**spec.changes), spec.kafka()
    trainer = TeacherTrainer(config, SCHEMA, model=parts.get("model"), telemetry=telemetry)
    folder = SnapshotFolder(Path(spec.folder) / "snapshots", config.keep_snapshots, telemetry)
    records, sink = KafkaSource(kafka, group=f"{spec.prefix}-teacher"), KafkaSink(kafka)
    store = parts.get("store") or spec.store()
    topic = kafka.topics.examples
    quarantine = Quarantine(sink, kafka.topics.quarantine, telemetry, QuarantineLimit())
    try:
        start = resume(trainer, folder, start_positions(records, topic, range(kafka.partitions)))
        source = ExampleSource(
            records, topic, SCHEMA, trainer.encoder.columns, start, quarantine, telemetry, idle_s=None
        )
        results = Path(spec.folder) / "results" / "teacher.json"
        yield TeacherLoop(
            source, store, trainer, parts.get("positions", start), folder,
            topic=topic, results=results, telemetry=telemetry, stop_at_end=spec.stop_at_end,
        )  # fmt: skip
    finally:
        records.close()
        sink.close()
        store.close()
        folder.close()


class Ledger(RecordingTelemetry):
    """Also appends what became of each block to a file, at once, so that a killed process has told it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """See Telemetry."""
        super().count(name, amount, **labels)
        if name == "exfm_logit_blocks_total":
            with self._path.open("a") as file:
                file.write(f"{labels['outcome']} {int(amount)}\n")


def ledger(spec: Spec) -> Path:
    """Where the processes of a spec tell what became of their blocks."""
    return Path(spec.folder) / "ledger.txt"


def main(spec: Spec, faults: str | None = None) -> None:
    """Run until the end of the stream or SIGTERM, with faults armed."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    fault.arm(faults)
    with teacher(spec, Ledger(ledger(spec))) as loop:
        loop.run(stop)
