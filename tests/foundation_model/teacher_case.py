"""A small stream with real learnable structure, and a teacher over it, shared by the teacher's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from das.examples import JoinedRow, encode_examples
from das.messages import MessageCodec
from das.schema import FeatureSchema
from foundation_model.trainer import TeacherConfig

START_MS = 1_650_000_000_000
SCHEMA = FeatureSchema.parse(
    {
        "name": "shop",
        "domains": ["0", "1"],
        "objectives": [{"name": "click", "window_s": 60}, {"name": "like", "window_s": 60, "domains": ["1"]}],
        "features": [
            {"kind": "categorical", "name": "user_id"},
            {"kind": "categorical", "name": "item", "table": "item_id"},
            {"kind": "categorical", "name": "tag", "dtype": "string", "nullable": True},
            {"kind": "numeric", "name": "duration_ms", "transform": "log1p"},
            {"kind": "numeric", "name": "score", "nullable": True, "transform": "standardize", "mean": 5, "std": 2},
            {
                "kind": "sequence",
                "name": "clicks",
                "event": "click",
                "max_length": 8,
                "fields": [{"name": "item", "table": "item_id"}, {"name": "tag", "dtype": "string"}],
            },
        ],
    }
)
TEACHER: dict[str, Any] = {
    "name": "kunlun",
    "device": "cpu",
    "tables": {"default_buckets": 64, "buckets": {"item_id": 200}},
    "model": {"preset": "small", "num_layers": 2, "head_hidden": [16], "wukong_hidden": 16, "embedding_dim": 8},
    "optimizer": {"lr": 3e-3},
    "snapshot_every_messages": 6,
}


def teacher_config(**changes: Any) -> TeacherConfig:
    """The test teacher, with changes."""
    return TeacherConfig.parse(TEACHER | changes)


def rows(count: int, seed: int = 0) -> list[JoinedRow]:
    """Joined rows in time order; a click is likely for even items, and likes exist in domain 1 only."""
    codec, rng = MessageCodec(SCHEMA), np.random.default_rng(seed)
    return [_row(codec, rng, i, seed) for i in range(count)]


def _row(codec: MessageCodec, rng: np.random.Generator, i: int, seed: int) -> JoinedRow:
    now_ms, domain, item = START_MS + 1000 * i, str(rng.integers(2)), int(rng.integers(40))
    past = int(rng.integers(0, 6))
    features = {
        "user_id": int(rng.integers(-5, 2**62)) if rng.random() < 0.1 else int(rng.integers(20)),
        "item": item,
        "tag": None if rng.random() < 0.2 else f"t{item % 7}",
        "duration_ms": float(rng.integers(0, 100_000)),
        "score": None if rng.random() < 0.2 else float(rng.normal(5, 2)),
        "clicks": {
            "item": [int(x) for x in rng.integers(0, 40, past)],
            "tag": [f"t{x}" for x in rng.integers(0, 7, past)],
            "time_ms": [now_ms - 1000 * (past - j) for j in range(past)],
        },
    }
    value = {"impression_id": f"{seed}-{i}", "event_time": now_ms, "domain": domain, "features": features}
    click = int(rng.random() < (0.8 if item % 2 == 0 else 0.2))
    like = int(rng.random() < 0.3) if domain == "1" else None
    return JoinedRow(codec.impression(value), now_ms + 5, (click, like))


def messages(count: int, rows_each: int = 16, seed: int = 0) -> Iterator[bytes]:
    """Values of `examples` messages."""
    everything = rows(count * rows_each, seed)
    for i in range(count):
        yield encode_examples(everything[i * rows_each : (i + 1) * rows_each], SCHEMA)
