"""What the GDPA block's backward kernels on Hopper share, in Gluon: a query tile and its norms, a tile's way out.

Shape letters: M = 64 rows of a query tile, N rows of the tile of keys, D = 128 head width, W = H D numbers of a row.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.hopper_ring import ROWS, store, store_rows, take


@gluon.jit
def norms_of(norms, row, left, LAYOUT: gl.constexpr):
    """mean, rstd and rms of each row of a query tile: zeros past the example's end. LAYOUT: of a row's numbers."""
    row_M = gl.arange(0, ROWS, LAYOUT)
    kept_M = norms + (row + row_M).to(gl.int64) * 3
    mean_M = gl.load(kept_M, mask=row_M < left, other=0.0)
    rstd_M = gl.load(kept_M + 1, mask=row_M < left, other=0.0)
    rms_M = gl.load(kept_M + 2, mask=row_M < left, other=0.0)
    return mean_M, rstd_M, rms_M


@gluon.jit
def put_out(x, pointer, staged, row, rows, column, W: gl.constexpr):
    """Store a staged tile, or its first rows if it has more, at this row and column of x."""
    if rows >= staged.shape[0]:
        store(x, [row, column], staged)
    else:
        C: gl.constexpr = staged.shape[1]
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [gl.num_warps(), 1], [1, 0])
        # From 0 that changes with the row for all the compiler knows: addresses are computed where they are used.
        store_rows(pointer + row.to(gl.int64) * W + column, staged.load(LAYOUT), row >> 31, rows, W, LAYOUT)


@gluon.jit
def next_tile(dk, dv, num_kv, column, told, news, N: gl.constexpr, D: gl.constexpr, W: gl.constexpr):
    """The next query tile: example, first row, rows left, number. Examples without rows get their zeros."""
    b, row, left, tile = take(news, told, 4)
    told += 1
    while (b >= 0) & (left == 0):
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
        base = b.to(gl.int64) * num_kv * W + column
        zero_ND = gl.full([N, D], 0.0, dk.dtype.element_ty, LAYOUT)
        # From 0 that changes for all the compiler knows: addresses are computed where they are used.
        store_rows(dk + base, zero_ND, row >> 31, num_kv, W, LAYOUT)
        store_rows(dv + base, zero_ND, row >> 31, num_kv, W, LAYOUT)
        b, row, left, tile = take(news, told, 4)
        told += 1
    return b, row, left, tile, told
