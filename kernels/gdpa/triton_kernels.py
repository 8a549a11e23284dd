"""GDPA in Triton: what one program does. `kernels/gdpa/launch.py` chooses the tiles and launches.

Shape letters: T query rows of all examples, S key rows of all examples, M rows of a query tile, N rows of a key tile,
H heads, D head width (padded to BLOCK_D). Rows past an example's end are read as zeros: every activation is 0 at 0, so
they add nothing and need no mask but at the stores.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Triton gives the arguments their types at launch.
from __future__ import annotations

import triton
import triton.language as tl

from kernels.device import example_rows, in_window, load_evicted, load_rows, store_rows, stream_base, stream_rows
from kernels.gdpa.triton_activations import activate, activate_with_slope


@triton.jit
def _gdpa_fwd_short_kernel(
    q, k, v, out, q_offsets,
    num_heads, num_kv, inner, outer,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vt: tl.constexpr, stride_vh: tl.constexpr, stride_ot: tl.constexpr, stride_oh: tl.constexpr,
    LATE: tl.constexpr, EAGER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr, APPROX: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Dense keys of one tile: they stay on chip while the example's queries stream by.

    EAGER: they are asked for before it is known whether the example has queries.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // num_heads, pid % num_heads
    k_base, v_base = k + b * num_kv * stride_kt + h * stride_kh, v + b * num_kv * stride_vt + h * stride_vh
    if EAGER:
        k_ND = load_evicted(k_base, 0, num_kv, stride_kt, BLOCK_N, D, BLOCK_D, "evict_first")
        v_ND = load_evicted(v_base, 0, num_kv, stride_vt, BLOCK_N, D, BLOCK_D, "evict_first")
    first, num_q = example_rows(q_offsets, b, 0, True)
    tile_first = tl.program_id(1) * BLOCK_M
    if tile_first >= num_q:
        return
    if not EAGER:
        k_ND = load_rows(k_base, 0, num_kv, stride_kt, BLOCK_N, D, BLOCK_D)
        v_ND = load_rows(v_base, 0, num_kv, stride_vt, BLOCK_N, D, BLOCK_D)
    q_base = stream_base(q, first, h * stride_qh, stride_qt, TMA)
    out_base = out + first * stride_ot + h * stride_oh
    ACC: tl.constexpr = tl.float64 if k_ND.dtype == tl.float64 else tl.float32
    o_MD = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    step = tl.num_programs(1) * BLOCK_M
    for m in range(tile_first, num_q, step):
        q_MD = stream_rows(q, q_base, first, m, num_q, h * stride_qh, stride_qt, BLOCK_M, D, BLOCK_D, TMA)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION, out_dtype=ACC)
        if LATE:
            # The tile before this one: its product and this one's scores ran without a wait between them.
            before = tl.maximum(m - step, tile_first)
            store_rows(out_base, o_MD, before, tl.where(m > tile_first, num_q, 0), stride_ot, BLOCK_M, D, BLOCK_D)
        p_MN = activate(s_MN, inner, outer, ACTIVATION, APPROX)
        o_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, input_precision=PRECISION, out_dtype=ACC)
        if not LATE:
            store_rows(out_base, o_MD, m, num_q, stride_ot, BLOCK_M, D, BLOCK_D)
    if LATE:
        last = tile_first + (num_q - tile_first - 1) // step * step
        store_rows(out_base, o_MD, last, num_q, stride_ot, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["window"])
def _gdpa_fwd_kernel(
    q, k, v, out, q_offsets, kv_offsets,
    num_heads, num_kv, window, inner, outer,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vt: tl.constexpr, stride_vh: tl.constexpr, stride_ot: tl.constexpr, stride_oh: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    JAGGED: tl.constexpr, WINDOW: tl.constexpr,
    ACTIVATION: tl.constexpr, APPROX: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys of any length: one query tile stays on chip while the keys stream by."""
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // num_heads, pid % num_heads
    first, num_q = example_rows(q_offsets, b, 0, True)
    kv_first, length = example_rows(kv_offsets, b, num_kv, JAGGED)
    q_base = q + first * stride_qt + h * stride_qh
    k_base = stream_base(k, kv_first, h * stride_kh, stride_kt, TMA)
    v_base = stream_base(v, kv_first, h * stride_vh, stride_vt, TMA)
    out_base = out + first * stride_ot + h * stride_oh
    ACC: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    for m in range(tl.program_id(1) * BLOCK_M, num_q, tl.num_programs(1) * BLOCK_M):
        q_MD = load_rows(q_base, m, num_q, stride_qt, BLOCK_M, D, BLOCK_D)
        lo, hi = 0, length
        if WINDOW:
            lo = tl.maximum(m - window, 0) // BLOCK_N * BLOCK_N
            hi = tl.minimum(m + BLOCK_M + window, length)
        o_MD = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        for n in range(lo, hi, BLOCK_N):
            k_ND = stream_rows(k, k_base, kv_first, n, length, h * stride_kh, stride_kt, BLOCK_N, D, BLOCK_D, TMA)
            v_ND = stream_rows(v, v_base, kv_first, n, length, h * stride_vh, stride_vt, BLOCK_N, D, BLOCK_D, TMA)
            s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION, out_dtype=ACC)
            p_MN = activate(s_MN, inner, outer, ACTIVATION, APPROX)
            if WINDOW:
                p_MN = in_window(p_MN, m, n, window, BLOCK_M, BLOCK_N)
            if TMA:  # noqa: SIM102 - an `and` with a tensor would leave a branch in the loop
                if n + BLOCK_N > length:
                    p_MN = tl.where((n + tl.arange(0, BLOCK_N) < length)[None, :], p_MN, 0.0)
            o_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, o_MD, input_precision=PRECISION, out_dtype=ACC)
        store_rows(out_base, o_MD, m, num_q, stride_ot, BLOCK_M, D, BLOCK_D)


