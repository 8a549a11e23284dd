"""Seed attention's backward on Hopper, in Gluon: the seeds stay on chip, and all examples' keys stream by.

Shape letters: B examples, H heads, D head width; M = 64 seeds of a part, N = 64 keys of a tile. The key tiles of all
examples, head after head, are shared out evenly and in a fixed order. A program has a warp that asks for copies, and
two groups of four warps with PARTS parts of the seeds each, whose dQ stays in registers over all examples. For each
key tile a group computes P and dS of its parts and leaves them in shared memory; then one group makes dV of all
seeds, the other dK, which are complete. Program p leaves its sum for head h as share p + h; `_add_shares_kernel`
adds these.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.hopper_ring import all_warps, copy_in, get, put, store, store_rows

_M = gl.constexpr(64)
_N = gl.constexpr(64)
_WORDS = gl.constexpr(8)  # of an announcement


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
    q, k, v, o, do, before, offsets, num_examples, num_heads, num_shared, units, tiles, barriers,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    stride_gh: gl.constexpr,
):  # fmt: skip
    """One warp: announces key tiles and has all tiles copied."""
    units, unit_full, unit_empty = units
    q_tiles, o_tiles, do_tiles, k_tiles, v_tiles = tiles
    q_full, q_empty, o_full, o_empty, do_full, do_empty, k_full, k_empty, v_full, v_empty = barriers
    ALL: gl.constexpr = q_tiles.shape[0]
    PARTS: gl.constexpr = ALL // 2
    PLACES: gl.constexpr = k_tiles.shape[0]
    DO_PLACES: gl.constexpr = do_tiles.shape[0] // ALL
    first_tile, end, each = _share(before, num_examples, num_heads)
    h = first_tile // each
    b = _find(before, num_examples, first_tile - h * each)
    n = (first_tile - h * each - gl.load(before + b)) * _N
    kv_first, length = _rows(offsets, b)
    visit = 0  # examples so far
    fresh = 2  # 1: an example's first tile here, 2: a head's
    heads = 0
    for i in range(end - first_tile):
        if n >= length:
            # The next tile is of an example after this one, or of the next head.
            n = 0
            b += 1
            fresh = 1
            if first_tile + i == (h + 1) * each:
                h += 1
                b = 0
                fresh = 2
            kv_first, length = _rows(offsets, b)
            while length == 0:
                b += 1
                kv_first, length = _rows(offsets, b)
        ends = (first_tile + i + 1 == end) | (first_tile + i + 1 == (h + 1) * each)
        mbarrier.wait(unit_empty.index(i % 2), (i // 2 & 1) ^ 1)
        put(units.index(i % 2 * _WORDS), kv_first + n)
        put(units.index(i % 2 * _WORDS + 1), length - n)
        put(units.index(i % 2 * _WORDS + 2), h)
        put(units.index(i % 2 * _WORDS + 3), fresh + 4 * ends.to(gl.int32))
        put(units.index(i % 2 * _WORDS + 4), b)
        mbarrier.arrive(unit_full.index(i % 2), count=1)
        at = i % PLACES
        mbarrier.wait(v_empty.index(at), (i // PLACES & 1) ^ 1)
        copy_in(v, kv_first + n, h * stride_vh, v_full.index(at), v_tiles.index(at), True)
        mbarrier.wait(k_empty.index(at), (i // PLACES & 1) ^ 1)
        copy_in(k, kv_first + n, h * stride_kh, k_full.index(at), k_tiles.index(at), True)
        if fresh == 2:
            mbarrier.wait(q_empty, (heads & 1) ^ 1)
            for part in gl.static_range(ALL):
                copy_in(q, part * _M, h * stride_qh, q_full, q_tiles.index(part), True)
            heads += 1
        if fresh > 0:
            place = visit % DO_PLACES
            for part in gl.static_range(ALL):
                mbarrier.wait(do_empty.index(place * ALL + part), (visit // DO_PLACES & 1) ^ 1)
                full, tile = do_full.index(place * ALL + part), do_tiles.index(place * ALL + part)
                copy_in(do, b * num_shared + part * _M, h * stride_doh, full, tile, True)
            mbarrier.wait(o_empty, (visit & 1) ^ 1)
            for part in gl.static_range(ALL):
                tile = _o_tile(o_tiles, part // PARTS, part % PARTS, PARTS)
                copy_in(o, b * num_shared + part * _M, h * stride_gh, o_full, tile, True)
            visit += 1
        fresh = 0
        n += _N


@gluon.jit
def _take(units, full, empty, i):
    """Row, rows left in its example, head, marks and example of the i-th key tile."""
    mbarrier.wait(full.index(i % 2), i // 2 & 1)
    row = get(units.index(i % 2 * _WORDS))
    left = get(units.index(i % 2 * _WORDS + 1))
    h = get(units.index(i % 2 * _WORDS + 2))
    marks = get(units.index(i % 2 * _WORDS + 3))
    b = get(units.index(i % 2 * _WORDS + 4))
    all_warps()  # have read
    mbarrier.arrive(empty.index(i % 2), count=1)
    return row, left, h, marks & 3, marks >> 2, b


@gluon.jit
def _o_tile(o_tiles, group: gl.constexpr, j: gl.constexpr, PARTS: gl.constexpr):
    """Where part j of a group's O goes: a place of its own, or what P's (part 0) or dS's has been."""
    first, second = o_tiles
    if first.shape[0] == 2 * PARTS:
        return first.index(group * PARTS + j)
    elif j == 0:
        return first.index(group)
    else:
        return second.index(group)


