"""What comes before and after `kernels/attention/hopper_seeds_backward.py`, in Triton.

Shape letters: B examples, in `sum_B` numbers of a block; H heads, D head width.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Triton gives the arguments their types at launch.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _count_tiles_kernel(offsets, before, num_examples, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """before (B + 1): how many tiles of KEYS rows precede each example. One program, BLOCK examples at a time."""
    tiles = 0
    for some in range(0, num_examples, BLOCK):
        b = some + tl.arange(0, BLOCK)
        real = b < num_examples
        length = tl.load(offsets + b + 1, mask=real, other=0) - tl.load(offsets + b, mask=real, other=0)
        count = (length + (KEYS - 1)) // KEYS
        tl.store(before + b, tiles + tl.cumsum(count, 0) - count, mask=real)
        tiles += tl.sum(count, 0)
    tl.store(before + num_examples, tiles)


@triton.jit
def _add_shares_kernel(
    shares, before, dq, num_examples, num_heads, num_seeds, query_rows, num_programs, D: tl.constexpr,
    BLOCK: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """dq (num_seeds, H, D): the sum of what programs added up for a head, in a fixed order."""
    h = tl.program_id(1)
    each = tl.load(before + num_examples).to(tl.int64)
    total = each * num_heads
    # Program p has the tiles from total * p // num_programs to total * (p + 1) // num_programs.
    first, end = 0, 0
    if each > 0:
        first = (((h * each + 1) * num_programs - 1) // total).to(tl.int32)
        end = (((h + 1) * each * num_programs - 1) // total).to(tl.int32) + 1
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sum_B = tl.zeros((BLOCK,), tl.float32)
    for some in range(first, end, SHARES):
        p = some + tl.arange(0, SHARES)
        of_share = (p + h).to(tl.int64) * (query_rows * D)
        real = (p < end)[:, None]
        sum_B += tl.sum(tl.load(shares + (of_share[:, None] + place[None, :]), mask=real, other=0.0), 0)
    row = place // D
    tl.store(dq + ((row * num_heads + h) * D + place % D), sum_B, mask=row < num_seeds)
