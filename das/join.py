"""The join of one partition's impressions and feedback: a pure state machine over event time.

What leaves is a function of the two logs alone, however reading them interleaves (while no input is idle):

* An impression's release time is its event time plus the window it is hashed into (das.zipper; the longest without it).
* It is late if its release time is not above its own log's watermark when it is read.
* Feedback counts if it is inside the row's and its objective's window and the row's release time is above the feedback
  log's watermark when the feedback is read. A row leaves when the join watermark reaches its release time, so no
  feedback that counts can come after its row.
* With `release_positives_early`, a row whose labels are all positive leaves as soon as the join watermark reaches what
  both logs show on their own: the times of the feedback that decided it, the feedback log's watermark before each, and
  the impression log's before the impression. That is above any join watermark there was before the row was decided.
* Rows leave in the order (release time, impression id) and are cut into messages by rows, bytes and event time.

So a state rebuilt from the logs continues with the very same messages, and each impression leaves once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from heapq import heappop, heappush
from typing import Self

import msgspec
from pydantic import Field, model_validator

from das.config import Config
from das.join_memory import JoinMemory, Seen
from das.join_state import BEFORE_ALL, FEEDBACK, IMPRESSIONS, NEVER_MS, JoinState, ReleaseKey
from das.schema import FeatureSchema
from das.watermark import SIDES, JoinWatermark


class JoinConfig(Config):
    """Times in event-time milliseconds; `linger_ms` bounds the span of one message's release times."""

    allowed_lateness_ms: int = Field(60_000, ge=0)
    idle_timeout_s: float | None = Field(30.0, gt=0)  # None: never; the output then depends on the input alone
    batch_rows: int = Field(256, ge=1, le=65_536)
    batch_bytes: int = Field(4 << 20, ge=1024)  # of impressions as they were read
    linger_ms: int = Field(60_000, ge=0)
    max_skew_ms: int = Field(1000, ge=0)  # how far feedback may lie before its impression: two clocks
    dedup_ms: int = Field(600_000, ge=0)
    dedup_max: int = Field(1_000_000, ge=0)
    max_orphans: int = Field(200_000, ge=1)
    release_positives_early: bool = False  # biases what is trained on towards positives: docs/join.md

    def reread_ms(self, schema: FeatureSchema) -> int:
        """The span of event time that a restarted join reads again, while both logs keep pace."""
        return schema.max_window_ms + self.allowed_lateness_ms + max(self.dedup_ms, self.linger_ms)

    @model_validator(mode="after")
    def _early_release_needs_the_logs_alone(self) -> Self:
        if self.release_positives_early and self.idle_timeout_s is not None:
            raise ValueError(
                "release_positives_early needs idle_timeout_s: null, so that what leaves follows from the logs alone"
            )
        return self


class Pending(msgspec.Struct, gc=False):
    """An impression that waits for its window, an index into `schema.windows_ms`. `value` is its message as read."""

    event_time: int
    window: int
    release_ms: int  # as things stand
    decided_ms: int  # not to leave before, however it is labeled
    domain: str
    ingest_ms: int
    value: bytes
    positive: int = 0  # one bit per objective
    negative: int = 0


class ReleasedRow(msgspec.Struct, frozen=True, gc=False):
    """A row that leaves: the impression as it was read, its labels within `window` in objective order, final."""

    value: bytes
    ingest_ms: int
    labels: tuple[int | None, ...]
    window: int


class Cut(msgspec.Struct, frozen=True):
    """One message: its rows (none at the end of the stream) and the state to recover from."""

    rows: list[ReleasedRow]
    state: JoinState
    end: bool


class _Given(msgspec.Struct, frozen=True, gc=False):
    """One feedback record; `passed_ms` is the feedback log's watermark before it."""

    objective: int
    event_time: int
    positive: bool
    passed_ms: int
    counted: bool


