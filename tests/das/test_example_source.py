"""Reading the examples topic: order, resume, repeated and bad messages, the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import pytest
import xxhash
from example_kit import joined, small_schema

from das.deadline import Deadline
from das.errors import Fatal, Retryable
from das.example_source import ExampleMessage, ExampleSource, start_positions
from das.examples import (
    END_OF_STREAM,
    HEADER_CONTROL,
    HEADER_FORMAT,
    HEADER_JOIN,
    HEADER_ROWS,
    HEADER_SCHEMA,
    HEADER_SEQ,
    decode_examples,
    encode_examples,
)
from das.join_state import JoinState, ReleaseKey, encode_state
from das.position import Position, Positions
from das.quarantine import Quarantine, QuarantineLimit
from das.schema import FeatureSchema
from das.stream import KafkaConfig, KafkaSink, KafkaSource, TopicPartition, TopicsConfig, create_topics, read_tail
from das.telemetry import RecordingTelemetry

SCHEMA = small_schema()
COLUMNS = ("click", "item", "ingest_time")


class Topic:
    """An examples topic that the test writes as a joiner would."""

    def __init__(self, bootstrap: str, prefix: str) -> None:
        topics = TopicsConfig(**{name: f"{prefix}-{name}" for name in TopicsConfig.model_fields})
        self.config = KafkaConfig(bootstrap=bootstrap, topics=topics, lost_log_s=0.5)
        create_topics(self.config)
        self.sink = KafkaSink(self.config)
        self.telemetry = RecordingTelemetry()
        self.name = topics.examples
        self._open: list[ExampleSource] = []

    def put(self, partition: int, seq: int, release_ms: int, *, rows: int = 2, end: bool = False, **changes) -> bytes:
        """One message; `changes` replace its value or headers (None removes one)."""
        key = ReleaseKey(release_ms, "x")
        state = JoinState(
            seq=seq, key=key, first_release_ms=release_ms, last_release_ms=release_ms, next=(9, 9), replay=(0, 0),
            replay_max_ms=(0, 0), ends=(9, 9) if end else (0, 0), ended=(False, False), waits=SCHEMA.waits,
        )  # fmt: skip
        value = changes.pop("value", b"" if end else encode_examples(joined(SCHEMA, rows), SCHEMA))
        headers = {
            HEADER_FORMAT: b"1",
            HEADER_SCHEMA: b"%016x" % SCHEMA.fingerprint,
            HEADER_ROWS: b"%d" % (0 if end else rows),
            HEADER_SEQ: b"%d" % seq,
            HEADER_JOIN: encode_state(state),
            HEADER_CONTROL: END_OF_STREAM if end else None,
            **{name.replace("_", "-"): header for name, header in changes.items()},
        }
        self.sink.send(self.name, partition, None, value, {k: v for k, v in headers.items() if v is not None})
        self.sink.flush(10)
        return value

    def read(
        self, start: Positions, columns: Sequence[str] | None = COLUMNS, schema: FeatureSchema = SCHEMA, **options
    ) -> ExampleSource:
        quarantine = Quarantine(self.sink, self.config.topics.quarantine, self.telemetry, QuarantineLimit())
        source = ExampleSource(
            KafkaSource(self.config, group=self.name), self.name, schema, columns, start, quarantine, self.telemetry,
            **{"idle_s": None, **options},
        )  # fmt: skip
        self._open.append(source)
        return source

    def close(self) -> None:
        for source in self._open:
            source.close()
        self.sink.close()


@pytest.fixture
def topic(kafka_bootstrap: str, prefix: str) -> Iterator[Topic]:
    topic = Topic(kafka_bootstrap, prefix)
    yield topic
    topic.close()


def drain(source: ExampleSource, count: int = 10**6, seconds: float = 8.0, most: int = 3) -> list[ExampleMessage]:
    messages: list[ExampleMessage] = []
    deadline = Deadline.after(seconds)
    while len(messages) < count and not source.ended and not deadline.passed:
        messages += source.poll(0.3, most)
    return messages


def places(messages: list[ExampleMessage]) -> list[tuple[int, int]]:
    return [(m.partition, m.offset) for m in messages]


BOTH = {0: Position(0), 1: Position(0)}


def test_lag_seconds_is_the_age_of_the_oldest_message_not_delivered(topic: Topic) -> None:
    topic.put(0, 0, 10)
    topic.put(0, 1, 11)
    time.sleep(1.2)
    topic.put(0, 2, 12)
    source = topic.read({0: Position(0)}, idle_s=0.1)

    def lag_s() -> float:
        return topic.telemetry.gauges["exfm_lag_seconds", (("partition", "0"), ("topic", topic.name))]

    seen = []
    while len(seen) < 3:
        messages = source.poll(5, 1)
        seen += [lag_s()] * len(messages)
    assert seen[0] >= 1.2 > seen[1] > 0
    assert seen[2] == 0


def test_partitions_are_merged_by_release_time_whatever_the_poll_size(topic: Topic) -> None:
    for seq, (first_ms, second_ms) in enumerate(((10, 15), (20, 16), (20, 20), (30, 99))):
        topic.put(0, seq, first_ms)
        topic.put(1, seq, second_ms)
    for partition in (0, 1):
        topic.put(partition, 4, 99, end=True)
    runs = []
    for most in (1, 3, 100):
        source = topic.read(BOTH)
        runs.append(places(drain(source, most=most)))
        assert source.ended
        assert source.lag == {0: 0, 1: 0}
    assert runs == [[(0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (0, 3), (1, 3)]] * 3


def test_a_message_is_projected_and_identified(topic: Topic) -> None:
    value = topic.put(0, 0, 10, rows=5)
    topic.put(0, 1, 11)
    (message, _) = drain(topic.read({0: Position(0)}), 2)
    assert message.rows.batch.schema.names == list(COLUMNS)
    assert (message.rows.batch.num_rows, message.seq, message.checksum) == (5, 0, xxhash.xxh64_intdigest(value))
    stored = read_tail(topic.config, TopicPartition(topic.name, 0), 2, Deadline.after(5))[0]
    assert message.appended_ms == stored.timestamp_ms


def test_resume_delivers_the_message_that_holds_the_position_again(topic: Topic) -> None:
    for seq in range(6):
        topic.put(0, seq, seq)
        topic.put(1, seq, seq)
    source = topic.read({0: Position(4, 1), 1: Position(2, 0)})
    assert places(drain(source, 5)) == [(1, 2), (1, 3), (0, 4), (1, 4), (0, 5)]
    assert topic.telemetry.total("exfm_messages_skipped_total") == 0


def test_a_repeated_message_is_dropped_and_a_gap_is_counted_also_across_a_resume(topic: Topic) -> None:
    for seq in (0, 1, 2, 1, 2, 3, 6):
        topic.put(0, seq, seq)
    assert [m.seq for m in drain(topic.read({0: Position(0)}), 5)] == [0, 1, 2, 3, 6]
    counted = topic.telemetry
    assert counted.total("exfm_messages_skipped_total", reason="duplicate") == 2
    assert counted.total("exfm_messages_skipped_total", reason="gap") == 2
    assert places(drain(topic.read({0: Position(3)}), 2)) == [(0, 5), (0, 6)]  # 3 and 4 repeat what is before them


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"value": b"no arrow"}, b"arrow"),
        ({"exfm_rows": b"3"}, b"rows"),
        ({"exfm_format": b"9"}, b"format"),
        ({"exfm_seq": None}, b"header"),
        ({"exfm_seq": b"one"}, b"header"),
        ({"exfm_join": b"{}"}, b"header"),
        ({"exfm_control": b"pause"}, b"header"),
    ],
)
def test_a_bad_message_is_quarantined_and_its_neighbors_are_read(topic: Topic, changes: dict, reason: bytes) -> None:
    topic.put(0, 0, 0)
    topic.put(0, 1, 1, **changes)
    topic.put(0, 2, 2)
    assert places(drain(topic.read({0: Position(0)}), 2)) == [(0, 0), (0, 2)]
    (bad,) = read_tail(topic.config, TopicPartition(topic.config.topics.quarantine, 0), 9, Deadline.after(5))
    assert (bad.headers["exfm-reason"], bad.headers["exfm-offset"]) == (reason, b"1")


def test_a_quarantine_that_fails_loses_no_message_of_the_poll(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    for seq, changes in enumerate(({}, {"value": b"bad"}, {})):
        topic.put(0, seq, 10 + seq, **changes)
    source, failures = topic.read({0: Position(0)}), [Retryable("the broker is away")]

    def flush(quarantine: Quarantine) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(Quarantine, "flush", flush)
    messages: list[ExampleMessage] = []
    deadline = Deadline.after(8)
    while len(messages) < 2 and not deadline.passed:
        with contextlib.suppress(Retryable):
            messages += source.poll(0.3, 3)
    assert failures == []
    assert places(messages) == [(0, 0), (0, 2)]


def test_a_message_of_another_schema_names_both(topic: Topic) -> None:
    other = small_schema(features=[{"kind": "categorical", "name": "item", "dtype": "string"}])
    topic.put(0, 0, 0, value=encode_examples([], other), rows=0)
    topic.put(0, 1, 1)
    assert places(drain(topic.read({0: Position(0)}), 1)) == [(0, 1)]
    (bad,) = read_tail(topic.config, TopicPartition(topic.config.topics.quarantine, 0), 9, Deadline.after(5))
    assert bad.headers["exfm-reason"] == b"schema"
    assert b"wanted" in bad.headers["exfm-detail"]


def test_an_older_reader_passes_over_what_was_added_and_says_whose_schema_it_reads(
    topic: Topic, caplog: pytest.LogCaptureFixture
) -> None:
    data = SCHEMA.model_dump()
    older = small_schema(features=data["features"][2:5], objectives=data["objectives"][1:])
    written = topic.put(0, 0, 10, rows=3)
    (message,) = drain(topic.read({0: Position(0)}, None, older), 1)
    names = message.rows.batch.schema.names
    assert names == ["impression_id", "event_time", "ingest_time", "domain", "window", "tag", "color", "price", "buy"]
    assert message.rows.batch.equals(decode_examples(written, SCHEMA, names))
    assert f"of schema {SCHEMA.fingerprint:016x}, ours is {older.fingerprint:016x}" in caplog.text


def test_a_newer_reader_takes_older_messages_only_for_the_columns_that_they_have(topic: Topic) -> None:
    added = {"kind": "numeric", "name": "discount", "nullable": True}
    newer = small_schema(features=[*SCHEMA.model_dump()["features"], added])
    topic.put(0, 0, 10, rows=3)
    topic.put(0, 1, 20, end=True)
    (message,) = drain(topic.read({0: Position(0)}, ("click", "price"), newer), 1)
    assert message.rows.batch.num_rows == 3
    assert drain(topic.read({0: Position(0)}, ("click", "discount"), newer)) == []
    (bad,) = read_tail(topic.config, TopicPartition(topic.config.topics.quarantine, 0), 9, Deadline.after(5))
    detail = bad.headers["exfm-detail"].decode()
    assert bad.headers["exfm-reason"] == b"schema"
    assert "discount is there 0 times" in detail
    assert "wanted: click: int8, discount: float" in detail
    assert "found: impression_id: string, event_time" in detail


def test_messages_whose_rows_waited_for_other_windows_are_refused(topic: Topic) -> None:
    windows = [{"window_s": 10, "share": 0.5}, {"window_s": 60, "share": 0.5}]
    zipped = small_schema(zipper={"salt": "s", "windows": windows})
    topic.put(0, 0, 10)
    topic.put(0, 1, 20, end=True)
    assert drain(topic.read({0: Position(0)}, COLUMNS, zipped), seconds=2.0) == []
    bad = read_tail(topic.config, TopicPartition(topic.config.topics.quarantine, 0), 9, Deadline.after(5))
    assert (
        "every impression wait 60000 ms; ours lets impressions wait, hashed" in bad[0].headers["exfm-detail"].decode()
    )


def test_a_silent_partition_holds_the_others_back_only_for_its_time(topic: Topic) -> None:
    topic.put(0, 0, 10)
    patient = topic.read(BOTH)
    assert drain(patient, 1, seconds=1.5) == []
    hasty = topic.read(BOTH, idle_s=0.5)
    assert places(drain(hasty, 1, seconds=5)) == [(0, 0)]
    topic.put(1, 0, 5)
    assert places(drain(patient, 2, seconds=1.5)) == [(1, 0)]  # now 0 waits for what 1 may still bring


def test_the_end_waits_for_all_partitions_and_the_stream_can_go_on_after_it(topic: Topic) -> None:
    topic.put(0, 0, 10)
    topic.put(0, 1, 10, end=True)
    topic.put(0, 2, 50)
    topic.put(1, 0, 20)
    source = topic.read(BOTH)
    assert places(drain(source, 2, seconds=1.5)) == [(0, 0), (1, 0)]
    assert not source.ended
    topic.put(1, 1, 20, end=True)
    assert drain(source) == []
    assert source.ended
    topic.put(1, 2, 60)
    messages = source.poll(2.0, 10)
    assert places(messages) == [(0, 2)]
    assert not source.ended


def test_a_stream_that_goes_on_is_read_past_an_end_that_others_never_reach(topic: Topic) -> None:
    topic.put(0, 0, 10)
    topic.put(0, 1, 10, end=True)
    topic.put(0, 2, 50)
    source = topic.read(BOTH, idle_s=0.5)
    assert places(drain(source, 2, seconds=5)) == [(0, 0), (0, 2)]
    assert not source.ended


def test_polling_on_after_the_end_waits(topic: Topic) -> None:
    topic.put(0, 0, 10, end=True)
    source = topic.read({0: Position(0)})
    assert drain(source) == []
    began_s = time.monotonic()
    assert source.poll(0.5, 10) == []
    assert time.monotonic() - began_s > 0.4


def test_a_start_outside_the_log_stops_naming_saved_and_available(topic: Topic) -> None:
    for seq in range(3):
        topic.put(0, seq, seq)
    source = topic.read({0: Position(77)})
    with pytest.raises(Fatal, match=r"saved offset is 77, available are 0 to (3|unknown)"):
        drain(source, 1)


def test_memory_is_bounded_while_one_partition_is_far_ahead(topic: Topic) -> None:
    value = encode_examples(joined(SCHEMA, 2), SCHEMA)
    for seq in range(200):
        topic.put(0, seq, seq, value=value)
    source = topic.read(BOTH, queue_messages=8)
    assert drain(source, 1, seconds=2) == []
    assert len(source._lanes[0].queue) <= 16
    topic.put(1, 0, 10_000)
    topic.put(1, 1, 10_000, end=True)
    topic.put(0, 200, 300, end=True)
    assert places(drain(source)) == [*((0, n) for n in range(200)), (1, 0)]


def test_the_oldest_positions_are_where_a_new_reader_begins(topic: Topic) -> None:
    source = KafkaSource(topic.config)
    assert start_positions(source, topic.name, [0, 1]) == BOTH
    source.close()


def test_positions_are_committed_for_display(topic: Topic) -> None:
    topic.put(0, 0, 10)
    source = topic.read({0: Position(0)})
    drain(source, 1)
    source.commit({0: Position(1, 0)})
    other = KafkaSource(topic.config, group=topic.name)
    tp = TopicPartition(topic.name, 0)
    assert other.committed([tp]) == {tp: 1}
    other.close()
