"""What ExFM says about served and auxiliary heads, on a toy stream: rows of user x item with a known click rate.

The signs are those of the paper's section 3: a teacher helps both kinds of student; a biased one ruins the calibration
of a student that serves the head it distils into, and leaves that of a student with an auxiliary head alone.
"""

from __future__ import annotations

from functools import cache
from statistics import fmean

import numpy as np
import pytest
import torch

from das.schema import FeatureSchema
from foundation_model.batch import Batch
from foundation_model.metrics import PortfolioMetrics
from vertical_models.config import StudentConfig
from vertical_models.objective import TeacherTargets
from vertical_models.row_buffer import TrainingBatch
from vertical_models.trainer import StudentTrainer

SEEDS = (0, 1, 2, 3)
STEPS, ROWS, USERS, ITEMS, RANK = 100, 128, 60, 60, 4
BIAS = 0.7
SCHEMA = FeatureSchema.parse(
    {
        "name": "toy",
        "domains": ["a"],
        "objectives": [{"name": "click", "window_s": 1}],
        "features": [{"kind": "categorical", "name": "user"}, {"kind": "categorical", "name": "item"}],
    }
)


def _stream(seed: int) -> tuple[Batch, torch.Tensor]:
    """All rows, and the true logit of each."""
    rng = np.random.default_rng(seed)
    users, items = rng.normal(size=(USERS, RANK)), rng.normal(size=(ITEMS, RANK))
    count = STEPS * ROWS
    user, item = rng.integers(USERS, size=count), rng.integers(ITEMS, size=count)
    logits = (users[user] * items[item]).sum(1) * 0.7 - 2.0
    labels = rng.random(count) < 1 / (1 + np.exp(-logits))
    batch = Batch(
        cat_BC=torch.from_numpy(np.stack([1 + user, 101 + item], 1)),
        num_BN=torch.zeros(count, 0),
        seqs={},
        labels_BK=torch.from_numpy(labels[:, None].astype(np.float32)),
        label_mask_BK=torch.ones(count, 1, dtype=torch.bool),
        domain_B=torch.zeros(count, dtype=torch.int64),
        event_time_ms_B=np.arange(count),
        ingest_time_ms_B=np.arange(count),
    )
    return batch, torch.from_numpy(logits[:, None].astype(np.float32))


@cache
def _learn(seed: int, mode: str, weight: float, bias: float) -> PortfolioMetrics:
    """Progressive metrics of the last half of the stream."""
    config = StudentConfig.parse(
        {
            "name": "toy",
            "objectives": ["click"],
            "tables": {"default_buckets": 100},
            "backbone": {"hidden": [32]},
            "distillation": {"mode": mode, "weight": weight},
            "eval_from": STEPS * ROWS // 2 / 1000,
            "seed": seed,
        }
    )
    trainer = StudentTrainer(config, SCHEMA)
    whole, logits = _stream(seed)
    mask = torch.ones(ROWS, 1, dtype=torch.bool)
    for start in range(0, STEPS * ROWS, ROWS):
        stop = start + ROWS
        teacher = TeacherTargets(logits[start:stop] + bias, mask, mask[:, 0]) if mode != "none" else None
        trainer.train(TrainingBatch(whole.slice(start, stop), teacher, []))
    return trainer.metrics.summary("a/click")


def _ne_change(mode: str, weight: float, bias: float) -> list[float]:
    """Percent against the student without a teacher, of the same seed; negative is better."""
    changes = []
    for seed in SEEDS:
        ours, none = _learn(seed, mode, weight, bias).ne, _learn(seed, "none", 1.0, 0.0).ne
        assert ours is not None
        assert none is not None
        changes.append(100 * (ours / none - 1))
    return changes


def _calibration(mode: str, weight: float, bias: float) -> list[float]:
    return [value for seed in SEEDS if (value := _learn(seed, mode, weight, bias).calibration) is not None]


@pytest.mark.parametrize("mode", ["auxiliary", "shared"])
def test_an_unbiased_teacher_helps_every_seed(mode: str) -> None:
    assert max(_ne_change(mode, 3.0, 0.0)) < -0.3


def test_a_biased_teacher_helps_through_an_auxiliary_head_only() -> None:
    auxiliary, shared = _ne_change("auxiliary", 10.0, BIAS), _ne_change("shared", 10.0, BIAS)
    assert max(auxiliary) < 0
    assert fmean(auxiliary) < -0.4
    assert min(shared) > 1


def test_a_biased_teacher_shifts_the_calibration_of_a_shared_head_only() -> None:
    none, auxiliary = _calibration("none", 1.0, 0.0), _calibration("auxiliary", 10.0, BIAS)
    assert min(_calibration("shared", 10.0, BIAS)) > 1.2
    for without, distilled in zip(none, auxiliary, strict=True):
        assert distilled == pytest.approx(without, abs=0.06)
        assert distilled == pytest.approx(1.0, abs=0.1)
