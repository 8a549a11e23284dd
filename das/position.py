"""Stream positions: a batch is cut from messages by (partition, offset, row)."""

from __future__ import annotations

from typing import NamedTuple


class Position(NamedTuple):
    """The next row to read of one partition: rows before `row` of message `offset` are done."""

    offset: int
    row: int = 0


Positions = dict[int, Position]
"""Position per partition."""
