"""The port over the Kafka client, on a real broker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from das.deadline import Deadline
from das.errors import ConfigError, Fatal, Retryable
from das.stream import (
    KafkaConfig,
    KafkaSink,
    KafkaSource,
    Record,
    TopicPartition,
    TopicsConfig,
    create_topics,
    partition_for,
    read_tail,
    wait_for_broker,
)
from services.embedded import free_port, start_broker


def config_for(bootstrap: str, prefix: str, **changes: object) -> KafkaConfig:
    topics = TopicsConfig(**{name: f"{prefix}-{name}" for name in TopicsConfig.model_fields})
    return KafkaConfig(bootstrap=bootstrap, topics=topics, **changes)


@pytest.fixture
def config(kafka_bootstrap: str, prefix: str) -> KafkaConfig:
    config = config_for(kafka_bootstrap, prefix)
    create_topics(config)
    return config


@pytest.fixture
def sink(config: KafkaConfig) -> Iterator[KafkaSink]:
    sink = KafkaSink(config)
    yield sink
    sink.close()


@pytest.fixture
def source(config: KafkaConfig) -> Iterator[KafkaSource]:
    source = KafkaSource(config, group=config.topics.examples)
    yield source
    source.close()


def read(source: KafkaSource, count: int, seconds: float = 10) -> list[Record]:
    records: list[Record] = []
    deadline = Deadline.after(seconds)
    while len(records) < count and not deadline.passed:
        records += source.poll(0.5, 1000)
    return records


def test_records_come_back_as_sent_with_the_wall_clock(
    config: KafkaConfig, sink: KafkaSink, source: KafkaSource
) -> None:
    topic = config.topics.impressions
    before_ms = int(time.time() * 1000) - 1
    for i in range(50):
        sink.send(topic, 1, b"k%d" % i, b"v%d" % i, {"a": b"%d" % i, "b": b""})
    sink.flush(10)
    tp = TopicPartition(topic, 1)
    source.assign({tp: 10})
    records = read(source, 40)
    assert [(r.offset, r.key, r.value, r.headers) for r in records] == [
        (i, b"k%d" % i, b"v%d" % i, {"a": b"%d" % i, "b": b""}) for i in range(10, 50)
    ]
    assert all(before_ms <= r.timestamp_ms <= int(time.time() * 1000) + 1 for r in records)
    assert (source.position(tp), source.highwater(tp)) == (50, 50)


def test_paused_partition_is_not_delivered_until_resumed(
    config: KafkaConfig, sink: KafkaSink, source: KafkaSource
) -> None:
    topic = config.topics.impressions
    for i in range(20):
        sink.send(topic, i % 2, None, b"%d" % i)
    sink.flush(10)
    parts = [TopicPartition(topic, 0), TopicPartition(topic, 1)]
    source.assign(dict.fromkeys(parts, 0))
    source.pause([parts[1]])
    assert {r.partition for r in read(source, 11, seconds=1.5)} == {0}
    source.resume([parts[1]])
    assert [r.value for r in read(source, 10)] == [b"%d" % i for i in range(1, 20, 2)]


def test_the_tail_is_the_last_records_even_of_a_batched_partition(config: KafkaConfig, sink: KafkaSink) -> None:
    topic = config.topics.examples
    empty = read_tail(config, TopicPartition(topic, 1), 3, Deadline.after(10))
    for i in range(500):  # many records per producer batch: the broker's own end offset may be too low
        sink.send(topic, 0, None, b"%d" % i)
    sink.flush(10)
    tail = read_tail(config, TopicPartition(topic, 0), 3, Deadline.after(10))
    assert (empty, [r.value for r in tail]) == ([], [b"497", b"498", b"499"])


def test_a_start_past_the_end_stops_naming_saved_and_available(kafka_bootstrap: str, prefix: str) -> None:
    config = config_for(kafka_bootstrap, prefix, lost_log_s=0.5)
    create_topics(config)
    sink, source = KafkaSink(config), KafkaSource(config)
    for i in range(7):
        sink.send(config.topics.examples, 0, None, b"%d" % i)
    sink.flush(10)
    source.assign({TopicPartition(config.topics.examples, 0): 4242})
    with pytest.raises(Fatal, match=r"saved offset is 4242, available are 0 to (7|unknown)"):
        read(source, 1)
    sink.close()
    source.close()


def test_the_end_of_a_silent_partition_is_known_wherever_the_reader_moved(
    config: KafkaConfig, sink: KafkaSink, source: KafkaSource
) -> None:
    one, other = TopicPartition(config.topics.examples, 0), TopicPartition(config.topics.examples, 1)
    for i in range(3):
        sink.send(one.topic, 0, None, b"%d" % i)
    sink.flush(10)
    source.assign({one: 0, other: 0})
    assert len(read(source, 3)) == 3
    for starts in ({other: 0}, {one: 3, other: 0}, {one: 3}):  # nothing new comes from here on
        source.assign(starts)
        deadline = Deadline.after(10)
        while any(source.highwater(tp) is None for tp in starts) and not deadline.passed:
            source.poll(0.3, 10)
        assert {tp: source.highwater(tp) for tp in starts} == {tp: 3 if tp == one else 0 for tp in starts}


def test_every_fetch_asks_for_every_partition(config: KafkaConfig, source: KafkaSource) -> None:
    source.assign({TopicPartition(config.topics.examples, 0): 0})
    source.poll(0.5, 1)
    fetcher = source._consumer._fetcher
    assert fetcher._manager.broker_version >= (1, 1)  # from which on the client would keep sessions
    assert not fetcher._enable_incremental_fetch_sessions


def test_offsets_committed_by_hand_are_read_back(config: KafkaConfig, source: KafkaSource) -> None:
    one, other = TopicPartition(config.topics.examples, 0), TopicPartition(config.topics.examples, 1)
    source.assign({one: 0})
    assert source.commit({one: 33})
    assert source.committed([one, other]) == {one: 33, other: None}


def test_group_assigns_both_topics_and_delivers_only_after_start(
    config: KafkaConfig, sink: KafkaSink, source: KafkaSource
) -> None:
    topics = [config.topics.impressions, config.topics.feedback]
    for topic in topics:
        sink.send(topic, 0, None, topic.encode())
    sink.flush(10)
    assigned: list[TopicPartition] = []
    source.subscribe(topics, assigned.extend, lambda _: None)
    early = []
    deadline = Deadline.after(15)
    while not assigned and not deadline.passed:
        early += source.poll(0.5, 100)
    early += source.poll(0.5, 100)
    assert sorted(assigned) == sorted(TopicPartition(t, p) for t in topics for p in range(2))
    assert early == []
    source.start(dict.fromkeys(assigned, 0))
    assert sorted(r.topic for r in read(source, 2)) == sorted(topics)


def test_oversized_record_is_fatal_and_names_the_setting(kafka_bootstrap: str, prefix: str) -> None:
    config = config_for(kafka_bootstrap, prefix, max_message_bytes=1 << 16)
    create_topics(config)
    sink = KafkaSink(config)
    with pytest.raises(Fatal, match=r"kafka\.max_message_bytes"):
        sink.send(config.topics.examples, 0, None, b"x" * (1 << 17))
    sink.close()


def test_topics_are_created_once_and_a_partition_mismatch_is_a_config_error(config: KafkaConfig) -> None:
    create_topics(config)
    with pytest.raises(ConfigError, match=r"has 2 partitions, the configuration says 3"):
        create_topics(config.model_copy(update={"partitions": 3}))


def test_absent_broker_is_retryable_and_named() -> None:
    config = KafkaConfig(bootstrap=f"127.0.0.1:{free_port()}")
    with pytest.raises(Retryable, match=config.bootstrap):
        wait_for_broker(config, Deadline.after(1.5))


def test_unknown_client_option_is_a_config_error(kafka_bootstrap: str) -> None:
    with pytest.raises(ConfigError, match="sasl_mechanisms"):
        KafkaSink(KafkaConfig(bootstrap=kafka_bootstrap, options={"sasl_mechanisms": "PLAIN"}))
    with pytest.raises(ConfigError, match="enable_auto_commit"):
        KafkaConfig.parse({"options": {"enable_auto_commit": True}})


def test_broker_that_lost_its_log_stops_the_reader(tmp_path, prefix: str) -> None:
    server = start_broker(tmp_path / "one")
    config = config_for(server.address, prefix, lost_log_s=1.0, request_timeout_s=5)
    create_topics(config)
    sink, source = KafkaSink(config), KafkaSource(config)
    tp = TopicPartition(config.topics.examples, 0)
    for i in range(9):
        sink.send(tp.topic, 0, None, b"%d" % i)
    sink.flush(10)
    source.assign({tp: 0})
    assert len(read(source, 9)) == 9
    server.process.kill()
    server.process.wait(5)
    server = start_broker(tmp_path / "two", port=int(server.address.rsplit(":", 1)[1]))
    with suppress(ConfigError):  # the reader may have made the broker create it, with the broker's own settings
        create_topics(config)
    with pytest.raises(Fatal, match="the saved offset is 9"):
        read(source, 1, seconds=15)
    for client in (source, sink):
        client.close()
    server.stop()


def test_partition_is_a_stable_function_of_the_id() -> None:
    assert [partition_for(i, 4) for i in ("a", "b", "impression-1", "\u00e9")] == [3, 3, 1, 0]
