"""Progressive metrics against their definitions, block pairing, and exact state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from das.errors import ConfigError
from foundation_model import metrics as module
from foundation_model.metrics import ProgressiveMetrics

DOMAINS = ("0", "1", "4")
OBJECTIVES = ("click", "long_view")
Columns = tuple[np.ndarray, ...]


def _stream(rows: int, seed: int = 0) -> Columns:
    """logits, labels, mask, domain, event time; labels depend on the logits, and base rates are uneven."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.0, 2.0, (rows, 2)).astype(np.float32)
    labels = (rng.random((rows, 2)) < 1 / (1 + np.exp(-0.5 * logits))).astype(np.float32)
    mask = rng.random((rows, 2)) < 0.9
    domain = rng.choice(3, rows, p=[0.1, 0.7, 0.2]).astype(np.int64)
    return logits, labels * mask, mask, domain, np.arange(rows, dtype=np.int64) * 10


def _feed(metrics: ProgressiveMetrics, columns: Columns, cuts: list[int]) -> ProgressiveMetrics:
    for start, stop in zip([0, *cuts], [*cuts, len(columns[0])], strict=True):
        metrics.update(*(column[start:stop] for column in columns))
    return metrics


def _exact_auc(y: np.ndarray, p: np.ndarray) -> float:
    """Probability that a positive outranks a negative, ties one half, by comparing every pair."""
    positive, negative = p[y > 0][:, None], np.sort(p[y == 0])
    wins = np.searchsorted(negative, positive) + np.searchsorted(negative, positive, side="right")
    return float(wins.sum() / 2 / positive.size / negative.size)


def _log_loss(y: np.ndarray, p: np.ndarray) -> float:
    return float(-np.where(y > 0, np.log(p), np.log1p(-p)).mean())


def _metrics(**options: int) -> ProgressiveMetrics:
    return ProgressiveMetrics(DOMAINS, OBJECTIVES, **options)


@pytest.mark.parametrize("key", ["all/click", "1/click", "4/long_view"])
def test_summary_equals_the_definitions_on_the_rows_from_eval_from(key: str) -> None:
    logits, labels, mask, domain, time_ms = columns = _stream(20_000)
    metrics = _feed(_metrics(eval_from_ms=60_000), columns, [1000, 1256, 9999])
    name, objective = key.split("/")
    k = OBJECTIVES.index(objective)
    rows = mask[:, k] & (time_ms >= 60_000)
    if name != "all":
        rows &= domain == DOMAINS.index(name)
    y, p = labels[rows, k].astype(np.float64), 1 / (1 + np.exp(-logits[rows, k].astype(np.float64)))
    got = metrics.summary(key)
    base = np.full(len(y), y.mean())
    assert (got.rows, got.positives) == (len(y), y.sum())
    assert got.auc_error is not None
    assert got.auc_error < 2e-3
    assert got.auc == pytest.approx(_exact_auc(y, p), abs=got.auc_error)
    assert got.logloss == pytest.approx(_log_loss(y, p), rel=1e-9)
    assert got.ne == pytest.approx(_log_loss(y, p) / _log_loss(y, base), rel=1e-9)
    assert got.calibration == pytest.approx(p.sum() / y.sum(), rel=1e-9)


def test_blocks_hold_the_same_rows_however_batches_are_cut() -> None:
    columns = _stream(5000)
    one = _feed(_metrics(block_rows=700), columns, [])
    other = _feed(_metrics(block_rows=700), columns, list(range(17, 5000, 37)))
    for key in one.keys:
        np.testing.assert_allclose(one.blocks(key), other.blocks(key), rtol=1e-12)
        assert (one.blocks(key)[:-1, 0] == 700).all()
        assert one.blocks(key)[:, 0].sum() == one.summary(key).rows
    assert len(one.keys) == 8


def test_a_block_is_the_sum_of_its_rows() -> None:
    logits, labels, mask, _, _ = columns = _stream(3000)
    blocks = _feed(_metrics(block_rows=1000), columns, [10]).blocks("all/click")
    z, y = logits[mask[:, 0], 0][1000:2000].astype(np.float64), labels[mask[:, 0], 0][1000:2000]
    assert blocks[1].tolist() == pytest.approx([1000, y.sum(), (np.logaddexp(0, z) - z * y).sum()])


def test_state_resumes_to_the_bit() -> None:
    columns, cuts = _stream(5000), [300, 1100, 2500, 4000]
    straight = _feed(_metrics(block_rows=700), columns, cuts).state_tensors()
    first = _feed(_metrics(block_rows=700), tuple(c[:2500] for c in columns), cuts[:2])
    second = _metrics(block_rows=700)
    second.load_state_tensors({name: t.clone() for name, t in first.state_tensors().items()})
    resumed = _feed(second, tuple(c[2500:] for c in columns), [1500]).state_tensors()
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_extreme_logits_and_single_class_portfolios_stay_defined() -> None:
    metrics = _metrics()
    logits = np.array([[65504.0, -65504.0], [-800.0, 2.0]], np.float32)
    labels = np.array([[1, 0], [0, 0]], np.float32)
    metrics.update(logits, labels, np.ones((2, 2)), np.zeros(2, np.int64), np.zeros(2, np.int64))
    assert metrics.summary("0/click").auc == 1.0
    assert metrics.summary("0/click").logloss == 0.0
    single = metrics.summary("0/long_view")
    assert (single.auc, single.ne, single.calibration) == (None, None, None)
    assert metrics.summary("4/click").rows == 0


def test_recent_ne_forgets_older_rows() -> None:
    metrics = _metrics(block_rows=100)
    logits, labels, mask, domain, time_ms = _stream(1000)
    metrics.update(-logits, labels, mask, domain, time_ms)
    bad = metrics.recent_ne("all/click", 3)
    metrics.update(logits, labels, mask, domain, time_ms)
    good = metrics.recent_ne("all/click", 3)
    assert good is not None
    assert bad is not None
    assert good < bad
    assert good < metrics.summary("all/click").ne


def test_blocks_are_bounded_and_totals_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BLOCKS", 8)
    columns = _stream(5000)
    metrics = _feed(_metrics(block_rows=100), columns, list(range(50, 5000, 50)))
    full = metrics.blocks("all/click")
    assert len(full) <= 8
    monkeypatch.setattr(module, "MAX_BLOCKS", 1000)
    whole = _feed(_metrics(block_rows=100), columns, [])
    np.testing.assert_allclose(full, whole.blocks("all/click")[-len(full) :])
    assert metrics.summary("all/click").rows == whole.summary("all/click").rows


def test_a_domain_cannot_take_the_name_of_the_pool() -> None:
    with pytest.raises(ConfigError, match="rename the domain"):
        ProgressiveMetrics(("all",), OBJECTIVES)
