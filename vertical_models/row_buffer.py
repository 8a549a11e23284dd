"""Rows between the stream and the optimizer, cut into batches by stream position.

Messages are consumed in the order they were delivered. A partition's position is the next row that was not trained:
everything before it was (or was not this student's), whatever the order in which partitions are merged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from das.position import Position, Positions
from foundation_model.batch import Batch
from vertical_models.objective import TeacherTargets


@dataclass(frozen=True, slots=True)
class Segment:
    """A student's rows of one message.

    rows: their indices in the message, rising. batch and teacher: the rows, encoded; None if there are no rows.
    had_logits: whether a block was attached.
    """

    partition: int
    offset: int
    rows: list[int]
    batch: Batch | None
    teacher: TeacherTargets | None
    had_logits: bool


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """What one step trains on. teacher is None for students that do not read logits.

    source: (partition, offset, row) of each row, in batch order.
    """

    batch: Batch
    teacher: TeacherTargets | None
    source: list[tuple[int, int, int]]


@dataclass(slots=True)
class _Pending:
    segment: Segment
    used: int = 0


@dataclass(slots=True)
class RowBuffer:
    """A queue of segments. `positions` starts where the snapshot ended and moves with `cut`."""

    positions: Positions
    _queue: deque[_Pending] = field(default_factory=deque)
    _rows: int = 0

    def __len__(self) -> int:
        return self._rows

    def add(self, segment: Segment) -> None:
        """Append the next message's rows."""
        self._queue.append(_Pending(segment))
        self._rows += len(segment.rows)
        self._drop_finished()

    def cut(self, count: int) -> TrainingBatch:
        """Take the next `count` rows, 1 <= count <= len(self), and move the positions past them."""
        assert 0 < count <= self._rows, f"cut {count} of {self._rows} rows"
        batches: list[Batch] = []
        teachers: list[TeacherTargets] = []
        source: list[tuple[int, int, int]] = []
        left = count
        while left:
            pending = self._queue[0]
            segment, start = pending.segment, pending.used
            stop = min(start + left, len(segment.rows))
            if stop > start:
                assert segment.batch is not None
                batches.append(segment.batch.slice(start, stop))
                if segment.teacher is not None:
                    teachers.append(segment.teacher.slice(start, stop))
                source.extend((segment.partition, segment.offset, row) for row in segment.rows[start:stop])
                self.positions[segment.partition] = Position(segment.offset, segment.rows[stop - 1] + 1)
            pending.used = stop
            left -= stop - start
            self._drop_finished()
        self._rows -= count
        return TrainingBatch(Batch.concat(batches), TeacherTargets.concat(teachers), source)

    def decisions(self) -> Tensor:
        """Whether each message still here has logits: int64 (M, 3) of partition, offset, 0 or 1."""
        rows = [(p.segment.partition, p.segment.offset, int(p.segment.had_logits)) for p in self._queue]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)

    def _drop_finished(self) -> None:
        while self._queue and self._queue[0].used == len(self._queue[0].segment.rows):
            segment = self._queue.popleft().segment
            self.positions[segment.partition] = Position(segment.offset + 1, 0)


def decided_misses(decisions: Tensor) -> frozenset[tuple[int, int]]:
    """The (partition, offset) of messages that were found to have no logits; the inverse of `RowBuffer.decisions`."""
    return frozenset((partition, offset) for partition, offset, had in decisions.tolist() if not had)


def start_row(positions: Mapping[int, Position], partition: int, offset: int) -> int:
    """The first row of a message that is still to be trained; -1 if the message is behind the position."""
    position = positions.get(partition, Position(0))
    if offset < position.offset:
        return -1
    return position.row if offset == position.offset else 0
