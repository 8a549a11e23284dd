"""`exfm topics`: create the topics of a pipeline, and say what is in them."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from das.broker import KafkaConfig, create_topics, wait_for_broker
from das.deadline import Deadline
from das.errors import ExfmError
from das.stream import KafkaSource, TopicPartition
from services.logs import redact
from services.process import EXIT_FAILED, EXIT_OK
from services.settings import load

TIMEOUT_S = 15.0


def create(settings_file: Path) -> int:
    """Create what is missing; returns the exit code."""
    kafka = load(settings_file, os.environ).kafka
    try:
        wait_for_broker(kafka, Deadline.after(TIMEOUT_S))
        create_topics(kafka)
    except ExfmError as error:
        return _failed(error)
    for topic, partitions in partition_counts(kafka).items():
        Console().print(f"{topic}: there, {partitions} partition(s), on {kafka.bootstrap}", highlight=False)
    return EXIT_OK


def describe(settings_file: Path) -> int:
    """Print the first and next offset of every partition; returns the exit code."""
    kafka = load(settings_file, os.environ).kafka
    table = Table("topic", "partition", "first offset", "next offset")
    try:
        wait_for_broker(kafka, Deadline.after(TIMEOUT_S))
        for topic, partitions in partition_counts(kafka).items():
            for partition, (first, following) in sorted(offsets(kafka, topic, partitions).items()):
                table.add_row(topic, str(partition), str(first), str(following))
    except ExfmError as error:
        return _failed(error)
    Console().print(table)
    return EXIT_OK


def partition_counts(kafka: KafkaConfig) -> dict[str, int]:
    """The topics of a pipeline; quarantine has a single partition."""
    names = kafka.topics
    return {names.impressions: kafka.partitions, names.feedback: kafka.partitions, names.examples: kafka.partitions} | {
        names.quarantine: 1
    }


def offsets(kafka: KafkaConfig, topic: str, count: int, timeout_s: float = TIMEOUT_S) -> dict[int, tuple[int, int]]:
    """First and next offset per partition, asked by a fetch: not every broker answers `end_offsets` right."""
    source = KafkaSource(kafka)
    try:
        partitions = [TopicPartition(topic, number) for number in range(count)]
        first = source.beginning_offsets(partitions)
        source.assign(first)
        deadline = Deadline.after(timeout_s)
        while not deadline.passed and any(source.highwater(p) is None for p in partitions):
            source.poll(min(0.5, deadline.left_s), 1)
        return {p.partition: (first[p], source.highwater(p) or first[p]) for p in partitions}
    finally:
        source.close()


def _failed(error: ExfmError) -> int:
    Console(stderr=True).print(f"error: {redact(str(error))}", style="red", highlight=False)
    return EXIT_FAILED
