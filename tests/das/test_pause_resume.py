"""A paused partition that is resumed delivers again, whatever the client had fetched of it meanwhile."""

from __future__ import annotations

import time

from das.broker import KafkaConfig, TopicsConfig, create_topics
from das.stream import KafkaSink, KafkaSource, TopicPartition

RECORDS = 300


def test_resumed_partition_delivers_while_another_one_has_records(kafka_bootstrap: str, prefix: str) -> None:
    topics = {name: f"{prefix}-{name}" for name in TopicsConfig.model_fields}
    config = KafkaConfig(bootstrap=kafka_bootstrap, partitions=2, topics=TopicsConfig(**topics))
    create_topics(config)
    partitions = [TopicPartition(config.topics.examples, number) for number in range(2)]
    sink, source = KafkaSink(config), KafkaSource(config)
    try:
        for number in range(RECORDS):
            for tp in partitions:
                sink.send(*tp, None, b"%d" % number, {})
        sink.flush(30)
        source.assign(dict.fromkeys(partitions, 0))
        got = {0: 0, 1: 0}
        end_s = time.monotonic() + 15
        while sum(got.values()) < 2 * RECORDS and time.monotonic() < end_s:
            for record in source.poll(0.25, 40):
                got[record.partition] += 1
            ahead = partitions[got[1] > got[0]]
            behind = partitions[got[1] <= got[0]]
            source.pause([ahead])
            source.resume([behind])
        assert got == {0: RECORDS, 1: RECORDS}
    finally:
        sink.close()
        source.close()
