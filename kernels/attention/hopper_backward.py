"""Softmax attention's backward on Hopper, in Gluon: matrix products, copies and waits are placed by hand.

Shape letters: D head width, H heads. Two passes that share one device function: dQ by query tile while the keys stream
by, and dK, dV by key tile while the queries do. In both, a pair of tiles (X, Y) of R rows is resident, (Q, dO) or
(K, V), and pairs (U, W) stream by, (K, V) or (Q, dO). Scores are X U^T, dP is Y W^T, and their rows are the resident
tile's, so that P and dS enter the last products from registers. A program takes one pass over one example and head:
those of both passes run side by side and read the same rows, which the L2 cache then has.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.attention.hopper_forward import _is_cut, _visible
from kernels.hopper_ring import copy_in, key_range, store_tile


@gluon.jit
def _advance(cursor, step, length, window, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WINDOW: gl.constexpr):
    """The pair of tiles after this one: (query row, key row, end of its keys)."""
    m, n, hi = cursor
    n += BLOCK_N
    if n >= hi:
        m += step
        n, hi = key_range(m, BLOCK_M, length, window, BLOCK_N, WINDOW)
    return m, n, hi


@gluon.jit
def _weights(
    s_RC, dp_RC, lse, delta, r, c, length, window, scale_log2, KEYS: gl.constexpr, TYPE: gl.constexpr,
    LAYOUT: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """P and dS. `lse` and `delta` are the queries', along rows, or with KEYS resident along columns."""
    if KEYS:
        p_RC = gl.exp2(s_RC * scale_log2 - lse[None, :])
        ds_RC = p_RC * (dp_RC - delta[None, :])
    else:
        p_RC = gl.exp2(s_RC * scale_log2 - lse[:, None])
        ds_RC = p_RC * (dp_RC - delta[:, None])
    p_RC = p_RC.to(TYPE)
    ds_RC = ds_RC.to(TYPE)
    # Queries past the end have weights of 0 already, by their `lse`.
    if WINDOW or not KEYS:  # noqa: SIM102
        if _is_cut(r, c, length, window, s_RC.shape[0], s_RC.shape[1], WINDOW):
            row_R = r + gl.arange(0, s_RC.shape[0], gl.SliceLayout(1, LAYOUT))
            column_C = c + gl.arange(0, s_RC.shape[1], gl.SliceLayout(0, LAYOUT))
            visible = _visible(row_R, column_C, length, window, WINDOW)
            p_RC = gl.where(visible, p_RC, 0.0)
            ds_RC = gl.where(visible, ds_RC, 0.0)
    return p_RC, ds_RC


