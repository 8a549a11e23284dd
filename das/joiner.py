"""The joiner process: impressions and feedback in, `examples` out, each impression exactly once.

There is no store beside Kafka and no transaction: every message carries the state to go on from (see das.join_state),
and what follows from the inputs is always the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from pydantic import Field

from das import fault
from das.deadline import Deadline
from das.errors import Fatal, Retryable
from das.examples import Compression
from das.join import Cut, JoinConfig, PartitionJoin
from das.join_state import IMPRESSIONS, JoinState, last_state
from das.joiner_lane import JoinerLane
from das.messages import MessageCodec
from das.quarantine import Quarantine, QuarantineLimit
from das.schema import FeatureSchema
from das.stream import KafkaConfig, KafkaSink, KafkaSource, TopicPartition, age_s, read_tail
from das.telemetry import Telemetry
from das.watermark import SIDES

log = logging.getLogger(__name__)

TAIL_MESSAGES = 64
ROUND_MESSAGES = 32
"""Messages published at once; well below TAIL_MESSAGES, so that what a joiner that lost its partitions still had in
hand cannot hide the newest."""
ROUND_S = 1.0
"""How long one partition is joined before the group is asked again."""


class JoinerConfig(JoinConfig):
    """One joiner worker; start several with the same `group` to share the partitions."""

    group: str = "exfm-joiner"
    session_timeout_s: float = Field(10.0, ge=1, le=300)
    poll_records: int = Field(2000, ge=1, le=100_000)
    poll_s: float = Field(0.25, gt=0, le=10)
    max_pending: int = Field(500_000, ge=1)
    max_ahead_ms: int = Field(3_600_000, ge=0)  # how far event times may lie after their arrival
    compression: Compression = "none"  # of each column of a message; kafka.compression is of whole batches of messages
    stall_timeout_s: float = Field(120.0, gt=0)
    recovery_timeout_s: float = Field(60.0, gt=0, le=3600)
    outage_timeout_s: float = Field(600.0, gt=0)  # how long the broker may be away before the process gives up


class Joiner:
    """One worker. Raises Fatal when going on would lose or misplace records; Retryable never leaves `run`."""

    def __init__(
        self,
        kafka: KafkaConfig,
        schema: FeatureSchema,
        config: JoinerConfig,
        telemetry: Telemetry,
        *,
        limit: QuarantineLimit | None = None,
        stop_at_end: bool = False,
    ) -> None:
        self._kafka = kafka
        self._topics = (kafka.topics.impressions, kafka.topics.feedback)
        self._schema = schema
        self._codec = MessageCodec(schema)
        self._config = config
        self._telemetry = telemetry
        self._limit = limit or QuarantineLimit()
        self._stop_at_end = stop_at_end
        self._source: KafkaSource | None = None
        self._sink: KafkaSink | None = None
        self._lanes: dict[int, JoinerLane] = {}
        self._stop = threading.Event()
        self._alive_s = self._probed_s = 0.0
        self._moved = self._published = False
        self._progress_s: dict[int, float] = {}

    def run(self, stop: threading.Event) -> None:
        """Join until `stop` is set or, with `stop_at_end`, until all assigned partitions have ended.

        While the broker is away, tries again with growing pauses. Raises Fatal after `outage_timeout_s` of that.
        """
        self._stop = stop
        outage = _Outage(self._config.outage_timeout_s, self._config.session_timeout_s)
        try:
            while not stop.is_set():
                self._published = False
                try:
                    finished = self._round()
                except Retryable as error:
                    pause_s = outage.failed(error, time.monotonic())
                    log.warning("trying again in %.1f s: %s", pause_s, error)
                    self._telemetry.gauge("exfm_ready", 0)
                    self._close()
                    stop.wait(pause_s)
                else:
                    if self._lanes and outage.worked(time.monotonic(), published=self._published):
                        self._telemetry.gauge("exfm_ready", 1)
                    if finished:
                        return
        finally:
            self._close()

    def _round(self) -> bool:
        """Read, join and publish once; True when the stream has ended."""
        source = self._open()
        wait_s = 0.0 if self._moved else self._config.poll_s
        self._check_awake()
        records = source.poll(wait_s, self._config.poll_records)
        self._check_awake()
        now_s = time.monotonic()
        for record in records:
            lane = self._lanes[record.partition]
            lane.waiting[self._topics.index(record.topic)].append(record)
        if records:
            fault.point("joiner.after_poll")
        self._note_activity(source, now_s)
        self._moved = False
        for number, lane in self._lanes.items():
            if self._join(lane, source, now_s):
                self._progress_s[number] = now_s
                self._moved = True
            lane.check_progress(now_s - self._progress_s[number], self._config.stall_timeout_s)
            self._throttle(source, lane)
        self._report(source)
        return (
            self._stop_at_end and bool(self._lanes) and all(self._ended(lane, source) for lane in self._lanes.values())
        )

    def _join(self, lane: JoinerLane, source: KafkaSource, now_s: float) -> bool:
        """Join what was read of one partition and publish what is complete, for ROUND_S; whether anything moved."""
        moved = False
        end_s = time.monotonic() + ROUND_S
        while time.monotonic() < end_s and not self._stop.is_set():
            taken = lane.take(now_s, lambda side: self._drained(source, lane, side))
            cuts = self._cuts(lane, now_s)
            if cuts:
                self._publish(lane, source, cuts)
            if not taken and not cuts:
                break
            moved = True
        return moved

    @staticmethod
    def _cuts(lane: JoinerLane, now_s: float) -> list[Cut]:
        cuts: list[Cut] = []
        while len(cuts) < ROUND_MESSAGES and (cut := lane.join.cut(now_s)) is not None:
            cuts.append(cut)
        return cuts

    def _publish(self, lane: JoinerLane, source: KafkaSource, cuts: Sequence[Cut]) -> None:
        """The durable order. A crash between any two steps repeats no row and loses none."""
        assert self._sink is not None
        self._check_awake()
        number = lane.partitions[IMPRESSIONS].partition
        messages = [lane.message(cut) for cut in cuts]
        self._quarantine.flush()  # 1. what the messages' states call read and bad is kept
        fault.point("joiner.before_produce")
        for value, headers in messages:  # 2. rows and the state to go on from, in one record
            self._sink.send(self._kafka.topics.examples, number, None, value, headers)
        self._sink.flush(self._kafka.produce_timeout_s)
        fault.point("joiner.after_produce")
        replay = cuts[-1].state.replay
        source.commit({lane.partitions[side]: replay[side] for side in SIDES})  # 3. for lag displays only
        fault.point("joiner.after_commit")
        self._published = True
        rows = sum(len(cut.rows) for cut in cuts)
        self._telemetry.count("exfm_examples_rows_total", rows)
        self._check_awake()

    def _check_awake(self) -> None:
        """Raises Retryable after a pause in which the group may have given the partitions to another worker."""
        before_s, self._alive_s = self._alive_s, time.monotonic()
        if self._lanes and self._alive_s - before_s > self._config.session_timeout_s:
            raise Retryable("stopped for longer than the group's session: the partitions may be another worker's")

    def _open(self) -> KafkaSource:
        if self._source is None:
            self._sink = KafkaSink(self._kafka)
            self._quarantine = Quarantine(self._sink, self._kafka.topics.quarantine, self._telemetry, self._limit)
            self._source = KafkaSource(self._kafka, self._config.group, self._config.session_timeout_s)
            self._source.subscribe(self._topics, self._assigned, self._revoked)
        return self._source

    def _close(self) -> None:
        self._lanes.clear()
        source, sink = self._source, self._sink
        self._source = self._sink = None
        if source is not None:
            source.close()
        if sink is not None:
            sink.close()

    def _revoked(self, partitions: list[TopicPartition]) -> None:
        for tp in partitions:
            self._lanes.pop(tp.partition, None)

    def _assigned(self, partitions: list[TopicPartition]) -> None:
        """Rebuild each partition from its last message. Raises Fatal if a needed offset is gone."""
        assert self._source is not None
        for number in sorted({tp.partition for tp in partitions}):
            inputs = (TopicPartition(self._topics[0], number), TopicPartition(self._topics[1], number))
            missing = [tp for tp in inputs if tp not in partitions]
            if missing:
                raise Fatal(
                    f"the group gave this worker only one topic of partition {number}; {self._topics[0]} and "
                    f"{self._topics[1]} must have equal numbers of partitions"
                )
            state = self._last_state(number)
            oldest = self._source.beginning_offsets(inputs)
            starts = {tp: oldest[tp] if state is None else state.replay[side] for side, tp in enumerate(inputs)}
            self._lanes[number] = self._lane(inputs, state)
            self._alive_s = time.monotonic()
            self._progress_s[number] = time.monotonic()
            self._source.start(starts)
            log.info("partition %d: from %s after %s", number, list(starts.values()), state)

    def _last_state(self, number: int) -> JoinState | None:
        output = TopicPartition(self._kafka.topics.examples, number)
        deadline = Deadline.after(self._config.recovery_timeout_s)
        return last_state(read_tail(self._kafka, output, TAIL_MESSAGES, deadline))

    def _lane(self, inputs: tuple[TopicPartition, TopicPartition], state: JoinState | None) -> JoinerLane:
        config = self._config
        return JoinerLane(
            inputs,
            PartitionJoin(self._schema, config, state),
            self._codec,
            self._quarantine,
            max_pending=config.max_pending,
            max_orphans=config.max_orphans,
            max_ahead_ms=config.max_ahead_ms,
            compression=config.compression,
        )

    def _drained(self, source: KafkaSource, lane: JoinerLane, side: int) -> bool:
        """Whether an input has nothing left to read, as far as the last fetch tells."""
        tp = lane.partitions[side]
        end = source.highwater(tp)
        return end is not None and source.position(tp) >= end and not lane.waiting[side]

    def _ended(self, lane: JoinerLane, source: KafkaSource) -> bool:
        return lane.join.at_end and all(self._drained(source, lane, side) for side in SIDES)

    def _note_activity(self, source: KafkaSource, now_s: float) -> None:
        """Tell each watermark which inputs are not idle; silence counts only while the broker answers."""
        silent = []
        for lane in self._lanes.values():
            for side in SIDES:
                if self._drained(source, lane, side):
                    silent.append((lane, side))
                else:
                    lane.join.watermark.active(side, now_s)
        timeout_s = self._config.idle_timeout_s
        if not silent or timeout_s is None or now_s - self._probed_s < timeout_s / 2:
            return
        self._probed_s = now_s
        if not source.reachable(min(5.0, timeout_s / 2)):
            for lane, side in silent:
                lane.join.watermark.active(side, now_s)

    def _throttle(self, source: KafkaSource, lane: JoinerLane) -> None:
        """Stop reading an input that has much waiting; go on below half of that."""
        most = 2 * self._config.poll_records
        for side in SIDES:
            full = len(lane.waiting[side]) >= (most // 2 if lane.paused[side] else most)
            if full != lane.paused[side]:
                lane.paused[side] = full
                (source.pause if full else source.resume)([lane.partitions[side]])

    def _report(self, source: KafkaSource) -> None:
        telemetry = self._telemetry
        for number, lane in self._lanes.items():
            join = lane.join
            counts = join.counts
            for (topic, outcome), amount in counts.items():
                telemetry.count(f"exfm_{topic}_total", amount, outcome=outcome)
            counts.clear()
            for side in SIDES:
                tp = lane.partitions[side]
                if lane.passed[side] or lane.poison[side]:
                    telemetry.count("exfm_records_total", lane.passed[side], topic=tp.topic, outcome="accepted")
                    telemetry.count("exfm_records_total", lane.poison[side], topic=tp.topic, outcome="poison")
                    lane.passed[side] = lane.poison[side] = 0
                behind = (source.highwater(tp) or 0) - join.next[side]
                labels = {"topic": tp.topic, "partition": str(number)}
                telemetry.gauge("exfm_lag_records", max(0, behind), **labels)
                waiting = lane.waiting[side]
                oldest_ms = waiting[0].timestamp_ms if waiting else lane.taken_ms[side]
                telemetry.gauge("exfm_lag_seconds", age_s(oldest_ms) if behind > 0 else 0.0, **labels)
            telemetry.gauge("exfm_watermark_lag_seconds", join.watermark.lag_ms / 1000, partition=str(number))
        telemetry.gauge("exfm_joiner_pending", sum(len(lane.join.pending) for lane in self._lanes.values()))


class _Outage:
    """Growing pauses while rounds fail; over after a message got through or after a while without failure."""

    def __init__(self, limit_s: float, calm_s: float) -> None:
        self._limit_s = limit_s
        self._calm_s = calm_s
        self._since_s: float | None = None
        self._well_s: float | None = None
        self._pause_s = 0.1

    def failed(self, error: Retryable, now_s: float) -> float:
        """How long to wait before the next try. Raises Fatal when the outage has lasted too long."""
        self._well_s = None
        self._since_s = now_s if self._since_s is None else self._since_s
        if now_s - self._since_s > self._limit_s:
            raise Fatal(f"gave up after {now_s - self._since_s:.0f} s (joiner.outage_timeout_s) of: {error}") from error
        pause_s, self._pause_s = self._pause_s, min(5.0, 2 * self._pause_s)
        return pause_s

    def worked(self, now_s: float, *, published: bool) -> bool:
        """Note a round without failure; True if it was the first after an outage."""
        if self._since_s is None:
            return False
        first = self._well_s is None
        self._well_s = now_s if first else self._well_s
        assert self._well_s is not None
        if published or now_s - self._well_s > self._calm_s:
            self._since_s, self._pause_s = None, 0.1
        return first
