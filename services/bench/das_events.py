"""The synthetic stream of `exfm bench das`: about 30 columns, shaped like a short-video or shop log."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from das.schema import FeatureSchema

START_MS = 1_650_000_000_000
STEP_MS = 10
"""Event time between impressions."""
CLICK_SHARE, BUY_SHARE = 0.2, 0.05
OBJECTIVES = [{"name": "click", "window_s": 10}, {"name": "buy", "window_s": 60}]
NUM_IDS, NUM_WORDS, NUM_NUMBERS, NULLABLE = 14, 4, 10, 2
SEQUENCE_LENGTH = 10


def schema(*, sequence: bool) -> FeatureSchema:
    """14 ids, 4 strings and 10 numbers (two of which may be missing); `sequence` adds one of 3 columns."""
    features: list[dict[str, Any]] = [{"kind": "categorical", "name": f"id{i}"} for i in range(NUM_IDS)]
    features += [{"kind": "categorical", "name": f"word{i}", "dtype": "string"} for i in range(NUM_WORDS)]
    for i in range(NUM_NUMBERS):
        features.append({"kind": "numeric", "name": f"number{i}", "transform": "log1p", "nullable": i < NULLABLE})
    if sequence:
        fields = [{"name": "id0"}, {"name": "id1"}]
        clicks = {"kind": "sequence", "name": "clicks", "event": "click", "max_length": 50, "fields": fields}
        features.append(clicks)
    data = {"name": "bench", "domains": ["feed", "search"], "objectives": OBJECTIVES, "features": features}
    return FeatureSchema.model_validate(data)


def impressions(count: int, *, sequence: bool) -> Iterator[dict[str, Any]]:
    """Impressions in event-time order, always the same ones."""
    rng = random.Random(1)
    for n in range(count):
        now_ms = START_MS + STEP_MS * n
        features: dict[str, Any] = {f"id{i}": rng.randrange(10 ** (2 + i % 6)) for i in range(NUM_IDS)}
        features |= {f"word{i}": f"w{rng.randrange(5 * 10**i % 400 + 5)}" for i in range(NUM_WORDS)}
        for i in range(NUM_NUMBERS):
            missing = i < NULLABLE and rng.random() < 0.1
            features[f"number{i}"] = None if missing else round(rng.expovariate(0.01), 3)
        if sequence:
            length = rng.randrange(2 * SEQUENCE_LENGTH + 1)
            past_ms = sorted(now_ms - rng.randrange(1, 10**8) for _ in range(length))
            clicks = {f"id{i}": [rng.randrange(10**5) for _ in range(length)] for i in range(2)}
            features["clicks"] = clicks | {"time_ms": past_ms}
        domain = "search" if n % 4 == 0 else "feed"
        yield {"impression_id": f"i{n:012d}", "event_time": now_ms, "domain": domain, "features": features}


def feedback(count: int) -> Iterator[dict[str, Any]]:
    """The outcomes of those impressions, in event-time order."""
    rng = random.Random(2)
    found = []
    for n in range(count):
        for objective, share, most_ms in (("click", CLICK_SHARE, 9_000), ("buy", BUY_SHARE, 50_000)):
            if rng.random() < share:
                found.append((START_MS + STEP_MS * n + rng.randrange(100, most_ms), n, objective))
    for time_ms, n, objective in sorted(found):
        yield {"impression_id": f"i{n:012d}", "objective": objective, "event_time": time_ms, "value": 1}
