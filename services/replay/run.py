"""The replay loop: recorded rows to impressions and feedback in event-time order, at a chosen speed.

The same table, mapping and schema give the same records per partition, so a replay that was killed goes on where the
topics end: as many records of a partition as are there already are left out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from das.deadline import Deadline
from das.errors import ConfigError
from das.examples import END_OF_STREAM, HEADER_CONTROL
from das.messages import Impression, MessageCodec
from das.schema import FeatureSchema
from das.stream import KafkaConfig, KafkaSink, KafkaSource, TopicPartition, TopicsConfig, partition_for, read_tail
from das.telemetry import Telemetry
from services.replay.config import ReplayConfig
from services.replay.dataset import DatasetConfig
from services.replay.progress import ReplayProgress
from services.replay.reader import RowReader
from services.replay.serving_log import ServingLog

log = logging.getLogger(__name__)
REPORT_EVERY = 256


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """Records in the topics at the end, earlier runs of the same replay included. `complete` is False if stopped."""

    impressions: int
    feedback: int
    earlier: int
    seconds: float
    complete: bool


class Pacer:
    """Lets an event pass when its time has come at `factor` times the recorded speed; None never waits."""

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._start_s = 0.0
        self._start_ms: int | None = None

    def wait(self, event_time_ms: int, stop: threading.Event) -> None:
        """Returns when the event is due, or at once when `stop` is set."""
        if self._factor is None:
            return
        if self._start_ms is None:
            self._start_s, self._start_ms = time.monotonic(), event_time_ms
        due_s = self._start_s + (event_time_ms - self._start_ms) / 1000 / self._factor
        left_s = due_s - time.monotonic()
        if left_s > 0:
            stop.wait(left_s)


class Replay:
    """One recorded data set on its way into the topics."""

    def __init__(self, config: ReplayConfig, schema: FeatureSchema, kafka: KafkaConfig, telemetry: Telemetry) -> None:
        """Raises ConfigError if the mapping does not fit the schema or the table cannot be found."""
        self._config = config
        self._kafka = kafka
        self._telemetry = telemetry
        self._codec = MessageCodec(schema)
        dataset = DatasetConfig.load(config.dataset, schema)
        data = config.data or dataset.data
        if data is None:
            raise ConfigError(f"{config.dataset}: set data here, or replay.data, to the table to replay")
        self._reader = RowReader(Path(data), dataset, schema)
        self._log = ServingLog(schema, dataset, config.log)

    @property
    def total(self) -> int | None:
        """Impressions it will send in all, where the table says so."""
        known = [n for n in (self._reader.num_rows, self._config.limit) if n is not None]
        return min(known) if self._reader.num_rows is not None else None

    def run(self, stop: threading.Event) -> ReplayResult:
        """Send everything, or until `stop`. Raises ConfigError on bad data, Retryable or Fatal from the broker."""
        started_s = time.monotonic()
        if self.total is not None:
            self._telemetry.gauge("exfm_replay_rows", self.total)
        sink = KafkaSink(self._kafka)
        try:
            lanes = self._open_lanes()
            complete = self._send(sink, lanes, stop)
            if complete and self._config.end_of_stream:
                for lane in lanes.values():
                    lane.close(sink)
            sink.flush(self._config.flush_s)
        finally:
            sink.close()
        topics = self._kafka.topics
        counts = {t: sum(lane.passed for tp, lane in lanes.items() if tp.topic == t) for t in _replayed(topics)}
        earlier = sum(min(lane.present, lane.passed) for lane in lanes.values())
        seconds = time.monotonic() - started_s
        return ReplayResult(counts[topics.impressions], counts[topics.feedback], earlier, seconds, complete)

    def _send(self, sink: KafkaSink, lanes: Mapping[TopicPartition, _Lane], stop: threading.Event) -> bool:
        """Every impression and feedback to its lane; returns whether the end was reached."""
        topics, partitions = self._kafka.topics, self._kafka.partitions
        pacer = Pacer(self._config.factor)
        done = {topics.impressions: 0, topics.feedback: 0}
        told = dict(done)
        encode: tuple[Callable[[Any], bytes], ...] = (self._codec.encode_feedback, self._codec.encode_impression)
        rows = islice(self._reader.rows(), self._config.limit)
        with ReplayProgress(self.total) as progress:
            for event in self._log.events(rows):
                partition = partition_for(event.impression_id, partitions)
                shown = isinstance(event, Impression)
                topic = topics.impressions if shown else topics.feedback
                lane = lanes[TopicPartition(topic, partition)]
                if not lane.skips(event.impression_id):
                    pacer.wait(event.event_time, stop)
                    if stop.is_set():
                        break
                    lane.send(sink, event.impression_id, encode[shown](event))
                done[topic] += 1
                if (done[topic] - told[topic]) >= REPORT_EVERY:
                    self._report(done, told)
                    progress.update(done[topics.impressions], event.event_time)
            self._report(done, told)
        return not stop.is_set()

    def _report(self, done: Mapping[str, int], told: dict[str, int]) -> None:
        for topic, count in done.items():
            self._telemetry.count("exfm_replayed_total", count - told[topic], topic=topic)
            told[topic] = count

    def _open_lanes(self) -> dict[TopicPartition, _Lane]:
        """One lane per partition of both topics, each knowing what an earlier run left in it."""
        places = [TopicPartition(t, p) for t in _replayed(self._kafka.topics) for p in range(self._kafka.partitions)]
        lanes = {place: _Lane(place) for place in places}
        if self._config.resume:
            source = KafkaSource(self._kafka)
            try:
                filled = [place for place in places if source.end_offset_hint(place) > 0]
            finally:
                source.close()
            for place in filled:
                lanes[place].look_back(self._kafka)
        found = sum(lane.present for lane in lanes.values())
        if found:
            log.info("the topics hold %d records of an earlier run; going on after them", found)
        return lanes


class _Lane:
    """One partition: how many records it held at the start, and how many of the replay's have passed."""

    def __init__(self, place: TopicPartition) -> None:
        self.place = place
        self.present = 0
        self.passed = 0
        self._closed = False
        self._last_key = ""

    def look_back(self, kafka: KafkaConfig) -> None:
        """Find the end of the partition. Raises Retryable if the broker does not answer in time."""
        tail = read_tail(kafka, self.place, 2, Deadline.after(kafka.request_timeout_s))
        if tail and HEADER_CONTROL in tail[-1].headers:
            self._closed = True
            tail = tail[:-1]
        if tail:
            self.present = tail[-1].offset + 1
            self._last_key = (tail[-1].key or b"").decode(errors="replace")

    def skips(self, impression_id: str) -> bool:
        """Whether an earlier run sent the next record. Raises ConfigError if something else is in its place."""
        if self.passed >= self.present:
            return False
        self.passed += 1
        if self.passed == self.present and impression_id != self._last_key:
            raise ConfigError(
                f"{self.place.topic}[{self.place.partition}] holds other records: '{self._last_key}' is at offset "
                f"{self.present - 1}, this replay has '{impression_id}' there; use empty topics, or set "
                "replay.resume: false to send everything after what is there"
            )
        return True

    def send(self, sink: KafkaSink, impression_id: str, value: bytes) -> None:
        """Send the next record."""
        if self._closed:
            raise ConfigError(
                f"{self.place.topic}[{self.place.partition}] was closed by an end-of-stream message after "
                f"{self.present} records; use empty topics to replay more"
            )
        sink.send(self.place.topic, self.place.partition, impression_id.encode(), value)
        self.passed += 1

    def close(self, sink: KafkaSink) -> None:
        """Send the end-of-stream message, once."""
        if not self._closed:
            sink.send(self.place.topic, self.place.partition, None, b"", {HEADER_CONTROL: END_OF_STREAM})
            self._closed = True


def _replayed(topics: TopicsConfig) -> tuple[str, str]:
    return topics.impressions, topics.feedback
