"""The join against its oracle, over random logs, windows, interleavings and restarts."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from join_kit import PLAIN, ZIPPER, Fb, Harness, Imp, config, oracle, window_of, windows

from das.join import JoinConfig
from das.join_state import FEEDBACK, IMPRESSIONS
from das.schema import FeatureSchema

Logs = tuple[list[Imp], list[Fb]]
WINDOWS_MS = (20, 50, 90, 200)
OFFSETS_MS = (-6, -5, 0, 5, 20, 21, 50, 51, 90, 91, 150, 200, 201, 260)
"""Of feedback after its impression: the last moment of every window, and the first after it."""


@st.composite
def logs(draw: st.DrawFn, reuse: bool = False) -> tuple[list[Imp], list[Fb]]:
    """Both logs, each roughly in event-time order with stragglers; impressions up to twice, feedback of no impression.

    The second one has the same event time (a producer that sent again), or any with `reuse`.
    """
    gap_ms = draw(st.integers(0, 25))
    imps: list[tuple[float, Imp]] = []
    fbs: list[tuple[float, Fb]] = []
    jitters = st.integers(0, 120)
    outcomes = st.tuples(
        st.sampled_from(("click", "buy")), st.sampled_from(OFFSETS_MS), jitters, st.sampled_from((1.0, 1.0, 1.0, 0.0))
    )
    rows = st.tuples(
        jitters, st.sampled_from("ab"), st.one_of(st.none(), st.integers(1, 40)), st.lists(outcomes, max_size=3)
    )
    for i, (jitter_ms, domain, again, outcome_list) in enumerate(draw(st.lists(rows, max_size=40))):
        record = (f"i{i}", i * gap_ms + jitter_ms, domain)
        imps.append((i, record))
        if again is not None:
            imps.append((i + again + 0.5, (record[0], draw(st.integers(0, 1000)) if reuse else record[1], domain)))
        for objective, after_ms, place_ms, value in outcome_list:
            t = record[1] + after_ms
            fbs.append((t + place_ms, (record[0] if place_ms != 1 else f"ghost{i}", objective, t, value)))
    return [r for _, r in sorted(imps, key=lambda p: p[0])], [r for _, r in sorted(fbs, key=lambda p: p[0])]


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


# the profile of `make property` (tests/conftest.py) runs more
CASES = settings(
    max_examples=max(600, settings().max_examples), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
FEWER = settings(CASES, max_examples=CASES.max_examples // 4)
seeds = st.integers(0, 2**31)
some_logs = st.one_of(logs(), seeds.map(lambda seed: long_logs(random.Random(seed))))
ms = st.sampled_from(WINDOWS_MS)
schemas = st.builds(windows, ms, ms, st.booleans(), st.frozensets(ms))
configs = st.builds(
    config,
    allowed_lateness_ms=st.sampled_from((30, 0, 100)),
    batch_rows=st.sampled_from((4, 1, 50)),
    linger_ms=st.sampled_from((60, 0)),
    dedup_ms=st.sampled_from((100, 0)),
    max_skew_ms=st.sampled_from((0, 5)),
    release_positives_early=st.booleans(),
)


@CASES
@given(some_logs, schemas, configs, seeds, st.sampled_from((0, 8, 30)))
def test_output_equals_the_oracle_for_any_interleaving_and_restarts(
    records: Logs, schema: FeatureSchema, cfg: JoinConfig, seed: int, restarts: int
) -> None:
    harness = Harness(*records, cfg, schema)
    harness.run(random.Random(seed), restarts)
    assert harness.messages() == oracle(*records, cfg, schema)
    assert [cut.state.seq for cut in harness.out] == list(range(len(harness.out)))
    assert [cut.end for cut in harness.out] == [False] * (len(harness.out) - 1) + [True]


@FEWER
@given(logs(reuse=True), schemas, seeds)
def test_an_id_that_comes_again_inside_the_dedup_window_never_leaves_twice(
    records: Logs, schema: FeatureSchema, seed: int
) -> None:
    harness = Harness(*records, config(dedup_ms=10**9), schema)
    harness.run(random.Random(seed), restarts=8)
    assert harness.messages() == oracle(*records, config(dedup_ms=10**9), schema)


@FEWER
@given(some_logs, schemas, configs, seeds)
def test_every_record_is_counted_once(records: Logs, schema: FeatureSchema, cfg: JoinConfig, seed: int) -> None:
    harness = Harness(*records, cfg, schema)
    harness.run(random.Random(seed))
    totals = {topic: sum(n for (t, _), n in harness.join.counts.items() if t == topic) for topic in
              ("impressions", "feedback")}  # fmt: skip
    assert totals == {"impressions": len(records[0]), "feedback": len(records[1])}
    assert harness.join.counts["impressions", "accepted"] == sum(map(len, harness.messages()))


@pytest.mark.parametrize("early", [False, True])
def test_what_comes_after_an_end_of_stream_leaves_once_and_in_the_same_messages(early: bool) -> None:
    cfg = config(release_positives_early=early, dedup_ms=500)
    for seed in range(300):
        rng = random.Random(seed)
        imps, fbs = long_logs(rng)
        part = rng.random()
        ends = int(part * len(imps)), int(part * len(fbs))
        found = []
        for restarts in (0, 0, 40):
            harness = Harness(imps, fbs, cfg, ZIPPER)
            for side in (IMPRESSIONS, FEEDBACK):
                harness.logs[side].insert(ends[side], None)  # type: ignore[arg-type]
            harness.run(rng, restarts)
            found.append([(cut.state.seq, cut.state.key, [row.value for row in cut.rows]) for cut in harness.out])
        assert found[0] == found[1] == found[2], seed
        keys = [cut.state.key for cut in harness.out]
        assert keys == sorted(keys), seed


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
