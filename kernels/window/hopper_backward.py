"""Backward of windowed self-attention on Hopper, softmax's and GDPA's, in Gluon: each row comes on chip once.

Shape letters: D head width, H heads, R rows of a tile, C columns of its scores, both 64. One warp has tiles of K, V, Q
and dO copied into rings of SLOTS tiles each, in order. Two groups of four warps walk along the example: one by query
tile, for dQ, and one by key tile, for dK and dV. A tile stays until neither group's window needs it any more. The
groups exchange no tiles: each computes its own scores, 7 products in all, and one's weights overlap with the other's
products. Of softmax the first tells the second delta = rowsum(dO * O), from tiles of O that it reads itself.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.attention.hopper_forward import _is_cut, _visible
from kernels.gdpa.triton_activations import activate_with_slope
from kernels.hopper_ring import all_warps, announce, barriers_of, copy_in, example, give_back, news_of, store_tile, take

_R = gl.constexpr(64)


@gluon.jit
def _near(tile, num_tiles, window):
    """The first tile that some row of this one meets, and the one after the last."""
    lo = gl.maximum(tile * _R - window, 0) // _R
    return lo, gl.minimum((tile * _R + (_R - 1) + window) // _R + 1, num_tiles)


@gluon.jit
def _produce(
    q, k, v, do, lse, offsets, counter, num_items, num_heads, tiles, lse_tiles, barriers, news,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    SOFTMAX: gl.constexpr,
):  # fmt: skip
    """One warp: takes items off the counter and has their tiles copied as far ahead as the rings have room."""
    q_tiles, do_tiles, k_tiles, v_tiles = tiles
    q_full, q_empty, k_full, k_empty = barriers
    SLOTS: gl.constexpr = q_tiles.shape[0]
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    at = 0  # tiles so far
    count = 0  # items so far
    item = gl.program_id(0)
    while item < num_items:
        b, h = example(item // num_heads, num_items // num_heads, offsets), item % num_heads
        first = gl.load(offsets + b)
        length = gl.load(offsets + b + 1) - first
        if length > 0:
            announce((item, h, first, length), news, count)
            count += 1
        for row in range(0, length, _R):
            slot, phase = at % SLOTS, (at // SLOTS & 1) ^ 1
            if SOFTMAX:
                row_R = row + gl.arange(0, _R, FLAT)
                of_row_R = (first + row_R).to(gl.int64) * num_heads + h
                lse_R = gl.load(lse + of_row_R, mask=row_R < length, other=float("inf"))  # a weight of 0
            mbarrier.wait(k_empty.index(slot), phase)
            copy_in(k, first + row, h * stride_kh, k_full.index(slot), k_tiles.index(slot), True)
            copy_in(v, first + row, h * stride_vh, k_full.index(slot), v_tiles.index(slot), True)
            mbarrier.wait(q_empty.index(slot), phase)
            copy_in(q, first + row, h * stride_qh, q_full.index(slot), q_tiles.index(slot), True)
            copy_in(do, first + row, h * stride_doh, q_full.index(slot), do_tiles.index(slot), True)
            if SOFTMAX:
                lse_tiles.index(slot).store(lse_R)
                mbarrier.arrive(q_full.index(slot), count=1)
            at += 1
        # Not before this item's last copies are on their way: a program that is busy must not hold a second one.
        item = gl.atomic_add(counter, 1) + gl.num_programs(0)
    announce((item, 0, 0, 0), news, count)
    give_back(counter)


@gluon.jit
def _start(x_tiles, x_full, u_tiles, u_full, own, other, is_new, exists, before, use_acc):
    """Start the product X U^T of tile number `own` with number `other`; `before` lends its registers.

    Past the end it multiplies leftovers, which nobody reads: a branch would keep the products from staying in flight.
    """
    SLOTS: gl.constexpr = x_tiles.shape[0]
    mbarrier.wait(x_full.index(own % SLOTS), own // SLOTS & 1, pred=is_new & exists)
    mbarrier.wait(u_full.index(other % SLOTS), other // SLOTS & 1, pred=exists)
    u = u_tiles.index(other % SLOTS).permute((1, 0))
    return hopper.warpgroup_mma(x_tiles.index(own % SLOTS), u, before, use_acc=use_acc, is_async=True)


@gluon.jit
def _less_delta(dp_RC, at, sums, exists, KEYS: gl.constexpr):
    """What softmax's dP is added to: - delta of query tile number `at`, by rows or with KEYS by columns."""
    LAYOUT: gl.constexpr = dp_RC.type.layout
    _, delta_tiles, delta_full = sums
    SLOTS: gl.constexpr = delta_tiles.shape[0]
    if KEYS:
        mbarrier.wait(delta_full.index(at % SLOTS), at // SLOTS & 1, pred=exists)
    delta = delta_tiles.index(at % SLOTS).load(gl.SliceLayout(0 if KEYS else 1, LAYOUT))
    return gl.full([_R, _R], 0.0, gl.float32, LAYOUT) - (delta[None, :] if KEYS else delta[:, None])


@gluon.jit
def _tile_of(out, row, length, stride: gl.constexpr, D: gl.constexpr):
    """A tile of O from memory; zeros past the example's end."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    row_R = row + gl.arange(0, _R, gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    return gl.load(out + (row_R[:, None] * stride + d[None, :]), mask=(row_R < length)[:, None], other=0.0)


@gluon.jit
def _leave_delta(o_RD, do_tiles, do_full, sums, at):
    """rowsum(dO * O) of query tile number `at`, for both groups."""
    _, delta_tiles, delta_full = sums
    SLOTS: gl.constexpr = do_tiles.shape[0]
    mbarrier.wait(do_full.index(at % SLOTS), at // SLOTS & 1)
    do_RD = do_tiles.index(at % SLOTS).load(o_RD.type.layout)
    delta_tiles.index(at % SLOTS).store(gl.sum(o_RD.to(gl.float32) * do_RD.to(gl.float32), 1))
    all_warps()
    mbarrier.arrive(delta_full.index(at % SLOTS), count=1)


@gluon.jit
def _walk(
    grads, pointers, out, num_items, window, inner, outer, resident, streamed, sums, barriers, turns, staged, news,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr, KEYS: gl.constexpr, ACTIVATION: gl.constexpr,
    APPROX: gl.constexpr,
):  # fmt: skip
    """Four warps: dX = dS U by tile, and with KEYS dY = P^T dO too.

    The resident pair (X, Y) is (Q, dO), and tiles of the streamed pair (U, W), (K, V), pass by; with KEYS the other way
    around, scores transposed. `inner`, `outer`: GDPA's scales, or the softmax's in base 2 and in dX. GDPA's groups
    start their products in turn, so that one's weights fall into the other's products.
    """
    x_tiles, y_tiles = resident
    u_tiles, w_tiles = streamed
    x_full, x_empty, u_full, u_empty = barriers
    SLOTS: gl.constexpr = x_tiles.shape[0]
    D: gl.constexpr = x_tiles.shape[2]
    TYPE: gl.constexpr = x_tiles.dtype
    SOFTMAX: gl.constexpr = ACTIVATION == "softmax"
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _R, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, G_LAYOUT, 2)
    SUMS: gl.constexpr = gl.SliceLayout(0 if KEYS else 1, S_LAYOUT)
    lse_tiles = sums[0]
    before = 0  # tiles of the items before
    count = 0
    pair = 0  # of tiles, so far
    item, h, first, length = take(news, count, 4)
    while item < num_items:
        num_tiles = gl.cdiv(length, _R)
        base = first.to(gl.int64) * stride_gt + h * stride_gh
        if SOFTMAX and not KEYS:
            o_RD = _tile_of(out + base, 0, length, stride_gt, D)
            next_o_RD = _tile_of(out + base, _R, length, stride_gt, D)
            _leave_delta(o_RD, y_tiles, x_full, sums, before)
        # Through a wait: registers of a product must be written before the first one is in flight.
        zero_RD = gl.full([_R, D], 0.0, gl.float32, G_LAYOUT)
        zero_RC = gl.full([_R, _R], 0.0, gl.float32, S_LAYOUT)
        dx_RD, dy_RD, s_RC, dp_RC = hopper.warpgroup_mma_wait(0, deps=[zero_RD, zero_RD, zero_RC, zero_RC])
        dx_sum, dy_sum = hopper.warpgroup_mma_init(dx_RD), hopper.warpgroup_mma_init(dy_RD)
        s = _start(x_tiles, x_full, u_tiles, u_full, before, before, True, True, s_RC, False)
        s_RC = hopper.warpgroup_mma_wait(0, deps=[s])
        if SOFTMAX:
            dp_RC = _less_delta(dp_RC, before, sums, True, KEYS)
        dp = _start(y_tiles, x_full, w_tiles, u_full, before, before, False, False, dp_RC, SOFTMAX)
        for i in range(num_tiles):
            lo, hi = _near(i, num_tiles, window)
            kept = _near(i + 1, num_tiles, window)[0]  # the first tile that the next step needs
            kept = gl.where(i + 1 < num_tiles, kept, num_tiles)
            place = (before + i) % SLOTS
            if SOFTMAX and not KEYS:
                # A tile ahead: the other group, about in step, meets the next tile already.
                if i + 1 < num_tiles:
                    _leave_delta(next_o_RD, y_tiles, x_full, sums, before + i + 1)
                next_o_RD = _tile_of(out + base, (i + 2) * _R, length, stride_gt, D)
                lse = lse_tiles.index(place).load(SUMS)
            for j in range(lo, hi):
                at = before + j
                if SOFTMAX and KEYS:
                    lse = lse_tiles.index(at % SLOTS).load(SUMS)
                if SOFTMAX:
                    p_RC = gl.exp2(s_RC * inner - (lse[None, :] if KEYS else lse[:, None]))
                    slope_RC = p_RC
                else:
                    p_RC, slope_RC = activate_with_slope(s_RC, inner, outer, ACTIVATION, APPROX)
                    if ACTIVATION == "identity":
                        slope_RC = s_RC * 0.0 + slope_RC
                dp_RC, slope_RC = hopper.warpgroup_mma_wait(0, deps=[dp, slope_RC])
                ds_RC = slope_RC * dp_RC
                p_RC, ds_RC = p_RC.to(TYPE), ds_RC.to(TYPE)
                if _is_cut(i * _R, j * _R, length, window, _R, _R, True):
                    row_R = i * _R + gl.arange(0, _R, gl.SliceLayout(1, S_LAYOUT))
                    column_C = j * _R + gl.arange(0, _R, gl.SliceLayout(0, S_LAYOUT))
                    visible = _visible(row_R, column_C, length, window, True)
                    if KEYS:
                        p_RC = gl.where(visible, p_RC, 0.0)
                    ds_RC = gl.where(visible, ds_RC, 0.0)
                if not SOFTMAX:
                    mbarrier.wait(turns[0], (pair + (0 if KEYS else 1)) & 1)
                if KEYS:
                    p_RC = gl.convert_layout(p_RC, A_LAYOUT)
                    dy_sum = hopper.warpgroup_mma(
                        p_RC, w_tiles.index(at % SLOTS), dy_sum, use_acc=j > lo, is_async=True
                    )
                ds_RC = gl.convert_layout(ds_RC, A_LAYOUT)
                dx_sum = hopper.warpgroup_mma(ds_RC, u_tiles.index(at % SLOTS), dx_sum, use_acc=j > lo, is_async=True)
                is_last = j + 1 == hi
                own = before + i + is_last.to(gl.int32)
                other = before + gl.where(is_last, kept, j + 1)
                exists = own < before + num_tiles
                s = _start(x_tiles, x_full, u_tiles, u_full, own, other, is_last, exists, s_RC, False)
                if KEYS:
                    s_RC, dx_RD, dy_RD = hopper.warpgroup_mma_wait(0, deps=[s, dx_sum, dy_sum])
                    dy_sum = hopper.warpgroup_mma_init(dy_RD)
                else:
                    s_RC, dx_RD = hopper.warpgroup_mma_wait(0, deps=[s, dx_sum])
                dx_sum = hopper.warpgroup_mma_init(dx_RD)
                if SOFTMAX:
                    dp_RC = _less_delta(dp_RC, other if KEYS else own, sums, exists, KEYS)
                dp = _start(y_tiles, x_full, w_tiles, u_full, own, other, False, False, dp_RC, SOFTMAX)
                if not SOFTMAX:
                    mbarrier.arrive(turns[1], count=1)
                    pair += 1
                if j < kept:
                    mbarrier.arrive(u_empty.index(at % SLOTS), count=1)
            mbarrier.arrive(x_empty.index(place), count=1)
            if KEYS:
                dx_RD, dy_RD = hopper.warpgroup_mma_wait(1, deps=[dx_sum, dy_sum])
                tma.store_wait(0)
                store_tile(dy_RD, grads[1], pointers[1] + base, h * stride_gh, staged, first, i * _R, length, stride_gt,
                           G_LAYOUT)  # fmt: skip
                dy_sum = hopper.warpgroup_mma_init(dy_RD)
            else:
                dx_RD = hopper.warpgroup_mma_wait(1, deps=[dx_sum])
            tma.store_wait(0)
            if SOFTMAX:
                dx_RD = dx_RD * outer
            store_tile(dx_RD, grads[0], pointers[0] + base, h * stride_gh, staged, first, i * _R, length, stride_gt,
                       G_LAYOUT)  # fmt: skip
            dx_sum = hopper.warpgroup_mma_init(dx_RD)
        hopper.warpgroup_mma_wait(0, deps=[dp])  # leftovers
        before += num_tiles
        count += 1
        item, h, first, length = take(news, count, 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["window", "num_items"])
def _window_bwd_hopper_kernel(
    q, k, v, do, dq, dk, dv, dq_pointer, dk_pointer, dv_pointer, out_pointer, lse, offsets, counter, num_items,
    num_heads, window, inner, outer,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr,
    D: gl.constexpr, SLOTS: gl.constexpr, REGISTERS: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """q to dv are the copy engine's descriptors, of 64 rows. An item is an example and a head; a program that is done
    with one takes another off `counter`, two int32 that are 0 before and after. SLOTS: at least the tiles that one tile
    meets. REGISTERS: of a thread that makes dK and dV. ACTIVATION "softmax" has its result, laid out as the gradients
    are, and base-2 log-sums `lse`, which others do not read."""
    TYPE: gl.constexpr = q.dtype
    SOFTMAX: gl.constexpr = ACTIVATION == "softmax"
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, _R, D], q.layout)
    do_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, _R, D], do.layout)
    k_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, _R, D], k.layout)
    v_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, _R, D], v.layout)
    dq_tile = gl.allocate_shared_memory(TYPE, [_R, D], dq.layout)
    dk_tile = gl.allocate_shared_memory(TYPE, [_R, D], dk.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [SLOTS, _R], FLAT)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [SLOTS, _R], FLAT)
    news = news_of(2, 4, 2)
    q_full, q_empty = barriers_of(SLOTS, 3 if SOFTMAX else 2), barriers_of(SLOTS, 2)
    k_full, k_empty = barriers_of(SLOTS, 2), barriers_of(SLOTS, 2)
    q_turn, k_turn = q_full.index(0), k_full.index(0)  # not read
    if not SOFTMAX:
        q_turn, k_turn = barriers_of(1, 1).index(0), barriers_of(1, 1).index(0)
    delta_full = q_full  # not read
    if SOFTMAX:
        delta_full = barriers_of(SLOTS, 1)
    hopper.fence_async_shared()
    sums = (lse_tiles, delta_tiles, delta_full)  # full: the query group leaves deltas, the copying warp log-sums
    gl.warp_specialize(
        [
            (_walk, ((dq, dq), (dq_pointer, dq_pointer), out_pointer, num_items, window, inner, outer,
                     (q_tiles, do_tiles), (k_tiles, v_tiles), sums, (q_full, q_empty, k_full, k_empty),
                     (q_turn, k_turn), dq_tile, news,
                     stride_gt, stride_gh, False, ACTIVATION, APPROX)),
            (_walk, ((dk, dv), (dk_pointer, dv_pointer), out_pointer, num_items, window, inner, outer,
                     (k_tiles, v_tiles), (q_tiles, do_tiles), sums, (k_full, k_empty, q_full, q_empty),
                     (k_turn, q_turn), dk_tile, news,
                     stride_gt, stride_gh, True, ACTIVATION, APPROX)),
            (_produce, (q, k, v, do, lse, offsets, counter, num_items, num_heads,
                        (q_tiles, do_tiles, k_tiles, v_tiles), lse_tiles, (q_full, q_empty, k_full, k_empty), news,
                        stride_qh, stride_kh, stride_vh, stride_doh, SOFTMAX)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
