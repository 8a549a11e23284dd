"""GDPA in Triton: what one program does. `kernels/gdpa/launch.py` chooses the tiles and launches.

Shape letters: T query rows of all examples, S key rows of all examples, M rows of a query tile, N rows of a key tile,
H heads, D head width (padded to BLOCK_D). Rows past an example's end are read as zeros: every activation is 0 at 0, so
they add nothing and need no mask but at the stores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gdpa.triton_activations import activate, activate_with_slope


@triton.jit
def _rows(offsets, b, num_dense, JAGGED: tl.constexpr):
    """First row (int64) and number of rows of example b; dense examples have `num_dense` rows each."""
    if JAGGED:
        first = tl.load(offsets + b)
        return first.to(tl.int64), tl.load(offsets + b + 1) - first
    return b * num_dense, num_dense


@triton.jit
def _load(base, first, num_rows, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [first, first + BLOCK) of one head, zeros past `num_rows` and past D."""
    row = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    mask = (row < num_rows - first)[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    # The tile's first row in 64 bits, as a scalar; offsets within the tile fit 32, which halves their registers.
    return tl.load(base + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + d[None, :]), mask=mask, other=0.0)


@triton.jit
def _store(base, x, first, num_rows, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    mask = (row < num_rows - first)[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    tile = base + tl.cast(first, tl.int64) * stride
    tl.store(tile + (row[:, None] * stride + d[None, :]), x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _in_window(x, row_first, column_first, window, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x where |row - column| <= window, else 0."""
    distance = (row_first + tl.arange(0, ROWS))[:, None] - (column_first + tl.arange(0, COLUMNS))[None, :]
    return tl.where((distance <= window) & (distance >= -window), x, 0.0)


@triton.jit
def _gdpa_fwd_short_kernel(
    q, k, v, out, q_offsets,
    num_heads, num_kv, inner, outer,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vt: tl.constexpr, stride_vh: tl.constexpr, stride_ot: tl.constexpr, stride_oh: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr, APPROX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dense keys of one tile: they stay on chip while the example's queries stream by."""
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // num_heads, pid % num_heads
    first, num_q = _rows(q_offsets, b, 0, True)
    tile_first = tl.program_id(1) * BLOCK_M
    if tile_first >= num_q:
        return
    k_ND = _load(k + b * num_kv * stride_kt + h * stride_kh, 0, num_kv, stride_kt, BLOCK_N, D, BLOCK_D)
    v_ND = _load(v + b * num_kv * stride_vt + h * stride_vh, 0, num_kv, stride_vt, BLOCK_N, D, BLOCK_D)
    q_base = q + first * stride_qt + h * stride_qh
    out_base = out + first * stride_ot + h * stride_oh
    for m in range(tile_first, num_q, SPLITS * BLOCK_M):
        q_MD = _load(q_base, m, num_q, stride_qt, BLOCK_M, D, BLOCK_D)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
        p_MN = activate(s_MN, inner, outer, ACTIVATION, APPROX)
        o_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, input_precision=PRECISION)
        _store(out_base, o_MD, m, num_q, stride_ot, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["window"])
def _gdpa_fwd_kernel(
    q, k, v, out, q_offsets, kv_offsets,
    num_heads, num_kv, window, inner, outer,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vt: tl.constexpr, stride_vh: tl.constexpr, stride_ot: tl.constexpr, stride_oh: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    JAGGED: tl.constexpr, WINDOW: tl.constexpr,
    ACTIVATION: tl.constexpr, APPROX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys of any length: one query tile stays on chip while the keys stream by."""
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // num_heads, pid % num_heads
    first, num_q = _rows(q_offsets, b, 0, True)
    kv_first, length = _rows(kv_offsets, b, num_kv, JAGGED)
    q_base = q + first * stride_qt + h * stride_qh
    k_base = k + kv_first * stride_kt + h * stride_kh
    v_base = v + kv_first * stride_vt + h * stride_vh
    out_base = out + first * stride_ot + h * stride_oh
    for m in range(tl.program_id(1) * BLOCK_M, num_q, SPLITS * BLOCK_M):
        q_MD = _load(q_base, m, num_q, stride_qt, BLOCK_M, D, BLOCK_D)
        lo, hi = 0, length
        if WINDOW:
            lo = tl.maximum(m - window, 0) // BLOCK_N * BLOCK_N
            hi = tl.minimum(m + BLOCK_M + window, length)
        o_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float64 if q_MD.dtype == tl.float64 else tl.float32)
        for n in range(lo, hi, BLOCK_N):
            k_ND = _load(k_base, n, length, stride_kt, BLOCK_N, D, BLOCK_D)
            v_ND = _load(v_base, n, length, stride_vt, BLOCK_N, D, BLOCK_D)
            s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
            p_MN = activate(s_MN, inner, outer, ACTIVATION, APPROX)
            if WINDOW:
                p_MN = _in_window(p_MN, m, n, window, BLOCK_M, BLOCK_N)
            o_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, o_MD, input_precision=PRECISION)
        _store(out_base, o_MD, m, num_q, stride_ot, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["num_kv_rows", "window"])
def _gdpa_bwd_kernel(
    q, k, v, do, dq, dk, dv, scratch, q_offsets, kv_offsets,
    num_heads, num_kv, num_kv_rows, window, inner, outer,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vt: tl.constexpr, stride_vh: tl.constexpr, stride_dot: tl.constexpr, stride_doh: tl.constexpr,
    stride_gt: tl.constexpr, stride_gh: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    DQ: tl.constexpr, JAGGED: tl.constexpr, WINDOW: tl.constexpr,
    ACTIVATION: tl.constexpr, APPROX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of key tiles in registers while the queries stream by: five matmuls a pair of tiles.

    DQ is what becomes of dQ. "store": there is one key tile, so each dQ is complete. "carry": one program walks all
    key tiles of its example and carries unfinished dQ in `scratch` (float32, small enough to stay in L2), in a fixed
    order. "skip": `_gdpa_bwd_q_kernel` computes it; key tiles are then programs of their own (grid axis 1).
    With SPLITS > 1 ("store" only), grid axis 1 shares out the queries and dK, dV are partial sums [SPLITS, S, H, D].
    """
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // num_heads, pid % num_heads
    share = tl.program_id(1)
    first, num_q = _rows(q_offsets, b, 0, True)
    kv_first, length = _rows(kv_offsets, b, num_kv, JAGGED)
    q_base = q + first * stride_qt + h * stride_qh
    do_base = do + first * stride_dot + h * stride_doh
    dq_base = dq + first * stride_gt + h * stride_gh
    scratch_base = scratch + first * stride_gt + h * stride_gh
    k_base = k + kv_first * stride_kt + h * stride_kh
    v_base = v + kv_first * stride_vt + h * stride_vh
    part = kv_first * stride_gt + h * stride_gh
    if DQ == "store":
        part += share.to(tl.int64) * num_kv_rows * stride_gt
    ACC: tl.constexpr = tl.float64 if k.dtype.element_ty == tl.float64 else tl.float32
    n_first = 0
    n_step = BLOCK_N
    if DQ == "skip":
        n_first = share * BLOCK_N
        n_step = SPLITS * BLOCK_N
    for n in range(n_first, length, n_step):
        if DQ == "carry":
            # Another thread of this program may have carried the value that this one continues.
            tl.debug_barrier()
        k_ND = _load(k_base, n, length, stride_kt, BLOCK_N, D, BLOCK_D)
        v_ND = _load(v_base, n, length, stride_vt, BLOCK_N, D, BLOCK_D)
        dk_ND = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        dv_ND = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        lo, hi, step = 0, num_q, BLOCK_M
        if DQ == "store":
            lo = share * BLOCK_M
            step = SPLITS * BLOCK_M
        if WINDOW:
            lo = tl.maximum(n - window, 0) // BLOCK_M * BLOCK_M
            hi = tl.minimum(n + BLOCK_N + window, num_q)
        for m in range(lo, hi, step):
            q_MD = _load(q_base, m, num_q, stride_qt, BLOCK_M, D, BLOCK_D)
            do_MD = _load(do_base, m, num_q, stride_dot, BLOCK_M, D, BLOCK_D)
            s_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision=PRECISION)
            dp_NM = tl.dot(v_ND, tl.trans(do_MD), input_precision=PRECISION)
            p_NM, slope_NM = activate_with_slope(s_NM, inner, outer, ACTIVATION, APPROX)
            ds_NM = slope_NM * dp_NM
            if WINDOW:
                p_NM = _in_window(p_NM, n, m, window, BLOCK_N, BLOCK_M)
                ds_NM = _in_window(ds_NM, n, m, window, BLOCK_N, BLOCK_M)
            ds_NM = ds_NM.to(q_MD.dtype)
            dv_ND = tl.dot(p_NM.to(do_MD.dtype), do_MD, dv_ND, input_precision=PRECISION)
            dk_ND = tl.dot(ds_NM, q_MD, dk_ND, input_precision=PRECISION)
            if DQ == "store":
                dq_MD = tl.dot(tl.trans(ds_NM), k_ND, input_precision=PRECISION)
                _store(dq_base, dq_MD, m, num_q, stride_gt, BLOCK_M, D, BLOCK_D)
            elif DQ == "carry":
                earliest, latest = 0, length - 1
                if WINDOW:
                    earliest = tl.maximum(m - window, 0)
                    latest = tl.minimum(m + BLOCK_M - 1 + window, length - 1)
                rows_before = tl.where(n // BLOCK_N > earliest // BLOCK_N, num_q, 0)
                is_last = n // BLOCK_N == latest // BLOCK_N
                dq_MD = _load(scratch_base, m, rows_before, stride_gt, BLOCK_M, D, BLOCK_D)
                dq_MD = tl.dot(tl.trans(ds_NM), k_ND, dq_MD, input_precision=PRECISION)
                _store(dq_base, dq_MD, m, tl.where(is_last, num_q, 0), stride_gt, BLOCK_M, D, BLOCK_D)
                _store(scratch_base, dq_MD, m, tl.where(is_last, 0, num_q), stride_gt, BLOCK_M, D, BLOCK_D)
        _store(dk + part, dk_ND, n, length, stride_gt, BLOCK_N, D, BLOCK_D)
        _store(dv + part, dv_ND, n, length, stride_gt, BLOCK_N, D, BLOCK_D)
    if DQ == "carry":
        # Queries that no key reaches.
        untouched = 0
        if length > 0:
            untouched = num_q
            if WINDOW:
                untouched = (length + window + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        for m in range(untouched, num_q, BLOCK_M):
            zero_MD = tl.zeros((BLOCK_M, BLOCK_D), ACC)
            _store(dq_base, zero_MD, m, num_q, stride_gt, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["window"])
def _gdpa_bwd_q_kernel(
    q, k, v, do, dq, q_offsets, kv_offsets,
    num_heads, num_kv, window, inner, outer,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vt: tl.constexpr, stride_vh: tl.constexpr, stride_dot: tl.constexpr, stride_doh: tl.constexpr,
    stride_gt: tl.constexpr, stride_gh: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    JAGGED: tl.constexpr, WINDOW: tl.constexpr,
    ACTIVATION: tl.constexpr, APPROX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one query tile, the keys streaming by: for few examples with many rows, where "carry" has no parallelism."""
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // num_heads, pid % num_heads
    first, num_q = _rows(q_offsets, b, 0, True)
    kv_first, length = _rows(kv_offsets, b, num_kv, JAGGED)
    q_base = q + first * stride_qt + h * stride_qh
    do_base = do + first * stride_dot + h * stride_doh
    k_base = k + kv_first * stride_kt + h * stride_kh
    v_base = v + kv_first * stride_vt + h * stride_vh
    dq_base = dq + first * stride_gt + h * stride_gh
    for m in range(tl.program_id(1) * BLOCK_M, num_q, SPLITS * BLOCK_M):
        q_MD = _load(q_base, m, num_q, stride_qt, BLOCK_M, D, BLOCK_D)
        do_MD = _load(do_base, m, num_q, stride_dot, BLOCK_M, D, BLOCK_D)
        lo, hi = 0, length
        if WINDOW:
            lo = tl.maximum(m - window, 0) // BLOCK_N * BLOCK_N
            hi = tl.minimum(m + BLOCK_M + window, length)
        dq_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float64 if q_MD.dtype == tl.float64 else tl.float32)
        for n in range(lo, hi, BLOCK_N):
            k_ND = _load(k_base, n, length, stride_kt, BLOCK_N, D, BLOCK_D)
            v_ND = _load(v_base, n, length, stride_vt, BLOCK_N, D, BLOCK_D)
            s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
            dp_MN = tl.dot(do_MD, tl.trans(v_ND), input_precision=PRECISION)
            slope_MN = activate_with_slope(s_MN, inner, outer, ACTIVATION, APPROX)[1]
            ds_MN = slope_MN * dp_MN
            if WINDOW:
                ds_MN = _in_window(ds_MN, m, n, window, BLOCK_M, BLOCK_N)
            dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision=PRECISION)
        _store(dq_base, dq_MD, m, num_q, stride_gt, BLOCK_M, D, BLOCK_D)