@gluon.jit
def _log_sums(lse, part: gl.constexpr, first, h, num_heads, num_shared):
    """Of a part's seeds. Rows past the seeds have an infinite one: weights of 0."""
    m = part * _M + gl.arange(0, _M, gl.BlockedLayout([1], [32], [4], [0]))
    return gl.load(lse + (first + m) * num_heads + h, mask=m < num_shared, other=float("inf"))


@gluon.jit
def _row_sums(o_tile, do_tile):
    """rowsum(dO * O)."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    return gl.sum(o_tile.load(LAYOUT).to(gl.float32) * do_tile.load(LAYOUT).to(gl.float32), 1)


@gluon.jit
def _consume(
    dx, dx_pointer, lse, shares, before, num_examples, num_heads, num_shared, scale, scale_log2, units, tiles, made, barriers, exchange,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Four warps, with PARTS parts of the seeds. dX is dV in group 0 and dK in group 1."""
    units, unit_full, unit_empty = units
    q_tiles, o_tiles, do_tiles, k_tiles, v_tiles = tiles
    p_tiles, ds_tiles, staged, stats = made
    q_full, q_empty, o_full, o_empty, do_full, do_empty, k_full, k_empty, v_full, v_empty = barriers
    own_full, other_full, own_free, other_free = exchange
    ALL: gl.constexpr = 2 * PARTS
    PLACES: gl.constexpr = k_tiles.shape[0]
    DO_PLACES: gl.constexpr = do_tiles.shape[0] // ALL
    D: gl.constexpr = q_tiles.shape[2]
    TYPE: gl.constexpr = q_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _N, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    SHARE: gl.constexpr = PARTS == 2 and D == 128  # shared memory is short
    if SHARE:
        # dX leaves through the group's own parts of what only this group's last product reads.
        staged = ds_tiles.index(GROUP) if GROUP else p_tiles.index(GROUP)
    else:
        staged = staged.index(GROUP)
    first_tile, end, each = _share(before, num_examples, num_heads)
    count = end - first_tile
    if count > 0:
        dq_0 = gl.full([_M, D], 0.0, gl.float32, G_LAYOUT)
        dq_1 = gl.full([_M, D], 0.0, gl.float32, G_LAYOUT)
        visit = -1
        heads = -1
        for i in range(count):
            row, left, h, fresh, ends, b = _take(units, unit_full, unit_empty, i)
            is_new = fresh > 0
            visit += is_new.to(gl.int32)
            heads += (fresh == 2).to(gl.int32)
            adds = fresh < 2
            # 0, which the compiler cannot know: addresses are computed where they are used.
            zero = left >> 31
            at, phase = i % PLACES, i // PLACES & 1
            do_at, do_phase = visit % DO_PLACES, visit // DO_PLACES & 1
            keys, values = k_tiles.index(at + zero), v_tiles.index(at + zero)
            if is_new:
                first = b.to(gl.int64) * num_shared
                sums_0 = _log_sums(lse, GROUP * PARTS, first, h, num_heads, num_shared)
                sums_1 = _log_sums(lse, GROUP * PARTS + PARTS - 1, first, h, num_heads, num_shared)
                stats.index(2 * GROUP * PARTS).store(sums_0)
                if PARTS == 2:
                    stats.index(2 * GROUP * PARTS + 2).store(sums_1)
                mbarrier.wait(o_full, visit & 1)
                for j in gl.static_range(PARTS):
                    mbarrier.wait(do_full.index(do_at * ALL + GROUP * PARTS + j), do_phase)
                    do_tile = do_tiles.index(do_at * ALL + GROUP * PARTS + j)
                    sums_M = _row_sums(_o_tile(o_tiles, GROUP, j, PARTS), do_tile)
                    stats.index(2 * (GROUP * PARTS + j) + 1).store(sums_M * scale)
                if not SHARE:
                    mbarrier.arrive(o_empty, count=1)
            # Through a wait: registers of a product must be written before the first one is in flight.
            s_MN = gl.full([_M, _N], 0.0, gl.float32, S_LAYOUT)
            dp_MN = gl.full([_M, _N], 0.0, gl.float32, S_LAYOUT)
            s_MN, dp_MN, dq_0, dq_1 = hopper.warpgroup_mma_wait(0, deps=[s_MN, dp_MN, dq_0, dq_1])
            mbarrier.wait(q_full, heads & 1, pred=fresh == 2)
            mbarrier.wait(k_full.index(at), phase)
            s = hopper.warpgroup_mma(q_tiles.index(GROUP * PARTS + zero), keys.permute((1, 0)), s_MN, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(at), phase)
            dp = hopper.warpgroup_mma(do_tiles.index(zero + do_at * ALL + GROUP * PARTS), values.permute((1, 0)), dp_MN, use_acc=False, is_async=True)
            for j in gl.static_range(PARTS):
                own_p = p_tiles.index(GROUP + zero).slice(j * _N, _N, 1)
                own_ds = ds_tiles.index(GROUP + zero).slice(j * _N, _N, 1)
                if j == 0:
                    s_MN = hopper.warpgroup_mma_wait(1, deps=[s])
                else:
                    s_MN = hopper.warpgroup_mma_wait(2, deps=[s])
                lse_M = stats.index(2 * (GROUP * PARTS + j)).load(ROW)
                p_MN = gl.exp2(s_MN * scale_log2 - lse_M[:, None])
                if j == 0:
                    tma.store_wait(0)
                    mbarrier.wait(other_free, (i & 1) ^ 1)
                own_p.store(p_MN.to(TYPE))
                if j == 0:
                    dp_MN = hopper.warpgroup_mma_wait(0, deps=[dp])
                else:
                    dp_MN, dq_0 = hopper.warpgroup_mma_wait(0, deps=[dp, dq_0])
                if j == PARTS - 1:
                    mbarrier.arrive(v_empty.index(at), count=1)
                delta_M = stats.index(2 * (GROUP * PARTS + j) + 1).load(ROW)
                ds_MN = p_MN * (dp_MN * scale - delta_M[:, None])
                if left < _N:
                    column_N = gl.arange(0, _N, gl.SliceLayout(0, S_LAYOUT))
                    ds_MN = gl.where((column_N < left)[None, :], ds_MN, 0.0)
                own_ds.store(ds_MN.to(TYPE))
                hopper.fence_async_shared()
                if j < PARTS - 1:
                    s = hopper.warpgroup_mma(q_tiles.index(GROUP * PARTS + j + 1 + zero), keys.permute((1, 0)), s_MN, use_acc=False, is_async=True)
                else:
                    mbarrier.arrive(own_full, count=1)
                if j == 0:
                    dq_0 = hopper.warpgroup_mma(own_ds, keys, dq_0, use_acc=adds, is_async=True)
                else:
                    dq_1 = hopper.warpgroup_mma(own_ds, keys, dq_1, use_acc=adds, is_async=True)
                if j < PARTS - 1:
                    dp = hopper.warpgroup_mma(do_tiles.index(zero + do_at * ALL + GROUP * PARTS + j + 1), values.permute((1, 0)), dp_MN, use_acc=False, is_async=True)
            dx_ND = gl.full([_N, D], 0.0, gl.float32, G_LAYOUT)
            if PARTS == 1:
                dq_0, dx_ND = hopper.warpgroup_mma_wait(0, deps=[dq_0, dx_ND])
            else:
                dq_1, dx_ND = hopper.warpgroup_mma_wait(0, deps=[dq_1, dx_ND])
            mbarrier.arrive(k_empty.index(at), count=1)
            dx_sum = hopper.warpgroup_mma_init(dx_ND)
            mbarrier.wait(other_full, i & 1)
            for part in gl.static_range(ALL):
                if GROUP == 0:
                    mbarrier.wait(do_full.index(do_at * ALL + part), do_phase, pred=is_new)
                    x = p_tiles.index(part // PARTS + zero).slice(part % PARTS * _N, _N, 1)
                    y = do_tiles.index(zero + do_at * ALL + part)
                else:
                    x = ds_tiles.index(part // PARTS + zero).slice(part % PARTS * _N, _N, 1)
                    y = q_tiles.index(part + zero)
                dx_sum = hopper.warpgroup_mma(x.permute((1, 0)), y, dx_sum, use_acc=part > 0, is_async=True)
            is_last = (left <= _N) | (ends > 0)
            if GROUP == 0:
                # The other group is done with dO already: it has left its dS.
                for part in gl.static_range(ALL):
                    dx_ND = hopper.warpgroup_mma_wait(ALL - 1 - part, deps=[dx_sum])
                    dx_sum = hopper.warpgroup_mma_init(dx_ND)
                    mbarrier.arrive(do_empty.index(do_at * ALL + part), count=1, pred=is_last)
            else:
                dx_ND = hopper.warpgroup_mma_wait(0, deps=[dx_sum])
            mbarrier.arrive(own_free, count=1)
            if ends > 0:
                mbarrier.arrive(q_empty, count=1)
            if left >= _N:
                staged.store(dx_ND.to(TYPE))
                hopper.fence_async_shared()
                store(dx, [row, h * stride_gh], staged)
            else:
                store_rows(dx_pointer + row.to(gl.int64) * stride_gt + h * stride_gh, dx_ND, 0, left, stride_gt, G_LAYOUT)
            if SHARE & is_last:
                tma.store_wait(0)
                mbarrier.arrive(o_empty, count=1)
            if ends > 0:
                share = shares + ((gl.program_id(0) + h) * ALL + GROUP * PARTS).to(gl.int64) * (_M * D)
                store_rows(share, dq_0, 0, _M, D, G_LAYOUT)
                if PARTS == 2:
                    store_rows(share + _M * D, dq_1, 0, _M, D, G_LAYOUT)
    tma.store_wait(0)


@gluon.jit
def _barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit(do_not_specialize=["num_examples", "num_shared"])
def _seeds_bwd_hopper_kernel(
    q, k, v, o, do, dk, dv, dk_pointer, dv_pointer, lse, shares, before, offsets,
    num_examples, num_heads, num_shared, scale, scale_log2,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr,
    D: gl.constexpr, PARTS: gl.constexpr, PLACES: gl.constexpr, DO_PLACES: gl.constexpr,
):  # fmt: skip
    """q to dv are the copy engine's descriptors, of 64 rows; `before` is what
    `_count_tiles_kernel` leaves. PLACES: of key tiles on chip; DO_PLACES: of examples' dO."""
    TYPE: gl.constexpr = q.dtype
    ALL: gl.constexpr = 2 * PARTS
    P_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_M, PARTS * _N], TYPE)
    q_tiles = gl.allocate_shared_memory(TYPE, [ALL, _M, D], q.layout)
    do_tiles = gl.allocate_shared_memory(TYPE, [DO_PLACES * ALL, _M, D], do.layout)
    p_tiles = gl.allocate_shared_memory(TYPE, [2, _M, PARTS * _N], P_LAYOUT)
    ds_tiles = gl.allocate_shared_memory(TYPE, [2, _M, PARTS * _N], P_LAYOUT)
    k_tiles = gl.allocate_shared_memory(TYPE, [PLACES, _N, D], k.layout)
    v_tiles = gl.allocate_shared_memory(TYPE, [PLACES, _N, D], v.layout)
    SHARE: gl.constexpr = PARTS == 2 and D == 128
    staged = p_tiles
    o_tiles = p_tiles
    if not SHARE:
        staged = gl.allocate_shared_memory(TYPE, [2, _N, D], dv.layout)
        o_tiles = gl.allocate_shared_memory(TYPE, [ALL, _M, D], o.layout)
    stats = gl.allocate_shared_memory(gl.float32, [2 * ALL, _M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    units = gl.allocate_shared_memory(gl.int32, [2 * _WORDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    units = (units, _barriers(2, 1), _barriers(2, 2))
    q_full, q_empty, o_full, o_empty = _barriers(1, ALL), _barriers(1, 2), _barriers(1, ALL), _barriers(1, 2)
    do_full, do_empty = _barriers(DO_PLACES * ALL, 1), _barriers(DO_PLACES * ALL, 1)
    k_full, k_empty, v_full, v_empty = _barriers(PLACES, 1), _barriers(PLACES, 2), _barriers(PLACES, 1), _barriers(PLACES, 2)
    full, free = _barriers(2, 1), _barriers(2, 1)
    hopper.fence_async_shared()
    tiles = (q_tiles, (o_tiles, ds_tiles), do_tiles, k_tiles, v_tiles)
    made = (p_tiles, ds_tiles, staged, stats)
    barriers = (q_full.index(0), q_empty.index(0), o_full.index(0), o_empty.index(0), do_full, do_empty, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (_consume, (dv, dv_pointer, lse, shares, before, num_examples, num_heads, num_shared, scale, scale_log2,
                        units, tiles, made, barriers, (full.index(0), full.index(1), free.index(0), free.index(1)),
                        stride_gt, stride_gh, 0, PARTS)),
            (_consume, (dk, dk_pointer, lse, shares, before, num_examples, num_heads, num_shared, scale, scale_log2,
                        units, tiles, made, barriers, (full.index(1), full.index(0), free.index(1), free.index(0)),
                        stride_gt, stride_gh, 1, PARTS)),
            (_produce, (q, k, v, o, do, before, offsets, num_examples, num_heads, num_shared, units, tiles, barriers,
                        stride_qh, stride_kh, stride_vh, stride_doh, stride_gh)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
