"""Softmax attention in Triton, over a symmetric window or of shared seeds. `launch.py` chooses tiles and launches.

Shape letters: T query rows of all examples, S key rows of all examples, M rows of a query tile, N rows of a key tile,
H heads, D head width (padded to BLOCK_D). With SHARED, the same queries serve every example, and what belongs to one
example's queries (out, its gradient, log-sum, delta, partial dQ) has rows b * num_shared onward.

Saved for the backward pass: `lse` (T, H), base-2 logarithm of each row's sum of exponentials, 0 for a row without keys.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Triton gives the arguments their types at launch.
from __future__ import annotations

import triton
import triton.language as tl

from kernels.device import example_rows, load_rows, store_rows


@triton.jit
def _query_rows(offsets, b, num_shared, SHARED: tl.constexpr):
    """First row of the queries, first row of what is per example, number of rows."""
    first, num_rows = example_rows(offsets, b, num_shared, not SHARED)
    if SHARED:
        return first * 0, first, num_rows
    else:
        return first, first, num_rows


@triton.jit
def _allowed(row_M, column_N, length, window, WINDOW: tl.constexpr):
    """(M, N), True where row m sees column n. One unsigned comparison is both bounds: below the first, it wraps."""
    if WINDOW:
        lowest_M = row_M - window
        reach_M = tl.minimum(row_M + window, length - 1) - lowest_M
        return (column_N[None, :] - lowest_M[:, None]).to(tl.uint32) <= reach_M.to(tl.uint32)[:, None]
    else:
        return (column_N < length)[None, :]


@triton.jit(do_not_specialize=["window", "num_shared"])
def _softmax_fwd_kernel(
    q, k, v, out, lse, q_offsets, kv_offsets, num_heads, num_shared, window, scale_log2,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vt: tl.constexpr, stride_vh: tl.constexpr, stride_ot: tl.constexpr, stride_oh: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARED: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of one query tile while the keys stream by."""
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // num_heads, pid % num_heads
    q_first, out_first, num_q = _query_rows(q_offsets, b, num_shared, SHARED)
    kv_first, length = example_rows(kv_offsets, b, 0, True)
    q_base = q + q_first * stride_qt + h * stride_qh
    k_base = k + kv_first * stride_kt + h * stride_kh
    v_base = v + kv_first * stride_vt + h * stride_vh
    out_base = out + out_first * stride_ot + h * stride_oh
    ACC: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    for m in range(tl.program_id(1) * BLOCK_M, num_q, tl.num_programs(1) * BLOCK_M):
        row_M = m + tl.arange(0, BLOCK_M)
        q_MD = load_rows(q_base, m, num_q, stride_qt, BLOCK_M, D, BLOCK_D)
        lo, hi = 0, length
        if WINDOW:
            lo = tl.maximum(m - window, 0) // BLOCK_N * BLOCK_N
            hi = tl.minimum(m + BLOCK_M + window, length)
        top_M = tl.full((BLOCK_M,), float("-inf"), ACC)
        sum_M = tl.zeros((BLOCK_M,), ACC)
        o_MD = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        for n in range(lo, hi, BLOCK_N):
            k_ND = load_rows(k_base, n, length, stride_kt, BLOCK_N, D, BLOCK_D)
            v_ND = load_rows(v_base, n, length, stride_vt, BLOCK_N, D, BLOCK_D)
            s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * scale_log2
            column_N = n + tl.arange(0, BLOCK_N)
            s_MN = tl.where(_allowed(row_M, column_N, length, window, WINDOW), s_MN, float("-inf"))
            higher_M = tl.maximum(top_M, tl.max(s_MN, 1))
            # A row with no key so far must not compute inf - inf.
            base_M = tl.where(higher_M == float("-inf"), 0.0, higher_M)
            p_MN = tl.exp2(s_MN - base_M[:, None])
            shrink_M = tl.exp2(top_M - base_M)
            sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
            o_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, o_MD * shrink_M[:, None], input_precision=PRECISION)
            top_M = higher_M
        empty_M = sum_M == 0.0
        sum_M = tl.where(empty_M, 1.0, sum_M)
        store_rows(out_base, o_MD / sum_M[:, None], m, num_q, stride_ot, BLOCK_M, D, BLOCK_D)
        lse_M = tl.where(empty_M, 0.0, top_M + tl.log2(sum_M))
        tl.store(lse + (out_first + row_M) * num_heads + h, lse_M, mask=row_M < num_q)


