"""What the join does with each kind of record, and when rows leave. test_join_property.py compares whole logs."""

from __future__ import annotations

import random

import pytest
from join_kit import PLAIN, SHARES, ZIPPER, Fb, Harness, Imp, config, window_of

from das.errors import Fatal
from das.join import PartitionJoin
from das.join_state import FEEDBACK, IMPRESSIONS
from das.schema import FeatureSchema


def test_what_is_read_again_is_not_counted_again() -> None:
    harness = Harness([(f"i{n}", 20 * n, "a") for n in range(60)], [(f"i{n}", "click", 20 * n, 1.0) for n in range(60)],
                      config())  # fmt: skip
    for _ in range(50):
        harness.feed(IMPRESSIONS)
        harness.feed(FEEDBACK)
    harness.cut()
    before = harness.out[-1].state
    assert before.replay[IMPRESSIONS] < before.next[IMPRESSIONS] == 50
    harness.restart()
    harness.run(random.Random(0))
    assert harness.join.counts == {("impressions", "accepted"): 10, ("feedback", "joined"): 10}


def fed(imps: list[Imp], fbs: list[Fb], schema: FeatureSchema = PLAIN, **changes: object) -> Harness:
    harness = Harness(imps, fbs, config(**changes), schema)
    for side, log in ((FEEDBACK, fbs), (IMPRESSIONS, imps)):
        for _ in log:
            harness.feed(side)
    return harness


@pytest.mark.parametrize(
    ("record", "outcome"),
    [
        (("x", "click", 1050, 1.0), "joined"),  # the last moment of the window
        (("x", "click", 1051, 1.0), "late"),
        (("x", "click", 999, 1.0), "early"),
        (("x", "buy", 1010, 1.0), "unknown"),  # not an objective of domain a
        (("y", "click", 1010, 1.0), "orphan"),
        (("x", "click", 1010, 0.0), "joined"),
    ],
)
def test_feedback_policy_by_case(record: Fb, outcome: str) -> None:
    harness = fed([("x", 1000, "a")], [record])
    harness.run(random.Random(0))
    assert harness.join.counts["feedback", outcome] == 1
    assert harness.messages() == [[("x", 0, (int(outcome == "joined" and record[3] > 0), None))]]


@pytest.mark.parametrize(("before_ms", "outcome"), [(1, "joined"), (100, "joined"), (101, "early")])
def test_feedback_by_a_clock_that_is_behind_counts_within_max_skew_ms(before_ms: int, outcome: str) -> None:
    harness = fed([("x", 1000, "a")], [("x", "click", 1000 - before_ms, 1.0)], max_skew_ms=100)
    harness.run(random.Random(0))
    assert harness.join.counts["feedback", outcome] == 1
    assert harness.messages() == [[("x", 0, (int(outcome == "joined"), None))]]


def test_an_event_of_years_ago_is_taken_when_it_is_the_first_and_late_when_it_is_not() -> None:
    years_ms = 5 * 365 * 86_400_000
    imps = [("old", 0, "a"), ("x", years_ms, "a"), ("older", 10, "a")]
    fbs = [("old", "click", 20, 1.0), ("x", "click", years_ms, 1.0), ("x", "click", 30, 1.0)]
    harness = fed(imps, fbs)
    assert harness.join.counts["impressions", "late"] == 1
    harness.run(random.Random(0))
    assert harness.messages() == [[("old", 0, (1, None))], [("x", 0, (1, None))]]
    assert harness.join.counts["feedback", "early"] == 1


def test_an_id_that_comes_back_after_its_row_left_and_dedup_ms_is_another_impression() -> None:
    for again_ms, outcome in ((1330, "duplicate"), (1331, "accepted")):  # 1000 + window + lateness + dedup
        harness = fed([("x", 1000, "a"), ("y", again_ms, "b")], [("q", "click", 1300, 1.0)], linger_ms=0)
        harness.cut()
        assert harness.messages() == [[("x", 0, (0, None))]]
        assert harness.join.impression(2, "x", again_ms, "a", 7, b"x") == outcome


