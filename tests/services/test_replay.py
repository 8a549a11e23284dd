"""The replay on a real broker: order, partitions, resume, stop, pace and end of stream."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from replay_kit import record, schema, write_jsonl, write_mapping

from das.deadline import Deadline
from das.errors import ConfigError
from das.messages import Impression, MessageCodec
from das.stream import KafkaConfig, Record, TopicPartition, create_topics, partition_for, read_tail
from das.telemetry import RecordingTelemetry
from services.replay.config import ReplayConfig
from services.replay.run import Pacer, Replay, ReplayResult

RECORDS = [record(n, at=record(0)["at"] + 4 * (n // 2)) for n in range(400)]
CODEC = MessageCodec(schema())


@pytest.fixture
def kafka(kafka_bootstrap: str, prefix: str) -> KafkaConfig:
    """Fresh topics of three partitions."""
    names = {name: f"{prefix}-{name}" for name in ("impressions", "feedback", "examples", "quarantine")}
    config = KafkaConfig.parse({"bootstrap": kafka_bootstrap, "partitions": 3, "topics": names})
    create_topics(config)
    return config


class Bench:
    """Runs replays of one small table into one set of topics."""

    def __init__(self, kafka: KafkaConfig, folder: Path) -> None:
        self.kafka = kafka
        self.telemetry = RecordingTelemetry()
        self._mapping = write_mapping(folder)
        self._folder = folder

    def replay(self, rows: list[dict[str, Any]] = RECORDS, **changes: Any) -> Replay:
        """A replay of these rows."""
        data = write_jsonl(self._folder / "table.jsonl", rows)
        config = ReplayConfig.parse({"dataset": self._mapping, "data": data, **changes})
        return Replay(config, schema(), self.kafka, self.telemetry)

    def run(
        self, rows: list[dict[str, Any]] = RECORDS, stop: threading.Event | None = None, **changes: Any
    ) -> ReplayResult:
        """Run it to its end."""
        return self.replay(rows, **changes).run(stop or threading.Event())

    def records(self, topic: str) -> dict[int, list[Record]]:
        """Everything in the partitions of a topic."""
        deadline = Deadline.after(20)
        places = range(self.kafka.partitions)
        return {p: read_tail(self.kafka, TopicPartition(topic, p), 10_000, deadline) for p in places}

    def content(self, topic: str) -> dict[int, list[tuple[bytes | None, bytes | None, dict[str, bytes]]]]:
        """The same without offsets and times."""
        return {p: [(r.key, r.value, r.headers) for r in records] for p, records in self.records(topic).items()}


@pytest.fixture
def bench(kafka: KafkaConfig, tmp_path: Path) -> Bench:
    """A bench on fresh topics."""
    return Bench(kafka, tmp_path)


def test_every_row_arrives_once_in_event_time_order_and_partitions_are_closed(bench: Bench) -> None:
    result = bench.run()
    topics = bench.kafka.topics
    shown, told = bench.records(topics.impressions), bench.records(topics.feedback)
    seen = []
    for partition, records in (*shown.items(), *told.items()):
        assert records[-1].headers == {"exfm-control": b"end-of-stream"}
        assert not records[-1].value
        assert not any(r.headers for r in records[:-1])
        decode = CODEC.decode_impression if records[0].topic == topics.impressions else CODEC.decode_feedback
        messages = [decode(r.value) for r in records[:-1]]
        assert [r.key for r in records[:-1]] == [m.impression_id.encode() for m in messages]
        assert {partition_for(m.impression_id, 3) for m in messages} == {partition}
        times = [m.event_time for m in messages]
        assert times == sorted(times)
        seen += [m.impression_id for m in messages if isinstance(m, Impression)]
    assert sorted(seen) == sorted(f"s-{n}" for n in range(400))
    outcomes = sum(r["clicked"] > 0 for r in RECORDS) + sum(r["bought_for"] > 1.5 for r in RECORDS)
    assert (result.impressions, result.feedback, result.earlier, result.complete) == (400, outcomes, 0, True)
    assert bench.telemetry.total("exfm_replayed_total", topic=topics.impressions) == 400
    assert bench.telemetry.total("exfm_replayed_total", topic=topics.feedback) == outcomes


def test_a_stopped_replay_goes_on_where_it_stopped(bench: Bench, tmp_path: Path) -> None:
    stop = threading.Event()
    timer = threading.Timer(2.5, stop.set)
    timer.start()
    first = bench.run(stop=stop, speed=0.05)
    assert not first.complete
    assert 0 < first.impressions < 400
    assert not any(r.headers for records in bench.records(bench.kafka.topics.impressions).values() for r in records)
    second = bench.run()
    assert (second.impressions, second.complete) == (400, True)
    assert second.earlier == first.impressions + first.feedback
    assert bench.run().earlier == second.impressions + second.feedback  # all there: nothing is sent again
    whole = Bench(_other_topics(bench.kafka), tmp_path)
    whole.run()
    for topic in ("impressions", "feedback"):
        ours = bench.content(getattr(bench.kafka.topics, topic))
        assert ours == whole.content(getattr(whole.kafka.topics, topic))


def _other_topics(kafka: KafkaConfig) -> KafkaConfig:
    names = {name: f"{text}-2" for name, text in kafka.topics.model_dump().items()}
    config = kafka.model_copy(update={"topics": type(kafka.topics).parse(names)})
    create_topics(config)
    return config


def test_records_of_another_replay_are_refused(bench: Bench) -> None:
    bench.run(end_of_stream=False)
    other = [record(n, id=n + 7000) for n in range(400)]
    with pytest.raises(ConfigError, match=r"holds other records: 's-\d+' is at offset .* replay.resume: false"):
        bench.run(other)
    bench.run(other, resume=False)
    assert sum(map(len, bench.records(bench.kafka.topics.impressions).values())) == 803


def test_a_closed_partition_takes_no_more(bench: Bench) -> None:
    bench.run(RECORDS[:100])
    with pytest.raises(ConfigError, match="was closed by an end-of-stream message after"):
        bench.run(RECORDS)


def test_limit_and_open_end(bench: Bench) -> None:
    result = bench.run(limit=10, end_of_stream=False)
    assert (result.impressions, result.complete) == (10, True)
    keys = [r.key for records in bench.records(bench.kafka.topics.impressions).values() for r in records]
    assert sorted(filter(None, keys)) == sorted(f"s-{n}".encode() for n in range(10))


def test_pace_follows_event_time_and_stop_is_prompt(bench: Bench, tmp_path: Path) -> None:
    """400 rows span 0.8 s, so at half speed the last goes out about 1.6 s after the first."""
    bench.run(speed=0.5)
    sent = [r for records in bench.records(bench.kafka.topics.impressions).values() for r in records if r.key]
    times = [(r.timestamp_ms, CODEC.decode_impression(r.value).event_time) for r in sent]
    (first_sent, first_event), *_ = sorted(times)
    behind = [(at - first_sent) - 2 * (event - first_event) for at, event in times]
    assert min(behind) > -50
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    started = time.monotonic()
    Bench(_other_topics(bench.kafka), tmp_path).run(stop=stop, speed=1e-6)
    assert time.monotonic() - started < 10


def test_pacer_waits_in_proportion_and_never_for_max() -> None:
    stop = threading.Event()
    for factor, least, most in ((None, 0.0, 0.05), (10.0, 0.19, 0.4)):
        pacer = Pacer(factor)
        started = time.monotonic()
        for event_time_ms in (1000, 2000, 3000):
            pacer.wait(event_time_ms, stop)
        assert least <= time.monotonic() - started <= most


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": "fast"}, "speed"),
        ({"speed": 0}, "greater than 0"),
        ({"limit": 0}, "greater than or equal to 1"),
        ({"sped": 1}, "did you mean 'speed'"),
    ],
)
def test_bad_settings_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReplayConfig.parse({"dataset": "d.yaml", **changes})


def test_a_missing_table_is_named_before_anything_is_sent(bench: Bench, tmp_path: Path) -> None:
    config = ReplayConfig(dataset=write_mapping(tmp_path))
    with pytest.raises(ConfigError, match=r"set data here, or replay.data, to the table"):
        Replay(config, schema(), bench.kafka, bench.telemetry)


def test_records_sent_before_bad_data_are_kept_in_order(bench: Bench) -> None:
    """A table that turns bad stops the replay with the row named; what was sent stays valid for a resume."""
    broken = [*RECORDS[:200], {**RECORDS[200], "price": "x"}]
    with pytest.raises(ConfigError, match=r"mixes types|price"):
        bench.run(broken)
    assert bench.run().complete
