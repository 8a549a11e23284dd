"""Attaching logits to messages: a bounded wait for the teacher, then hard labels only, then logits again.

Each partition is HEALTHY or DEGRADED. HEALTHY: a message that the teacher has not reached is waited for. DEGRADED: one
look, no wait. A wait that runs out degrades; a watermark seen to advance, or a store that answers again, heals.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import Field

from das.config import Config
from das.errors import Retryable
from das.logit_block import BlockError, LogitBlock, decode_blocks
from das.logit_store import Fetched, LogitStore
from das.schema import FeatureSchema
from das.telemetry import Telemetry

if TYPE_CHECKING:
    from das.example_source import ExampleMessage

MAX_POLL_S = 0.2
_VIOLATIONS = {"rows": "right_row", "message": "right_row", "peek": "no_peek"}


class LookupConfig(Config):
    """How a student waits for the teacher's logits. The longest stall of one call: wait_ms + two socket timeouts."""

    wait_ms: int = Field(30_000, ge=0, le=600_000)
    """The longest wait per call of `attach`; 0 = never wait, train on labels alone at once."""
    stall_ms: int = Field(5_000, ge=0, le=600_000)
    """Give up waiting when the watermark has not moved, or the store not answered, for this long."""
    poll_ms: int = Field(20, ge=1, le=200)
    """First pause between two looks; it doubles up to 200 ms while nothing moves."""
    retry_ms: int = Field(1_000, ge=1, le=60_000)
    """While the store is away: the pause between two attempts to reach it."""


@dataclass(slots=True)
class _Partition:
    """What was last seen of one partition. `moved_s`: when its watermark last advanced, or a wait for it began."""

    watermark: int = 0
    moved_s: float = 0.0
    degraded: bool = False


@dataclass(slots=True)
class _Call:
    """One call of `attach`: message indices not decided yet, by partition; the answers; why the rest was missed.

    needed: how many messages, from the first, are waited for.
    """

    messages: Sequence[ExampleMessage]
    rows: Sequence[int]
    pending: dict[int, list[int]]
    found: list[LogitBlock | None]
    needed: int
    missed: dict[int, str] = field(default_factory=dict)

    @property
    def waits(self) -> bool:
        """Whether a message that is waited for is not decided."""
        return any(indices[0] < self.needed for indices in self.pending.values())


