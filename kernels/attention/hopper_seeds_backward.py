"""Seed attention's backward on Hopper, in Gluon: one pass, with dQ added up by program over all examples.

Shape letters: B examples, H heads, D head width; tiles have M = 64 seeds and N = 128 keys, 64 of them a group's. As in
`kernels/gdpa/hopper_backward.py` a warp asks for copies, and two groups of four warps hold dK and dV of their keys,
compute scores transposed and make half of dQ's columns each. The key tiles of all examples, head after head, are shared
out evenly and in a fixed order. A program adds dQ of its own tiles, one after another, to float32 rows of its own, a
set for each head it meets: program p's of head h is number p + h. `_add_shares_kernel` sums these.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.hopper_ring import add, all_warps, copy_in, get, put, store, store_rows

_M = gl.constexpr(64)
_N = gl.constexpr(128)
_K_PLACES = gl.constexpr(2)


@gluon.jit
def _wait_for_stores():
    """All that this thread stored or added through the copy engine is done."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _share(before, num_examples, num_heads):
    """This program's first tile and end, of all heads' tiles, and the tiles of one head."""
    each = gl.load(before + num_examples)
    total = each.to(gl.int64) * num_heads
    first = total * gl.program_id(0) // gl.num_programs(0)
    end = total * (gl.program_id(0) + 1) // gl.num_programs(0)
    return first.to(gl.int32), end.to(gl.int32), gl.maximum(each, 1)


@gluon.jit
def _find(before, num_examples, tile):
    """The example that has this tile of a head's: before[b] <= tile < before[b + 1]."""
    b = 0
    width = num_examples
    while width > 1:
        step = (width + 127) // 128
        at_P = b + (gl.arange(0, 128, gl.BlockedLayout([4], [32], [gl.num_warps()], [0])) + 1) * step
        inside_P = at_P < b + width
        starts_P = gl.load(before + at_P, mask=inside_P, other=0)
        steps = gl.sum((inside_P & (starts_P <= tile)).to(gl.int32), 0)
        b += steps * step
        width = gl.minimum(step, width - steps * step)
    return b


@gluon.jit
def _rows(offsets, b):
    first = gl.load(offsets + b)
    return first, gl.load(offsets + b + 1) - first


