"""Predictions that wait for their labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from das.schema import FeatureSchema
from foundation_model.metrics import ProgressiveMetrics, normalized_entropy
from services.bench.zipper_stream import OBJECTIVE, Day


@dataclass(frozen=True, slots=True)
class Judged:
    """What a model served, on matured labels. `ne_shifted`: NE with the one constant added to all logits that makes
    the mean prediction right, in hindsight: what is left is order and spread. `blocks`: as of ProgressiveMetrics.
    """

    rows: int
    positives: int
    ne: float
    ne_shifted: float
    auc: float
    calibration: float
    blocks: list[list[float]]


class Predictions:
    """Logits kept until their labels mature."""

    def __init__(self) -> None:
        self._days: list[Day] = []
        self._logits: list[np.ndarray] = []

    def keep(self, day: Day, logits_B: np.ndarray) -> None:
        """Remember what was served on one day, float32 (B,)."""
        self._days.append(day)
        self._logits.append(logits_B)

    def judge(self, schema: FeatureSchema) -> Judged:
        """Metrics of all that was kept. There must be labels of both classes."""
        metrics = ProgressiveMetrics(schema.domains, (OBJECTIVE,))
        for day, logits_B in zip(self._days, self._logits, strict=True):
            known_BK = np.ones((len(day.ids), 1), bool)
            domain_B, times_B = day.impressions.domain_B.numpy(), day.impressions.event_time_ms_B
            metrics.update(logits_B[:, None], day.labels[:, None], known_BK, domain_B, times_B)
        key = f"all/{OBJECTIVE}"
        found = metrics.summary(key)
        assert found.ne is not None, "labels of one class"
        assert found.auc is not None, "labels of one class"
        assert found.calibration is not None, "labels of one class"
        shifted = _ne_shifted(np.concatenate(self._logits), np.concatenate([day.labels for day in self._days]))
        blocks = metrics.blocks(key).tolist()
        return Judged(found.rows, found.positives, found.ne, shifted, found.auc, found.calibration, blocks)


def _ne_shifted(logits_N: np.ndarray, labels_N: np.ndarray) -> float:
    """NE with the best-calibrated constant added, found by halving an interval."""
    z_N, positives = logits_N.astype(np.float64), float(labels_N.sum())
    low, high = -30.0, 30.0
    for _ in range(60):
        shift = (low + high) / 2
        if (1 / (1 + np.exp(-(z_N + shift)))).sum() < positives:
            low = shift
        else:
            high = shift
    z_N += low
    loss_N = np.logaddexp(0, z_N) - z_N * labels_N
    ne = normalized_entropy(len(z_N), positives, float(loss_N.sum()))
    assert ne is not None, "labels of one class"
    return ne
