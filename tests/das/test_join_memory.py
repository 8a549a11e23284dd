"""What the state of a join takes is what the docs say."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from join_kit import PLAIN, config

from das.join import PartitionJoin

PAGE = Path(__file__).parents[2] / "docs" / "join.md"
COUNT = 20_000
T0_MS = 1_700_000_000_000


def ident(n: int) -> str:
    return f"impression-{n:021d}"


def impressions(join: PartitionJoin) -> None:
    for n in range(COUNT):
        join.impression(10**6 + n, ident(n), T0_MS + n, "b", T0_MS + 10**6 + n, bytes(100))


def feedback(join: PartitionJoin) -> None:
    for n in range(COUNT):
        join.feedback(5 * 10**6 + n, ident(n), "buy", T0_MS + n, 1.0)


def leave(join: PartitionJoin) -> None:
    for side in (0, 1):
        join.watermark.saw(side, T0_MS + COUNT + 10**6)
    while join.cut(0.0) is not None:
        continue


def grown(join: PartitionJoin, fill: Callable[[PartitionJoin], None]) -> float:
    """Bytes that stay allocated, per record."""
    tracemalloc.start()
    fill(join)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return size / COUNT


def documented(row: str) -> int:
    """The bytes of one row of the table."""
    (found,) = re.findall(rf"^\| {row} \| [^|]* \| (?:m \+ )?(\d+) \|", PAGE.read_text(), re.M)
    return int(found)


@pytest.mark.parametrize(
    ("row", "before", "fill", "of_message"),
    [
        ("impressions that wait", [], impressions, 100),
        ("positive feedback of those", [impressions], feedback, 0),
        ("feedback without impression", [], feedback, 0),
    ],
)
def test_the_documented_bytes_are_those_allocated_and_some_for_the_allocator(
    row: str, before: list[Callable[[PartitionJoin], None]], fill: Callable[[PartitionJoin], None], of_message: int
) -> None:
    join = PartitionJoin(PLAIN, config())
    for step in before:
        step(join)
    measured = grown(join, fill) - of_message
    assert measured < documented(row) < 1.4 * measured


def test_the_documented_bytes_of_an_id_are_those_that_stay_when_rows_leave() -> None:
    join = PartitionJoin(PLAIN, config(dedup_ms=10**9))
    tracemalloc.start()
    impressions(join)
    leave(join)
    measured = tracemalloc.get_traced_memory()[0] / COUNT
    tracemalloc.stop()
    assert not join.pending
    assert measured < documented("ids of rows that left") < 1.4 * measured
