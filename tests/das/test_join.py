"""The join against a small oracle, over random logs, interleavings and restarts."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from das.join import Cut, JoinConfig, PartitionJoin
from das.join_state import FEEDBACK, IMPRESSIONS, JoinState
from das.schema import FeatureSchema

SCHEMA = FeatureSchema.model_validate(
    {
        "name": "t",
        "domains": ["a", "b"],
        "features": [{"kind": "categorical", "name": "item"}],
        "objectives": [{"name": "click", "window_s": 0.05}, {"name": "buy", "window_s": 0.2, "domains": ["b"]}],
    }
)
WINDOW_MS = 200
Imp = tuple[str, int, str]
Fb = tuple[str, str, int, float]


def config(**changes: object) -> JoinConfig:
    base = {"allowed_lateness_ms": 30, "idle_timeout_s": None, "batch_rows": 4, "linger_ms": 60, "dedup_ms": 100}
    return JoinConfig.model_validate(base | changes)


def oracle(imps: list[Imp], fbs: list[Fb], cfg: JoinConfig) -> list[list[tuple[str, tuple[int | None, ...]]]]:
    """Messages of (id, labels) from the whole logs at once."""
    lateness, accepted, last, newest = cfg.allowed_lateness_ms + 1, [], {}, -(10**9)
    for name, t, domain in imps:
        passed, newest, release = newest - lateness, max(newest, t), t + WINDOW_MS
        if name in last and last[name] + cfg.dedup_ms > passed:
            last[name] = max(last[name], release)
        elif release > passed:
            accepted.append((release, name, t, domain))
            last[name] = max(last.get(name, release), release)
    accepted.sort()
    clicks, newest = [], -(10**9)
    for name, objective, t, value in fbs:
        clicks.append((name, objective, t, value, newest - lateness))
        newest = max(newest, t)
    messages, first = [], None
    for release, name, t, domain in accepted:
        labels: list[int | None] = []
        for objective, window, domains in (("click", 50, "ab"), ("buy", 200, "b")):
            hit = any(
                n == name and o == objective and v > 0 and t <= f <= t + window and release > passed
                for n, o, f, v, passed in clicks
            )
            labels.append(int(hit) if domain in domains else None)
        if first is None or len(messages[-1]) == cfg.batch_rows or release > first + cfg.linger_ms:
            messages.append([])
            first = release
        messages[-1].append((name, tuple(labels)))
    return messages


class Harness:
    """Feeds logs that end with an end-of-stream to a join, which may lose its memory at any time."""

    def __init__(self, imps: list[Imp], fbs: list[Fb], cfg: JoinConfig) -> None:
        self.logs: tuple[list[Imp | None], list[Fb | None]] = ([*imps, None], [*fbs, None])
        self.cfg = cfg
        self.out: list[Cut] = []
        self.join = PartitionJoin(SCHEMA, cfg)
        self.now_s = 0.0

    def restart(self) -> None:
        state = None
        if self.out:
            state = msgspec.json.decode(msgspec.json.encode(self.out[-1].state), type=JoinState)
        self.join = PartitionJoin(SCHEMA, self.cfg, state)

    def readable(self, side: int) -> bool:
        return self.join.next[side] < len(self.logs[side]) and not self.join.held(side)

    def feed(self, side: int) -> None:
        join, offset = self.join, self.join.next[side]
        record = self.logs[side][offset]
        join.watermark.active(side, self.now_s)
        if record is None:
            join.end(side, offset)
        elif side == IMPRESSIONS:
            join.impression(offset, record[0], record[1], record[2], 7, record[0].encode())
        else:
            join.feedback(offset, *record)

    def cut(self) -> None:
        while (message := self.join.cut(self.now_s)) is not None:
            self.out.append(message)

    def run(self, rng: random.Random, restarts: int = 0) -> None:
        for _ in range(100_000):
            if self.join.at_end:
                return
            sides = [side for side in (IMPRESSIONS, FEEDBACK) if self.readable(side)]
            side = rng.choice(sides) if sides else None
            for _ in range(rng.choice((1, 1, 2, 5, 20))):
                if side is not None and self.readable(side):
                    self.feed(side)
            if rng.random() < 0.7 or not sides:
                self.cut()
            if restarts and rng.random() < 0.15:
                restarts -= 1
                self.restart()
        raise AssertionError("the end was never handed on")

    def messages(self) -> list[list[tuple[str, tuple[int | None, ...]]]]:
        return [[(row.value.decode(), row.labels) for row in cut.rows] for cut in self.out if not cut.end]


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


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(impressions(), feedback, st.integers(0, 25), st.integers(0, 2**31), st.booleans())
def test_output_equals_the_oracle_for_any_interleaving_and_restarts(
    imps: list[Imp], fbs: list[Fb], gap_ms: int, seed: int, restarts: bool
) -> None:
    harness = Harness(imps, spread(fbs, gap_ms), config())
    harness.run(random.Random(seed), restarts=8 if restarts else 0)
    assert harness.messages() == oracle(imps, spread(fbs, gap_ms), config())
    assert [cut.state.seq for cut in harness.out] == list(range(len(harness.out)))
    assert [cut.end for cut in harness.out] == [False] * (len(harness.out) - 1) + [True]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(impressions(reuse=True), feedback, st.integers(0, 25), st.integers(0, 2**31))
def test_an_id_that_comes_again_inside_the_dedup_window_never_leaves_twice(
    imps: list[Imp], fbs: list[Fb], gap_ms: int, seed: int
) -> None:
    harness = Harness(imps, spread(fbs, gap_ms), config(dedup_ms=10**9))
    harness.run(random.Random(seed), restarts=8)
    assert harness.messages() == oracle(imps, spread(fbs, gap_ms), config(dedup_ms=10**9))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(impressions(), feedback, st.integers(0, 25), st.integers(0, 2**31))
def test_every_record_is_counted_once(imps: list[Imp], fbs: list[Fb], gap_ms: int, seed: int) -> None:
    harness = Harness(imps, spread(fbs, gap_ms), config())
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


@pytest.mark.parametrize("block", range(6))
def test_long_logs_with_many_restarts_equal_the_oracle(block: int) -> None:
    for seed in range(100 * block, 100 * (block + 1)):
        rng = random.Random(seed)
        imps, fbs = long_logs(rng)
        harness = Harness(imps, fbs, config())
        harness.run(rng, restarts=30)
        assert harness.messages() == oracle(imps, fbs, config()), seed


@pytest.mark.parametrize("block", range(4))
def test_each_impression_leaves_once_even_when_idle_inputs_are_left_out(block: int) -> None:
    for seed in range(100 * block, 100 * (block + 1)):
        rng = random.Random(seed)
        imps, fbs = long_logs(rng)
        imps = list({imp[0]: imp for imp in imps}.values())
        harness = Harness(imps, fbs, config(idle_timeout_s=0.02, batch_rows=rng.choice((1, 4, 50))))
        refused = run_with_silences(harness, rng)
        keys = [cut.state.key for cut in harness.out if not cut.end]
        times = {name: t for name, t, _ in imps}
        out = [(times[name] + WINDOW_MS, name) for message in harness.messages() for name, _ in message]
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


def fed(imps: list[Imp], fbs: list[Fb], **changes: object) -> Harness:
    harness = Harness(imps, fbs, config(**changes))
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
    assert harness.messages() == [[("x", (int(outcome == "joined" and record[3] > 0), None))]]


def test_first_positive_wins_over_later_and_earlier_contradiction() -> None:
    clicks = [
        ("x", "click", 1001, 0.0),
        ("x", "click", 1002, 1.0),
        ("x", "click", 1003, 0.0),
        ("x", "click", 1004, 1.0),
    ]
    harness = fed([("x", 1000, "a")], clicks)
    harness.run(random.Random(0))
    assert harness.messages() == [[("x", (1, None))]]
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
    assert harness.messages() == [[("x", (0, None))]]


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
    assert harness.messages() == [[("x", (0, None))]]


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
    assert harness.messages()[0] == [("x", (1, None))]


def test_memory_is_bounded() -> None:
    join = PartitionJoin(SCHEMA, config(max_orphans=50, dedup_max=20, dedup_ms=10**9))
    for i in range(2000):
        join.impression(i, f"i{i}", i * 10, "b", 0, b"")
        join.feedback(2 * i, f"i{i}", "click", i * 10, 1.0)
        join.feedback(2 * i + 1, f"ghost{i}", "click", i * 10, 1.0)
        while join.cut(0.0) is not None:
            continue
    sizes = [len(join.pending), join.num_orphans, len(join._seen), len(join._kept_feedback)]
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
    assert [name for message in harness.messages() for name, _ in message] == ["x", "z"]
