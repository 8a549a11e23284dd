"""The proof of exactly-once can fail: it is read from the topics, not from what the processes say."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from das.broker import KafkaConfig, TopicsConfig, create_topics
from das.errors import Retryable
from das.examples import END_OF_STREAM, HEADER_CONTROL, JoinedRow, encode_examples
from das.messages import MessageCodec
from das.schema import FeatureSchema
from das.stream import KafkaSink
from services.demo.verify import count_impressions, read_examples

SCHEMA = FeatureSchema.parse(
    {
        "name": "s",
        "domains": ["a"],
        "objectives": [{"name": "click", "window_s": 1}],
        "features": [{"kind": "categorical", "name": "item"}],
    }
)


@pytest.fixture
def kafka(kafka_bootstrap: str, prefix: str) -> KafkaConfig:
    names = {name: f"{prefix}-{name}" for name in TopicsConfig.model_fields}
    config = KafkaConfig(bootstrap=kafka_bootstrap, partitions=2, topics=TopicsConfig(**names))
    create_topics(config)
    return config


@pytest.fixture
def sink(kafka: KafkaConfig) -> Iterator[KafkaSink]:
    client = KafkaSink(kafka)
    yield client
    client.close()


def message(*ids: str) -> bytes:
    codec = MessageCodec(SCHEMA)
    rows = []
    for impression_id in ids:
        data = {"impression_id": impression_id, "event_time": 1, "domain": "a", "features": {"item": 1}}
        rows.append(JoinedRow(codec.decode_impression(msgspec.json.encode(data)), 1, (0,)))
    return encode_examples(rows, SCHEMA)


def end(sink: KafkaSink, topic: str) -> None:
    for partition in (0, 1):
        sink.send(topic, partition, None, b"", {HEADER_CONTROL: END_OF_STREAM})
    sink.flush(10)


def test_exact_stream_has_no_problems(kafka: KafkaConfig, sink: KafkaSink) -> None:
    for number in range(3):
        sink.send(kafka.topics.impressions, number % 2, None, b"{}", {})
    sink.send(kafka.topics.examples, 0, None, message("a", "b"), {})
    sink.send(kafka.topics.examples, 1, None, message("c"), {})
    end(sink, kafka.topics.impressions)
    end(sink, kafka.topics.examples)
    assert count_impressions(kafka) == 3
    found = read_examples(kafka, SCHEMA)
    assert (found.messages, found.rows, found.distinct, found.quarantined) == (2, 3, 3, 0)
    assert found.problems(3) == []


def test_duplicates_losses_and_quarantine_are_told_apart(kafka: KafkaConfig, sink: KafkaSink) -> None:
    sink.send(kafka.topics.examples, 0, None, message("a", "b"), {})
    sink.send(kafka.topics.examples, 1, None, message("b"), {})
    sink.send(kafka.topics.quarantine, 0, None, b"?", {})
    end(sink, kafka.topics.examples)
    assert read_examples(kafka, SCHEMA).problems(3) == [
        "1 impressions are in examples more than once",
        "examples holds 2 distinct impressions, 3 were replayed",
        "1 records are in quarantine",
    ]


def test_a_stream_without_an_end_is_not_called_complete(kafka: KafkaConfig, sink: KafkaSink) -> None:
    sink.send(kafka.topics.examples, 0, None, message("a"), {})
    sink.flush(10)
    with pytest.raises(Retryable, match="no end of stream"):
        read_examples(kafka, SCHEMA, timeout_s=1.5)
