"""Device code that all Triton kernels here share: where an example's rows are, tiles in and out of them.

Shape letters: B examples, H heads, D head width (padded to BLOCK_D).
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Triton gives the arguments their types at launch.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def example_rows(offsets, b, num_dense, JAGGED: tl.constexpr):
    """First row (int64) and number of rows of example b; dense examples have `num_dense` rows each."""
    if JAGGED:
        first = tl.load(offsets + b)
        return first.to(tl.int64), tl.load(offsets + b + 1) - first
    return b * num_dense, num_dense


@triton.jit
def load_rows(base, first, num_rows, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [first, first + BLOCK) of one head, zeros past `num_rows` and past D."""
    return load_evicted(base, first, num_rows, stride, BLOCK, D, BLOCK_D, "")


@triton.jit
def load_evicted(
    base, first, num_rows, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WHEN: tl.constexpr
):
    """As `load_rows`; WHEN: when they leave the L2 cache, as `tl.load` calls it."""
    row = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    mask = (row < num_rows - first)[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    # The tile's first row in 64 bits, as a scalar; offsets within the tile fit 32, which halves their registers.
    return tl.load(
        base + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + d[None, :]), mask=mask, other=0.0,
        eviction_policy=WHEN,
    )  # fmt: skip


@triton.jit
def stream_rows(x, base, example_first, first, num_rows, column, stride,
          BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Rows [first, first + BLOCK) of one example and head. TMA reads on past the example: the caller masks its use."""
    if TMA:
        return x.load([(example_first + first).to(tl.int32), column.to(tl.int32)])
    else:
        return load_rows(base, first, num_rows, stride, BLOCK, D, BLOCK_D)


@triton.jit
def stream_base(x, first, column, stride, TMA: tl.constexpr):
    """Pointer to the example's first row of the head; a TMA descriptor has none."""
    if TMA:
        return x
    else:
        return x + first * stride + column


@triton.jit
def store_rows(base, x, first, num_rows, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    mask = (row < num_rows - first)[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    tile = base + tl.cast(first, tl.int64) * stride
    tl.store(tile + (row[:, None] * stride + d[None, :]), x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def in_window(x, row_first, column_first, window, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x where |row - column| <= window, else 0."""
    distance = (row_first + tl.arange(0, ROWS))[:, None] - (column_first + tl.arange(0, COLUMNS))[None, :]
    return tl.where((distance <= window) & (distance >= -window), x, 0.0)
