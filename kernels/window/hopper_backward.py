"""Backward of windowed self-attention on Hopper, softmax's and GDPA's, in Gluon: each row comes on chip once.

Shape letters: D head width, H heads, R rows of a tile, C columns of its scores, both 64. One warp has tiles of K, V, Q
and dO copied into rings of SLOTS tiles each, in order. Groups of four warps walk along the example: one by query tile,
for dQ, and one or two by key tile, for dK and dV. A tile stays until no group's window needs it any more. Each group
computes its own scores, 7 products in all, and one's weights overlap with another's products. All they exchange is
softmax's delta = rowsum(dO * O), which the queries' group makes.
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
from kernels.hopper_ring import all_warps, copy_in, get, give_back, put, store_tile

_R = gl.constexpr(64)


@gluon.jit
def _near(tile, num_tiles, window):
    """The first tile that some row of this one meets, and the one after the last."""
    lo = gl.maximum(tile * _R - window, 0) // _R
    return lo, gl.minimum((tile * _R + (_R - 1) + window) // _R + 1, num_tiles)


@gluon.jit
def _announce(item, h, first, length, news, at):
    items, full, empty = news
    slot = at % 2
    mbarrier.wait(empty.index(slot), (at // 2 & 1) ^ 1)
    put(items.index(slot * 4), item)
    put(items.index(slot * 4 + 1), h)
    put(items.index(slot * 4 + 2), first)
    put(items.index(slot * 4 + 3), length)
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _take(news, at):
    """Number, head, first row and length of the item that was announced."""
    items, full, empty = news
    slot = at % 2
    mbarrier.wait(full.index(slot), at // 2 & 1)
    item = get(items.index(slot * 4))
    h = get(items.index(slot * 4 + 1))
    first = get(items.index(slot * 4 + 2))
    length = get(items.index(slot * 4 + 3))
    all_warps()  # have read
    mbarrier.arrive(empty.index(slot), count=1)
    return item, h, first, length


@gluon.jit
def _produce(
    q, k, v, do, out, lse, offsets, counter, num_items, num_heads, tiles, sums, barriers, news,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    stride_gh: gl.constexpr, SOFTMAX: gl.constexpr,
):  # fmt: skip
    """One warp: takes items off the counter and has their tiles copied as far ahead as the rings have room."""
    q_tiles, do_tiles, k_tiles, v_tiles = tiles
    out_tile, lse_tiles, _, out_full, out_empty, _ = sums
    q_full, q_empty, k_full, k_empty = barriers
    SLOTS: gl.constexpr = q_tiles.shape[0]
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    at = 0  # tiles so far
    count = 0  # items so far
    item = gl.program_id(0)
    while item < num_items:
        b, h = item // num_heads, item % num_heads
        first = gl.load(offsets + b)
        length = gl.load(offsets + b + 1) - first
        if length > 0:
            _announce(item, h, first, length, news, count)
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
                mbarrier.wait(out_empty, (at & 1) ^ 1)
                copy_in(out, first + row, h * stride_gh, out_full, out_tile, True)
            at += 1
        # Not before this item's last copies are on their way: a program that is busy must not hold a second one.
        item = gl.atomic_add(counter, 1) + gl.num_programs(0)
    _announce(item, 0, 0, 0, news, count)
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
def _less_delta(dp_RC, at, sums, exists):
    """What dP of the keys is added to: - delta of the queries, which the other group makes."""
    _, _, delta_tiles, _, _, delta_full = sums
    SLOTS: gl.constexpr = delta_tiles.shape[0]
    mbarrier.wait(delta_full.index(at % SLOTS), at // SLOTS & 1, pred=exists)
    delta = delta_tiles.index(at % SLOTS).load(gl.SliceLayout(0, dp_RC.type.layout))
    return gl.full([_R, _R], 0.0, gl.float32, dp_RC.type.layout) - delta[None, :]


@gluon.jit
def _delta(do_tile, at, sums, SUMS: gl.constexpr):
    """rowsum(dO * O) of query tile number `at`, for both groups."""
    out_tile, _, delta_tiles, out_full, out_empty, delta_full = sums
    SLOTS: gl.constexpr = delta_tiles.shape[0]
    ACROSS: gl.constexpr = do_tile.shape[1] // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    mbarrier.wait(out_full, at & 1)
    product_RD = out_tile.load(LAYOUT).to(gl.float32) * do_tile.load(LAYOUT).to(gl.float32)
    delta_tiles.index(at % SLOTS).store(gl.sum(product_RD, 1))
    mbarrier.arrive(out_empty, count=1)
    mbarrier.arrive(delta_full.index(at % SLOTS), count=1)
    return delta_tiles.index(at % SLOTS).load(SUMS)


@gluon.jit
def _walk(
    grads, pointers, num_items, window, inner, outer, resident, streamed, sums, barriers, turns, staged, news,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr, KEYS: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
    IN_PLACE: gl.constexpr, TURNS: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """Four warps: dX = dS U by tile, and with KEYS dY = P^T dO too, of every GROUPS-th tile.

    The resident pair (X, Y) is (Q, dO), and tiles of the streamed pair (U, W), (K, V), pass by; with KEYS the other way
    around, scores transposed. `inner`, `outer`: GDPA's scales, or the softmax's in base 2 and in dX. IN_PLACE: dK and
    dV leave through the places of their K and V. TURNS: this group and the other one start their products in turn.
    """
    x_tiles, y_tiles = resident
    u_tiles, w_tiles = streamed
    x_full, x_empty, u_full, u_empty, x_done = barriers
    SLOTS: gl.constexpr = x_tiles.shape[0]
    D: gl.constexpr = x_tiles.shape[2]
    TYPE: gl.constexpr = x_tiles.dtype
    SOFTMAX: gl.constexpr = ACTIVATION == "softmax"
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _R, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, G_LAYOUT, 2)
    SUMS: gl.constexpr = gl.SliceLayout(0 if KEYS else 1, S_LAYOUT)
    lse_tiles = sums[1]
    before = 0  # tiles of the items before
    count = 0
    pair = 0
    held = -1  # the tile whose gradients may still be in its place
    item, h, first, length = _take(news, count)
    while item < num_items:
        num_tiles = gl.cdiv(length, _R)
        base = first.to(gl.int64) * stride_gt + h * stride_gh
        # Slots of a ring of even size are one group's for good: it sees every time that they fill.
        i_first = (before + GROUP) % GROUPS
        released = 0
        some = i_first < num_tiles
        # Through a wait: registers of a product must be written before the first one is in flight.
        zero_RD = gl.full([_R, D], 0.0, gl.float32, G_LAYOUT)
        zero_RC = gl.full([_R, _R], 0.0, gl.float32, S_LAYOUT)
        dx_RD, dy_RD, s_RC, dp_RC = hopper.warpgroup_mma_wait(0, deps=[zero_RD, zero_RD, zero_RC, zero_RC])
        dx_sum, dy_sum = hopper.warpgroup_mma_init(dx_RD), hopper.warpgroup_mma_init(dy_RD)
        own, other = before + i_first, before + _near(i_first, num_tiles, window)[0]
        s = _start(x_tiles, x_full, u_tiles, u_full, own, other, True, some, s_RC, False)
        s_RC = hopper.warpgroup_mma_wait(0, deps=[s])
        if SOFTMAX and KEYS:
            dp_RC = _less_delta(dp_RC, other, sums, some)
        dp = _start(y_tiles, x_full, w_tiles, u_full, own, other, False, False, dp_RC, SOFTMAX and KEYS)
        for i in range(i_first, num_tiles, GROUPS):
            lo, hi = _near(i, num_tiles, window)
            kept = _near(i + GROUPS, num_tiles, window)[0]  # the first tile that the next step needs
            kept = gl.where(i + GROUPS < num_tiles, kept, num_tiles)
            place = (before + i) % SLOTS
            if SOFTMAX and not KEYS:
                lse = lse_tiles.index(place).load(SUMS)
                delta = _delta(y_tiles.index(place), before + i, sums, SUMS)
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
                ds_RC = slope_RC * (dp_RC - delta[:, None]) if SOFTMAX and not KEYS else slope_RC * dp_RC
                p_RC, ds_RC = p_RC.to(TYPE), ds_RC.to(TYPE)
                if _is_cut(i * _R, j * _R, length, window, _R, _R, True):
                    row_R = i * _R + gl.arange(0, _R, gl.SliceLayout(1, S_LAYOUT))
                    column_C = j * _R + gl.arange(0, _R, gl.SliceLayout(0, S_LAYOUT))
                    visible = _visible(row_R, column_C, length, window, True)
                    if KEYS:
                        p_RC = gl.where(visible, p_RC, 0.0)
                    ds_RC = gl.where(visible, ds_RC, 0.0)
                if TURNS:
                    mbarrier.wait(turns[0], (pair + (0 if KEYS else 1)) & 1)
                if KEYS:
                    p_RC = gl.convert_layout(p_RC, A_LAYOUT)
                    dy_sum = hopper.warpgroup_mma(
                        p_RC, w_tiles.index(at % SLOTS), dy_sum, use_acc=j > lo, is_async=True
                    )
                ds_RC = gl.convert_layout(ds_RC, A_LAYOUT)
                dx_sum = hopper.warpgroup_mma(ds_RC, u_tiles.index(at % SLOTS), dx_sum, use_acc=j > lo, is_async=True)
                is_last = j + 1 == hi
                own = before + gl.where(is_last, i + GROUPS, i)
                other = before + gl.where(is_last, kept, j + 1)
                exists = own < before + num_tiles
                s = _start(x_tiles, x_full, u_tiles, u_full, own, other, is_last, exists, s_RC, False)
                if KEYS:
                    s_RC, dx_RD, dy_RD = hopper.warpgroup_mma_wait(0, deps=[s, dx_sum, dy_sum])
                    dy_sum = hopper.warpgroup_mma_init(dy_RD)
                else:
                    s_RC, dx_RD = hopper.warpgroup_mma_wait(0, deps=[s, dx_sum])
                dx_sum = hopper.warpgroup_mma_init(dx_RD)
                if SOFTMAX and KEYS:
                    dp_RC = _less_delta(dp_RC, other, sums, exists)
                dp = _start(y_tiles, x_full, w_tiles, u_full, own, other, False, False, dp_RC, SOFTMAX and KEYS)
                if TURNS:
                    mbarrier.arrive(turns[1], count=1)
                    pair += 1
                if GROUPS == 1:  # noqa: SIM102
                    if j < kept:
                        mbarrier.arrive(u_empty.index(at % SLOTS), count=1)
                if KEYS and IN_PLACE:  # noqa: SIM102
                    if j == lo:
                        tma.store_wait(0)
                        mbarrier.arrive(x_empty.index(gl.maximum(held, 0) % SLOTS), count=1, pred=held >= 0)
            if KEYS:
                dx_RD, dy_RD = hopper.warpgroup_mma_wait(1, deps=[dx_sum, dy_sum])
                if IN_PLACE:
                    mbarrier.wait(x_done.index(place), (before + i) // SLOTS & 1)  # nobody else needs K and V
                    held = before + i
                    dx_staged, dy_staged = x_tiles.index(place), y_tiles.index(place)
                else:
                    mbarrier.arrive(x_empty.index(place), count=1)
                    tma.store_wait(0)
                    dx_staged, dy_staged = staged, staged
                store_tile(dy_RD, grads[1], pointers[1] + base, h * stride_gh, dy_staged, first, i * _R, length,
                           stride_gt, G_LAYOUT)  # fmt: skip
                dy_sum = hopper.warpgroup_mma_init(dy_RD)
                if not IN_PLACE:
                    tma.store_wait(0)
            else:
                dx_RD = hopper.warpgroup_mma_wait(1, deps=[dx_sum])
                mbarrier.arrive(x_empty.index(place), count=1)
                tma.store_wait(0)
                dx_staged = staged
            if SOFTMAX:
                dx_RD = dx_RD * outer
            store_tile(dx_RD, grads[0], pointers[0] + base, h * stride_gh, dx_staged, first, i * _R, length, stride_gt,
                       G_LAYOUT)  # fmt: skip
            dx_sum = hopper.warpgroup_mma_init(dx_RD)
            if GROUPS > 1:
                _release(before + released, before + kept, u_full, u_empty)
                released = kept
        hopper.warpgroup_mma_wait(0, deps=[dp])  # leftovers
        if GROUPS > 1:
            _release(before + released, before + num_tiles, u_full, u_empty)
        before += num_tiles
        count += 1
        item, h, first, length = _take(news, count)
    tma.store_wait(0)


@gluon.jit
def _release(t, end, full, empty):
    """Tiles that this group no longer needs, or never did: only once they are there, so that no time is missed."""
    SLOTS: gl.constexpr = full.shape[0]
    for tile in range(t, end):
        mbarrier.wait(full.index(tile % SLOTS), tile // SLOTS & 1)
        mbarrier.arrive(empty.index(tile % SLOTS), count=1)


@gluon.jit
def _barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit(do_not_specialize=["window", "num_items"])
def _window_bwd_hopper_kernel(
    q, k, v, do, out, dq, dk, dv, dq_pointer, dk_pointer, dv_pointer, lse, offsets, counter, num_items, num_heads,
    window, inner, outer,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr,
    D: gl.constexpr, SLOTS: gl.constexpr, GROUPS: gl.constexpr, IN_PLACE: gl.constexpr, TURNS: gl.constexpr,
    REGISTERS: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """q to dv are the copy engine's descriptors, of 64 rows. An item is an example and a head; a program that is done
    with one takes another off `counter`, two int32 that are 0 before and after. SLOTS: at least the tiles that one tile
    meets, and with two GROUPS that make dK and dV, one more and even. ACTIVATION "softmax" has `out` and base-2
    log-sums `lse`, which others do not read."""
    TYPE: gl.constexpr = q.dtype
    SOFTMAX: gl.constexpr = ACTIVATION == "softmax"
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, _R, D], q.layout)
    do_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, _R, D], do.layout)
    k_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, _R, D], k.layout)
    v_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, _R, D], v.layout)
    dq_tile = gl.allocate_shared_memory(TYPE, [_R, D], dq.layout)
    dk_tile, out_tile = dq_tile, dq_tile
    if not IN_PLACE:
        dk_tile = gl.allocate_shared_memory(TYPE, [_R, D], dk.layout)
    if SOFTMAX:
        out_tile = gl.allocate_shared_memory(TYPE, [_R, D], out.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [SLOTS, _R], FLAT)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [SLOTS, _R], FLAT)
    items = gl.allocate_shared_memory(gl.int32, [8, 1], FLAT)
    news = (items, _barriers(2, 1), _barriers(2, 1 + GROUPS))
    q_full, q_empty = _barriers(SLOTS, 3 if SOFTMAX else 2), _barriers(SLOTS, 1 + GROUPS)
    k_full, k_empty = _barriers(SLOTS, 2), _barriers(SLOTS, 1 if IN_PLACE else 2)
    k_done = k_empty
    if IN_PLACE:
        k_done = _barriers(SLOTS, 1)
    sums = (out_tile, lse_tiles, delta_tiles, _barriers(1, 1).index(0), _barriers(1, 1).index(0), _barriers(SLOTS, 1))
    q_turn, k_turn = _barriers(1, 1).index(0), _barriers(1, 1).index(0)
    hopper.fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_walk, ((dq, dq), (dq_pointer, dq_pointer), num_items, window, inner, outer, (q_tiles, do_tiles),
                         (k_tiles, v_tiles), sums, (q_full, q_empty, k_full, k_done, q_empty), (q_turn, k_turn),
                         dq_tile, news, stride_gt, stride_gh, False, 0, 1, IN_PLACE, TURNS, ACTIVATION, APPROX)),
                (_walk, ((dk, dv), (dk_pointer, dv_pointer), num_items, window, inner, outer, (k_tiles, v_tiles),
                         (q_tiles, do_tiles), sums, (k_full, k_empty, q_full, q_empty, k_done), (k_turn, q_turn),
                         dk_tile, news, stride_gt, stride_gh, True, 0, 1, IN_PLACE, TURNS, ACTIVATION, APPROX)),
                (_produce, (q, k, v, do, out, lse, offsets, counter, num_items, num_heads,
                            (q_tiles, do_tiles, k_tiles, v_tiles), sums, barriers, news,
                            stride_qh, stride_kh, stride_vh, stride_doh, stride_gh, SOFTMAX)),
            ],
            [4, 1], [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_walk, ((dq, dq), (dq_pointer, dq_pointer), num_items, window, inner, outer, (q_tiles, do_tiles),
                         (k_tiles, v_tiles), sums, (q_full, q_empty, k_full, k_done, q_empty), (q_turn, k_turn),
                         dq_tile, news, stride_gt, stride_gh, False, 0, 1, IN_PLACE, TURNS, ACTIVATION, APPROX)),
                (_walk, ((dk, dv), (dk_pointer, dv_pointer), num_items, window, inner, outer, (k_tiles, v_tiles),
                         (q_tiles, do_tiles), sums, (k_full, k_empty, q_full, q_empty, k_done), (k_turn, q_turn),
                         dk_tile, news, stride_gt, stride_gh, True, 0, GROUPS, IN_PLACE, TURNS, ACTIVATION, APPROX)),
                (_walk, ((dk, dv), (dk_pointer, dv_pointer), num_items, window, inner, outer, (k_tiles, v_tiles),
                         (q_tiles, do_tiles), sums, (k_full, k_empty, q_full, q_empty, k_done), (k_turn, q_turn),
                         dk_tile, news, stride_gt, stride_gh, True, 1, GROUPS, IN_PLACE, TURNS, ACTIVATION, APPROX)),
                (_produce, (q, k, v, do, out, lse, offsets, counter, num_items, num_heads,
                            (q_tiles, do_tiles, k_tiles, v_tiles), sums, barriers, news,
                            stride_qh, stride_kh, stride_vh, stride_doh, stride_gh, SOFTMAX)),
            ],
            [4, 4, 1], [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
