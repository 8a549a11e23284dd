"""One partition inside a joiner: records that wait, which input to read next, and messages that are complete."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from das.errors import Fatal, Poison
from das.examples import (
    END_OF_STREAM,
    FORMAT,
    HEADER_CONTROL,
    HEADER_FORMAT,
    HEADER_JOIN,
    HEADER_ROWS,
    HEADER_SCHEMA,
    HEADER_SEQ,
    Compression,
    JoinedRow,
    encode_examples,
)
from das.join import Cut, PartitionJoin
from das.join_state import FEEDBACK, IMPRESSIONS, encode_state
from das.messages import MessageCodec
from das.quarantine import Quarantine
from das.stream import Record, TopicPartition
from das.watermark import SIDES

RUN = 64
"""Records taken from one input before the choice is made anew."""


class JoinerLane:
    """Feeds one `PartitionJoin`, reading the input whose event time is behind.

    Reading in event-time order keeps the join small; it does not change the output. An input is only read ahead of
    the other when the other has nothing left to read now.
    """

    def __init__(
        self,
        partitions: tuple[TopicPartition, TopicPartition],
        join: PartitionJoin,
        codec: MessageCodec,
        quarantine: Quarantine,
        *,
        max_pending: int,
        max_orphans: int,
        max_ahead_ms: int,
        compression: Compression,
    ) -> None:
        self.partitions = partitions
        self.join = join
        self.waiting: tuple[deque[Record], deque[Record]] = (deque(), deque())
        self.paused = [False, False]
        self.poison = [0, 0]
        self.passed = [0, 0]
        self.taken_ms = [0, 0]
        """When the last records fed to the join were appended."""
        self._good = [0, 0]
        self._codec = codec
        self._quarantine = quarantine
        self._max_pending = max_pending
        self._max_orphans = max_orphans
        self._max_ahead_ms = max_ahead_ms
        self._compression = compression

    def take(self, now_s: float, drained: Callable[[int], bool]) -> bool:
        """Feed one run of records to the join; False if there is nothing that may be read now.

        `drained(side)` says whether an input has nothing left to read at the moment.
        """
        side = self._next_side(now_s, drained)
        if side is None:
            return False
        waiting = self.waiting[side]
        consume = self._impression if side == IMPRESSIONS else self._feedback
        self.taken_ms[side] = waiting[0].timestamp_ms
        for _ in range(min(RUN, len(waiting))):
            record = waiting.popleft()
            if HEADER_CONTROL in record.headers:
                self._control(side, record)
                break
            try:
                consume(record)
                self.passed[side] += 1
                self._good[side] += 1
            except Poison as poison:
                self._reject(side, record, poison)
        return True

    def full(self) -> bool:
        """Whether impressions must wait for rows to leave."""
        return self.join.num_held >= self._max_pending

    def _next_side(self, now_s: float, drained: Callable[[int], bool]) -> int | None:
        join, newest = self.join, self.join.watermark.max_event_ms
        readable = [bool(self.waiting[side]) and not join.held(side) for side in SIDES]
        if readable[FEEDBACK] and readable[IMPRESSIONS] and join.num_orphans >= self._max_orphans:
            readable[FEEDBACK] = False
        if readable[IMPRESSIONS] and self.full():
            readable[IMPRESSIONS] = False
            return FEEDBACK if readable[FEEDBACK] else None
        if all(readable):
            return min(SIDES, key=lambda side: newest[side])
        for side in SIDES:
            other = FEEDBACK if side == IMPRESSIONS else IMPRESSIONS
            behind = newest[side] <= newest[other]
            if readable[side] and (behind or join.held(other) or bool(self.waiting[other]) or drained(other)):
                return side
            if self.waiting[side] and join.held(side) and drained(other) and join.watermark.idle(other, now_s):
                join.reopen(side)
        return None

    def _impression(self, record: Record) -> None:
        impression = self._codec.decode_impression(record.value)
        self._check_time(record, impression.event_time)
        assert record.value is not None
        outcome = self.join.impression(
            record.offset,
            impression.impression_id,
            impression.event_time,
            impression.domain,
            record.timestamp_ms,
            record.value,
        )
        if outcome == "late" and not self.join.replayed(IMPRESSIONS, record.offset):
            problem = (
                f"event_time {impression.event_time} is too far behind the newest; raise joiner.allowed_lateness_ms"
            )
            self._quarantine.put(record, Poison("late", problem), malformed=False)

    def _feedback(self, record: Record) -> None:
        feedback = self._codec.decode_feedback(record.value)
        self._check_time(record, feedback.event_time)
        self.join.feedback(
            record.offset, feedback.impression_id, feedback.objective, feedback.event_time, feedback.value
        )

    def _check_time(self, record: Record, event_ms: int) -> None:
        """An event of the future would move the watermark past everything that is still to come."""
        if event_ms > record.timestamp_ms + self._max_ahead_ms:
            problem = f"event_time {event_ms} is later than its arrival at {record.timestamp_ms} by too much"
            raise Poison("future", problem)

    def _control(self, side: int, record: Record) -> None:
        if record.headers[HEADER_CONTROL] == END_OF_STREAM:
            self.join.end(side, record.offset)
        else:
            self._reject(side, record, Poison("control", f"unknown control {record.headers[HEADER_CONTROL][:64]!r}"))

    def _reject(self, side: int, record: Record, poison: Poison) -> None:
        self.join.skip(side, record.offset)
        if not self.join.replayed(side, record.offset):
            self.poison[side] += 1
            self._quarantine.passed(record.topic, self._good[side])
            self._good[side] = 0
            self._quarantine.put(record, poison)

    def check_progress(self, silent_s: float, stall_timeout_s: float) -> None:
        """Raises Fatal when impressions wait for room that nothing can make."""
        if not (self.waiting[IMPRESSIONS] and self.full()) or (self.join.rebuilding and silent_s < stall_timeout_s):
            return
        watermark, (topic, number) = self.join.watermark, self.partitions[IMPRESSIONS]
        behind = watermark.input_ms(FEEDBACK) < watermark.input_ms(IMPRESSIONS)
        if watermark.ended[FEEDBACK] or not behind:
            why = "the attribution window, lateness and linger hold more impressions than that"
        elif silent_s > stall_timeout_s:
            why = f"no feedback came for {silent_s:.0f} s, so their windows cannot close (or set joiner.idle_timeout_s)"
        else:
            return
        raise Fatal(
            f"{topic}[{number}]: joiner.max_pending = {self._max_pending} impressions wait and none can leave: "
            f"{why}; raise joiner.max_pending"
        )

    def message(self, cut: Cut) -> tuple[bytes, dict[str, bytes]]:
        """Value and headers of one `examples` message."""
        schema = self._codec.schema
        headers = {
            HEADER_FORMAT: b"%d" % FORMAT,
            HEADER_SCHEMA: b"%016x" % schema.fingerprint,
            HEADER_ROWS: b"%d" % len(cut.rows),
            HEADER_SEQ: b"%d" % cut.state.seq,
            HEADER_JOIN: encode_state(cut.state),
        }
        if cut.end:
            return b"", headers | {HEADER_CONTROL: END_OF_STREAM}
        return encode_examples(joined_rows(cut, self._codec), schema, self._compression), headers


def joined_rows(cut: Cut, codec: MessageCodec) -> list[JoinedRow]:
    """The rows of one message, their impressions decoded."""
    decode = codec.decode_impression
    return [JoinedRow(decode(row.value), row.ingest_ms, row.labels, row.window) for row in cut.rows]
