"""`exfm topics`: create the topics of a pipeline, and say what is in them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from kafka.errors import KafkaError
from rich.console import Console
from rich.table import Table

from das.broker import KafkaConfig, create_topics, open_client, translate, wait_for_broker
from das.deadline import Deadline
from das.errors import ExfmError
from das.stream import KafkaSource, TopicPartition
from services.logs import redact
from services.process import EXIT_FAILED, EXIT_OK
from services.servers import attached
from services.settings import load

TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as the broker has it; `retention_ms` is None where the broker does not say, -1 for no limit."""

    partitions: int
    retention_ms: int | None


def create(settings_file: Path) -> int:
    """Create what is missing; returns the exit code."""
    kafka = load(settings_file, os.environ).kafka
    try:
        wait_for_broker(kafka, Deadline.after(TIMEOUT_S))
        create_topics(kafka)
    except ExfmError as error:
        return _failed(error)
    for topic, partitions in partition_counts(kafka).items():
        Console().print(
            f"{topic}: there, {partitions} partition(s), on {kafka.bootstrap}", markup=False, highlight=False
        )
    return EXIT_OK


def describe(settings_file: Path) -> int:
    """Print the first and next offset of every partition; returns the exit code."""
    kafka = attached(load(settings_file, os.environ)).kafka
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


def describe_topics(kafka: KafkaConfig) -> dict[str, Topic | None]:
    """What the broker says about the topics of a pipeline; None for an absent one. Raises Retryable or Fatal."""
    names = list(partition_counts(kafka))
    admin = open_client(KafkaAdminClient, kafka, {})
    try:
        described = {topic["name"]: topic for topic in admin.describe_topics(names) if not topic["error_code"]}
        wanted = [ConfigResource(ConfigResourceType.TOPIC, name) for name in described]
        settings = admin.describe_configs(wanted, config_filter="all").get("topic", {}) if wanted else {}
    except KafkaError as error:
        raise translate(error, kafka) from error
    finally:
        admin.close()
    return {name: _topic(described[name], settings.get(name, {})) if name in described else None for name in names}


def _topic(described: Any, settings: Any) -> Topic:
    retention = settings.get("retention.ms", {}).get("value")
    return Topic(len(described["partitions"]), None if retention is None else int(retention))


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
    Console(stderr=True).print(f"error: {redact(str(error))}", style="red", markup=False, highlight=False)
    return EXIT_FAILED