class LogitLookup:
    """Attaches logit blocks to messages. One thread at a time."""

    def __init__(
        self,
        store: LogitStore,
        schema: FeatureSchema,
        telemetry: Telemetry,
        config: LookupConfig,
        *,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stop` ends every wait at once; `clock` is monotonic seconds."""
        self._store = store
        self._telemetry = telemetry
        self._config = config
        self._stop = stop or threading.Event()
        self._clock = clock
        self._fingerprint = schema.fingerprint
        self._num_heads = len(schema.heads)
        self._partitions: dict[int, _Partition] = {}
        self._away = False
        self._next_try_s = 0.0

    @property
    def degraded(self) -> bool:
        """Whether any partition goes without waiting."""
        return any(p.degraded for p in self._partitions.values())

    def attach(
        self,
        messages: Sequence[ExampleMessage],
        rows: Sequence[int] | None = None,
        *,
        wait_for: int | None = None,
    ) -> list[LogitBlock | None]:
        """The verified block of each message, None where there is none to be had in time.

        `rows`: per message, how many of its rows the caller trains, which is what hits and misses count; None = all.
        `wait_for`: wait for the first so many alone. The answer then ends before the first later message whose logits
        are not there: ask again for what it leaves out. None = all.

        When the stop event is set, the answer may be cut short: messages not decided by then are left out or None, and
        not counted, so do not train on them. Raises Fatal only (wrong credentials, a server that refuses our commands).
        """
        counted = [message.rows.num_rows for message in messages] if rows is None else rows
        assert len(counted) == len(messages)
        call = _Call(messages, counted, {}, [None] * len(messages), len(messages) if wait_for is None else wait_for)
        for index, message in enumerate(messages):
            call.pending.setdefault(message.partition, []).append(index)
        began_s = self._clock()
        for partition in call.pending:
            state = self._partitions.setdefault(partition, _Partition())
            state.moved_s = max(state.moved_s, began_s)
        pause_s = self._config.poll_ms / 1000
        while call.waits:
            moved = self._look(call)
            self._give_up(call, began_s)
            if not call.waits or self._stop.is_set():
                break
            pause_s = self._config.poll_ms / 1000 if moved else min(2 * pause_s, MAX_POLL_S)
            until_s = began_s + self._config.wait_ms / 1000 - self._clock()
            self._stop.wait(max(0.0, min(pause_s, until_s)))
        if wait_for is not None:
            self._cut(call)
        self._count(call, self._clock() - began_s)
        return call.found

    def _cut(self, call: _Call) -> None:
        """End the answer before the first message that is not decided."""
        end = min((indices[0] for indices in call.pending.values()), default=len(call.rows))
        call.rows, call.found, call.pending = call.rows[:end], call.found[:end], {}

    def _look(self, call: _Call) -> bool:
        """One round trip, if it is time for one; takes what is there. Whether a watermark advanced."""
        now_s = self._clock()
        if self._away and now_s < self._next_try_s:
            return False
        wanted = {p: [call.messages[i].offset for i in indices] for p, indices in call.pending.items()}
        try:
            fetched = self._store.fetch_many(wanted)
        except Retryable:
            self._away = True
            self._next_try_s = self._clock() + self._config.retry_ms / 1000
            return False
        if self._away:
            self._away = False
            for state in self._partitions.values():
                state.degraded, state.moved_s = False, now_s
        moved = [self._take(call, partition, answer) for partition, answer in fetched.items()]
        return any(moved)

    def _take(self, call: _Call, partition: int, answer: Fetched) -> bool:
        """Decide what one partition's answer decides. Whether its watermark advanced."""
        state = self._partitions[partition]
        moved = answer.watermark > state.watermark
        if moved:
            state.degraded, state.moved_s = False, self._clock()
        state.watermark = answer.watermark
        left = []
        decoded = iter(decode_blocks([raw for raw in answer.blocks if raw is not None]))
        for index, raw in zip(call.pending[partition], answer.blocks, strict=True):
            if raw is not None:
                self._verify(call, index, next(decoded))
            elif call.messages[index].offset < answer.watermark:
                call.missed[index] = "absent"
            else:
                left.append(index)
        if left:
            call.pending[partition] = left
        else:
            del call.pending[partition]
        return moved

    def _verify(self, call: _Call, index: int, block: LogitBlock | BlockError) -> None:
        """Use a block only if it is whole, of this schema and of exactly this message."""
        message = call.messages[index]
        if isinstance(block, BlockError):
            call.missed[index] = block.reason
            return
        rows, heads = block.logits.shape
        if block.schema_fingerprint != self._fingerprint or heads != self._num_heads:
            call.missed[index] = "schema"
        elif rows != message.rows.num_rows:
            call.missed[index] = "rows"
        elif block.message_checksum != message.checksum:
            call.missed[index] = "message"
        elif block.trained_offset > message.offset:
            call.missed[index] = "peek"
        else:
            call.found[index] = block

    def _give_up(self, call: _Call, began_s: float) -> None:
        """Degrade, and miss what is pending and waited for, where waiting is over."""
        if self._stop.is_set():
            return
        now_s = self._clock()
        out_of_time = now_s - began_s >= self._config.wait_ms / 1000
        for partition, indices in list(call.pending.items()):
            state = self._partitions[partition]
            over = state.degraded or out_of_time or now_s - state.moved_s >= self._config.stall_ms / 1000
            if not over or indices[0] >= call.needed:
                continue
            state.degraded = True
            reason = "store" if self._away else "timeout"
            call.missed.update((index, reason) for index in indices if index < call.needed)
            if later := [index for index in indices if index >= call.needed]:
                call.pending[partition] = later
            else:
                del call.pending[partition]

    def _count(self, call: _Call, waited_s: float) -> None:
        undecided = {i for indices in call.pending.values() for i in indices}
        for index, rows in enumerate(call.rows):
            reason = call.missed.get(index)
            if reason is not None:
                self._telemetry.count("exfm_logit_rows_total", rows, outcome="miss")
                self._telemetry.count("exfm_logit_misses_total", rows, reason=reason)
                if reason in _VIOLATIONS:
                    self._telemetry.count("exfm_invariant_violations_total", 1, invariant=_VIOLATIONS[reason])
            elif index not in undecided:
                self._telemetry.count("exfm_logit_rows_total", rows, outcome="hit")
        self._telemetry.gauge("exfm_lookup_degraded", float(self.degraded))
        self._telemetry.observe("exfm_lookup_wait_seconds", waited_s)