@triton.jit
def _keep_dq(
    dq_base, scratch_base, dq_MD, m, num_rows, n, length, window, stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DQ: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Store query tile m's dQ: for good after its last key tile, in scratch before. "add": to what dQ holds."""
    if DQ == "store":
        store_rows(dq_base, dq_MD, m, num_rows, stride, BLOCK_M, D, BLOCK_D)
    elif DQ == "add":
        earliest = 0
        if WINDOW:
            earliest = tl.maximum(m - window, 0)
        carried_rows = tl.where(n // BLOCK_N > earliest // BLOCK_N, num_rows, 0)
        # Rounded first: the change of layout then moves half the bytes.
        dq_MD = dq_MD.to(dq_base.dtype.element_ty) + load_rows(dq_base, m, carried_rows, stride, BLOCK_M, D, BLOCK_D)
        store_rows(dq_base, dq_MD, m, num_rows, stride, BLOCK_M, D, BLOCK_D)
    else:
        latest = length - 1
        if WINDOW:
            latest = tl.minimum(m + BLOCK_M - 1 + window, latest)
        is_last = n // BLOCK_N == latest // BLOCK_N
        store_rows(dq_base, dq_MD, m, tl.where(is_last, num_rows, 0), stride, BLOCK_M, D, BLOCK_D)
        store_rows(scratch_base, dq_MD, m, tl.where(is_last, 0, num_rows), stride, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["num_kv_rows", "shorter", "longest", "window"])
def _gdpa_bwd_kernel(
    q, k, v, do, dq, dk, dv, scratch, q_offsets, kv_offsets,
    num_heads, num_kv_rows, shorter, longest, num_kv, window, inner, outer,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vt: tl.constexpr, stride_vh: tl.constexpr, stride_dot: tl.constexpr, stride_doh: tl.constexpr,
    stride_gt: tl.constexpr, stride_gh: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DQ: tl.constexpr, LATE: tl.constexpr, JAGGED: tl.constexpr, WINDOW: tl.constexpr,
    ACTIVATION: tl.constexpr, APPROX: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dK and dV of key tiles in registers while the queries stream by: five matmuls a pair of tiles.

    DQ is what becomes of dQ. "store": there is one key tile, so each dQ is complete. "add": one program walks all key
    tiles of its example and adds each one's share to dQ, in dQ's own type and a fixed order. "carry": likewise, with
    unfinished dQ in `scratch`, float32, for 16-bit types that many roundings would harm. "skip": `_gdpa_bwd_q_kernel`
    computes it; key tiles are then programs of their own (grid axis 1).
    With "store", grid axis 1 shares out the queries; of several shares, dK and dV are partial sums [shares, S, H, D].
    Only examples of more than `shorter` and at most `longest` keys are computed.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // num_heads, pid % num_heads
    share = tl.program_id(1)
    first, num_q = example_rows(q_offsets, b, 0, True)
    kv_first, length = example_rows(kv_offsets, b, num_kv, JAGGED)
    if (length <= shorter) | (length > longest):
        return
    q_base = stream_base(q, first, h * stride_qh, stride_qt, TMA)
    do_base = stream_base(do, first, h * stride_doh, stride_dot, TMA)
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
        n_step = tl.num_programs(1) * BLOCK_N
    for n in range(n_first, length, n_step):
        if DQ == "carry" or DQ == "add":
            # Another thread of this program may have carried the value that this one continues.
            tl.debug_barrier()
        k_ND = load_rows(k_base, n, length, stride_kt, BLOCK_N, D, BLOCK_D)
        v_ND = load_rows(v_base, n, length, stride_vt, BLOCK_N, D, BLOCK_D)
        dk_ND = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        dv_ND = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        lo, hi, step = 0, num_q, BLOCK_M
        if DQ == "store":
            lo = share * BLOCK_M
            step = tl.num_programs(1) * BLOCK_M
        if WINDOW:
            lo = tl.maximum(n - window, 0) // BLOCK_M * BLOCK_M
            hi = tl.minimum(n + BLOCK_N + window, num_q)
        dq_MD = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        for m in range(lo, hi, step):
            q_MD = stream_rows(q, q_base, first, m, num_q, h * stride_qh, stride_qt, BLOCK_M, D, BLOCK_D, TMA)
            do_MD = stream_rows(do, do_base, first, m, num_q, h * stride_doh, stride_dot, BLOCK_M, D, BLOCK_D, TMA)
            s_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision=PRECISION, out_dtype=ACC)
            if LATE:
                # Of the tile before this one: its three products and these scores ran without a wait between them.
                before, rows_before = tl.maximum(m - step, lo), tl.where(m > lo, num_q, 0)
                _keep_dq(dq_base, scratch_base, dq_MD, before, rows_before, n, length, window, stride_gt,
                         BLOCK_M, BLOCK_N, D, BLOCK_D, DQ, WINDOW)  # fmt: skip
            dp_NM = tl.dot(v_ND, tl.trans(do_MD), input_precision=PRECISION, out_dtype=ACC)
            p_NM, slope_NM = activate_with_slope(s_NM, inner, outer, ACTIVATION, APPROX)
            ds_NM = slope_NM * dp_NM
            if WINDOW:
                p_NM = in_window(p_NM, n, m, window, BLOCK_N, BLOCK_M)
                ds_NM = in_window(ds_NM, n, m, window, BLOCK_N, BLOCK_M)
            p_NM = p_NM.to(do_MD.dtype)
            ds_NM = ds_NM.to(q_MD.dtype)
            if TMA:  # noqa: SIM102
                if m + BLOCK_M > num_q:
                    real_M = (m + tl.arange(0, BLOCK_M) < num_q)[None, :]
                    p_NM = tl.where(real_M, p_NM, 0.0)
                    ds_NM = tl.where(real_M, ds_NM, 0.0)
            dv_ND = tl.dot(p_NM, do_MD, dv_ND, input_precision=PRECISION, out_dtype=ACC)
            dk_ND = tl.dot(ds_NM, q_MD, dk_ND, input_precision=PRECISION, out_dtype=ACC)
            if DQ == "store" or DQ == "add":
                dq_MD = tl.dot(tl.trans(ds_NM), k_ND, input_precision=PRECISION, out_dtype=ACC)
            elif DQ == "carry":
                earliest = 0
                if WINDOW:
                    earliest = tl.maximum(m - window, 0)
                carried_rows = tl.where(n // BLOCK_N > earliest // BLOCK_N, num_q, 0)
                dq_MD = load_rows(scratch_base, m, carried_rows, stride_gt, BLOCK_M, D, BLOCK_D)
                dq_MD = tl.dot(tl.trans(ds_NM), k_ND, dq_MD, input_precision=PRECISION, out_dtype=ACC)
            if DQ != "skip" and not LATE:
                _keep_dq(dq_base, scratch_base, dq_MD, m, num_q, n, length, window, stride_gt,
                         BLOCK_M, BLOCK_N, D, BLOCK_D, DQ, WINDOW)  # fmt: skip
        if LATE:
            last = lo + (hi - lo - 1) // step * step
            last, last_rows = tl.maximum(last, lo), tl.where(hi > lo, num_q, 0)
            _keep_dq(dq_base, scratch_base, dq_MD, last, last_rows, n, length, window, stride_gt,
                     BLOCK_M, BLOCK_N, D, BLOCK_D, DQ, WINDOW)  # fmt: skip
        store_rows(dk + part, dk_ND, n, length, stride_gt, BLOCK_N, D, BLOCK_D)
        store_rows(dv + part, dv_ND, n, length, stride_gt, BLOCK_N, D, BLOCK_D)
    if DQ == "carry" or DQ == "add":
        # Queries that no key reaches.
        untouched = 0
        if length > 0:
            untouched = num_q
            if WINDOW:
                untouched = (length + window + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        for m in range(untouched, num_q, BLOCK_M):
            zero_MD = tl.zeros((BLOCK_M, BLOCK_D), ACC)
            store_rows(dq_base, zero_MD, m, num_q, stride_gt, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["window"])
def _gdpa_bwd_q_kernel(
    q, k, v, do, dq, q_offsets, kv_offsets,
    num_heads, num_kv, window, inner, outer,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vt: tl.constexpr, stride_vh: tl.constexpr, stride_dot: tl.constexpr, stride_doh: tl.constexpr,
    stride_gt: tl.constexpr, stride_gh: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    JAGGED: tl.constexpr, WINDOW: tl.constexpr,
    ACTIVATION: tl.constexpr, APPROX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one query tile, the keys streaming by: for few long examples, where "carry" has no parallelism."""
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // num_heads, pid % num_heads
    first, num_q = example_rows(q_offsets, b, 0, True)
    kv_first, length = example_rows(kv_offsets, b, num_kv, JAGGED)
    q_base = q + first * stride_qt + h * stride_qh
    do_base = do + first * stride_dot + h * stride_doh
    k_base = k + kv_first * stride_kt + h * stride_kh
    v_base = v + kv_first * stride_vt + h * stride_vh
    dq_base = dq + first * stride_gt + h * stride_gh
    ACC: tl.constexpr = tl.float64 if dq.dtype.element_ty == tl.float64 else tl.float32
    for m in range(tl.program_id(1) * BLOCK_M, num_q, tl.num_programs(1) * BLOCK_M):
        q_MD = load_rows(q_base, m, num_q, stride_qt, BLOCK_M, D, BLOCK_D)
        do_MD = load_rows(do_base, m, num_q, stride_dot, BLOCK_M, D, BLOCK_D)
        lo, hi = 0, length
        if WINDOW:
            lo = tl.maximum(m - window, 0) // BLOCK_N * BLOCK_N
            hi = tl.minimum(m + BLOCK_M + window, length)
        dq_MD = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        for n in range(lo, hi, BLOCK_N):
            k_ND = load_rows(k_base, n, length, stride_kt, BLOCK_N, D, BLOCK_D)
            v_ND = load_rows(v_base, n, length, stride_vt, BLOCK_N, D, BLOCK_D)
            s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION, out_dtype=ACC)
            dp_MN = tl.dot(do_MD, tl.trans(v_ND), input_precision=PRECISION, out_dtype=ACC)
            slope_MN = activate_with_slope(s_MN, inner, outer, ACTIVATION, APPROX)[1]
            ds_MN = slope_MN * dp_MN
            if WINDOW:
                ds_MN = in_window(ds_MN, m, n, window, BLOCK_M, BLOCK_N)
            dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision=PRECISION, out_dtype=ACC)
        store_rows(dq_base, dq_MD, m, num_q, stride_gt, BLOCK_M, D, BLOCK_D)
