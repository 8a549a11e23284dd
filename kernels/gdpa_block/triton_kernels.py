"""What stands before and after GDPA in its block, each one pass over memory; a program has a few whole rows.

Nothing between the passes is kept for backward but `norms`, three numbers a row (T, 3): mean and 1 / standard deviation
of S, and 1 / root mean square before the outer residual. Rows are normalized again where they are read.

Shape letters: T rows of all examples, R rows of a program, W numbers of a row (all heads; padded to BLOCK_W).
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Triton gives the arguments their types at launch.
from __future__ import annotations

import triton
import triton.language as tl

_EPS = tl.constexpr(1e-5)


@triton.jit
def _load(x, row_R, num_rows, W: tl.constexpr, BLOCK_W: tl.constexpr):
    column_W = tl.arange(0, BLOCK_W)
    mask_RW = (row_R < num_rows)[:, None] & (column_W < W)[None, :]
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    return tl.load(x + row_R[:, None] * W + column_W[None, :], mask=mask_RW, other=0.0).to(ACC)


@triton.jit
def _store(x, x_RW, row_R, num_rows, W: tl.constexpr, BLOCK_W: tl.constexpr):
    column_W = tl.arange(0, BLOCK_W)
    mask_RW = (row_R < num_rows)[:, None] & (column_W < W)[None, :]
    tl.store(x + row_R[:, None] * W + column_W[None, :], x_RW.to(x.dtype.element_ty), mask=mask_RW)


@triton.jit
def _normalize(s_RW, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """LayerNorm of each row, its mean, and 1 / its standard deviation."""
    mean_R = tl.sum(s_RW, 1) / W
    around_RW = tl.where((tl.arange(0, BLOCK_W) < W)[None, :], s_RW - mean_R[:, None], 0.0)
    rstd_R = 1.0 / tl.sqrt(tl.sum(around_RW * around_RW, 1) / W + _EPS)
    return around_RW * rstd_R[:, None], mean_R, rstd_R


@triton.jit
def _normalize_again(s_RW, norms, row_R, num_rows, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """LayerNorm of each row as forward found it, 1 / its standard deviation, and RMSNorm's factor."""
    mean_R = tl.load(norms + row_R * 3, mask=row_R < num_rows, other=0.0)
    rstd_R = tl.load(norms + row_R * 3 + 1, mask=row_R < num_rows, other=0.0)
    rms_R = tl.load(norms + row_R * 3 + 2, mask=row_R < num_rows, other=0.0)
    around_RW = tl.where((tl.arange(0, BLOCK_W) < W)[None, :], s_RW - mean_R[:, None], 0.0)
    return around_RW * rstd_R[:, None], rstd_R, rms_R


@triton.jit
def _through_rms(do_RW, unit_RW, rms_R, W: tl.constexpr):
    """Gradient of RMSNorm's input; `unit_RW` is its output, `rms_R` its factor."""
    return rms_R[:, None] * (do_RW - (tl.sum(do_RW * unit_RW, 1) / W)[:, None] * unit_RW)


@triton.jit
def _gdpa_block_open_fwd_kernel(s, q, num_rows, W: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr):
    """q = LayerNorm(S)."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    q_RW, _, _ = _normalize(_load(s, row_R, num_rows, W, BLOCK_W), W, BLOCK_W)
    _store(q, q_RW, row_R, num_rows, W, BLOCK_W)


@triton.jit
def _gdpa_block_close_fwd_kernel(
    s, attended, out, norms, num_rows, W: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """out = RMSNorm(attended + q) + S, and `norms`."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    s_RW = _load(s, row_R, num_rows, W, BLOCK_W)
    q_RW, mean_R, rstd_R = _normalize(s_RW, W, BLOCK_W)
    g_RW = _load(attended, row_R, num_rows, W, BLOCK_W) + q_RW
    rms_R = 1.0 / tl.sqrt(tl.sum(g_RW * g_RW, 1) / W + _EPS)
    _store(out, g_RW * rms_R[:, None] + s_RW, row_R, num_rows, W, BLOCK_W)
    tl.store(norms + row_R * 3, mean_R, mask=row_R < num_rows)
    tl.store(norms + row_R * 3 + 1, rstd_R, mask=row_R < num_rows)
    tl.store(norms + row_R * 3 + 2, rms_R, mask=row_R < num_rows)


@triton.jit
def _gdpa_block_open_bwd_kernel(
    s, out, do, norms, q, dg, num_rows, W: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """q again, and the gradient of g."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    s_RW = _load(s, row_R, num_rows, W, BLOCK_W)
    unit_RW = _load(out, row_R, num_rows, W, BLOCK_W) - s_RW
    q_RW, _, rms_R = _normalize_again(s_RW, norms, row_R, num_rows, W, BLOCK_W)
    dg_RW = _through_rms(_load(do, row_R, num_rows, W, BLOCK_W), unit_RW, rms_R, W)
    _store(q, q_RW, row_R, num_rows, W, BLOCK_W)
    _store(dg, dg_RW, row_R, num_rows, W, BLOCK_W)


@triton.jit
def _gdpa_block_close_bwd_kernel(
    s, out, do, norms, dq, ds, num_rows, W: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The gradient of S from those of q (by GDPA), of g and of out."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    s_RW = _load(s, row_R, num_rows, W, BLOCK_W)
    do_RW = _load(do, row_R, num_rows, W, BLOCK_W)
    unit_RW = _load(out, row_R, num_rows, W, BLOCK_W) - s_RW
    q_RW, rstd_R, rms_R = _normalize_again(s_RW, norms, row_R, num_rows, W, BLOCK_W)
    dq_RW = _load(dq, row_R, num_rows, W, BLOCK_W) + _through_rms(do_RW, unit_RW, rms_R, W)
    mean_R, along_R = tl.sum(dq_RW, 1) / W, tl.sum(dq_RW * q_RW, 1) / W
    ds_RW = rstd_R[:, None] * (dq_RW - mean_R[:, None] - q_RW * along_R[:, None]) + do_RW
    _store(ds, ds_RW, row_R, num_rows, W, BLOCK_W)
