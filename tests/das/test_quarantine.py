"""The quarantine topic and the share of bad records at which a process stops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from das.deadline import Deadline
from das.errors import Fatal, Poison, Retryable
from das.quarantine import Quarantine, QuarantineLimit
from das.stream import KafkaConfig, KafkaSink, Record, TopicPartition, TopicsConfig, create_topics, read_tail
from das.telemetry import RecordingTelemetry
from services.embedded import start_broker

LIMIT = QuarantineLimit(max_share=0.5, window=20, min_seen=10)


def record(offset: int, topic: str = "impressions") -> Record:
    return Record(topic, 3, offset, 1_650_000_000_000, b"key", b"\x00value\xff", {"trace": b"\x01"})


@pytest.fixture
def config(kafka_bootstrap: str, prefix: str) -> KafkaConfig:
    topics = TopicsConfig(**{name: f"{prefix}-{name}" for name in TopicsConfig.model_fields})
    config = KafkaConfig(bootstrap=kafka_bootstrap, topics=topics)
    create_topics(config)
    return config


@pytest.fixture
def quarantine(config: KafkaConfig) -> Iterator[Quarantine]:
    sink = KafkaSink(config)
    yield Quarantine(sink, config.topics.quarantine, RecordingTelemetry(), LIMIT)
    sink.close()


def put(quarantine: Quarantine, count: int, topic: str = "impressions", **options: bool) -> None:
    for offset in range(count):
        quarantine.put(record(offset, topic), Poison("json", "bad"), **options)


def test_a_record_arrives_unchanged_with_its_reason_and_place(config: KafkaConfig, quarantine: Quarantine) -> None:
    quarantine.put(record(41), Poison("type", "price is text: \u00e9" + "x" * 5000))
    quarantine.flush()
    (found,) = read_tail(config, TopicPartition(config.topics.quarantine, 0), 9, Deadline.after(5))
    detail = found.headers.pop("exfm-detail")
    assert detail.startswith("price is text: \u00e9".encode())
    assert len(detail) == 1000
    assert (found.key, found.value) == (b"key", b"\x00value\xff")
    assert found.headers == {
        "exfm-reason": b"type",
        "exfm-topic": b"impressions",
        "exfm-partition": b"3",
        "exfm-offset": b"41",
        "exfm-timestamp": b"1650000000000",
        "exfm-original-trace": b"\x01",
    }


def test_a_burst_of_bad_records_stops_the_process_with_what_to_do(quarantine: Quarantine) -> None:
    put(quarantine, 9)
    with pytest.raises(Fatal, match=r"10 of the last 10 records of 'impressions'.*json: bad.*quarantine\.max_share"):
        put(quarantine, 1)


def test_good_records_make_room_and_old_ones_are_forgotten(quarantine: Quarantine) -> None:
    for _ in range(10):
        quarantine.passed("impressions", 10)
        put(quarantine, 10)  # ten of the last twenty: at the limit, not past it
    with pytest.raises(Fatal, match="11 of the last 20"):
        put(quarantine, 1)


def test_topics_are_measured_apart(quarantine: Quarantine) -> None:
    quarantine.passed("impressions", 1000)
    with pytest.raises(Fatal, match="'feedback'"):
        put(quarantine, 10, topic="feedback")


def test_late_records_do_not_stop_the_process(quarantine: Quarantine) -> None:
    put(quarantine, 100, malformed=False)


def test_flush_raises_when_the_broker_is_gone(tmp_path, prefix: str) -> None:
    server = start_broker(tmp_path)
    config = KafkaConfig(bootstrap=server.address, produce_timeout_s=1, request_timeout_s=1)
    create_topics(config)
    limit = QuarantineLimit(flush_timeout_s=2)
    sink = KafkaSink(config)
    quarantine = Quarantine(sink, config.topics.quarantine, RecordingTelemetry(), limit)
    put(quarantine, 1)
    quarantine.flush()
    server.process.kill()
    server.process.wait(5)
    put(quarantine, 1)
    with pytest.raises((Retryable, Fatal), match=server.address):
        quarantine.flush()
    sink.close()
