"""What comes before and after `kernels/attention/hopper_seeds_backward.py`, in Triton.

Shape letters: B examples, H heads, D head width, R rows of a block.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Triton gives the arguments their types at launch.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _prepare_seeds_kernel(
    out, do, lse, offsets, stats, before, num_examples, num_shared, query_rows, scale,
    stride_dot: tl.constexpr, stride_doh: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    KEYS: tl.constexpr, EXAMPLES: tl.constexpr,
):  # fmt: skip
    """Statistics of queries by tile of 64, and the number of key tiles before each example.

    stats (B, H, query_rows / 64, 2, 64) are lse and scale * rowsum(dO * O); `query_rows` is `num_shared` rounded up,
    and the rows past it have an infinite lse. before (B + 1): tiles of KEYS rows, made by the first program, EXAMPLES at
    a time. out is contiguous, D a power of two.
    """
    if tl.program_id(0) == 0:
        tiles = 0
        for some in range(0, num_examples, EXAMPLES):
            b_E = some + tl.arange(0, EXAMPLES)
            real_E = b_E < num_examples
            length_E = tl.load(offsets + b_E + 1, mask=real_E, other=0) - tl.load(offsets + b_E, mask=real_E, other=0)
            tiles_E = (length_E + (KEYS - 1)) // KEYS
            end_E = tiles + tl.cumsum(tiles_E, 0)
            tl.store(before + b_E, end_E - tiles_E, mask=real_E)
            tiles += tl.sum(tiles_E, 0)
        tl.store(before + num_examples, tiles)
    else:
        # Rows of one head each, those past the seeds too; all of one example.
        blocks = query_rows * H // BLOCK_ROWS
        b = ((tl.program_id(0) - 1) // blocks).to(tl.int64)
        pair = (tl.program_id(0) - 1) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        h, row = pair % H, pair // H
        real = row < num_shared
        d = tl.arange(0, D)
        first = b * num_shared
        o_at = out + first * (H * D) + (pair[:, None] * D + d[None, :])
        do_at = do + first * stride_dot + ((row * stride_dot + h * stride_doh)[:, None] + d[None, :])
        o_RD = tl.load(o_at, mask=real[:, None], other=0.0)
        do_RD = tl.load(do_at, mask=real[:, None], other=0.0)
        lse_R = tl.load(lse + first * H + pair, mask=real, other=float("inf"))
        delta_R = tl.sum(o_RD.to(tl.float32) * do_RD.to(tl.float32), 1) * scale
        place = stats + b * (2 * H * query_rows) + (h * (2 * query_rows) + row // 64 * 128 + row % 64)
        tl.store(place, lse_R)
        tl.store(place + 64, delta_R)


@triton.jit
def _add_shares_kernel(
    shares, before, dq, num_examples, num_heads, num_shared, query_rows, num_programs, D: tl.constexpr,
    BLOCK: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """dq (num_shared, H, D): the sum of what programs added up for a head, in a fixed order."""
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
        # More programs than tiles: some have none.
        real = (p < end) & (total * p // num_programs < total * (p + 1) // num_programs)
        of_share = (p + h).to(tl.int64) * (query_rows * D)
        sum_B += tl.sum(tl.load(shares + (of_share[:, None] + place[None, :]), mask=real[:, None], other=0.0), 0)
    row = place // D
    tl.store(dq + ((row * num_heads + h) * D + place % D), sum_B, mask=row < num_shared)
