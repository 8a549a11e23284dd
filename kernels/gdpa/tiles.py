"""Which tiles GDPA's kernels use: rules on the shape's class (dtype, head width, keys an example, window), no table.

docs/kernels-tried.md has the measurements behind each rule.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from kernels.jagged import ENOUGH_PROGRAMS, MAX_SPLITS, shares

_LEAST_TILE = 16  # every block of rows is a multiple
_REMEMBERED = 1024  # classes of problems
# Key tiles whose share of dQ may be added in a 16-bit type, rounded each time: measured errors are in docs/kernels.md.
MAX_ROUNDED_SUMS = 6


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Rows of a query tile and of a key tile, warps of a program, depth of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    """The streamed tiles come through the copy engine where layout and card allow: fewer registers and instructions."""
    late: bool = False
    """A tile's result is stored an iteration later, so that no wait stands between its last product and the next."""
    eager: bool = False
    """Keys in one tile are asked for before the example's length is known, and leave the L2 cache first."""
    carry: bool = True
    """Backward over many key tiles, given enough examples: one program adds up dQ along them. Else two passes."""


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What the rules may look at: no lengths, which live on the device. One object a class of problems."""

    dtype: torch.dtype
    num_examples: int
    num_heads: int
    width: int
    query_rows: int
    dense_keys: int | None
    """Keys per example, or None for jagged keys."""
    window: int | None
    datacenter_card: bool = True
    """Hopper's or datacenter Blackwell's copy engine and 227 KB of shared memory, for which the tables are."""

    @property
    def block_d(self) -> int:
        return _power_of_two(self.width)

    @property
    def low_precision(self) -> bool:
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def key_class(self) -> str:
        """Dense keys by the power of two that holds them, up to 256; else "long", or "window"."""
        if self.window is not None:
            return "window"
        if self.dense_keys is None or self.dense_keys > 256:
            return "long"
        return str(_power_of_two(max(self.dense_keys, 1)))

    def query_splits(self, block_m: int) -> int:
        """Programs that share an example's queries when keys stay on chip: as few as fill the card."""
        return shares(self.num_examples * self.num_heads, self.query_tiles(block_m))

    def tile_splits(self, block: int) -> int:
        """Programs per example when each takes one tile, if lengths are within twice their mean; longer ones loop."""
        return max(1, min(2 * self.query_tiles(block), MAX_SPLITS))

    @property
    def enough_examples(self) -> bool:
        """One program per example and head fills the card."""
        return self.num_examples * self.num_heads >= ENOUGH_PROGRAMS

    def key_tiles(self, tiles: Tiles) -> int | None:
        """The most key tiles that a query meets; None where only the device knows, for jagged keys without a window."""
        if self.window is not None:
            return -(-(tiles.block_m + 2 * self.window) // tiles.block_n) + 1
        return None if self.dense_keys is None else -(-self.dense_keys // tiles.block_n)

    def query_tiles(self, block: int) -> int:
        return -(-self.query_rows // (max(self.num_examples, 1) * block))


# By (class of keys, wide heads), the fastest measured on an H100; a class nobody measured takes its neighbor's.
# Wide: D > 64, where a tile's accumulators take twice the registers.
_SMALL = Tiles(32, 32, 4, 1)
_WIDEST = Tiles(64, 64, 8, 1)  # D > 128: what fits shared memory
_FORWARD: dict[tuple[str, bool], Tiles] = {
    ("16", False): Tiles(64, 16, 4, 3),
    ("16", True): Tiles(64, 16, 4, 3),
    ("32", False): Tiles(64, 32, 4, 3, late=True),
    ("32", True): Tiles(64, 32, 4, 2),
    ("64", False): Tiles(64, 64, 4, 3),
    ("64", True): Tiles(64, 64, 4, 1),
    ("128", False): Tiles(64, 128, 4, 4, tma=True),
    ("128", True): Tiles(128, 128, 8, 4, late=True),
    ("256", False): Tiles(128, 64, 8, 3, tma=True),
    ("256", True): Tiles(128, 256, 8, 2, late=True),
    ("long", False): Tiles(128, 64, 4, 3, tma=True),
    ("long", True): Tiles(128, 64, 8, 3, tma=True),
    ("window", False): Tiles(128, 64, 8, 3),
    ("window", True): Tiles(128, 64, 8, 3),
}
_SHORT = replace(_FORWARD["64", True], eager=True)  # of such keys and queries in two tiles
_FEW_ROWS = Tiles(32, 64, 4, 1)  # backward at D <= 16: an example's queries and keys are one tile each
_BACKWARD: dict[tuple[str, bool], Tiles] = {
    ("16", False): Tiles(64, 16, 4, 2),
    ("16", True): Tiles(64, 16, 4, 2),
    ("32", False): Tiles(64, 32, 2, 2, tma=True),
    ("32", True): Tiles(32, 32, 4, 2),
    ("64", False): Tiles(64, 64, 4, 3, tma=True),
    ("64", True): Tiles(32, 64, 4, 3, tma=True, late=True),
    ("128", False): Tiles(64, 128, 8, 3, late=True),
    ("128", True): Tiles(64, 128, 8, 3),
    ("256", False): Tiles(64, 128, 8, 3, late=True),
    ("256", True): Tiles(64, 128, 8, 3),
    ("long", False): Tiles(64, 128, 8, 3, late=True),
    ("long", True): Tiles(64, 128, 8, 3),
    ("window", False): Tiles(64, 128, 8, 3),
    ("window", True): Tiles(64, 128, 8, 3),
}


def mean_tile_rows(query_rows: int, num_examples: int) -> int:
    """Rows rounded up as the rules do, to whole tiles of the smallest kind per example: batches then look alike."""
    tile = _LEAST_TILE * max(num_examples, 1)
    return -(-query_rows // tile) * tile


@functools.lru_cache(_REMEMBERED)
def forward_tiles(problem: Problem) -> Tiles:
    """Float32, float64 and other cards take small tiles, which run anywhere."""
    tiles = _choose(problem, _FORWARD)
    short = problem.query_rows <= 2 * _SHORT.block_m * problem.num_examples
    return _SHORT if short and tiles is _FORWARD["64", True] else tiles


@functools.lru_cache(_REMEMBERED)
def backward_tiles(problem: Problem) -> Tiles:
    """Of the kernel that makes dK and dV."""
    tiles = _choose(problem, _BACKWARD)
    few_rows = problem.block_d <= 16 and problem.query_rows <= _FEW_ROWS.block_m * problem.num_examples
    return _FEW_ROWS if few_rows and problem.key_class == "64" and tiles is not _SMALL else tiles


def backward_query_tiles(problem: Problem) -> Tiles:
    """For dQ in a pass of its own."""
    if not (problem.low_precision and problem.datacenter_card):
        return _SMALL
    return Tiles(64, 64, 4, 2) if problem.block_d <= 128 else _WIDEST


def _choose(problem: Problem, table: dict[tuple[str, bool], Tiles]) -> Tiles:
    if not (problem.low_precision and problem.datacenter_card):
        return _SMALL
    return table[problem.key_class, problem.block_d > 64] if problem.block_d <= 128 else _WIDEST


def _power_of_two(n: int) -> int:
    """At least 16, the least a matrix instruction takes."""
    return max(16, 1 << (n - 1).bit_length())
