"""What a trainer reports at the end of a stream."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

_FIRST_S = 1e-3
_PER_DECADE = 50
_NUM_BINS = 11 * _PER_DECADE


class Ages:
    """A histogram of durations from 1 ms to 3 years, in steps of 5 %; memory is fixed."""

    def __init__(self) -> None:
        self._counts = np.zeros(_NUM_BINS, np.int64)

    def add(self, seconds: np.ndarray) -> None:
        """Count durations; negative ones (clock skew) count as 1 ms."""
        place = np.floor(np.log10(np.maximum(seconds, _FIRST_S) / _FIRST_S) * _PER_DECADE).astype(np.int64)
        self._counts += np.bincount(np.minimum(place, _NUM_BINS - 1), minlength=_NUM_BINS)

    def quantile(self, q: float) -> float | None:
        """The upper end of the step that holds quantile `q`; None if nothing was counted."""
        total = int(self._counts.sum())
        if not total:
            return None
        place = int(np.searchsorted(np.cumsum(self._counts), max(1, math.ceil(q * total))))
        return float(_FIRST_S * 10 ** ((place + 1) / _PER_DECADE))

    def summary(self) -> dict[str, float | None]:
        """p50, p95 and p99 in seconds."""
        return {f"p{round(100 * q)}": self.quantile(q) for q in (0.5, 0.95, 0.99)}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Replace `path` by `results` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
