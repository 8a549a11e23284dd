"""Which tiles GDPA's kernels use: rules on the shape's class (dtype, head width, keys an example, window), no table.

docs/kernels.md has the measurements behind each rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Programs that fill the largest card a few times over; below this, an example's queries are shared out.
_ENOUGH_PROGRAMS = 512
_MAX_SPLITS = 65_535  # of a CUDA grid's second axis


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Problem:
    """What the rules may look at: no lengths, which live on the device."""

    dtype: torch.dtype
    num_examples: int
    num_heads: int
    width: int
    query_rows: int
    dense_keys: int | None
    """Keys per example, or None for jagged keys."""
    window: int | None

    @property
    def block_d(self) -> int:
        return _power_of_two(self.width)

    @property
    def low_precision(self) -> bool:
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def short_keys(self) -> bool:
        """All keys of an example fit one tile."""
        return self.dense_keys is not None and 0 < self.dense_keys <= (128 if self.low_precision else 32)

    def query_splits(self, block_m: int) -> int:
        """Programs that share an example's queries when keys stay on chip: as few as fill the card."""
        programs = max(self.num_examples * self.num_heads, 1)
        return max(1, min(-(-_ENOUGH_PROGRAMS // programs), self._tiles(block_m), _MAX_SPLITS))

    def tile_splits(self, block: int) -> int:
        """Programs per example when each takes one tile, if lengths are within twice their mean; longer ones loop."""
        return max(1, min(2 * self._tiles(block), _MAX_SPLITS))

    @property
    def enough_examples(self) -> bool:
        """One program per example and head fills the card."""
        return self.num_examples * self.num_heads >= _ENOUGH_PROGRAMS

    def _tiles(self, block: int) -> int:
        return -(-self.query_rows // (max(self.num_examples, 1) * block))


def forward_tiles(problem: Problem) -> Tiles:
    if not problem.low_precision:
        return Tiles(32, 32, 4, 1)
    if problem.short_keys:
        block_n = _power_of_two(problem.dense_keys or 1)
        return Tiles(64, block_n, 4, 3 if problem.block_d <= 64 else 2)
    if problem.window is not None:
        return Tiles(64, 64, 4, 2)
    return Tiles(128, 64, 8 if problem.block_d > 64 else 4, 3)


def backward_tiles(problem: Problem) -> Tiles:
    if not problem.low_precision:
        return Tiles(32, 32, 4, 1)
    if problem.short_keys:
        block_n = _power_of_two(problem.dense_keys or 1)
        return Tiles(64, block_n, 8 if block_n * problem.block_d > 64 * 128 else 4, 2)
    if problem.window is not None:
        return Tiles(64, 64, 4, 2)
    return Tiles(64, 128, 8, 2)


def backward_query_tiles(problem: Problem) -> Tiles:
    """For dQ in a pass of its own."""
    if not problem.low_precision:
        return Tiles(32, 32, 4, 1)
    return Tiles(64, 64, 4, 2)


def _power_of_two(n: int) -> int:
    """At least 16, the least a matrix instruction takes."""
    return max(16, 1 << (n - 1).bit_length())