@triton.jit
def _query_pass(
    q_base, k_base, v_base, out_base, do_base, lse_base, delta_base, dq_base, num_q, length, num_heads, window,
    scale, scale_log2,
    stride_qt: tl.constexpr, stride_kt: tl.constexpr, stride_vt: tl.constexpr, stride_dot: tl.constexpr,
    stride_gt: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEEP: tl.constexpr, WINDOW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one query tile after another while the keys stream by; KEEP: store delta = rowsum(dO * O)."""
    for m in range(tl.program_id(1) * BLOCK_M, num_q, tl.num_programs(1) * BLOCK_M):
        row_M = m + tl.arange(0, BLOCK_M)
        q_MD = load_rows(q_base, m, num_q, stride_qt, BLOCK_M, D, BLOCK_D)
        do_MD = load_rows(do_base, m, num_q, stride_dot, BLOCK_M, D, BLOCK_D)
        o_MD = load_rows(out_base, m, num_q, stride_gt, BLOCK_M, D, BLOCK_D)
        delta_M = tl.sum(o_MD.to(ACC) * do_MD.to(ACC), 1)
        if KEEP:
            tl.store(delta_base + row_M * num_heads, delta_M, mask=row_M < num_q)
        lse_M = tl.load(lse_base + row_M * num_heads, mask=row_M < num_q, other=0.0)
        lo, hi = 0, length
        if WINDOW:
            lo = tl.maximum(m - window, 0) // BLOCK_N * BLOCK_N
            hi = tl.minimum(m + BLOCK_M + window, length)
        dq_MD = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        for n in range(lo, hi, BLOCK_N):
            k_ND = load_rows(k_base, n, length, stride_kt, BLOCK_N, D, BLOCK_D)
            v_ND = load_rows(v_base, n, length, stride_vt, BLOCK_N, D, BLOCK_D)
            s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
            dp_MN = tl.dot(do_MD, tl.trans(v_ND), input_precision=PRECISION)
            column_N = n + tl.arange(0, BLOCK_N)
            p_MN = tl.exp2(s_MN * scale_log2 - lse_M[:, None])
            p_MN = tl.where(_allowed(row_M, column_N, length, window, WINDOW), p_MN, 0.0)
            ds_MN = p_MN * (dp_MN - delta_M[:, None])
            dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision=PRECISION)
        store_rows(dq_base, dq_MD * scale, m, num_q, stride_gt, BLOCK_M, D, BLOCK_D)


@triton.jit
def _key_pass(
    q_base, k_base, v_base, out_base, do_base, lse_base, delta_base, dk_base, dv_base, num_q, length, num_heads, window,
    scale, scale_log2,
    stride_qt: tl.constexpr, stride_kt: tl.constexpr, stride_vt: tl.constexpr, stride_dot: tl.constexpr,
    stride_gt: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEPT: tl.constexpr, WINDOW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one key tile after another while the queries stream by; KEPT: delta is there already."""
    for n in range(tl.program_id(1) * BLOCK_N, length, tl.num_programs(1) * BLOCK_N):
        k_ND = load_rows(k_base, n, length, stride_kt, BLOCK_N, D, BLOCK_D)
        v_ND = load_rows(v_base, n, length, stride_vt, BLOCK_N, D, BLOCK_D)
        dk_ND = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        dv_ND = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        column_N = n + tl.arange(0, BLOCK_N)
        lo, hi = 0, num_q
        if WINDOW:
            lo = tl.maximum(n - window, 0) // BLOCK_M * BLOCK_M
            hi = tl.minimum(n + BLOCK_N + window, num_q)
        for m in range(lo, hi, BLOCK_M):
            row_M = m + tl.arange(0, BLOCK_M)
            q_MD = load_rows(q_base, m, num_q, stride_qt, BLOCK_M, D, BLOCK_D)
            do_MD = load_rows(do_base, m, num_q, stride_dot, BLOCK_M, D, BLOCK_D)
            lse_M = tl.load(lse_base + row_M * num_heads, mask=row_M < num_q, other=0.0)
            if KEPT:
                delta_M = tl.load(delta_base + row_M * num_heads, mask=row_M < num_q, other=0.0)
            else:
                o_MD = load_rows(out_base, m, num_q, stride_gt, BLOCK_M, D, BLOCK_D)
                delta_M = tl.sum(o_MD.to(ACC) * do_MD.to(ACC), 1)
            # Queries as rows: a thread then holds two of their numbers, not sixteen.
            s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
            dp_MN = tl.dot(do_MD, tl.trans(v_ND), input_precision=PRECISION)
            p_MN = tl.exp2(s_MN * scale_log2 - lse_M[:, None])
            if WINDOW:
                from_lowest_MN = (column_N[None, :] - (row_M - window)[:, None]).to(tl.uint32)
                p_MN = tl.where(from_lowest_MN <= 2 * window, p_MN, 0.0)
            ds_MN = p_MN * (dp_MN - delta_M[:, None])
            dv_ND = tl.dot(tl.trans(p_MN.to(do_MD.dtype)), do_MD, dv_ND, input_precision=PRECISION)
            dk_ND = tl.dot(tl.trans(ds_MN.to(q_MD.dtype)), q_MD, dk_ND, input_precision=PRECISION)
        store_rows(dk_base, dk_ND * scale, n, length, stride_gt, BLOCK_N, D, BLOCK_D)
        store_rows(dv_base, dv_ND, n, length, stride_gt, BLOCK_N, D, BLOCK_D)


@triton.jit(do_not_specialize=["window", "num_shared"])
def _softmax_bwd_kernel(
    q, k, v, out, do, lse, delta, dq, dk, dv, q_offsets, kv_offsets, num_heads, num_shared, window, scale, scale_log2,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vt: tl.constexpr, stride_vh: tl.constexpr, stride_dot: tl.constexpr, stride_doh: tl.constexpr,
    stride_gt: tl.constexpr, stride_gh: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OUTPUTS: tl.constexpr, SHARED: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ by query tile (OUTPUTS "dq", which also fills delta), then dK and dV by key tile ("dkv"); or "all" in one
    launch, a program each, without delta: the second then computes it anew for every key tile."""
    pid = tl.program_id(0).to(tl.int64)
    is_key_pass = OUTPUTS == "dkv"
    if OUTPUTS == "all":
        is_key_pass = pid % 2 == 1
        pid = pid // 2
    b, h = pid // num_heads, pid % num_heads
    q_first, out_first, num_q = _query_rows(q_offsets, b, num_shared, SHARED)
    kv_first, length = example_rows(kv_offsets, b, 0, True)
    q_base = q + q_first * stride_qt + h * stride_qh
    k_base = k + kv_first * stride_kt + h * stride_kh
    v_base = v + kv_first * stride_vt + h * stride_vh
    do_base = do + out_first * stride_dot + h * stride_doh
    query_part = out_first * stride_gt + h * stride_gh
    key_part = kv_first * stride_gt + h * stride_gh
    lse_base = lse + out_first * num_heads + h
    delta_base = delta + out_first * num_heads + h
    ACC: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    if is_key_pass:
        _key_pass(
            q_base, k_base, v_base, out + query_part, do_base, lse_base, delta_base, dk + key_part, dv + key_part,
            num_q, length, num_heads, window, scale, scale_log2, stride_qt, stride_kt, stride_vt, stride_dot, stride_gt,
            D, BLOCK_D, BLOCK_M, BLOCK_N, OUTPUTS == "dkv", WINDOW, ACC, PRECISION,
        )  # fmt: skip
    else:
        _query_pass(
            q_base, k_base, v_base, out + query_part, do_base, lse_base, delta_base, dq + query_part,
            num_q, length, num_heads, window, scale, scale_log2, stride_qt, stride_kt, stride_vt, stride_dot, stride_gt,
            D, BLOCK_D, BLOCK_M, BLOCK_N, OUTPUTS == "dq", WINDOW, ACC, PRECISION,
        )  # fmt: skip


@triton.jit
def _softmax_delta_kernel(
    out, do, delta, num_rows, num_heads, stride_dot: tl.constexpr, stride_doh: tl.constexpr, D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O), of rows of one head each; out is contiguous, D a power of two."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, D)
    real = row < num_rows.to(tl.int64) * num_heads
    of_row = row // num_heads * stride_dot + row % num_heads * stride_doh
    o_RD = tl.load(out + (row[:, None] * D + d[None, :]), mask=real[:, None], other=0.0)
    do_RD = tl.load(do + (of_row[:, None] + d[None, :]), mask=real[:, None], other=0.0)
    tl.store(delta + row, tl.sum(o_RD.to(tl.float32) * do_RD.to(tl.float32), 1), mask=real)


@triton.jit(do_not_specialize=["num_shared"])
def _softmax_bwd_seeds_kernel(
    q, k, v, out, do, lse, dq, dk, dv, offsets, num_heads, num_shared, scale, scale_log2,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vt: tl.constexpr, stride_vh: tl.constexpr, stride_dot: tl.constexpr, stride_doh: tl.constexpr,
    stride_gt: tl.constexpr, stride_gh: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Shared queries of one tile: they stay on chip while the keys stream by, and each dK and dV is complete."""
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // num_heads, pid % num_heads
    first, length = example_rows(offsets, b, 0, True)
    own = b * num_shared
    row_M = tl.arange(0, BLOCK_M)
    q_MD = load_rows(q + h * stride_qh, 0, num_shared, stride_qt, BLOCK_M, D, BLOCK_D)
    do_MD = load_rows(do + own * stride_dot + h * stride_doh, 0, num_shared, stride_dot, BLOCK_M, D, BLOCK_D)
    o_MD = load_rows(out + own * stride_gt + h * stride_gh, 0, num_shared, stride_gt, BLOCK_M, D, BLOCK_D)
    lse_M = tl.load(lse + (own + row_M) * num_heads + h, mask=row_M < num_shared, other=0.0)
    k_base = k + first * stride_kt + h * stride_kh
    v_base = v + first * stride_vt + h * stride_vh
    part = first * stride_gt + h * stride_gh
    ACC: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    delta_M = tl.sum(o_MD.to(ACC) * do_MD.to(ACC), 1)
    dq_MD = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for n in range(0, length, BLOCK_N):
        k_ND = load_rows(k_base, n, length, stride_kt, BLOCK_N, D, BLOCK_D)
        v_ND = load_rows(v_base, n, length, stride_vt, BLOCK_N, D, BLOCK_D)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
        dp_MN = tl.dot(do_MD, tl.trans(v_ND), input_precision=PRECISION)
        # Keys past the end are zeros and add nothing to dQ, as long as their weight is finite: no real one is above 1.
        p_MN = tl.exp2(tl.minimum(s_MN * scale_log2 - lse_M[:, None], 0.0))
        ds_MN = (p_MN * (dp_MN - delta_M[:, None]) * scale).to(q_MD.dtype)
        # dQ before dV and dK: after them, ptxas serializes all products of the loop.
        dq_MD = tl.dot(ds_MN, k_ND, dq_MD, input_precision=PRECISION)
        dv_ND = tl.dot(tl.trans(p_MN.to(do_MD.dtype)), do_MD, input_precision=PRECISION)
        dk_ND = tl.dot(tl.trans(ds_MN), q_MD, input_precision=PRECISION)
        store_rows(dv + part, dv_ND, n, length, stride_gt, BLOCK_N, D, BLOCK_D)
        store_rows(dk + part, dk_ND, n, length, stride_gt, BLOCK_N, D, BLOCK_D)
    store_rows(dq + own * stride_gt + h * stride_gh, dq_MD, 0, num_shared, stride_gt, BLOCK_M, D, BLOCK_D)


@triton.jit
def _sum_examples_kernel(
    parts, total, num_examples, num_columns, EXAMPLES: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """total (num_columns): the sum of `parts` (B, num_columns), EXAMPLES rows at a time, in a fixed order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sum_EC = tl.zeros((EXAMPLES, COLUMNS), ACC)
    for first in range(0, num_examples, EXAMPLES):
        b = first + tl.arange(0, EXAMPLES)
        mask = (b < num_examples)[:, None] & (column < num_columns)[None, :]
        sum_EC += tl.load(parts + (b.to(tl.int64)[:, None] * num_columns + column[None, :]), mask=mask, other=0.0)
    tl.store(total + column, tl.sum(sum_EC, 0).to(total.dtype.element_ty), mask=column < num_columns)
