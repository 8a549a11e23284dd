"""A small stream with real learnable structure, and students over it, shared by the students' tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from das.examples import JoinedRow, encode_examples, example_batch
from das.messages import MessageCodec
from das.schema import FeatureSchema
from foundation_model.batch import Batch
from vertical_models.config import StudentConfig
from vertical_models.objective import TeacherTargets
from vertical_models.row_buffer import TrainingBatch
from vertical_models.trainer import StudentTrainer

START_MS = 1_650_000_000_000
SCHEMA = FeatureSchema.parse(
    {
        "name": "shop",
        "domains": ["feed", "search", "mail"],
        "objectives": [{"name": "click", "window_s": 60}, {"name": "like", "window_s": 60, "domains": ["feed"]}],
        "features": [
            {"kind": "categorical", "name": "user_id"},
            {"kind": "categorical", "name": "item"},
            {"kind": "categorical", "name": "tag", "dtype": "string", "nullable": True},
            {"kind": "numeric", "name": "price", "transform": "log1p"},
            {"kind": "numeric", "name": "score", "nullable": True, "transform": "standardize", "mean": 5, "std": 2},
            {
                "kind": "sequence",
                "name": "clicks",
                "event": "click",
                "max_length": 8,
                "fields": [{"name": "item"}, {"name": "tag", "dtype": "string"}],
            },
        ],
    }
)
STUDENT: dict[str, Any] = {
    "name": "vm",
    "objectives": ["click", "like"],
    "tables": {"default_buckets": 64},
    "inputs": {"history": 5},
    "backbone": {"hidden": [16], "cross_rank": 4},
    "batch_rows": 32,
}
OFFSET_MS = 5
"""From a row's event time to its ingest time."""


def student_config(**changes: Any) -> StudentConfig:
    """The test student, with changes."""
    return StudentConfig.parse(STUDENT | changes)


def rows(count: int, seed: int = 0) -> list[JoinedRow]:
    """Joined rows in time order; a click is likely for even items; likes exist in one domain only."""
    codec, rng = MessageCodec(SCHEMA), np.random.default_rng(seed)
    return [_row(codec, rng, i, seed) for i in range(count)]


def _row(codec: MessageCodec, rng: np.random.Generator, i: int, seed: int) -> JoinedRow:
    now_ms, item, past = START_MS + 1000 * i, int(rng.integers(40)), int(rng.integers(0, 9))
    domain = str(rng.choice(SCHEMA.domains, p=[0.55, 0.4, 0.05]))
    features = {
        "user_id": int(rng.integers(20)),
        "item": item,
        "tag": None if rng.random() < 0.2 else f"t{item % 7}",
        "price": float(rng.integers(0, 1000)),
        "score": None if rng.random() < 0.2 else float(rng.normal(5, 2)),
        "clicks": {
            "item": [int(x) for x in rng.integers(0, 40, past)],
            "tag": [f"t{x}" for x in rng.integers(0, 7, past)],
            "time_ms": [now_ms - 60_000 * (past - j) for j in range(past)],
        },
    }
    value = {"impression_id": f"{seed}-{i}", "event_time": now_ms, "domain": domain, "features": features}
    click = int(rng.random() < (0.8 if item % 2 == 0 else 0.2))
    like = int(rng.random() < 0.3) if domain == "feed" else None
    return JoinedRow(codec.impression(value), now_ms + OFFSET_MS, (click, like))


def record_batch(count: int, seed: int = 0) -> pa.RecordBatch:
    """The rows as one record batch with all columns."""
    return example_batch(rows(count, seed), SCHEMA)


def messages(count: int, rows_each: int, seed: int = 0) -> list[bytes]:
    """Values of `examples` messages."""
    everything = rows(count * rows_each, seed)
    return [encode_examples(everything[i * rows_each : (i + 1) * rows_each], SCHEMA) for i in range(count)]


def teacher_of(batch: Batch, seed: int = 0) -> TeacherTargets:
    """Logits for every row and objective of a batch; nothing masked."""
    logits = torch.randn(batch.labels_BK.shape, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(batch.label_mask_BK)
    return TeacherTargets(logits, mask, mask[:, 0])


def train(trainer: StudentTrainer, steps: int, *, seed: int = 0, distill: bool = True) -> None:
    """Train on `steps` batches of the stream with random teacher logits."""
    size = trainer.config.batch_rows
    whole = trainer.encoder.encode(record_batch(steps * size, seed))
    for step in range(steps):
        batch = whole.slice(step * size, (step + 1) * size)
        teacher = teacher_of(batch, seed=step) if distill and trainer.config.distillation.reads_logits else None
        trainer.train(TrainingBatch(batch, teacher, []))
