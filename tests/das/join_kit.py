"""An oracle that joins whole logs at once, and a harness that feeds them to a join in any order, with restarts."""

from __future__ import annotations

import random
from collections import defaultdict
from functools import lru_cache
from typing import Any

import msgspec

from das.join import Cut, JoinConfig, PartitionJoin
from das.join_state import FEEDBACK, IMPRESSIONS, JoinState
from das.schema import FeatureSchema

Imp = tuple[str, int, str]
Fb = tuple[str, str, int, float]
Messages = list[list[tuple[str, int, tuple[int | None, ...]]]]
SHARES = {20: 0.5, 90: 0.3, 200: 0.2}


def schema(**changes: Any) -> FeatureSchema:
    """Clicks within 50 ms, buys of domain b within 200 ms."""
    base = {
        "name": "t",
        "domains": ["a", "b"],
        "features": [{"kind": "categorical", "name": "item"}],
        "objectives": [{"name": "click", "window_s": 0.05}, {"name": "buy", "window_s": 0.2, "domains": ["b"]}],
    }
    return FeatureSchema.model_validate(base | changes)


def zipper(shares: dict[int, float]) -> dict[str, Any]:
    return {"salt": "s", "windows": [{"window_s": ms / 1000, "share": share} for ms, share in shares.items()]}


PLAIN = schema()
ZIPPER = schema(zipper=zipper(SHARES))


@lru_cache(maxsize=1000)
def windows(click_ms: int, buy_ms: int, everywhere: bool, shorter: frozenset[int]) -> FeatureSchema:
    """Other windows than PLAIN's; with Zipper if any of `shorter` is below the longer of them."""
    full_ms = max(click_ms, buy_ms)
    several = [*sorted(ms for ms in shorter if ms < full_ms), full_ms]
    buy = {"name": "buy", "window_s": buy_ms / 1000, "domains": ["a", "b"] if everywhere else ["b"]}
    return schema(
        objectives=[{"name": "click", "window_s": click_ms / 1000}, buy],
        zipper=zipper(dict.fromkeys(several, 1 / len(several))) if len(several) > 1 else None,
    )


def config(**changes: object) -> JoinConfig:
    base = {"allowed_lateness_ms": 30, "idle_timeout_s": None, "batch_rows": 4, "linger_ms": 60}
    base |= {"dedup_ms": 100, "max_skew_ms": 0}
    return JoinConfig.model_validate(base | changes)


def window_of(schema: FeatureSchema, name: str) -> int:
    return schema.zipper.assign(name) if schema.zipper else 0


def oracle(imps: list[Imp], fbs: list[Fb], cfg: JoinConfig, schema: FeatureSchema = PLAIN) -> Messages:
    """Messages of (id, window, labels) from the whole logs at once."""
    lateness, accepted, last, newest = cfg.allowed_lateness_ms + 1, [], {}, -(10**9)
    for name, t, domain in imps:
        window = window_of(schema, name)
        passed, newest, end = newest - lateness, max(newest, t), t + schema.windows_ms[window]
        if name in last and last[name] + cfg.dedup_ms > passed:
            last[name] = max(last[name], end)
        elif end > passed:
            accepted.append((name, t, domain, window, end, passed))
            last[name] = max(last.get(name, end), end)
    given: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    newest = -(10**9)
    for name, objective, t, value in fbs:
        if value > 0:
            given[name, objective].append((t, newest - lateness))
        newest = max(newest, t)
    rows = []
    for name, t, domain, window, end, before in accepted:
        labels, decided = [], before + 1
        for o in schema.objectives:
            first_ms, last_ms = t - cfg.max_skew_ms, min(t + o.window_ms, end)
            hits = [max(f, p + 1) for f, p in given[name, o.name] if first_ms <= f <= last_ms and p < end]
            applies = o.domains is None or domain in o.domains
            labels.append(int(bool(hits)) if applies else None)
            decided = max([decided, *hits[:1]]) if applies else decided
        early = cfg.release_positives_early and 1 in labels and 0 not in labels
        rows.append((min(end, decided) if early else end, name, window, tuple(labels)))
    messages: Messages = []
    first = 0
    for release, name, window, labels in sorted(rows):
        if not messages or len(messages[-1]) == cfg.batch_rows or release > first + cfg.linger_ms:
            messages.append([])
            first = release
        messages[-1].append((name, window, labels))
    return messages


class Harness:
    """Feeds logs that end with an end-of-stream to a join, which may lose its memory at any time."""

    def __init__(self, imps: list[Imp], fbs: list[Fb], cfg: JoinConfig, schema: FeatureSchema = PLAIN) -> None:
        self.logs: tuple[list[Imp | None], list[Fb | None]] = ([*imps, None], [*fbs, None])
        self.cfg = cfg
        self.out: list[Cut] = []
        self.schema = schema
        self.join = PartitionJoin(schema, cfg)
        self.now_s = 0.0

    def restart(self) -> None:
        state = None
        if self.out:
            state = msgspec.json.decode(msgspec.json.encode(self.out[-1].state), type=JoinState)
        self.join = PartitionJoin(self.schema, self.cfg, state)

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
            if self.join.at_end and self.join.next == [len(log) for log in self.logs]:
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

    def messages(self) -> Messages:
        return [[(row.value.decode(), row.window, row.labels) for row in cut.rows] for cut in self.out if not cut.end]
