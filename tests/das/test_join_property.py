"""The join against its oracle, over random logs, windows, interleavings and restarts."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from join_kit import PLAIN, ZIPPER, Fb, Harness, Imp, config, oracle, window_of

from das.join_state import FEEDBACK, IMPRESSIONS
from das.schema import FeatureSchema

ids = st.integers(0, 40).map("i{}".format)
feedback = st.lists(
    st.tuples(ids, st.sampled_from(("click", "buy")), st.integers(-20, 330), st.sampled_from((1.0, 0.0))), max_size=40
)
fresh = st.lists(
    st.tuples(st.integers(0, 120), st.sampled_from("ab"), st.one_of(st.none(), st.integers(1, 40))), max_size=40
)


@st.composite
def impressions(draw: st.DrawFn, reuse: bool = False) -> list[Imp]:
    """A log roughly in event-time order with stragglers, and each record up to twice.

    The second one has the same event time (a producer that sent again), or any with `reuse`.
    """
    gap_ms = draw(st.integers(0, 25))
    placed: list[tuple[float, Imp]] = []
    for i, (jitter, domain, again) in enumerate(draw(fresh)):
        record = (f"i{i}", i * gap_ms + jitter, domain)
        placed.append((i, record))
        if again is not None:
            t = draw(st.integers(0, 1000)) if reuse else record[1]
            placed.append((i + again + 0.5, (record[0], t, domain)))
    return [record for _, record in sorted(placed, key=lambda p: p[0])]


def spread(records: list[Fb], gap_ms: int) -> list[Fb]:
    """Move feedback on in time by its place in the log."""
    return [(name, objective, t + i * gap_ms, value) for i, (name, objective, t, value) in enumerate(records)]


# the named profile of tests/conftest.py runs more, as `make property` does
CASES = settings(
    max_examples=max(300, settings().max_examples), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
FEWER = settings(CASES, max_examples=CASES.max_examples // 3)
schemas = st.sampled_from((PLAIN, ZIPPER))


@CASES
@given(schemas, impressions(), feedback, st.integers(0, 25), st.integers(0, 2**31), st.booleans())
def test_output_equals_the_oracle_for_any_interleaving_and_restarts(
    schema: FeatureSchema, imps: list[Imp], fbs: list[Fb], gap_ms: int, seed: int, restarts: bool
) -> None:
    harness = Harness(imps, spread(fbs, gap_ms), config(), schema)
    harness.run(random.Random(seed), restarts=8 if restarts else 0)
    assert harness.messages() == oracle(imps, spread(fbs, gap_ms), config(), schema)
    assert [cut.state.seq for cut in harness.out] == list(range(len(harness.out)))
    assert [cut.end for cut in harness.out] == [False] * (len(harness.out) - 1) + [True]


@FEWER
@given(schemas, impressions(reuse=True), feedback, st.integers(0, 25), st.integers(0, 2**31))
def test_an_id_that_comes_again_inside_the_dedup_window_never_leaves_twice(
    schema: FeatureSchema, imps: list[Imp], fbs: list[Fb], gap_ms: int, seed: int
) -> None:
    harness = Harness(imps, spread(fbs, gap_ms), config(dedup_ms=10**9), schema)
    harness.run(random.Random(seed), restarts=8)
    assert harness.messages() == oracle(imps, spread(fbs, gap_ms), config(dedup_ms=10**9), schema)


@FEWER
@given(schemas, impressions(), feedback, st.integers(0, 25), st.integers(0, 2**31))
def test_every_record_is_counted_once(
    schema: FeatureSchema, imps: list[Imp], fbs: list[Fb], gap_ms: int, seed: int
) -> None:
    harness = Harness(imps, spread(fbs, gap_ms), config(), schema)
    harness.run(random.Random(seed))
    totals = {topic: sum(n for (t, _), n in harness.join.counts.items() if t == topic) for topic in
              ("impressions", "feedback")}  # fmt: skip
    assert totals == {"impressions": len(imps), "feedback": len(fbs)}
    assert harness.join.counts["impressions", "accepted"] == sum(map(len, harness.messages()))


def long_logs(rng: random.Random) -> tuple[list[Imp], list[Fb]]:
    """Longer logs than hypothesis builds, dense in what restarts could get wrong: stragglers and repeats."""
    count, gap_ms, jitter_ms = rng.randrange(120), rng.choice((1, 5, 15, 40)), rng.choice((0, 20, 120, 400))
    feedback_share, ghosts = rng.choice((0.0, 0.1, 0.8)), rng.choice((0, 10))
    imps: list[tuple[float, Imp]] = []
    fbs: list[tuple[int, Fb]] = []
    for i in range(count):
        record = (f"i{i}", i * gap_ms + rng.randrange(jitter_ms + 1), rng.choice("ab"))
        imps.append((i, record))
        while rng.random() < 0.15:
            imps.append((i + rng.choice((0.5, 3.5, 30.5)), record))
        while rng.random() < feedback_share * 0.6:
            t = record[1] + rng.choice((-5, 0, 10, 50, 51, 150, 200, 201, 260, 500))
            place = t + rng.choice((0, 0, 0, -300, 200, rng.randrange(jitter_ms + 1)))
            fbs.append((place, (record[0], rng.choice(("click", "buy")), t, rng.choice((1.0, 1.0, 0.0)))))
    for i in range(ghosts):
        t = rng.randrange(count * gap_ms + 200)
        fbs.append((t, (f"ghost{i}", "click", t, 1.0)))
    return [r for _, r in sorted(imps, key=lambda p: p[0])], [r for _, r in sorted(fbs, key=lambda p: p[0])]


@pytest.mark.parametrize("schema", [PLAIN, ZIPPER], ids=["one window", "zipper"])
@pytest.mark.parametrize("block", range(4))
def test_long_logs_with_many_restarts_equal_the_oracle(block: int, schema: FeatureSchema) -> None:
    for seed in range(100 * block, 100 * (block + 1)):
        rng = random.Random(seed)
        imps, fbs = long_logs(rng)
        harness = Harness(imps, fbs, config(), schema)
        harness.run(rng, restarts=30)
        assert harness.messages() == oracle(imps, fbs, config(), schema), seed


@pytest.mark.parametrize("schema", [PLAIN, ZIPPER], ids=["one window", "zipper"])
@pytest.mark.parametrize("block", range(3))
def test_each_impression_leaves_once_even_when_idle_inputs_are_left_out(block: int, schema: FeatureSchema) -> None:
    for seed in range(100 * block, 100 * (block + 1)):
        rng = random.Random(seed)
        imps, fbs = long_logs(rng)
        imps = list({imp[0]: imp for imp in imps}.values())
        harness = Harness(imps, fbs, config(idle_timeout_s=0.02, batch_rows=rng.choice((1, 4, 50))), schema)
        refused = run_with_silences(harness, rng)
        keys = [cut.state.key for cut in harness.out if not cut.end]
        times = {name: t + schema.windows_ms[window_of(schema, name)] for name, t, _ in imps}
        out = [(times[name], name) for message in harness.messages() for name, _, _ in message]
        assert out == sorted(set(out)), seed
        assert {name for _, name in out} | refused == set(times), seed
        assert {name for _, name in out} & refused == set(), seed
        assert keys == sorted(keys), seed


def run_with_silences(harness: Harness, rng: random.Random, restarts: int = 20) -> set[str]:
    """Feed in bursts with pauses that make inputs idle; returns the ids that were refused as late."""
    refused: set[str] = set()
    while not harness.join.at_end:
        harness.now_s += rng.choice((0.0, 0.001, 0.05, 0.3))
        side = rng.choice((IMPRESSIONS, FEEDBACK))
        for _ in range(rng.choice((1, 5, 20))):
            if harness.readable(side):
                before, offset = harness.join.counts["impressions", "late"], harness.join.next[side]
                harness.feed(side)
                if harness.join.counts["impressions", "late"] > before:
                    refused.add(harness.logs[IMPRESSIONS][offset][0])
            if rng.random() < 0.3:
                harness.cut()
        if restarts and rng.random() < 0.1:
            restarts -= 1
            harness.restart()
    return refused