@gluon.jit
def _produce(
    q, k, v, do, stats, before, offsets, num_examples, num_heads, num_shared, units, tiles, barriers,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
):  # fmt: skip
    """One warp: announces key tiles and has all tiles copied, and the queries' statistics with them."""
    units, unit_full, unit_empty = units
    q_tiles, do_tiles, k_tiles, v_tiles, stats_tiles = tiles
    q_full, do_full, stats_full, empty, k_full, k_empty, v_full, v_empty = barriers
    SLOTS: gl.constexpr = q_tiles.shape[0]
    lane_S = gl.arange(0, 2 * _M, gl.BlockedLayout([4], [32], [1], [0]))
    query_tiles = gl.cdiv(num_shared, _M)
    first_tile, end, each = _share(before, num_examples, num_heads)
    h = first_tile // each
    b = _find(before, num_examples, first_tile - h * each)
    n = (first_tile - h * each - gl.load(before + b)) * _N
    kv_first, length = _rows(offsets, b)
    t = 0  # query tiles so far
    for i in range(end - first_tile):
        # The next tile: of this example, of one after it, or of the next head.
        if n >= length:
            n = 0
            b += 1
            if first_tile + i == (h + 1) * each:
                h += 1
                b = 0
            kv_first, length = _rows(offsets, b)
            while length == 0:
                b += 1
                kv_first, length = _rows(offsets, b)
        mbarrier.wait(unit_empty.index(i % 2), (i // 2 & 1) ^ 1)
        put(units.index(i % 2 * 4), kv_first + n)
        put(units.index(i % 2 * 4 + 1), length - n)
        put(units.index(i % 2 * 4 + 2), h)
        mbarrier.arrive(unit_full.index(i % 2), count=1)
        at = i % _K_PLACES
        mbarrier.wait(k_empty.index(at), (i // _K_PLACES & 1) ^ 1)
        for c in gl.static_range(2):
            copy_in(k, kv_first + n + c * 64, h * stride_kh, k_full.index(at), k_tiles.index(2 * at + c), True)
        for m in range(0, num_shared, _M):
            tile = (b * num_heads + h) * query_tiles + m // _M
            stats_S = gl.load(stats + tile.to(gl.int64) * (2 * _M) + lane_S)
            slot = t % SLOTS
            mbarrier.wait(empty.index(slot), (t // SLOTS & 1) ^ 1)
            copy_in(q, m, h * stride_qh, q_full.index(slot), q_tiles.index(slot), True)
            if m == 0:
                mbarrier.wait(v_empty, (i & 1) ^ 1)
                for c in gl.static_range(2):
                    copy_in(v, kv_first + n + c * 64, h * stride_vh, v_full, v_tiles.index(c), True)
            copy_in(do, b * num_shared + m, h * stride_doh, do_full.index(slot), do_tiles.index(slot), True)
            stats_tiles.index(slot).store(stats_S)
            mbarrier.arrive(stats_full.index(slot), count=1)
            t += 1
        n += _N


@gluon.jit
def _take(units, full, empty, i):
    """Row, rows left in its example, and head of the i-th key tile."""
    mbarrier.wait(full.index(i % 2), i // 2 & 1)
    row = get(units.index(i % 2 * 4))
    left = get(units.index(i % 2 * 4 + 1))
    h = get(units.index(i % 2 * 4 + 2))
    all_warps()  # have read
    mbarrier.arrive(empty.index(i % 2), count=1)
    return row, left, h


@gluon.jit
def _start(own, tiles, full, t, before, exists):
    """Start this group's keys (values) times query tile (dO tile) t. `before` lends its registers."""
    SLOTS: gl.constexpr = tiles.shape[0]
    mbarrier.wait(full.index(t % SLOTS), t // SLOTS & 1, pred=exists)
    x = tiles.index(t % SLOTS).permute((1, 0))
    return hopper.warpgroup_mma(own, x, before, use_acc=False, is_async=True)


@gluon.jit
def _keep_rows(pointer, tensor, x_ND, staged, row, left, column, stride_t: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows of dK or dV: a whole tile through shared memory, the last ones of an example from the registers."""
    if left >= x_ND.shape[0]:
        staged.store(x_ND.to(staged.dtype))
        hopper.fence_async_shared()
        store(tensor, [row, column], staged)
    else:
        store_rows(pointer + row.to(gl.int64) * stride_t + column, x_ND, 0, left, stride_t, LAYOUT)


@gluon.jit
def _consume(
    dq, dk, dv, dk_pointer, dv_pointer, before, num_examples, num_heads, num_shared, scale, scale_log2,
    units, tiles, made, barriers, exchange, stride_gt: gl.constexpr, stride_gh: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Four warps, with the keys 64 GROUP to 64 GROUP + 63 of each key tile."""
    units, unit_full, unit_empty = units
    q_tiles, do_tiles, k_tiles, v_tiles, stats_tiles = tiles
    ds_tiles, p_tiles, dq_tiles = made
    q_full, do_full, stats_full, empty, k_full, k_empty, v_full, v_empty = barriers
    own_full, other_full, own_free, other_free = exchange
    SLOTS: gl.constexpr = q_tiles.shape[0]
    SWAPS: gl.constexpr = own_full.shape[0]
    D: gl.constexpr = q_tiles.shape[2]
    HALF: gl.constexpr = D // 2
    TYPE: gl.constexpr = q_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _M, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, G_LAYOUT, 2)
    WIDE: gl.constexpr = D == 128  # registers are short
    staged = dq_tiles.index(GROUP)
    staged_dv = staged._reinterpret(TYPE, [64, D], dv.layout)
    own_v = v_tiles.index(GROUP)
    first_tile, end, each = _share(before, num_examples, num_heads)
    count = end - first_tile
    query_rows = gl.cdiv(num_shared, _M) * _M
    num_tiles = count * (query_rows // _M)
    if num_tiles > 0:
        # Through a wait: registers of a product must be written before the first one is in flight.
        dk_ND = gl.full([64, D], 0.0, gl.float32, G_LAYOUT)
        dv_ND = gl.full([64, D], 0.0, gl.float32, G_LAYOUT)
        s_NM = gl.full([64, _M], 0.0, gl.float32, S_LAYOUT)
        dp_NM = gl.full([64, _M], 0.0, gl.float32, S_LAYOUT)
        dq_MD = gl.full([_M, HALF], 0.0, gl.float32, Q_LAYOUT)
        dk_ND, dv_ND, s_NM, dp_NM, dq_MD = hopper.warpgroup_mma_wait(0, deps=[dk_ND, dv_ND, s_NM, dp_NM, dq_MD])
        dk_sum, dv_sum = hopper.warpgroup_mma_init(dk_ND), hopper.warpgroup_mma_init(dv_ND)
        mbarrier.wait(k_full.index(0), 0)
        s = _start(k_tiles.index(GROUP), q_tiles, q_full, 0, s_NM, True)
        mbarrier.wait(v_full, 0)
        dp = _start(own_v, do_tiles, do_full, 0, dp_NM, True)
        i = 0
        m = 0
        head = -1
        row, left, h = _take(units, unit_full, unit_empty, 0)
        for t in range(num_tiles):
            # 0 that changes with m for all the compiler knows: addresses are computed where they are used.
            zero = (num_shared - m) >> 31
            at = i % _K_PLACES + zero
            is_last = m + _M >= num_shared
            q_t, do_t = q_tiles.index(t % SLOTS), do_tiles.index(t % SLOTS)
            s_NM = hopper.warpgroup_mma_wait(1, deps=[s])
            mbarrier.wait(stats_full.index(t % SLOTS), t // SLOTS & 1)
            lse_M = stats_tiles.index(t % SLOTS).slice(0, _M, 0).load(gl.SliceLayout(0, S_LAYOUT))
            p_NM = gl.exp2(s_NM * scale_log2 - lse_M[None, :])
            p_low = p_NM.to(TYPE)
            if WIDE:
                p_tiles.index(GROUP).store(p_low)
                dp_NM = hopper.warpgroup_mma_wait(0, deps=[dp])
            else:
                dp_NM, p_NM = hopper.warpgroup_mma_wait(0, deps=[dp, p_NM])
            mbarrier.arrive(v_empty, count=1, pred=is_last)
            delta_M = stats_tiles.index(t % SLOTS).slice(_M, _M, 0).load(gl.SliceLayout(0, S_LAYOUT))
            ds_NM = p_NM * (dp_NM * scale - delta_M[None, :])
            own_left = left - GROUP * 64
            if own_left < 64:
                row_N = gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
                ds_NM = gl.where((row_N < own_left)[:, None], ds_NM, 0.0)
            ds_NM = ds_NM.to(TYPE)
            swap, phase = t % SWAPS, t // SWAPS & 1
            own_ds, other_ds = ds_tiles.index(2 * swap + GROUP), ds_tiles.index(2 * swap + 1 - GROUP)
            mbarrier.wait(own_free.index(swap), phase ^ 1)
            own_ds.store(ds_NM)
            hopper.fence_async_shared()
            mbarrier.arrive(own_full.index(swap), count=1)
            p_a = p_tiles.index(GROUP + zero) if WIDE else gl.convert_layout(p_low, A_LAYOUT)
            ds_a = own_ds if WIDE else gl.convert_layout(ds_NM, A_LAYOUT)
            dv_sum = hopper.warpgroup_mma(p_a, do_t, dv_sum, use_acc=m > 0, is_async=True)
            dk_sum = hopper.warpgroup_mma(ds_a, q_t, dk_sum, use_acc=m > 0, is_async=True)
            more = (not is_last) | (i + 1 < count)
            after = i + is_last.to(gl.int32)
            next_at = after % _K_PLACES
            mbarrier.wait(k_full.index(next_at), after // _K_PLACES & 1, pred=is_last & more)
            s = _start(k_tiles.index(2 * next_at + GROUP), q_tiles, q_full, t + 1, s_NM, more)
            if WIDE:
                dq_MD = gl.convert_layout(dp_NM, Q_LAYOUT, assert_trivial=True)
            k_half = k_tiles.index(2 * at + GROUP).slice(GROUP * HALF, HALF, 1)
            dq_sum = hopper.warpgroup_mma(own_ds.permute((1, 0)), k_half, dq_MD, use_acc=False, is_async=True)
            mbarrier.wait(other_full.index(swap), phase)
            k_half = k_tiles.index(2 * at + 1 - GROUP).slice(GROUP * HALF, HALF, 1)
            dq_sum = hopper.warpgroup_mma(other_ds.permute((1, 0)), k_half, dq_sum, is_async=True)
            s_NM, dk_ND, dv_ND = hopper.warpgroup_mma_wait(2, deps=[s, dk_sum, dv_sum])
            s = hopper.warpgroup_mma_init(s_NM)
            dk_sum, dv_sum = hopper.warpgroup_mma_init(dk_ND), hopper.warpgroup_mma_init(dv_ND)
            mbarrier.arrive(empty.index(t % SLOTS), count=1)
            # What was added to these rows for the key tile before is there.
            _wait_for_stores()
            tma.store_wait(0)
            # The place of the keys before, where dK was staged.
            mbarrier.arrive(k_empty.index((i + 1) % _K_PLACES), count=1, pred=(m == 0) & (i > 0))
            dq_MD = hopper.warpgroup_mma_wait(0, deps=[dq_sum])
            mbarrier.arrive(other_free.index(swap), count=1)
            staged.store(dq_MD)
            hopper.fence_async_shared()
            if WIDE:
                dp_NM = gl.convert_layout(dq_MD, S_LAYOUT, assert_trivial=True)
            mbarrier.wait(v_full, after & 1, pred=is_last & more)
            dp = _start(own_v, do_tiles, do_full, t + 1, dp_NM, more)
            dq_row = (gl.program_id(0) + h) * query_rows + m
            if h == head:
                add(dq, [dq_row, GROUP * HALF], staged)
            else:
                store(dq, [dq_row, GROUP * HALF], staged)
            m += _M
            if is_last:
                column = h * stride_gh
                own_row = row + GROUP * 64
                # The other group is done with these keys.
                mbarrier.wait(own_free.index(swap), phase)
                own_k = k_tiles.index(2 * (i % _K_PLACES) + GROUP)
                _keep_rows(dk_pointer, dk, dk_ND, own_k, own_row, own_left, column, stride_gt, G_LAYOUT)
                tma.store_wait(0)
                _keep_rows(dv_pointer, dv, dv_ND, staged_dv, own_row, own_left, column, stride_gt, G_LAYOUT)
                head = h
                m = 0
                i += 1
                if more:
                    row, left, h = _take(units, unit_full, unit_empty, i)
        # Leftovers of the products past the end.
        hopper.warpgroup_mma_wait(0, deps=[s, dp])
    tma.store_wait(0)


@gluon.jit
def _barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit(do_not_specialize=["num_examples", "num_shared"])
def _seeds_bwd_hopper_kernel(
    q, k, v, do, dq, dk, dv, dk_pointer, dv_pointer, stats, before, offsets, num_examples, num_heads, num_shared,
    scale, scale_log2,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr, SWAPS: gl.constexpr,
):  # fmt: skip
    """q to dv are the copy engine's descriptors, of 64 rows; dq's are of float32 and half a head's columns.

    `before` and `stats` are what `_prepare_seeds_kernel` leaves.
    """
    TYPE: gl.constexpr = q.dtype
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, _M], TYPE)
    q_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, _M, D], q.layout)
    do_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, _M, D], do.layout)
    k_tiles = gl.allocate_shared_memory(TYPE, [2 * _K_PLACES, 64, D], k.layout)
    v_tiles = gl.allocate_shared_memory(TYPE, [2, 64, D], v.layout)
    ds_tiles = gl.allocate_shared_memory(TYPE, [2 * SWAPS, 64, _M], DS_LAYOUT)
    p_tiles = ds_tiles
    if D == 128:
        p_tiles = gl.allocate_shared_memory(TYPE, [2, 64, _M], DS_LAYOUT)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2, _M, D // 2], dq.layout)
    stats_tiles = gl.allocate_shared_memory(gl.float32, [SLOTS, 2 * _M], FLAT)
    units = gl.allocate_shared_memory(gl.int32, [8, 1], FLAT)
    units = (units, _barriers(2, 1), _barriers(2, 2))
    q_full, do_full, stats_full, empty = _barriers(SLOTS, 1), _barriers(SLOTS, 1), _barriers(SLOTS, 1), _barriers(SLOTS, 2)
    k_full, k_empty, v_full, v_empty = _barriers(_K_PLACES, 2), _barriers(_K_PLACES, 2), _barriers(1, 2), _barriers(1, 2)
    full_0, full_1, free_0, free_1 = _barriers(SWAPS, 1), _barriers(SWAPS, 1), _barriers(SWAPS, 1), _barriers(SWAPS, 1)
    hopper.fence_async_shared()
    tiles = (q_tiles, do_tiles, k_tiles, v_tiles, stats_tiles)
    made = (ds_tiles, p_tiles, dq_tiles)
    barriers = (q_full, do_full, stats_full, empty, k_full, k_empty, v_full.index(0), v_empty.index(0))
    gl.warp_specialize(
        [
            (_consume, (dq, dk, dv, dk_pointer, dv_pointer, before, num_examples, num_heads, num_shared, scale,
                        scale_log2, units, tiles, made, barriers, (full_0, full_1, free_0, free_1),
                        stride_gt, stride_gh, 0)),
            (_consume, (dq, dk, dv, dk_pointer, dv_pointer, before, num_examples, num_heads, num_shared, scale,
                        scale_log2, units, tiles, made, barriers, (full_1, full_0, free_1, free_0),
                        stride_gt, stride_gh, 1)),
            (_produce, (q, k, v, do, stats, before, offsets, num_examples, num_heads, num_shared, units, tiles, barriers,
                        stride_qh, stride_kh, stride_vh, stride_doh)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
