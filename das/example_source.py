"""Reads the `examples` topic: deduplicated, in one deterministic order across partitions, columns by name."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import xxhash

from das.deadline import Deadline
from das.errors import Poison
from das.example_poll import PollRows, decode_poll
from das.examples import (
    END_OF_STREAM,
    FORMAT,
    HEADER_CONTROL,
    HEADER_FORMAT,
    HEADER_JOIN,
    HEADER_ROWS,
    HEADER_SCHEMA,
    HEADER_SEQ,
    ExampleDecoder,
)
from das.join_state import JoinState
from das.position import Position, Positions
from das.quarantine import Quarantine
from das.schema import FeatureSchema
from das.stream import Record, RecordSource, TopicPartition, age_s
from das.telemetry import Telemetry

log = logging.getLogger(__name__)

LOOK_BACK = 64
"""Messages before the start that are read again, only to learn the last sequence number."""


@dataclass(frozen=True, slots=True)
class ExampleMessage:
    """One message: `rows` has the projected columns; `checksum` is xxh64 of the whole Kafka value."""

    partition: int
    offset: int
    seq: int
    rows: PollRows
    checksum: int
    appended_ms: int


class ExampleReader(Protocol):
    """What the training loops read from; `ExampleSource` in every process."""

    @property
    def ended(self) -> bool:
        """Whether every partition reached its end of stream and everything before was delivered."""

    def poll(self, timeout_s: float, max_messages: int) -> list[ExampleMessage]:
        """The next messages, in the merged order."""

    def commit(self, positions: Positions) -> None:
        """Store the positions for lag displays."""


class _Head(msgspec.Struct, frozen=True, gc=False):
    """What a message's headers say. `key_ms` is the last release time of its rows."""

    seq: int
    rows: int
    key_ms: int
    end: bool


class _Lane:
    """One partition: its queued messages and how far it was delivered."""

    def __init__(self, tp: TopicPartition, start: int) -> None:
        self.tp = tp
        self.start = start
        self.next = start
        self.delivered_ms = 0
        self.last_seq: int | None = None
        self.written: bytes | None = None
        self.queue: deque[tuple[Record, _Head]] = deque()
        self.silent_s = 0.0
        self.paused = False


