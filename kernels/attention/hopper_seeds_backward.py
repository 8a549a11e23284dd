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

from kernels.attention.hopper_seeds_ring import WORDS, M, N, o_tile, produce, share
from kernels.hopper_ring import add, barriers_of, news_of, store, store_rows, take


@gluon.jit
def _log_sums(lse, part: gl.constexpr, first, h, num_heads, num_seeds):
    """Of a part's seeds. Rows past the seeds have an infinite one: weights of 0."""
    m = part * M + gl.arange(0, M, gl.BlockedLayout([1], [32], [4], [0]))
    return gl.load(lse + (first + m) * num_heads + h, mask=m < num_seeds, other=float("inf"))


@gluon.jit
def _keep_statistics(
    stats, lse, o_tiles, do_tiles, o_full, do_full, visit, first, h, num_heads, num_seeds, scale,
    GROUP: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Leave lse and scale * rowsum(dO * O) of a new example's seeds for the group's warps."""
    ALL: gl.constexpr = 2 * PARTS
    DO_PLACES: gl.constexpr = do_tiles.shape[0] // ALL
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    sums_0 = _log_sums(lse, GROUP * PARTS, first, h, num_heads, num_seeds)
    sums_1 = _log_sums(lse, GROUP * PARTS + PARTS - 1, first, h, num_heads, num_seeds)
    stats.index(2 * GROUP * PARTS).store(sums_0)
    if PARTS == 2:
        stats.index(2 * GROUP * PARTS + 2).store(sums_1)
    mbarrier.wait(o_full, visit & 1)
    for j in gl.static_range(PARTS):
        at = visit % DO_PLACES * ALL + GROUP * PARTS + j
        mbarrier.wait(do_full.index(at), visit // DO_PLACES & 1)
        o_MD = o_tile(o_tiles, GROUP, j, PARTS).load(LAYOUT).to(gl.float32)
        delta_M = gl.sum(o_MD * do_tiles.index(at).load(LAYOUT).to(gl.float32), 1)
        stats.index(2 * (GROUP * PARTS + j) + 1).store(delta_M * scale)


@gluon.jit
def _keep_gradient(dx, base, dx_ND, staged, row, column, left, stride: gl.constexpr, LAYOUT: gl.constexpr,
                   ADDS: gl.constexpr):  # fmt: skip
    """Of a key tile: a whole one through shared memory and the copy engine, an example's last rows from registers."""
    if left >= N:
        staged.store(dx_ND.to(staged.dtype))
        hopper.fence_async_shared()
        if ADDS:
            add(dx, [row, column], staged)
        else:
            store(dx, [row, column], staged)
    else:
        base += row.to(gl.int64) * stride + column
        if ADDS:
            n = gl.arange(0, dx_ND.shape[0], gl.SliceLayout(1, LAYOUT))
            d = gl.arange(0, dx_ND.shape[1], gl.SliceLayout(0, LAYOUT))
            before_ND = gl.load(base + (n[:, None] * stride + d[None, :]), mask=(n < left)[:, None], other=0.0)
            dx_ND = dx_ND.to(staged.dtype).to(gl.float32) + before_ND.to(gl.float32)
        store_rows(base, dx_ND, 0, left, stride, LAYOUT)


@gluon.jit
def _start(a, b, registers):
    """Start a times b transposed; the result before this one lends its registers."""
    return hopper.warpgroup_mma(a, b.permute((1, 0)), registers, use_acc=False, is_async=True)


@gluon.jit
def _consume(
    dx, dx_pointer, lse, shares, before, num_examples, num_heads, num_shared, num_seeds, scale,
    scale_log2, units, tiles, made, barriers, exchange,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr,
    ADDS: gl.constexpr,
):  # fmt: skip
    """Four warps, with PARTS parts of the seeds. dX is dV in group 0 and dK in group 1."""
    q_tiles, o_tiles, do_tiles, k_tiles, v_tiles = tiles
    p_tiles, ds_tiles, staged, stats = made
    q_full, q_empty, o_full, o_empty, do_full, do_empty, k_full, k_empty, v_full, v_empty = barriers
    own_full, other_full, own_free, other_free = exchange
    ALL: gl.constexpr = 2 * PARTS
    PLACES: gl.constexpr = k_tiles.shape[0]
    DO_PLACES: gl.constexpr = do_tiles.shape[0] // ALL
    D: gl.constexpr = q_tiles.shape[2]
    TYPE: gl.constexpr = q_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    SHARE: gl.constexpr = PARTS == 2 and D == 128  # shared memory is short: P and dS lend theirs
    # dX leaves through the group's own parts of what only this group's last product reads, or a place of its own.
    lent = ds_tiles if GROUP else p_tiles
    staged = (lent if SHARE else staged).index(GROUP)
    first_tile, end, _ = share(before, num_examples, num_heads)
    count = end - first_tile
    if count > 0:
        dq_0 = gl.full([M, D], 0.0, gl.float32, G_LAYOUT)
        dq_1 = gl.full([M, D], 0.0, gl.float32, G_LAYOUT)
        visit = -1
        heads = -1
        for i in range(count):
            row, left, h, b, fresh, ends = take(units, i, 6)
            is_new = fresh > 0
            visit += is_new.to(gl.int32)
            heads += (fresh == 2).to(gl.int32)
            adds = fresh < 2
            # 0, which the compiler cannot know: addresses are computed where they are used.
            zero = left >> 31
            at, phase = i % PLACES, i // PLACES & 1
            do_at, do_phase = visit % DO_PLACES * ALL + zero, visit // DO_PLACES & 1
            keys, values = k_tiles.index(at + zero), v_tiles.index(at + zero)
            if is_new:
                first = b.to(gl.int64) * num_shared
                _keep_statistics(stats, lse, o_tiles, do_tiles, o_full, do_full, visit, first, h, num_heads, num_seeds,
                                 scale, GROUP, PARTS)  # fmt: skip
                if not SHARE:
                    mbarrier.arrive(o_empty, count=1)
            # Through a wait: registers of a product must be written before the first one is in flight.
            s_MN = gl.full([M, N], 0.0, gl.float32, S_LAYOUT)
            dp_MN = gl.full([M, N], 0.0, gl.float32, S_LAYOUT)
            s_MN, dp_MN, dq_0, dq_1 = hopper.warpgroup_mma_wait(0, deps=[s_MN, dp_MN, dq_0, dq_1])
            mbarrier.wait(q_full, heads & 1, pred=fresh == 2)
            mbarrier.wait(k_full.index(at), phase)
            s = _start(q_tiles.index(GROUP * PARTS + zero), keys, s_MN)
            mbarrier.wait(v_full.index(at), phase)
            dp = _start(do_tiles.index(do_at + GROUP * PARTS), values, dp_MN)
            for j in gl.static_range(PARTS):
                own_p = p_tiles.index(GROUP + zero).slice(j * N, N, 1)
                own_ds = ds_tiles.index(GROUP + zero).slice(j * N, N, 1)
                s_MN = hopper.warpgroup_mma_wait(1 if j == 0 else 2, deps=[s])
                lse_M = stats.index(2 * (GROUP * PARTS + j)).load(ROW)
                p_MN = gl.exp2(s_MN * scale_log2 - lse_M[:, None])
                if j == 0:
                    tma.store_wait(0)  # of dX
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
                if left < N:
                    column_N = gl.arange(0, N, gl.SliceLayout(0, S_LAYOUT))
                    ds_MN = gl.where((column_N < left)[None, :], ds_MN, 0.0)
                own_ds.store(ds_MN.to(TYPE))
                hopper.fence_async_shared()
                if j < PARTS - 1:
                    s = _start(q_tiles.index(GROUP * PARTS + j + 1 + zero), keys, s_MN)
                else:
                    mbarrier.arrive(own_full, count=1)
                if j == 0:
                    dq_0 = hopper.warpgroup_mma(own_ds, keys, dq_0, use_acc=adds, is_async=True)
                else:
                    dq_1 = hopper.warpgroup_mma(own_ds, keys, dq_1, use_acc=adds, is_async=True)
                if j < PARTS - 1:
                    dp = _start(do_tiles.index(do_at + GROUP * PARTS + j + 1), values, dp_MN)
            dx_ND = gl.full([N, D], 0.0, gl.float32, G_LAYOUT)
            if PARTS == 1:
                dq_0, dx_ND = hopper.warpgroup_mma_wait(0, deps=[dq_0, dx_ND])
            else:
                dq_1, dx_ND = hopper.warpgroup_mma_wait(0, deps=[dq_1, dx_ND])
            mbarrier.arrive(k_empty.index(at), count=1)
            dx_sum = hopper.warpgroup_mma_init(dx_ND)
            mbarrier.wait(other_full, i & 1)
            for part in gl.static_range(ALL):
                if GROUP == 0:
                    mbarrier.wait(do_full.index(do_at + part), do_phase, pred=is_new)
                    x = p_tiles.index(part // PARTS + zero).slice(part % PARTS * N, N, 1)
                    y = do_tiles.index(do_at + part)
                else:
                    x = ds_tiles.index(part // PARTS + zero).slice(part % PARTS * N, N, 1)
                    y = q_tiles.index(part + zero)
                dx_sum = hopper.warpgroup_mma(x.permute((1, 0)), y, dx_sum, use_acc=part > 0, is_async=True)
            is_last = (left <= N) | (ends > 0)
            if GROUP == 0:
                # Each part's place is free for the next example's. The other group is done: it has left its dS.
                for part in gl.static_range(ALL):
                    dx_ND = hopper.warpgroup_mma_wait(ALL - 1 - part, deps=[dx_sum])
                    dx_sum = hopper.warpgroup_mma_init(dx_ND)
                    mbarrier.arrive(do_empty.index(do_at + part), count=1, pred=is_last)
            else:
                dx_ND = hopper.warpgroup_mma_wait(0, deps=[dx_sum])
            mbarrier.arrive(own_free, count=1)
            if ends > 0:
                mbarrier.arrive(q_empty, count=1)
            _keep_gradient(dx, dx_pointer, dx_ND, staged, row, h * stride_gh, left, stride_gt, G_LAYOUT, ADDS)
            if SHARE & is_last:
                tma.store_wait(0)
                mbarrier.arrive(o_empty, count=1)
            if ends > 0:
                sums = shares + ((gl.program_id(0) + h) * ALL + GROUP * PARTS).to(gl.int64) * (M * D)
                store_rows(sums, dq_0, 0, M, D, G_LAYOUT)
                if PARTS == 2:
                    store_rows(sums + M * D, dq_1, 0, M, D, G_LAYOUT)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_examples", "num_shared", "num_seeds"])
def _seeds_bwd_hopper_kernel(
    q, k, v, o, do, dk, dv, dk_pointer, dv_pointer, lse, shares, before, offsets,
    num_examples, num_heads, num_shared, num_seeds, scale, scale_log2,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr,
    D: gl.constexpr, PARTS: gl.constexpr, PLACES: gl.constexpr, DO_PLACES: gl.constexpr, ADDS: gl.constexpr,
):  # fmt: skip
    """q to dv are the copy engine's descriptors, of 64 rows, `before` is what `_count_tiles_kernel` leaves. No program
    is without a key tile. Of an example's `num_shared` seeds these are `num_seeds`, from where q, o, do and lse begin;
    with ADDS, dK and dV have those of others already. PLACES: of key tiles on chip; DO_PLACES: of examples' dO."""
    TYPE: gl.constexpr = q.dtype
    ALL: gl.constexpr = 2 * PARTS
    P_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, PARTS * N], TYPE)
    q_tiles = gl.allocate_shared_memory(TYPE, [ALL, M, D], q.layout)
    do_tiles = gl.allocate_shared_memory(TYPE, [DO_PLACES * ALL, M, D], do.layout)
    p_tiles = gl.allocate_shared_memory(TYPE, [2, M, PARTS * N], P_LAYOUT)
    ds_tiles = gl.allocate_shared_memory(TYPE, [2, M, PARTS * N], P_LAYOUT)
    k_tiles = gl.allocate_shared_memory(TYPE, [PLACES, N, D], k.layout)
    v_tiles = gl.allocate_shared_memory(TYPE, [PLACES, N, D], v.layout)
    SHARE: gl.constexpr = PARTS == 2 and D == 128
    staged = p_tiles
    o_tiles = p_tiles
    if not SHARE:
        staged = gl.allocate_shared_memory(TYPE, [2, N, D], dv.layout)
        o_tiles = gl.allocate_shared_memory(TYPE, [ALL, M, D], o.layout)
    stats = gl.allocate_shared_memory(gl.float32, [2 * ALL, M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    units = news_of(2, WORDS, 2)
    q_full, o_full = barriers_of(1, ALL).index(0), barriers_of(1, ALL).index(0)
    q_empty, o_empty = barriers_of(1, 2).index(0), barriers_of(1, 2).index(0)
    do_full, do_empty = barriers_of(DO_PLACES * ALL, 1), barriers_of(DO_PLACES * ALL, 1)
    k_full, v_full = barriers_of(PLACES, 1), barriers_of(PLACES, 1)
    k_empty, v_empty = barriers_of(PLACES, 2), barriers_of(PLACES, 2)
    full, free = barriers_of(2, 1), barriers_of(2, 1)
    hopper.fence_async_shared()
    tiles = (q_tiles, (o_tiles, ds_tiles), do_tiles, k_tiles, v_tiles)
    made = (p_tiles, ds_tiles, staged, stats)
    barriers = (q_full, q_empty, o_full, o_empty, do_full, do_empty, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (_consume, (dv, dv_pointer, lse, shares, before, num_examples, num_heads, num_shared, num_seeds, scale,
                        scale_log2, units, tiles, made, barriers,
                        (full.index(0), full.index(1), free.index(0), free.index(1)),
                        stride_gt, stride_gh, 0, PARTS, ADDS)),
            (_consume, (dk, dk_pointer, lse, shares, before, num_examples, num_heads, num_shared, num_seeds, scale,
                        scale_log2, units, tiles, made, barriers,
                        (full.index(1), full.index(0), free.index(1), free.index(0)),
                        stride_gt, stride_gh, 1, PARTS, ADDS)),
            (produce, (q, k, v, o, do, before, offsets, num_examples, num_heads, num_shared, units, tiles, barriers,
                        stride_qh, stride_kh, stride_vh, stride_doh, stride_gh)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
