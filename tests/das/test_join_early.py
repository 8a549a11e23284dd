"""Early release: a row whose labels are all positive leaves before its window passes, and never a second time."""

from __future__ import annotations

import random

import pytest
from join_kit import PLAIN, Fb, Harness, Imp, config
from pydantic import ValidationError

from das.errors import Fatal
from das.join_state import FEEDBACK, IMPRESSIONS


def early(imps: list[Imp], fbs: list[Fb], **changes: object) -> Harness:
    base: dict[str, object] = {"release_positives_early": True, "allowed_lateness_ms": 0, "linger_ms": 0}
    return Harness(imps, fbs, config(**{**base, **changes}), PLAIN)


def feed(harness: Harness, impressions: int, feedback: int) -> None:
    for side, count in ((IMPRESSIONS, impressions), (FEEDBACK, feedback)):
        for _ in range(count):
            harness.feed(side)
    harness.cut()


def test_a_row_leaves_when_its_last_label_is_positive_and_both_logs_have_passed_that() -> None:
    imps = [("x", 1000, "b"), ("y", 1000, "b"), ("z", 1100, "b")]
    fbs = [("x", "click", 1010, 1.0), ("y", "click", 1010, 1.0), ("x", "buy", 1040, 1.0), ("q", "buy", 1100, 1.0)]
    harness = early(imps, fbs)
    feed(harness, 3, 3)
    assert harness.out == []
    feed(harness, 0, 1)
    assert harness.messages() == [[("x", 0, (1, 1))]]
    assert harness.out[0].state.key == (1040, "x")
    harness.run(random.Random(0))
    assert harness.messages() == [[("x", 0, (1, 1))], [("y", 0, (1, 0))], [("z", 0, (0, 0))]]


def test_off_it_leaves_with_its_window() -> None:
    harness = early([("x", 1000, "a"), ("z", 1300, "a")], [("x", "click", 1010, 1.0)], release_positives_early=False)
    harness.run(random.Random(0))
    assert harness.out[0].state.key == (1200, "x")


def test_a_row_that_left_early_is_not_taken_again_though_its_id_is_forgotten() -> None:
    """With no room for ids, or long after `dedup_ms` by the impressions' own clock."""
    fbs = [("x", "click", 1010, 1.0), ("q", "click", 1160, 1.0)]
    for again_ms, changes in ((1000, {"dedup_max": 0}), (1900, {"dedup_ms": 0})):
        imps = [("x", 1000, "a"), ("w", 950, "a"), ("y", 1800, "b"), ("x", again_ms, "a")]
        harness = early(imps, fbs, **changes)
        feed(harness, 3, 2)
        assert harness.messages() == [[("x", 0, (1, None))], [("w", 0, (0, None))]]
        feed(harness, 1, 0)
        assert harness.join.counts["impressions", "duplicate"] == 1
        harness.restart()
        harness.run(random.Random(0))
        assert harness.messages()[2:] == [[("y", 0, (0, 0))]]


def test_a_row_that_left_early_before_an_end_of_stream_stays_away_after_it() -> None:
    harness = early([("x", 1000, "a")], [("x", "click", 1010, 1.0)])
    harness.run(random.Random(0))
    harness.restart()
    harness.logs[IMPRESSIONS].extend([("y", 1020, "a"), None])
    harness.logs[FEEDBACK].append(None)
    harness.run(random.Random(0))
    assert harness.messages() == [[("x", 0, (1, None))], [("y", 0, (0, None))]]


def test_after_an_end_of_stream_no_row_leaves_before_those_that_left_at_it() -> None:
    harness = early([("x", 1000, "a")], [("q", "click", 1000, 1.0)])
    harness.run(random.Random(0))
    harness.restart()
    harness.logs[IMPRESSIONS].extend([("y", 1010, "a"), None])
    harness.logs[FEEDBACK].extend([("y", "click", 1015, 1.0), None])
    feed(harness, 1, 1)
    harness.run(random.Random(0))
    assert harness.messages() == [[("x", 0, (0, None))], [("y", 0, (1, None))]]
    assert harness.out[-2].state.key == (1201, "y")


def test_it_can_be_turned_on_at_any_time_and_off_at_an_end() -> None:
    imps = [("w", 500, "a"), ("x", 1000, "a"), ("y", 1010, "b"), ("z", 1100, "a")]
    fbs = [("x", "click", 1001, 1.0), ("z", "click", 1105, 1.0), ("q", "buy", 1150, 1.0)]
    harness = early(imps, fbs, release_positives_early=False)
    feed(harness, 4, 3)
    assert harness.messages() == [[("w", 0, (0, None))]]
    harness.cfg = config(release_positives_early=True, allowed_lateness_ms=0, linger_ms=0)
    harness.restart()
    feed(harness, 3, 3)
    harness.restart()
    feed(harness, 4, 3)
    assert harness.messages()[1:] == [
        [("x", 0, (1, None))],
    ]
    harness.cfg = config(allowed_lateness_ms=0, linger_ms=0)
    with pytest.raises(Fatal, match=r"joiner\.release_positives_early was on"):
        harness.restart()
    harness.cfg = config(release_positives_early=True, allowed_lateness_ms=0, linger_ms=0)
    harness.restart()
    harness.run(random.Random(0))
    assert [name for message in harness.messages() for name, _, _ in message] == ["w", "x", "z", "y"]
    harness.cfg = config(allowed_lateness_ms=0, linger_ms=0)
    harness.restart()


def test_rows_that_left_early_take_room_until_their_windows_pass() -> None:
    harness = early(
        [(f"i{n}", 1000 + n, "a") for n in range(100)], [(f"i{n}", "click", 1001 + n, 1.0) for n in range(100)]
    )
    feed(harness, 100, 100)
    assert (len(harness.join.pending), harness.join.num_held) == (2, 100)
    harness.logs[IMPRESSIONS][100:100] = [("y", 1500, "a"), ("z", 1600, "a")]
    harness.logs[FEEDBACK][100:100] = [("y", "click", 1501, 1.0), ("q", "click", 1800, 1.0)]
    feed(harness, 2, 2)
    assert (len(harness.join.pending), harness.join.num_held) == (1, 2)


def test_with_an_idle_timeout_it_is_refused() -> None:
    with pytest.raises(ValidationError, match="idle_timeout_s: null"):
        config(release_positives_early=True, idle_timeout_s=30)
