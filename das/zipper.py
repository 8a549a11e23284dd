"""Zipper: several attribution windows in one stream (Lattice, arXiv 2512.09200, section 2).

A short window gives fresh labels of which some are wrong, a long one right labels that are stale. Each impression is
hashed into exactly one window and leaves the join when that window has passed; each (objective, window) has a head of
its own in the models, and only the head of an objective's full window is served.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple, Self

import xxhash
from pydantic import Field, model_validator

from das.config import Config


class ZipperWindow(Config):
    """One attribution window and the share of the impressions that wait for it."""

    window_s: float = Field(gt=0, le=90 * 86_400)
    share: float = Field(gt=0, lt=1)

    @property
    def window_ms(self) -> int:
        """The window in milliseconds."""
        return math.ceil(self.window_s * 1000)


class ZipperConfig(Config):
    """The windows, shortest first. `salt` makes the assignment independent of every other hash of the ids."""

    salt: str = Field(min_length=1, max_length=128)
    windows: tuple[ZipperWindow, ...] = Field(min_length=2, max_length=16)

    @model_validator(mode="after")
    def _windows_ascend_and_shares_sum(self) -> Self:
        if any(a.window_ms >= b.window_ms for a, b in pairwise(self.windows)):
            raise ValueError("windows must ascend: list the shortest first, each one once")
        total = math.fsum(w.share for w in self.windows)
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ValueError(f"the shares sum to {total:g}; make them sum to 1")
        return self

    @cached_property
    def _thresholds(self) -> tuple[float, ...]:
        return tuple(accumulate(w.share for w in self.windows))[:-1]

    @cached_property
    def _seed(self) -> int:
        return xxhash.xxh64_intdigest(self.salt.encode())

    def assign(self, impression_id: str) -> int:
        """The window of an impression, an index into `windows`: the same at every call, `share` of all ids each."""
        uniform = (xxhash.xxh64_intdigest(impression_id.encode(), self._seed) >> 11) * 2.0**-53
        return bisect_right(self._thresholds, uniform)


class Head(NamedTuple):
    """One output of the models: an objective within a window.

    `share`: of the impressions, those whose label trains this head. `served`: it is the objective's full window.
    """

    name: str
    objective: int
    window_ms: int
    share: float
    served: bool


def heads(objectives: tuple[tuple[str, int], ...], zipper: ZipperConfig | None) -> tuple[Head, ...]:
    """The heads of (name, window_ms) objectives: objectives in order, each one's windows shortest first, served last.

    A row of window W is labeled for an objective within `min(W, the objective's window)`; equal ones share a head, so
    an objective whose window is not longer than the shortest has just the one.
    """
    windows = ((None, 1.0),) if zipper is None else tuple((w.window_ms, w.share) for w in zipper.windows)
    result: list[Head] = []
    for k, (name, full_ms) in enumerate(objectives):
        shares: dict[int, float] = {}
        for window_ms, share in windows:
            effective_ms = full_ms if window_ms is None else min(window_ms, full_ms)
            shares[effective_ms] = shares.get(effective_ms, 0.0) + share
        for window_ms, share in sorted(shares.items()):
            served = window_ms == full_ms
            result.append(Head(name if served else f"{name}@{window_ms}ms", k, window_ms, share, served))
    return tuple(result)
