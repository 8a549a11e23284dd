"""The join of one partition's impressions and feedback: a pure state machine over event time.

What leaves is a function of the two logs alone, however reading them interleaves (while no input is idle):

* An impression's release time is its event time plus the window it is hashed into (das.zipper; the longest without it).
* It is late if its release time is not above its own log's watermark when it is read.
* Feedback counts if it is inside the row's and its objective's window and the row's release time is above the feedback
  log's watermark when the feedback is read. A row leaves when the join watermark reaches its release time, so no
  feedback that counts can come after its row.
* Rows leave in the order (release time, impression id) and are cut into messages by rows, bytes and event time.

So a state rebuilt from the logs continues with the very same messages, and each impression leaves once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from heapq import heappop, heappush
from typing import NamedTuple

import msgspec
from pydantic import Field

from das.config import Config
from das.join_state import BEFORE_ALL, FEEDBACK, IMPRESSIONS, JoinState, ReleaseKey
from das.schema import FeatureSchema
from das.watermark import SIDES, JoinWatermark


class JoinConfig(Config):
    """Times in event-time milliseconds; `linger_ms` bounds the span of one message's release times."""

    allowed_lateness_ms: int = Field(60_000, ge=0)
    idle_timeout_s: float | None = Field(30.0, gt=0)  # None: never; the output then depends on the input alone
    batch_rows: int = Field(256, ge=1, le=65_536)
    batch_bytes: int = Field(4 << 20, ge=1024)  # of impressions as they were read
    linger_ms: int = Field(60_000, ge=0)
    dedup_ms: int = Field(600_000, ge=0)
    dedup_max: int = Field(1_000_000, ge=0)
    max_orphans: int = Field(200_000, ge=1)


class Pending(msgspec.Struct, gc=False):
    """An impression that waits for its window, an index into `schema.windows_ms`. `value` is its message as read."""

    event_time: int
    window: int
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


class _Seen(msgspec.Struct, gc=False):
    """An accepted id: where it was read, the greatest event time before it, the last release time under this id."""

    offset: int
    before_ms: int
    release_ms: int