@gluon.jit
def _start(resident, ring, resident_full, full, tile, at, part: gl.constexpr, is_new, exists, s, dp):
    """Start scores and dP of resident pair number `tile` with rows of the streamed pair at `at`; these lend registers.

    Past the end it multiplies leftovers, which nobody reads: a branch would keep the products from staying in flight.
    """
    SLOTS: gl.constexpr = ring.shape[0]
    C: gl.constexpr = s.shape[1]
    mbarrier.wait(resident_full, tile & 1, pred=is_new & exists)
    mbarrier.wait(full.index(at % SLOTS), at // SLOTS & 1, pred=exists)
    mbarrier.wait(full.index((at + 1) % SLOTS), (at + 1) // SLOTS & 1, pred=exists)
    u = ring.index((at + 1) % SLOTS).slice(part * C, C, 0).permute((1, 0))
    w = ring.index(at % SLOTS).slice(part * C, C, 0).permute((1, 0))
    s = hopper.warpgroup_mma(resident.index(0), u, s, use_acc=False, is_async=True)
    dp = hopper.warpgroup_mma(resident.index(1), w, dp, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _refill(u, w, u_at, w_at, cursor, full, ring, at, num_rows, length, window, KEYS: gl.constexpr, R: gl.constexpr,
            WINDOW: gl.constexpr):  # fmt: skip
    """Ask for the next two tiles in the place of two that no product needs any more.

    Those are U and W of the pair before the one at `at`, or, where W is only in dP, that U and this pair's W.
    """
    SLOTS: gl.constexpr = ring.shape[0]
    T: gl.constexpr = ring.shape[1]
    slot = (at - 1) % SLOTS
    if KEYS:
        if at > 0:
            before = (at - 2) % SLOTS
            copy_in(u, u_at[0] + cursor[1], u_at[1], full.index(before), ring.index(before), cursor[0] < num_rows)
            cursor = _advance(cursor, R, length, window, R, T, WINDOW)
            copy_in(w, w_at[0] + cursor[1], w_at[1], full.index(slot), ring.index(slot), cursor[0] < num_rows)
    else:
        if at > 0:
            copy_in(w, w_at[0] + cursor[1], w_at[1], full.index(slot), ring.index(slot), cursor[0] < num_rows)
        this = at % SLOTS
        copy_in(u, u_at[0] + cursor[1], u_at[1], full.index(this), ring.index(this), cursor[0] < num_rows)
        cursor = _advance(cursor, R, length, window, R, T, WINDOW)
    return cursor


@gluon.jit
def _pass(
    x, y, u, w, dx, dy, dx_base, dy_base, lse_base, delta_base, resident, ring, resident_full, full,
    x_at, y_at, u_at, w_at, grad_at, num_rows, length, num_heads, window, scale, scale_log2,
    stride_gt: gl.constexpr, C: gl.constexpr, KEYS: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """dX = dS U by tile of `num_rows` rows, and with KEYS dY = P^T dO too, while `length` rows stream by in parts of C.

    `x_at` and so on are a tensor's first row and column.
    """
    R: gl.constexpr = resident.shape[1]
    T: gl.constexpr = ring.shape[1]
    SLOTS: gl.constexpr = ring.shape[0]
    TYPE: gl.constexpr = ring.dtype
    PARTS: gl.constexpr = T // C
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, C, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, ring.shape[2], 16])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    copy_in(x, x_at[0], x_at[1], resident_full, resident.index(0), True)
    copy_in(y, y_at[0], y_at[1], resident_full, resident.index(1), True)
    lo, hi = key_range(0, R, length, window, T, WINDOW)
    cursor = (num_rows * 0, lo, hi)
    for i in gl.static_range(SLOTS):
        if i % 2 == 0:
            copy_in(w, w_at[0] + cursor[1], w_at[1], full.index(i), ring.index(i), cursor[0] < num_rows)
        else:
            copy_in(u, u_at[0] + cursor[1], u_at[1], full.index(i), ring.index(i), cursor[0] < num_rows)
            cursor = _advance(cursor, R, length, window, R, T, WINDOW)
    # Through a wait: registers of a product must be written before the first one is in flight.
    zero_RD = gl.full([R, ring.shape[2]], 0.0, gl.float32, G_LAYOUT)
    zero_RC = gl.full([R, C], 0.0, gl.float32, S_LAYOUT)
    zero_RD, zero_RC = hopper.warpgroup_mma_wait(0, deps=[zero_RD, zero_RC])
    dx_sum = hopper.warpgroup_mma_init(zero_RD)
    dy_sum = hopper.warpgroup_mma_init(zero_RD)
    s, dp = _start(resident, ring, resident_full, full, 0, 0, 0, True, True, zero_RC, zero_RC)
    tile = 0  # resident tiles so far
    at = 0  # streamed tiles so far
    for r in range(0, num_rows, R):
        lo, hi = key_range(r, R, length, window, T, WINDOW)
        if not KEYS:
            row_R = r + gl.arange(0, R, gl.SliceLayout(1, S_LAYOUT))
            lse_q = gl.load(lse_base + row_R * num_heads, mask=row_R < num_rows, other=0.0)
            delta_q = gl.load(delta_base + row_R * num_heads, mask=row_R < num_rows, other=0.0)
        for t in range(lo, hi, T):
            is_last = t + T >= hi
            there = r + R < num_rows
            for part in gl.static_range(PARTS):
                c = t + part * C
                if KEYS:
                    column_C = c + gl.arange(0, C, FLAT)
                    real_C = column_C < length
                    # An infinite log-sum: a weight of 0.
                    lse_C = gl.load(lse_base + column_C * num_heads, mask=real_C, other=float("inf"))
                    delta_C = gl.load(delta_base + column_C * num_heads, mask=real_C, other=0.0)
                    s_RC, dp_RC, dx_sum, dy_sum = hopper.warpgroup_mma_wait(0, deps=[s, dp, dx_sum, dy_sum])
                    lse_q = gl.convert_layout(lse_C, gl.SliceLayout(0, S_LAYOUT))
                    delta_q = gl.convert_layout(delta_C, gl.SliceLayout(0, S_LAYOUT))
                else:
                    s_RC, dp_RC, dx_sum = hopper.warpgroup_mma_wait(0, deps=[s, dp, dx_sum])
                if part == 0:
                    if (t == lo) & (tile > 0):
                        # Where the gradients of the tile before this one were staged for their stores.
                        tma.store_wait(0)
                    cursor = _refill(u, w, u_at, w_at, cursor, full, ring, at, num_rows, length, window, KEYS, R,
                                     WINDOW)  # fmt: skip
                if part == PARTS - 1:
                    copy_in(x, x_at[0] + r + R, x_at[1], resident_full, resident.index(0), is_last & there)
                    copy_in(y, y_at[0] + r + R, y_at[1], resident_full, resident.index(1), is_last & there)
                p_RC, ds_RC = _weights(s_RC, dp_RC, lse_q, delta_q, r, c, length, window, scale_log2, KEYS, TYPE,
                                       S_LAYOUT, WINDOW)  # fmt: skip
                if KEYS:
                    p_RC = gl.convert_layout(p_RC, gl.DotOperandLayout(0, G_LAYOUT, 2))
                    w_CD = ring.index(at % SLOTS).slice(part * C, C, 0)
                    dy_sum = hopper.warpgroup_mma(p_RC, w_CD, dy_sum, use_acc=c > lo, is_async=True)
                ds_RC = gl.convert_layout(ds_RC, gl.DotOperandLayout(0, G_LAYOUT, 2))
                u_CD = ring.index((at + 1) % SLOTS).slice(part * C, C, 0)
                dx_sum = hopper.warpgroup_mma(ds_RC, u_CD, dx_sum, use_acc=c > lo, is_async=True)
                if part < PARTS - 1:
                    s, dp = _start(resident, ring, resident_full, full, tile, at, part + 1, False, False, s_RC, dp_RC)
                else:
                    at += 2
                    s, dp = _start(resident, ring, resident_full, full, tile + is_last.to(gl.int32), at, 0, is_last,
                                   (not is_last) | there, s_RC, dp_RC)  # fmt: skip
        if KEYS:
            dx_RD, dy_RD = hopper.warpgroup_mma_wait(2, deps=[dx_sum, dy_sum])
            store_tile(dy_RD, dy, dy_base, grad_at[1], ring.index((at - 2) % SLOTS), grad_at[0], r, num_rows,
                       stride_gt, G_LAYOUT)  # fmt: skip
            dy_sum = hopper.warpgroup_mma_init(dy_RD)
        else:
            dx_RD = hopper.warpgroup_mma_wait(2, deps=[dx_sum])
        store_tile(dx_RD * scale, dx, dx_base, grad_at[1], ring.index((at - 1) % SLOTS), grad_at[0], r, num_rows,
                   stride_gt, G_LAYOUT)  # fmt: skip
        dx_sum = hopper.warpgroup_mma_init(dx_RD)
        tile += 1  # noqa: SIM113 - Gluon knows no enumerate
    hopper.warpgroup_mma_wait(0, deps=[s, dp])
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["window", "num_shared"])
def _softmax_bwd_hopper_kernel(
    q, k, v, do, dq, dk, dv, dq_pointer, dk_pointer, dv_pointer, lse, delta, offsets, num_heads, num_shared, window,
    scale, scale_log2,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr,
    D: gl.constexpr, BLOCK: gl.constexpr, PART: gl.constexpr, SLOTS: gl.constexpr, SHARED: gl.constexpr,
    WINDOW: gl.constexpr,
):  # fmt: skip
    """The first seven are the copy engine's descriptors of tiles of BLOCK rows. Programs of even number make dQ, of odd
    number dK and dV, with their scores in parts of PART columns. SLOTS, the streamed tiles on chip, is odd."""
    b, h = gl.program_id(0) // 2 // num_heads, gl.program_id(0) // 2 % num_heads
    kv_first = gl.load(offsets + b)
    length = gl.load(offsets + b + 1) - kv_first
    q_first, first, num_q = kv_first, kv_first, length
    if SHARED:
        q_first, first, num_q = b * 0, b * num_shared, num_shared
    resident = gl.allocate_shared_memory(q.dtype, [2, BLOCK, D], q.layout)
    ring = gl.allocate_shared_memory(q.dtype, [SLOTS, BLOCK, D], q.layout)
    resident_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(resident_full, count=2)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
    hopper.fence_async_shared()
    q_at, do_at = (q_first, h * stride_qh), (first, h * stride_doh)
    k_at, v_at = (kv_first, h * stride_kh), (kv_first, h * stride_vh)
    first64, kv_first64 = first.to(gl.int64), kv_first.to(gl.int64)
    lse_base = lse + first64 * num_heads + h
    delta_base = delta + first64 * num_heads + h
    dq_base = dq_pointer + first64 * stride_gt + h * stride_gh
    dk_base = dk_pointer + kv_first64 * stride_gt + h * stride_gh
    dv_base = dv_pointer + kv_first64 * stride_gt + h * stride_gh
    if gl.program_id(0) % 2 == 1:
        if length > 0:
            _pass(k, v, q, do, dk, dv, dk_base, dv_base, lse_base, delta_base, resident, ring,
                  resident_full, full, k_at, v_at, q_at, do_at, (kv_first, h * stride_gh), length, num_q,
                  num_heads, window, scale, scale_log2, stride_gt, PART, True, WINDOW)  # fmt: skip
    elif num_q > 0:
        _pass(q, do, k, v, dq, dq, dq_base, dq_base, lse_base, delta_base, resident, ring,
              resident_full, full, q_at, do_at, k_at, v_at, (first, h * stride_gh), num_q, length,
              num_heads, window, scale, scale_log2, stride_gt, BLOCK, False, WINDOW)  # fmt: skip
