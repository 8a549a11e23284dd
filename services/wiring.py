"""How processes are put together from settings: the examples stream, the logit store, the snapshot folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from das.broker import wait_for_broker
from das.deadline import Deadline
from das.example_source import ExampleSource, start_positions
from das.logit_store import LogitStore
from das.position import Positions
from das.quarantine import Quarantine
from das.schema import FeatureSchema
from das.stream import KafkaSink, KafkaSource
from services.process import Context
from services.settings import Settings

START_S = 60.0
"""How long a process waits for the broker when it starts."""


def teacher_snapshots(settings: Settings) -> Path:
    """Where the teacher's snapshots are."""
    return settings.run_dir / "teacher"


def student_snapshots(settings: Settings, name: str) -> Path:
    """Where a student's snapshots are."""
    return settings.run_dir / "students" / name


def results_file(settings: Settings, name: str) -> Path:
    """Where a process writes its results when the stream ends."""
    return settings.run_dir / "results" / f"{name}.json"


class ExamplesReader:
    """The clients that one reader of the examples needs, opened once; close it on every path."""

    def __init__(self, context: Context, schema: FeatureSchema) -> None:
        """Raises Retryable when the broker does not answer within START_S."""
        kafka = context.settings.kafka
        wait_for_broker(kafka, Deadline.after(START_S))
        self._context = context
        self._schema = schema
        self._topic = kafka.topics.examples
        self._partitions = range(kafka.partitions)
        self._source = KafkaSource(kafka, group=f"exfm-{context.name}")
        self._sink = KafkaSink(kafka)

    def oldest(self) -> Positions:
        """Where a reader without a snapshot begins."""
        return start_positions(self._source, self._topic, self._partitions)

    def open(self, columns: Sequence[str], positions: Positions) -> ExampleSource:
        """The stream from `positions`. Raises Fatal when they have expired."""
        context = self._context
        settings, telemetry = context.settings, context.telemetry
        quarantine = Quarantine(self._sink, settings.kafka.topics.quarantine, telemetry, settings.quarantine)
        return ExampleSource(
            self._source,
            self._topic,
            self._schema,
            columns,
            positions,
            quarantine,
            telemetry,
            idle_s=settings.examples_idle_s,
        )

    def close(self) -> None:
        """Close the connections."""
        self._sink.close()
        self._source.close()


@contextmanager
def examples_reader(context: Context, schema: FeatureSchema) -> Iterator[ExamplesReader]:
    """An ExamplesReader, closed on the way out."""
    reader = ExamplesReader(context, schema)
    try:
        yield reader
    finally:
        reader.close()


@contextmanager
def logit_store(settings: Settings, teacher: str) -> Iterator[LogitStore]:
    """The store of one teacher's logits, closed on the way out."""
    ttl_s = settings.kafka.retention_ms / 1000
    store = LogitStore(settings.redis, topic=settings.kafka.topics.examples, teacher=teacher, ttl_s=ttl_s)
    try:
        yield store
    finally:
        store.close()