class PartitionJoin:
    """State of one partition; see the module. `counts` holds ("impressions" | "feedback", outcome) since last taken."""

    def __init__(self, schema: FeatureSchema, config: JoinConfig, state: JoinState | None = None) -> None:
        self._config = config
        self._zipper, self._waits = schema.zipper, schema.waits
        self._windows_ms = schema.windows_ms
        self._limits_ms = [[min(o.window_ms, ms) for o in schema.objectives] for ms in schema.windows_ms]
        self._objectives = {o.name: k for k, o in enumerate(schema.objectives)}
        self._applies = {
            d: tuple(o.domains is None or d in o.domains for o in schema.objectives) for d in schema.domains
        }
        self.watermark = JoinWatermark(config.allowed_lateness_ms, config.idle_timeout_s)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.num_orphans = 0
        self.pending: dict[str, Pending] = {}
        self._heap: list[ReleaseKey] = []
        self._ready: list[ReleaseKey] = []
        self.memory = JoinMemory(len(self._windows_ms), config.dedup_ms, config.dedup_max)
        self._orphans: OrderedDict[str, list[_Given]] = OrderedDict()
        self.next = [0, 0]
        self._recovered_next, self._recovered_key = (0, 0), BEFORE_ALL
        self._key, self._seq, self._ends = BEFORE_ALL, 0, [0, 0]
        self._early_after_ms = NEVER_MS if config.release_positives_early else None
        if state is not None:
            self.next = list(state.replay)
            self.watermark.max_event_ms = list(state.replay_max_ms)
            self._recovered_next, self._recovered_key = state.next, state.key
            self._key, self._seq, self._ends = state.key, state.seq + 1, list(state.ends)
            self._early_after_ms = state.resume(self._waits, early=config.release_positives_early)
            # an end that is read again says so itself
            self.watermark.ended = [state.ended[side] and state.replay[side] == state.next[side] for side in SIDES]

    @property
    def rebuilding(self) -> bool:
        """Whether records from before the saved state are still to be read again; until then nothing leaves."""
        return self.next[IMPRESSIONS] < self._recovered_next[IMPRESSIONS] or (
            self.next[FEEDBACK] < self._recovered_next[FEEDBACK]
        )

    @property
    def num_held(self) -> int:
        """Impressions that take room: those that wait, and those that left before their windows passed."""
        return len(self.pending) + len(self.memory.early)

    @property
    def at_end(self) -> bool:
        """Whether the last thing read of both inputs was an end-of-stream that was handed on."""
        return self.next == self._ends != [0, 0]

    def replayed(self, side: int, offset: int) -> bool:
        """Whether this record was read before the saved state."""
        return offset < self._recovered_next[side]

    def held(self, side: int) -> bool:
        """Whether an input must wait: it has ended, and the end was not handed on."""
        return self.watermark.ended[side]

    def skip(self, side: int, offset: int) -> None:
        """Pass a record that is not part of the join."""
        self.next[side] = offset + 1

    def end(self, side: int, offset: int) -> None:
        """Pass an end-of-stream; when both inputs have ended, `cut` lets everything leave and hands the end on."""
        self.next[side] = offset + 1
        if offset >= self._ends[side] and offset + 1 >= self._recovered_next[side]:
            self.watermark.ended[side] = True

    def reopen(self, side: int) -> None:
        """Go on past an end-of-stream without the other input's."""
        self.watermark.ended[side] = False

    def impression(
        self, offset: int, impression_id: str, event_time: int, domain: str, ingest_ms: int, value: bytes
    ) -> str:
        """Take one impression; accepted, duplicate or late."""
        passed_ms = self.watermark.input_ms(IMPRESSIONS)
        before_ms = self.watermark.max_event_ms[IMPRESSIONS]
        self.next[IMPRESSIONS] = offset + 1
        self.watermark.saw(IMPRESSIONS, event_time)
        window = self._window(impression_id)
        key = ReleaseKey(event_time + self._windows_ms[window], impression_id)
        again = self.replayed(IMPRESSIONS, offset)
        left = again and (key <= self._recovered_key or offset < self._ends[IMPRESSIONS])
        known = self.memory.seen[window]
        seen = known.get(impression_id)
        if seen is not None and (
            impression_id in self.pending or self.memory.is_repeated(impression_id, seen, passed_ms)
        ):
            seen.release_ms = max(seen.release_ms, key.release_ms)
            outcome = "duplicate"
        elif key.release_ms <= passed_ms or (key <= self._key and not left):
            outcome = "late"
        else:
            outcome = "accepted"
            seen = known.setdefault(impression_id, Seen(offset, before_ms, key.release_ms))
            seen.release_ms = max(seen.release_ms, key.release_ms)
            if not left:
                row = Pending(event_time, window, key.release_ms, passed_ms + 1, domain, ingest_ms, value)
                self._wait(key, row)
        if not again:
            self.counts["impressions", outcome] += 1
        return outcome

    def _window(self, impression_id: str) -> int:
        return self._zipper.assign(impression_id) if self._zipper else 0

    def _wait(self, key: ReleaseKey, row: Pending) -> None:
        self.pending[key.impression_id] = row
        self._push(key)
        for given in self._orphans.pop(key.impression_id, ()):
            self.num_orphans -= 1
            self._label(key.impression_id, row, given)

    def _push(self, key: ReleaseKey) -> None:
        heappush(self._heap, key)
        if self._ready and key < self._ready[-1]:
            for ready in self._ready:
                heappush(self._heap, ready)
            self._ready.clear()

    def feedback(self, offset: int, impression_id: str, objective: str, event_time: int, value: float) -> None:
        """Take one feedback record: label its impression, or keep it until the impression is read."""
        passed_ms = self.watermark.input_ms(FEEDBACK)
        before_ms = self.watermark.max_event_ms[FEEDBACK]
        self.next[FEEDBACK] = offset + 1
        self.watermark.saw(FEEDBACK, event_time)
        counted = not self.replayed(FEEDBACK, offset)
        given = _Given(self._objectives[objective], event_time, value > 0, passed_ms, counted)
        row, window = self.pending.get(impression_id), self._window(impression_id)
        if row is not None:
            keep = self._label(impression_id, row, given) == "joined" and given.positive
        elif impression_id in self.memory.seen[window]:
            self._count(given, "late")
            keep = False
        else:
            self._orphans.setdefault(impression_id, []).append(given)
            self.num_orphans += 1
            keep = True
            while self.num_orphans > self._config.max_orphans:
                self._drop_oldest_orphans()
        if keep:
            self.memory.keep(window, offset, before_ms, impression_id)

    def _label(self, impression_id: str, row: Pending, given: _Given) -> str:
        """Apply feedback to its pending impression; returns and counts what became of it."""
        bit = 1 << given.objective
        after_ms = given.event_time - row.event_time
        if not self._applies[row.domain][given.objective]:
            outcome = "unknown"
        elif after_ms < -self._config.max_skew_ms:
            outcome = "early"
        elif after_ms > self._limits_ms[row.window][given.objective] or row.release_ms <= given.passed_ms:
            outcome = "late"
        elif row.positive & bit:
            outcome = "duplicate" if given.positive else "contradicting"
        elif given.positive:
            outcome = "joined"
            row.positive |= bit
            if self._early_after_ms is not None:
                self._decide(impression_id, row, given)
        else:
            outcome = "duplicate" if row.negative & bit else "joined"
            row.negative |= bit
        self._count(given, outcome)
        return outcome

    def _decide(self, impression_id: str, row: Pending, given: _Given) -> None:
        """A row whose labels are all positive leaves early, or, if it is read again, has left."""
        assert self._early_after_ms is not None
        row.decided_ms = max(row.decided_ms, given.event_time, given.passed_ms + 1, self._early_after_ms + 1)
        missing = any(applies and not (row.positive >> k) & 1 for k, applies in enumerate(self._applies[row.domain]))
        if missing or row.decided_ms >= row.release_ms:
            return
        row.release_ms = row.decided_ms
        key = ReleaseKey(row.release_ms, impression_id)
        if key <= self._recovered_key:
            del self.pending[impression_id]
            self.memory.left_early(self._full_key(impression_id, row))
        else:
            self._push(key)

    def _full_key(self, impression_id: str, row: Pending) -> ReleaseKey:
        return ReleaseKey(row.event_time + self._windows_ms[row.window], impression_id)

    def _count(self, given: _Given, outcome: str) -> None:
        if given.counted:
            self.counts["feedback", outcome] += 1

    def _drop_oldest_orphans(self) -> None:
        for given in self._orphans.popitem(last=False)[1]:
            self.num_orphans -= 1
            self._count(given, "orphan")

    def cut(self, now_s: float) -> Cut | None:
        """The next message, if it is complete. Call until None."""
        reached_ms = self.watermark.advance(now_s)
        if self.rebuilding:
            return None
        config, ready = self._config, self._ready
        while self._heap and self._heap[0].release_ms <= reached_ms and len(ready) <= config.batch_rows:
            key = heappop(self._heap)
            row = self.pending.get(key.impression_id)
            if row is not None and row.release_ms == key.release_ms:  # else it leaves, or has left, early
                ready.append(key)
        num_rows = self._message_rows(reached_ms)
        if num_rows == 0 and (ready or not all(self.watermark.ended)):
            self._forget()
            return None
        keys = ready[:num_rows]
        del ready[:num_rows]
        rows = [self._release(key) for key in keys]
        end = not keys
        if end:
            self._hand_on_end()
        else:
            self._key = keys[-1]
        self._forget()
        first_ms = keys[0].release_ms if keys else self._key.release_ms
        return Cut(rows, self._state(first_ms), end)

    def _message_rows(self, reached_ms: int) -> int:
        """How many of the ready rows make the next message; 0 while more could belong to it."""
        config, ready = self._config, self._ready
        if not ready:
            return 0
        last_ms = ready[0].release_ms + config.linger_ms
        size_bytes = 0
        for n, key in enumerate(ready):
            size_bytes += len(self.pending[key.impression_id].value)
            if n == config.batch_rows or key.release_ms > last_ms or (n and size_bytes > config.batch_bytes):
                return n
        complete = len(ready) == config.batch_rows or reached_ms >= last_ms
        return len(ready) if complete else 0

    def _release(self, key: ReleaseKey) -> ReleasedRow:
        row = self.pending.pop(key.impression_id)
        full = self._full_key(key.impression_id, row)
        if key != full:
            self.memory.left_early(full)
        labels = tuple(
            (row.positive >> k) & 1 if applies else None for k, applies in enumerate(self._applies[row.domain])
        )
        return ReleasedRow(row.value, row.ingest_ms, labels, row.window)

    def _hand_on_end(self) -> None:
        while self._orphans:
            self._drop_oldest_orphans()
        self._ends = list(self.next)
        if self._early_after_ms is not None:
            self._early_after_ms = self._key.release_ms
        self.watermark.restart()

    def _forget(self) -> None:
        """Drop what no later record can need, so that memory and the records to read again stay bounded."""
        passed_ms = self.watermark.input_ms(IMPRESSIONS)
        while self._orphans:  # no impression that feedback could belong to would still be accepted
            impression_id, given = next(iter(self._orphans.items()))
            newest_ms = max(g.event_time for g in given) + self._config.max_skew_ms
            if newest_ms + self._windows_ms[self._window(impression_id)] > passed_ms:
                break
            self._drop_oldest_orphans()
        self.memory.forget(self._key, passed_ms, self.pending, len(self.pending), self._orphans)

    def _state(self, first_release_ms: int) -> JoinState:
        """The state after everything that left so far."""
        replay, before_ms = self.memory.replay(self.next, self.watermark.max_event_ms)
        state = JoinState(
            seq=self._seq,
            key=self._key,
            first_release_ms=first_release_ms,
            last_release_ms=self._key.release_ms,
            next=(self.next[IMPRESSIONS], self.next[FEEDBACK]),
            replay=(replay[IMPRESSIONS], replay[FEEDBACK]),
            replay_max_ms=(before_ms[IMPRESSIONS], before_ms[FEEDBACK]),
            ends=(self._ends[IMPRESSIONS], self._ends[FEEDBACK]),
            ended=(self.watermark.ended[IMPRESSIONS], self.watermark.ended[FEEDBACK]),
            waits=self._waits,
            early_after_ms=self._early_after_ms,
        )
        self._seq += 1
        return state
