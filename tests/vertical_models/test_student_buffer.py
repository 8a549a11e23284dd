"""Batches are cut by stream position: every row once, and positions that a resume can rely on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from das.position import Position
from foundation_model.batch import Batch
from vertical_models.objective import TeacherTargets
from vertical_models.row_buffer import RowBuffer, Segment, decided_misses, start_row

Message = tuple[int, int, list[int]]
"""Partition, offset, the student's rows."""


def _batch(message: Message) -> Batch:
    """Rows that carry their own place in the stream."""
    partition, offset, rows = message
    place = torch.tensor([[partition, offset, row] for row in rows])
    return Batch(
        cat_BC=place,
        num_BN=place.float(),
        seqs={},
        labels_BK=torch.zeros(len(rows), 1),
        label_mask_BK=torch.ones(len(rows), 1, dtype=torch.bool),
        domain_B=torch.zeros(len(rows), dtype=torch.int64),
        event_time_ms_B=np.array(rows, np.int64),
        ingest_time_ms_B=np.array(rows, np.int64),
    )


def _segment(message: Message, first: int = 0) -> Segment:
    partition, offset, rows = message
    rows = [row for row in rows if row >= first]
    if not rows:
        return Segment(partition, offset, [], None, None, True)
    batch = _batch((partition, offset, rows))
    mask = torch.ones(len(rows), 1, dtype=torch.bool)
    teacher = TeacherTargets(batch.num_BN[:, 1:2] * 100 + batch.num_BN[:, 2:], mask, mask[:, 0])
    return Segment(partition, offset, rows, batch, teacher, offset % 3 != 0)


@st.composite
def _streams(draw: st.DrawFn) -> list[Message]:
    """Messages of up to three partitions in some merged order, some without any row of the student's."""
    offsets = [0, 0, 0]
    stream = []
    for partition in draw(st.lists(st.integers(0, 2), min_size=1, max_size=12)):
        rows = sorted(draw(st.sets(st.integers(0, 9), max_size=6)))
        stream.append((partition, offsets[partition], rows))
        offsets[partition] += draw(st.integers(1, 2))  # offsets may have gaps
    return stream


def _rows(stream: list[Message]) -> list[tuple[int, int, int]]:
    return [(partition, offset, row) for partition, offset, rows in stream for row in rows]


@settings(max_examples=200, deadline=None)
@given(_streams(), st.integers(1, 9))
def test_every_row_is_cut_once_in_order_with_its_own_data(stream: list[Message], size: int) -> None:
    buffer, seen = RowBuffer({}), []
    for message in stream:
        buffer.add(_segment(message))
        while len(buffer) >= size:
            item = buffer.cut(size)
            assert item.batch.num_rows == size
            assert [tuple(place) for place in item.batch.cat_BC.tolist()] == item.source
            assert item.teacher is not None
            assert item.teacher.logits_BK[:, 0].tolist() == [100 * offset + row for _, offset, row in item.source]
            seen += item.source
    if len(buffer):
        seen += buffer.cut(len(buffer)).source
    assert seen == _rows(stream)
    last = {partition: offset for partition, offset, _ in stream}
    assert buffer.positions == {partition: Position(offset + 1) for partition, offset in last.items()}


@settings(max_examples=200, deadline=None)
@given(_streams(), st.integers(1, 9), st.integers(0, 5))
def test_a_resume_from_any_batch_boundary_goes_on_with_the_same_batches(
    stream: list[Message], size: int, cuts: int
) -> None:
    buffer, golden = RowBuffer({}), []
    at_cut: dict[int, dict[int, Position]] = {0: {}}
    for message in stream:
        buffer.add(_segment(message))
        while len(buffer) >= size:
            golden.append(buffer.cut(size).source)
            at_cut[len(golden)] = dict(buffer.positions)
    done = min(cuts, len(golden))
    resumed, batches = RowBuffer(dict(at_cut[done])), golden[:done]
    for partition, offset, rows in stream:
        first = start_row(at_cut[done], partition, offset)
        if first >= 0:
            resumed.add(_segment((partition, offset, rows), first))
        while len(resumed) >= size:
            batches.append(resumed.cut(size).source)
    assert batches == golden


def test_a_position_never_passes_a_row_that_was_not_trained() -> None:
    buffer = RowBuffer({0: Position(0), 1: Position(0)})
    buffer.add(_segment((0, 0, [0, 1, 2, 3])))
    buffer.add(_segment((1, 0, [])))
    buffer.add(_segment((0, 1, [5])))
    buffer.cut(3)
    assert buffer.positions == {0: Position(0, 3), 1: Position(0)}
    buffer.cut(1)
    assert buffer.positions == {0: Position(1), 1: Position(1)}
    buffer.cut(1)
    assert buffer.positions == {0: Position(2), 1: Position(1)}


def test_messages_without_rows_move_the_position_when_nothing_waits_before_them() -> None:
    buffer = RowBuffer({0: Position(7)})
    for offset in (7, 8, 11):
        buffer.add(_segment((0, offset, [])))
    assert buffer.positions == {0: Position(12)}
    assert len(buffer) == 0


def test_decisions_name_the_messages_still_here_and_come_back() -> None:
    buffer = RowBuffer({})
    for offset in range(1, 5):
        buffer.add(_segment((2, offset, [0, 1])))
    buffer.cut(3)
    assert buffer.decisions().tolist() == [[2, 2, 1], [2, 3, 0], [2, 4, 1]]
    assert decided_misses(buffer.decisions()) == {(2, 3)}
    assert decided_misses(RowBuffer({}).decisions()) == frozenset()


@pytest.mark.parametrize(("offset", "row"), [(3, -1), (4, 6), (5, 0)])
def test_where_a_message_begins_after_a_resume(offset: int, row: int) -> None:
    assert start_row({0: Position(4, 6)}, 0, offset) == row
    assert start_row({}, 0, offset) == 0