class ExampleSource:
    """Reads the partitions of `start`, each from its position.

    The message that contains a start position is delivered again: its first `row` rows are the caller's to skip.
    Across partitions, messages are merged by the last release time of their rows, then partition. A partition with
    nothing to read holds the others back until it was silent for `idle_s` (None: for ever, which makes the order
    independent of timing), and at an end-of-stream until all have reached theirs.
    """

    def __init__(
        self,
        source: RecordSource,
        topic: str,
        schema: FeatureSchema,
        columns: Sequence[str] | None,
        start: Positions,
        quarantine: Quarantine,
        telemetry: Telemetry,
        *,
        idle_s: float | None = 10.0,
        queue_messages: int = 64,
    ) -> None:
        self._source = source
        self._topic = topic
        self._decoder = ExampleDecoder(schema, columns)
        self._fingerprint, self._waits = b"%016x" % schema.fingerprint, schema.waits
        self._picked: list[tuple[Record, _Head]] = []
        self._quarantine = quarantine
        self._telemetry = telemetry
        self._idle_s = idle_s
        self._queue_messages = queue_messages
        self._lanes = {p: _Lane(TopicPartition(topic, p), at.offset) for p, at in sorted(start.items())}
        self.ended = False
        starts = {lane.tp: lane.start for lane in self._lanes.values()}
        source.assign(starts)  # refuses starts that have expired
        oldest = source.beginning_offsets(list(starts))
        source.start({tp: max(oldest[tp], offset - LOOK_BACK) for tp, offset in starts.items()})

    def poll(self, timeout_s: float, max_messages: int) -> list[ExampleMessage]:
        """Up to `max_messages` messages; an empty list after `timeout_s`, or at once when the stream just ended."""
        deadline = Deadline.after(timeout_s)
        wait_s, ended_before = 0.0, self.ended
        while True:
            self._fill(wait_s)
            messages = self._merge(max_messages)
            if messages or (self.ended and not ended_before) or deadline.passed:
                self._report_lag()
                return messages
            wait_s = min(0.25, deadline.left_s)

    @property
    def lag(self) -> dict[int, int]:
        """Messages per partition that are not yet delivered, as of the last fetch."""
        ends = {p: self._source.highwater(lane.tp) for p, lane in self._lanes.items()}
        return {p: max(0, (ends[p] or 0) - lane.next) for p, lane in self._lanes.items()}

    def commit(self, positions: Positions) -> None:
        """Store positions in the consumer group, for lag display only."""
        self._source.commit({self._lanes[p].tp: at.offset for p, at in positions.items()})

    def close(self) -> None:
        """Close the record source."""
        self._source.close()

    def _fill(self, wait_s: float) -> None:
        """Read records into the lanes; full lanes are paused."""
        before = time.monotonic()
        for record in self._source.poll(wait_s, self._queue_messages):
            lane = self._lanes[record.partition]
            lane.silent_s = 0.0
            self._accept(lane, record)
        waited_s = time.monotonic() - before
        for lane in self._lanes.values():
            lane.silent_s = 0.0 if lane.queue else lane.silent_s + waited_s
            self._find_start(lane)
            full = len(lane.queue) >= (self._queue_messages // 2 if lane.paused else self._queue_messages)
            if full != lane.paused:
                lane.paused = full
                (self._source.pause if full else self._source.resume)([lane.tp])

    def _find_start(self, lane: _Lane) -> None:
        """If the log ends before the start, read at the start, so that the source says what is missing."""
        end, at = self._source.highwater(lane.tp), self._source.position(lane.tp)
        if end is not None and end <= at < lane.start:
            self._source.start({lane.tp: lane.start})

    def _accept(self, lane: _Lane, record: Record) -> None:
        """Queue a record unless it is before the start, a duplicate or poison."""
        try:
            head = _parse_headers(record, self._waits)
        except Poison as poison:
            self._reject(record, poison, again=record.offset < lane.start)
            return
        self._note_schema(lane, record)
        last, lane.last_seq = lane.last_seq, max(head.seq, -1 if lane.last_seq is None else lane.last_seq)
        if record.offset < lane.start:
            return
        if last is not None and head.seq <= last:
            self._telemetry.count("exfm_messages_skipped_total", reason="duplicate")
            log.info("%s[%d] offset %d: seq %d was there before", *lane.tp, record.offset, head.seq)
            return
        if last is not None and head.seq > last + 1:
            self._telemetry.count("exfm_messages_skipped_total", head.seq - last - 1, reason="gap")
            log.error("%s[%d] offset %d: seq jumps from %d to %d", *lane.tp, record.offset, last, head.seq)
        lane.queue.append((record, head))

    def _note_schema(self, lane: _Lane, record: Record) -> None:
        """Say when the writer's schema changes to one that is not ours."""
        written = record.headers.get(HEADER_SCHEMA)
        if written != lane.written:
            lane.written = written
            if written is not None and written != self._fingerprint:
                place = f"{record.topic}[{record.partition}] offset {record.offset}"
                ours, theirs = self._fingerprint.decode(), written[:16].decode(errors="replace")
                log.warning("%s: from here on of schema %s, ours is %s; columns are read by name", place, theirs, ours)

    def _merge(self, max_messages: int) -> list[ExampleMessage]:
        messages: list[ExampleMessage] = []
        while not messages and self._pick(max_messages):
            messages = self._decode_picked()
        return messages

    def _pick(self, max_messages: int) -> bool:
        """Take the next records off the lanes; False if there are none. Those of a poll that failed are still there."""
        while len(self._picked) < max_messages and not self._pop_end(delivered=bool(self._picked)):
            lane = self._next_lane()
            if lane is None:
                break
            record, head = lane.queue.popleft()
            lane.next, lane.delivered_ms = record.offset + 1, record.timestamp_ms
            self.ended = False
            self._picked.append((record, head))
        return bool(self._picked)

    def _next_lane(self) -> _Lane | None:
        """The lane whose first message comes next, or None while a lane that could come before is awaited."""
        ready, silent = [], False
        for lane in self._lanes.values():
            if not lane.queue:
                if self._idle_s is None or lane.silent_s < self._idle_s:
                    return None
                silent = True
            elif not lane.queue[0][1].end:
                ready.append(lane)
        if not ready and silent:  # the silent ones' ends may never come: those that have more go on without
            ready = [lane for lane in self._lanes.values() if len(lane.queue) > 1]
            for lane in ready:
                lane.next = lane.queue.popleft()[0].offset + 1
            ready = [lane for lane in ready if not lane.queue[0][1].end]
        return min(ready, key=lambda lane: (lane.queue[0][1].key_ms, lane.tp.partition), default=None)

    def _pop_end(self, *, delivered: bool) -> bool:
        """At an end-of-stream on every lane: take them together. True if the caller should stop merging."""
        if not all(lane.queue and lane.queue[0][1].end for lane in self._lanes.values()):
            return False
        if not delivered:
            for lane in self._lanes.values():
                lane.next = lane.queue.popleft()[0].offset + 1
            self.ended = True
        return True

    def _decode_picked(self) -> list[ExampleMessage]:
        decoded = decode_poll([record.value for record, _ in self._picked], self._decoder)
        messages = []
        for (record, head), rows in zip(self._picked, decoded, strict=True):
            try:
                messages.append(self._message(record, head, rows))
            except Poison as poison:
                self._reject(record, poison)
        self._picked = []
        return messages

    def _message(self, record: Record, head: _Head, rows: PollRows | Poison) -> ExampleMessage:
        if isinstance(rows, Poison):
            raise rows
        if rows.num_rows != head.rows:
            raise Poison("rows", f"{rows.num_rows} rows, the header says {head.rows}")
        self._telemetry.count("exfm_records_total", topic=record.topic, outcome="accepted")
        self._quarantine.passed(record.topic, 1)
        checksum = xxhash.xxh64_intdigest(record.value or b"")
        return ExampleMessage(record.partition, record.offset, head.seq, rows, checksum, record.timestamp_ms)

    def _reject(self, record: Record, poison: Poison, *, again: bool = False) -> None:
        if again:  # read only to learn the sequence number: it was quarantined when it was first read
            return
        self._telemetry.count("exfm_records_total", topic=record.topic, outcome="poison")
        self._quarantine.put(record, poison)
        self._quarantine.flush()

    def _report_lag(self) -> None:
        for partition, messages in self.lag.items():
            lane, labels = self._lanes[partition], {"topic": self._topic, "partition": str(partition)}
            oldest_ms = lane.queue[0][0].timestamp_ms if lane.queue else lane.delivered_ms
            self._telemetry.gauge("exfm_lag_records", messages, **labels)
            self._telemetry.gauge("exfm_lag_seconds", age_s(oldest_ms) if messages else 0.0, **labels)


def start_positions(source: RecordSource, topic: str, partitions: Sequence[int]) -> Positions:
    """The oldest position kept of each partition: where a reader without a snapshot begins."""
    oldest = source.beginning_offsets([TopicPartition(topic, p) for p in partitions])
    return {tp.partition: Position(offset) for tp, offset in oldest.items()}


def _parse_headers(record: Record, waits: str) -> _Head:
    """Raises Poison `header` on a missing or malformed one, `format` on another format, `schema` on other windows."""
    headers = record.headers
    if headers.get(HEADER_FORMAT) != b"%d" % FORMAT:
        raise Poison("format", f"{HEADER_FORMAT} is {headers.get(HEADER_FORMAT)!r}, not {FORMAT}")
    control = headers.get(HEADER_CONTROL)
    if control not in (None, END_OF_STREAM):
        raise Poison("header", f"{HEADER_CONTROL} is {control[:64]!r}, not {END_OF_STREAM!r}")
    try:
        seq, rows = _decimal(headers[HEADER_SEQ]), _decimal(headers.get(HEADER_ROWS, b"0"))
        state = msgspec.json.decode(headers[HEADER_JOIN], type=JoinState)
    except KeyError as error:
        raise Poison("header", f"no header {error}") from None
    except ValueError as error:
        raise Poison("header", f"{HEADER_SEQ}, {HEADER_ROWS} or {HEADER_JOIN}: {error}"[:300]) from None
    if state.waits not in ("", waits):
        raise Poison("schema", f"its schema lets {state.waits[:300]}; ours lets {waits}")
    return _Head(seq, rows, state.last_release_ms, control is not None)


def _decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > 18:
        raise ValueError(f"{value[:32]!r} is not a decimal number")
    return int(value)