def test_a_clock_that_runs_ahead_makes_others_late_only_beyond_their_window_and_the_lateness() -> None:
    fast = ("fast", 5000, "a")  # the others' clocks say 4770: their windows end after 4969, up to which all is in
    imps = [fast, ("in time", 4770, "a"), ("late", 4769, "a")]
    harness = fed(imps, [("in time", "click", 4780, 1.0)])
    assert harness.join.counts["impressions", "late"] == 1
    harness.run(random.Random(0))
    assert harness.messages() == [[("in time", 0, (1, None))], [("fast", 0, (0, None))]]


def test_first_positive_wins_over_later_and_earlier_contradiction() -> None:
    clicks = [
        ("x", "click", 1001, 0.0),
        ("x", "click", 1002, 1.0),
        ("x", "click", 1003, 0.0),
        ("x", "click", 1004, 1.0),
    ]
    harness = fed([("x", 1000, "a")], clicks)
    harness.run(random.Random(0))
    assert harness.messages() == [[("x", 0, (1, None))]]
    counts = {outcome: n for (topic, outcome), n in harness.join.counts.items() if topic == "feedback"}
    assert counts == {"joined": 2, "contradicting": 1, "duplicate": 1}


def test_a_row_waits_for_both_inputs() -> None:
    harness = fed([("x", 1000, "a"), ("z", 5000, "a")], [("q", "click", 1230, 1.0)])
    harness.cut()
    assert harness.out == []  # feedback up to 1199 is complete: the window closes at 1200
    harness.join.feedback(1, "q", "click", 1231, 1.0)
    harness.cut()  # released, but the message may still grow until 60 ms later
    assert harness.out == []
    harness.join.feedback(2, "q", "click", 1291, 1.0)
    harness.cut()
    assert harness.messages() == [[("x", 0, (0, None))]]


def test_both_silent_inputs_release_everything_with_the_clock() -> None:
    harness = fed([("x", 1000, "a")], [("q", "click", 1000, 1.0)], idle_timeout_s=10)
    for now_s, messages in ((5.0, 0), (10.1, 0), (10.2, 0), (11.0, 1)):
        harness.now_s = now_s
        harness.cut()
        assert len(harness.out) == messages, now_s


def test_silent_feedback_is_left_out_while_impressions_move() -> None:
    harness = fed([("x", 1000, "a")], [], idle_timeout_s=10)
    for offset, now_s in ((1, 5.0), (2, 9.0), (3, 11.0)):
        assert harness.out == []
        harness.now_s = now_s
        harness.join.watermark.active(IMPRESSIONS, now_s)
        harness.join.impression(offset, f"z{offset}", 5000, "a", 7, b"z")
        harness.cut()
    assert harness.messages() == [[("x", 0, (0, None))]]


def test_impressions_after_a_silence_wait_for_feedback_that_is_on_its_way() -> None:
    harness = fed([], [], idle_timeout_s=10)
    harness.now_s = 100.0
    harness.logs[IMPRESSIONS][:0] = [("x", 1000, "a"), ("z", 5000, "a")]
    harness.logs[FEEDBACK][:0] = [("x", "click", 1001, 1.0)]
    for side in (IMPRESSIONS, IMPRESSIONS, FEEDBACK):
        harness.feed(side)
        harness.cut()
        assert harness.out == []
    harness.run(random.Random(0))
    assert harness.messages()[0] == [("x", 0, (1, None))]


def test_memory_is_bounded() -> None:
    join = PartitionJoin(PLAIN, config(max_orphans=50, dedup_max=20, dedup_ms=10**9))
    for i in range(2000):
        join.impression(i, f"i{i}", i * 10, "b", 0, b"")
        join.feedback(2 * i, f"i{i}", "click", i * 10, 1.0)
        join.feedback(2 * i + 1, f"ghost{i}", "click", i * 10, 1.0)
        while join.cut(0.0) is not None:
            continue
    sizes = [len(join.pending), join.num_orphans, len(join.memory.seen[0]), len(join.memory.kept[0])]
    assert all(n <= 120 for n in sizes), sizes