class _Kept(NamedTuple):
    """Feedback that is read again on recovery; `before_ms` is the greatest event time before it."""

    offset: int
    before_ms: int
    impression_id: str


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
        self._zipper = schema.zipper
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
        # by window, each in the order read: what waits long must not keep what waits briefly
        self._seen: list[OrderedDict[str, _Seen]] = [OrderedDict() for _ in self._windows_ms]
        self._kept_feedback: list[deque[_Kept]] = [deque() for _ in self._windows_ms]
        self._orphans: OrderedDict[str, list[_Given]] = OrderedDict()
        self.next = [0, 0]
        self._recovered_next, self._recovered_key = (0, 0), BEFORE_ALL
        self._key, self._seq, self._ends = BEFORE_ALL, 0, [0, 0]
        if state is not None:
            self.next = list(state.replay)
            self.watermark.max_event_ms = list(state.replay_max_ms)
            self._recovered_next, self._recovered_key = state.next, state.key
            self._key, self._seq, self._ends = state.key, state.seq + 1, list(state.ends)
            # an end that is read again says so itself
            self.watermark.ended = [state.ended[side] and state.replay[side] == state.next[side] for side in SIDES]

    @property
    def rebuilding(self) -> bool:
        """Whether records from before the saved state are still to be read again; until then nothing leaves."""
        return self.next[IMPRESSIONS] < self._recovered_next[IMPRESSIONS] or (
            self.next[FEEDBACK] < self._recovered_next[FEEDBACK]
        )

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
        left = again and key <= self._recovered_key
        seen = self._seen[window].get(impression_id)
        if seen is not None and (impression_id in self.pending or seen.release_ms + self._config.dedup_ms > passed_ms):
            seen.release_ms = max(seen.release_ms, key.release_ms)
            outcome = "duplicate"
        elif key.release_ms <= passed_ms or (key <= self._key and not left):
            outcome = "late"
        else:
            outcome = "accepted"
            seen = self._seen[window].setdefault(impression_id, _Seen(offset, before_ms, key.release_ms))
            seen.release_ms = max(seen.release_ms, key.release_ms)
            if not left:
                self._wait(key, Pending(event_time, window, domain, ingest_ms, value))
        if not again:
            self.counts["impressions", outcome] += 1
        return outcome

    def _window(self, impression_id: str) -> int:
        return self._zipper.assign(impression_id) if self._zipper else 0

    def _wait(self, key: ReleaseKey, row: Pending) -> None:
        self.pending[key.impression_id] = row
        heappush(self._heap, key)
        if self._ready and key < self._ready[-1]:
            for ready in self._ready:
                heappush(self._heap, ready)
            self._ready.clear()
        for given in self._orphans.pop(key.impression_id, ()):
            self.num_orphans -= 1
            self._label(row, given)

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
            keep = self._label(row, given) == "joined" and given.positive
        elif impression_id in self._seen[window]:
            self._count(given, "late")
            keep = False
        else:
            self._orphans.setdefault(impression_id, []).append(given)
            self.num_orphans += 1
            keep = True
            while self.num_orphans > self._config.max_orphans:
                self._drop_oldest_orphans()
        if keep:
            self._kept_feedback[window].append(_Kept(offset, before_ms, impression_id))

    def _label(self, row: Pending, given: _Given) -> str:
        """Apply feedback to its pending impression; returns and counts what became of it."""
        bit = 1 << given.objective
        after_ms = given.event_time - row.event_time
        if not self._applies[row.domain][given.objective]:
            outcome = "unknown"
        elif after_ms < 0:
            outcome = "early"
        elif (
            after_ms > self._limits_ms[row.window][given.objective]
            or row.event_time + self._windows_ms[row.window] <= given.passed_ms
        ):
            outcome = "late"
        elif row.positive & bit:
            outcome = "duplicate" if given.positive else "contradicting"
        elif given.positive:
            outcome = "joined"
            row.positive |= bit
        else:
            outcome = "duplicate" if row.negative & bit else "joined"
            row.negative |= bit
        self._count(given, outcome)
        return outcome

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
            ready.append(heappop(self._heap))
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
        labels = tuple(
            (row.positive >> k) & 1 if applies else None for k, applies in enumerate(self._applies[row.domain])
        )
        return ReleasedRow(row.value, row.ingest_ms, labels, row.window)

    def _hand_on_end(self) -> None:
        while self._orphans:
            self._drop_oldest_orphans()
        self._ends = list(self.next)
        self.watermark.restart()

    def _forget(self) -> None:
        """Drop what no later record can need, so that memory and the records to read again stay bounded."""
        passed_ms = self.watermark.input_ms(IMPRESSIONS)
        while self._orphans:  # no impression that feedback could belong to would still be accepted
            impression_id, given = next(iter(self._orphans.items()))
            if max(g.event_time for g in given) + self._windows_ms[self._window(impression_id)] > passed_ms:
                break
            self._drop_oldest_orphans()
        for kept in self._kept_feedback:
            while kept and kept[0].impression_id not in self.pending and kept[0].impression_id not in self._orphans:
                kept.popleft()
        for seen in self._seen:
            while seen and not self._needed(*next(iter(seen.items())), passed_ms):
                seen.popitem(last=False)
        for _ in range(sum(map(len, self._seen)) - self._config.dedup_max - len(self.pending)):
            first = [(next(iter(seen.items())), seen) for seen in self._seen if seen]
            left = [(entry.offset, seen) for (name, entry), seen in first if name not in self.pending]
            if not left:
                break
            min(left, key=lambda pair: pair[0])[1].popitem(last=False)

    def _needed(self, impression_id: str, seen: _Seen, passed_ms: int) -> bool:
        """Whether a record of this id would still be told to be a duplicate."""
        again = seen.release_ms + self._config.dedup_ms > passed_ms or seen.release_ms >= self._key.release_ms
        return again or impression_id in self.pending

    def _state(self, first_release_ms: int) -> JoinState:
        """The state after everything that left so far."""
        replay, before_ms = list(self.next), list(self.watermark.max_event_ms)
        first = [next(iter(seen.values())) for seen in self._seen if seen]
        if first:
            oldest = min(first, key=lambda seen: seen.offset)
            replay[IMPRESSIONS], before_ms[IMPRESSIONS] = oldest.offset, oldest.before_ms
        given = [kept[0] for kept in self._kept_feedback if kept]
        if given:
            replay[FEEDBACK], before_ms[FEEDBACK], _ = min(given)
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
        )
        self._seq += 1
        return state
