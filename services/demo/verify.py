"""Proof from the stream itself that every impression became exactly one example."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from das.broker import KafkaConfig
from das.deadline import Deadline
from das.errors import Retryable
from das.examples import decode_examples
from das.schema import FeatureSchema
from das.stream import KafkaSource, TopicPartition
from services.topics import offsets

CONTROL = "exfm-control"


@dataclass(frozen=True, slots=True)
class ExactlyOnce:
    """What the examples topic holds."""

    messages: int
    rows: int
    distinct: int
    quarantined: int

    def problems(self, replayed: int) -> list[str]:
        """What does not hold, one line each; empty when every impression is there once."""
        found = []
        if self.rows != self.distinct:
            found.append(f"{self.rows - self.distinct} impressions are in examples more than once")
        if self.distinct != replayed:
            found.append(f"examples holds {self.distinct} distinct impressions, {replayed} were replayed")
        if self.quarantined:
            found.append(f"{self.quarantined} records are in quarantine")
        return found


def read_examples(kafka: KafkaConfig, schema: FeatureSchema, timeout_s: float = 120.0) -> ExactlyOnce:
    """Read the whole examples topic, up to its end-of-stream messages, and count. Raises Retryable at the deadline."""
    deadline = Deadline.after(timeout_s)
    source = KafkaSource(kafka)
    seen: Counter[str] = Counter()
    messages = 0
    partitions = [TopicPartition(kafka.topics.examples, number) for number in range(kafka.partitions)]
    try:
        source.assign(source.beginning_offsets(partitions))
        open_partitions = set(partitions)
        while open_partitions:
            if deadline.passed:
                raise Retryable(f"no end of stream on {sorted(open_partitions)} within {timeout_s:.0f} s")
            for record in source.poll(min(1.0, deadline.left_s), 500):
                if CONTROL in record.headers:
                    open_partitions.discard(TopicPartition(record.topic, record.partition))
                    continue
                assert record.value is not None
                ids = decode_examples(record.value, schema, ["impression_id"]).column("impression_id")
                seen.update(ids.to_pylist())
                messages += 1
    finally:
        source.close()
    quarantine = offsets(kafka, kafka.topics.quarantine, 1)
    return ExactlyOnce(messages, seen.total(), len(seen), sum(end - first for first, end in quarantine.values()))


def count_impressions(kafka: KafkaConfig) -> int:
    """Impressions that the topic holds, by its offsets, without the end-of-stream message of each partition."""
    ends = offsets(kafka, kafka.topics.impressions, kafka.partitions)
    return sum(end - first - 1 for first, end in ends.values())