def test_an_end_without_its_counterpart_is_passed_when_reopened_also_after_a_restart() -> None:
    harness = Harness([("x", 1000, "a")], [("q", "click", 9000, 1.0)], config(idle_timeout_s=1))
    harness.logs[IMPRESSIONS].extend([("z", 2000, "a"), None])
    for side in (IMPRESSIONS, IMPRESSIONS, FEEDBACK):
        harness.feed(side)
    assert harness.join.held(IMPRESSIONS)
    harness.join.reopen(IMPRESSIONS)
    harness.feed(IMPRESSIONS)
    harness.cut()
    harness.restart()
    harness.run(random.Random(0))
    assert [name for message in harness.messages() for name, _, _ in message] == ["x", "z"]


def ids_of(window: int, count: int) -> list[str]:
    """Ids that Zipper hashes into a window."""
    return [name for name in map("z{}".format, range(20 * count)) if window_of(ZIPPER, name) == window][:count]


@pytest.mark.parametrize("window", range(3))
def test_under_zipper_a_row_leaves_after_its_own_window_with_what_came_within_it(window: int) -> None:
    (name,), window_ms = ids_of(window, 1), list(SHARES)[window]
    clicks = [(name, "click", 1000 + min(50, window_ms) + after_ms, 1.0) for after_ms in (0, 1)]
    buys = [(name, "buy", 1000 + window_ms + after_ms, 1.0) for after_ms in (0, 1)]
    marker = ("q", "click", 1000 + window_ms + 31, 1.0)
    harness = fed([(name, 1000, "b"), ("q", 9000, "b")], [*clicks, *buys, marker], ZIPPER, linger_ms=0)
    harness.cut()
    assert harness.messages() == [[(name, window, (1, 1))]]
    assert harness.out[0].state.key == (1000 + window_ms, name)
    assert harness.join.counts["feedback", "late"] == 2


def test_under_zipper_feedback_is_late_once_its_log_has_passed_the_rows_own_window() -> None:
    (short,), (long,) = ids_of(0, 1), ids_of(2, 1)
    imps = [(short, 1000, "b"), (long, 1000, "b")]
    harness = fed(imps, [("q", "click", 1051, 1.0), (short, "buy", 1010, 1.0), (long, "buy", 1010, 1.0)], ZIPPER)
    harness.run(random.Random(0))
    assert harness.messages() == [[(short, 0, (0, 0))], [(long, 2, (0, 1))]]


def test_a_row_that_waits_long_keeps_nothing_of_those_that_wait_briefly() -> None:
    briefly, (long, last) = ids_of(0, 100), ids_of(2, 2)
    imps = [(long, 1000, "b"), *((name, 1000 + i, "b") for i, name in enumerate(briefly)), (last, 1190, "b")]
    fbs = [(name, "click", 1000 + i, 1.0) for i, name in enumerate(briefly)]
    harness = fed(imps, [*fbs, (last, "click", 1190, 1.0)], ZIPPER, allowed_lateness_ms=0, dedup_ms=0, linger_ms=0)
    harness.cut()
    join = harness.join
    assert sorted(join.pending) == sorted([long, last])
    assert [len(seen) for seen in join.memory.seen] == [1, 0, 2]  # the last one that left, and those that wait
    assert [len(kept) for kept in join.memory.kept] == [0, 0, 1]


def test_other_windows_are_refused_while_rows_wait_and_taken_after_an_end() -> None:
    harness = fed([("x", 1000, "a"), ("y", 2000, "a")], [("q", "click", 1700, 1.0)])
    harness.cut()
    assert [len(cut.rows) for cut in harness.out] == [1]
    harness.schema = ZIPPER
    with pytest.raises(
        Fatal, match=r"wait, hashed with salt 's': a share of 0.5 20 ms.* it let every impression wait 200 ms"
    ):
        harness.restart()
    harness.schema = PLAIN
    harness.restart()
    harness.run(random.Random(0))
    harness.schema = ZIPPER
    harness.restart()
    harness.logs[IMPRESSIONS].extend([("z", 3000, "a"), None])
    harness.logs[FEEDBACK].append(None)
    harness.run(random.Random(0))
    assert [name for message in harness.messages() for name, _, _ in message] == ["x", "y", "z"]
