"""Which tiles the softmax kernels in Triton use: rules on the shape's class (dtype, head width, window, short keys).

docs/kernels-tried.md has the measurements behind each rule.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

SHORT = 64  # mean keys of an example up to which some rules differ


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Rows of a query tile and of a key tile, warps of a program, depth of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Tiles of the kernels."""

    forward: Tiles
    backward_q: Tiles
    backward_kv: Tiles
    backward_seeds: Tiles
    """Where all shared queries fit one tile: one pass instead of the two before."""


# By (width class, window), the fastest measured on an H100.
_SMALL = Tiles(32, 32, 4, 1)
_TWO_WARPS = Tiles(32, 32, 2, 1)
_EXACT = Plan(_SMALL, _SMALL, _SMALL, _SMALL)
_PLANS: dict[tuple[int, bool], Plan] = {
    (128, True): Plan(Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2)),
    (64, True): Plan(Tiles(128, 32, 4, 3), Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)),
    (32, True): Plan(Tiles(64, 32, 4, 1), _TWO_WARPS, _TWO_WARPS, _TWO_WARPS),
    (16, True): Plan(_TWO_WARPS, _TWO_WARPS, _TWO_WARPS, _TWO_WARPS),
    (128, False): Plan(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2)),
    (64, False): Plan(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3)),
}
_SHORT_SEEDS = Plan(Tiles(64, 32, 4, 1), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 32, 2, 2))


@functools.lru_cache(1024)
def plan_for(dtype: torch.dtype, width: int, window: bool, short: bool) -> Plan:
    """By the shape's class. Float32, float64 and D > 128 take small tiles."""
    if dtype not in (torch.bfloat16, torch.float16) or width > 128:
        return _EXACT
    narrow = width <= 32
    if narrow and short and not window:
        return _SHORT_SEEDS
    classes = (16, 32, 64, 128) if window else (64, 128)
    return _PLANS[next(c for c in classes if width <= c), window]
