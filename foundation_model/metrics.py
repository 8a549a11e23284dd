"""Progressive metrics: a batch is predicted before it is trained on, and only those predictions are counted.

A portfolio is one (domain, objective) pair, keyed "domain/objective"; "all/objective" pools the domains.
NE is normalized entropy: logloss over the entropy of the evaluated rows' own base rate (He et al., ADKDD 2014).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from das.errors import ConfigError

ALL = "all"
BINS = 16_384
LOGIT_LIMIT = 16.0
"""AUC bins split [-LOGIT_LIMIT, LOGIT_LIMIT] evenly: 1/512 of a logit each; logits beyond share the end bins."""
MAX_BLOCKS = 100_000
"""Paired blocks kept per portfolio at most; when more, the older half leaves, and stays in the totals."""


@dataclass(frozen=True)
class PortfolioMetrics:
    """Metrics of the evaluated rows of one portfolio; None where undefined (no rows, one class only).

    `auc_error` bounds the distance to the exact AUC: pairs that share a bin count one half.
    """

    rows: int
    positives: int
    predicted_sum: float
    auc: float | None
    auc_error: float | None
    ne: float | None
    logloss: float | None
    calibration: float | None


class ProgressiveMetrics:
    """Counts rows with `event_time >= eval_from_ms` whose label is known. Memory is bounded per portfolio.

    Blocks hold `block_rows` evaluated rows each and are cut by the count of evaluated rows alone, so the blocks of two
    models that read the same stream hold the same rows and can be paired.
    """

    def __init__(
        self,
        domains: Sequence[str],
        objectives: Sequence[str],
        *,
        eval_from_ms: int | None = None,
        block_rows: int = 1000,
    ) -> None:
        if ALL in domains:
            raise ConfigError(f"domains: '{ALL}' names the pool of all domains in metrics; rename the domain")
        self._domains = tuple(domains)
        self._objectives = tuple(objectives)
        self._eval_from_ms = eval_from_ms
        self._block_rows = block_rows
        self._portfolios: dict[str, _Portfolio] = {}

    @property
    def keys(self) -> tuple[str, ...]:
        """Portfolios with evaluated rows: pooled ones first, then by domain, in schema order."""
        names = (f"{domain}/{objective}" for domain in (ALL, *self._domains) for objective in self._objectives)
        return tuple(name for name in names if name in self._portfolios)

    def evaluated(self, event_time_ms_B: np.ndarray) -> np.ndarray:
        """Which rows are late enough to be evaluated: bool (B)."""
        if self._eval_from_ms is None:
            return np.ones(event_time_ms_B.shape, bool)
        return event_time_ms_B >= self._eval_from_ms

    def update(
        self,
        logits_BK: np.ndarray,
        labels_BK: np.ndarray,
        mask_BK: np.ndarray,
        domain_B: np.ndarray,
        event_time_ms_B: np.ndarray,
    ) -> None:
        """Count a batch of finite logits made before training on it; rows in stream order."""
        keep_BK = mask_BK.astype(bool) & self.evaluated(event_time_ms_B)[:, None]
        present = np.unique(domain_B)
        for k, objective in enumerate(self._objectives):
            rows = np.flatnonzero(keep_BK[:, k])
            if not rows.size:
                continue
            scored = _Scored(logits_BK[rows, k], labels_BK[rows, k])
            self._portfolio(ALL, objective).add(scored, slice(None))
            for d in present:
                here = domain_B[rows] == d
                if here.any():
                    self._portfolio(self._domains[d], objective).add(scored, here)

    def summary(self, key: str) -> PortfolioMetrics:
        """Metrics of all evaluated rows of one portfolio."""
        portfolio = self._portfolios.get(key)
        if portfolio is None:
            return PortfolioMetrics(0, 0, 0.0, None, None, None, None, None)
        rows, positives, logloss, predicted = portfolio.totals
        auc, error = _auc(portfolio.counts)
        return PortfolioMetrics(
            rows=int(rows),
            positives=int(positives),
            predicted_sum=float(predicted),
            auc=auc,
            auc_error=error,
            ne=normalized_entropy(rows, positives, logloss),
            logloss=float(logloss / rows),
            calibration=float(predicted / positives) if positives else None,
        )

    def recent_ne(self, key: str, num_blocks: int = 10) -> float | None:
        """NE of the last blocks, the open one included."""
        blocks = self.blocks(key)[-num_blocks:]
        rows, positives, logloss = blocks.sum(axis=0)
        return normalized_entropy(rows, positives, logloss)

    def blocks(self, key: str) -> np.ndarray:
        """(num_blocks, 3) float64: rows, positives, logloss sum; the last block may be open."""
        portfolio = self._portfolios.get(key)
        return portfolio.blocks[:, :3].copy() if portfolio else np.zeros((0, 3))

    def results(self) -> list[dict[str, Any]]:
        """One JSON-ready object per portfolio, as the results files hold them."""
        out = []
        for key in self.keys:
            domain, objective = key.rsplit("/", 1)
            summary = self.summary(key)
            out.append({"domain": domain, "objective": objective, **vars(summary), "blocks": self.blocks(key).tolist()})
        return out

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state by stable names."""
        out: dict[str, Tensor] = {}
        for key in self.keys:
            portfolio = self._portfolios[key]
            used = np.flatnonzero(portfolio.counts.any(axis=0))
            out[f"{key}.bins"] = torch.from_numpy(used.astype(np.int32))
            out[f"{key}.counts"] = torch.from_numpy(portfolio.counts[:, used])
            out[f"{key}.totals"] = torch.from_numpy(portfolio.totals.copy())
            out[f"{key}.blocks"] = torch.from_numpy(portfolio.blocks.copy())
        return out

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave; later updates give the same bits as without the interruption."""
        self._portfolios.clear()
        for key in dict.fromkeys(name.rsplit(".", 1)[0] for name in tensors):
            domain, objective = key.rsplit("/", 1)
            portfolio = self._portfolio(domain, objective)
            portfolio.counts[:, tensors[f"{key}.bins"].numpy()] = tensors[f"{key}.counts"].numpy()
            portfolio.totals[:] = tensors[f"{key}.totals"].numpy()
            portfolio.load_blocks(tensors[f"{key}.blocks"].numpy())

    def _portfolio(self, domain: str, objective: str) -> _Portfolio:
        key = f"{domain}/{objective}"
        if key not in self._portfolios:
            self._portfolios[key] = _Portfolio(self._block_rows)
        return self._portfolios[key]


class _Scored:
    """What one batch adds per row, computed once for the pooled portfolio and every domain."""

    def __init__(self, logits: np.ndarray, labels: np.ndarray) -> None:
        z = logits.astype(np.float64)
        y = labels.astype(np.float64)
        tail = np.exp(-np.abs(z))
        predicted = np.where(z >= 0, 1.0, tail) / (1.0 + tail)
        logloss = np.maximum(z, 0.0) - z * y + np.log1p(tail)
        self.sums = np.stack([np.ones_like(z), y, logloss, predicted], axis=1)
        place = (z + LOGIT_LIMIT) * (BINS / (2 * LOGIT_LIMIT))
        self.bins = np.clip(place, 0, BINS - 1).astype(np.intp)
        self.positive = (y > 0).astype(np.intp)


class _Portfolio:
    """Exact sums, AUC counts by (class, bin), and blocks, of one portfolio."""

    def __init__(self, block_rows: int) -> None:
        self._block_rows = block_rows
        self._num_blocks = 0
        self._blocks = np.zeros((16, 4))
        self.totals = np.zeros(4)
        self.counts = np.zeros((2, BINS), np.int64)

    @property
    def blocks(self) -> np.ndarray:
        return self._blocks[: self._num_blocks]

    def add(self, scored: _Scored, rows: slice | np.ndarray) -> None:
        sums = scored.sums[rows]
        np.add.at(self.counts, (scored.positive[rows], scored.bins[rows]), 1)
        index = (int(self.totals[0]) % self._block_rows + np.arange(len(sums))) // self._block_rows
        open_block = self._num_blocks - 1 if int(self.totals[0]) % self._block_rows else self._num_blocks
        self._reserve(open_block + int(index[-1]) + 1)
        cuts = np.flatnonzero(np.diff(index, prepend=-1))
        self._blocks[open_block + index[cuts]] += np.add.reduceat(sums, cuts, axis=0)
        self.totals += sums.sum(axis=0)
        if self._num_blocks > MAX_BLOCKS:
            self.load_blocks(self.blocks[-MAX_BLOCKS // 2 :])

    def load_blocks(self, blocks: np.ndarray) -> None:
        self._num_blocks = len(blocks)
        self._blocks = np.concatenate([blocks, np.zeros((16, 4))])

    def _reserve(self, num_blocks: int) -> None:
        if num_blocks > len(self._blocks):
            grown = np.zeros((2 * num_blocks, 4))
            grown[: self._num_blocks] = self.blocks
            self._blocks = grown
        self._num_blocks = max(self._num_blocks, num_blocks)


def normalized_entropy(rows: float, positives: float, logloss_sum: float) -> float | None:
    """Mean logloss over the entropy of the base rate; None without both classes."""
    if not 0 < positives < rows:
        return None
    p = positives / rows
    return float(logloss_sum / rows / -(p * math.log(p) + (1 - p) * math.log1p(-p)))


def _auc(counts: np.ndarray) -> tuple[float | None, float | None]:
    """AUC and its error bound from counts (2, bins) by class."""
    negatives, positives = counts[0].astype(np.float64), counts[1].astype(np.float64)
    pairs = negatives.sum() * positives.sum()
    if not pairs:
        return None, None
    below = np.cumsum(negatives) - negatives
    tied = float((positives * negatives).sum())
    return float(((positives * below).sum() + 0.5 * tied) / pairs), float(0.5 * tied / pairs)
