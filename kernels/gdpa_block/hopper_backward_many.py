"""The GDPA block's backward on Hopper in one kernel, of 65 to 128 keys, in Gluon.

A program has one head, and a team of programs, one a head, takes the same examples and query tiles in step: what both
norms' gradients need of a row are sums over all heads, which warps of their own exchange (`hopper_exchange`). Products
are as in GDPA's backward (`kernels/gdpa/hopper_backward_groups.py`): two groups of four warps, each with 64 keys and
half of dQ's columns, scores transposed, dS exchanged through shared memory. A third group makes rows ready for them a
tile ahead, and finishes them a tile behind (`hopper_backward_rows`).

Shape letters: M = 64 rows of a query tile, N = 64 keys of a group, D head width, H heads.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gdpa.hopper_backward_groups import activate_or_bare, common_factors, take_keys
from kernels.gdpa.hopper_backward_units import M, copy_keys
from kernels.gdpa_block.hopper_backward_rows import add_dq, exchange_first, exchange_second, row_group
from kernels.gdpa_block.hopper_mailbox import TURNS
from kernels.hopper_ring import all_warps, announce, barriers_of, copy_in, news_of, store, store_rows, take

_NEWS = gl.constexpr(3)  # query tiles that the copying warp tells the others about ahead of them
_READERS = gl.constexpr(6)


@gluon.jit
def _first_example(team, offsets, num_rows, num_examples, num_teams):
    """The first example of a team: all rows are shared out equally, and an example goes where its middle is."""
    begin = 2 * num_rows.to(gl.int64) * team
    b = team * 0
    after = num_examples
    while b < after:
        middle = (b + after) // 2
        twice = gl.load(offsets + middle).to(gl.int64) + gl.load(offsets + middle + 1)
        is_before = twice * num_teams < begin
        b = gl.where(is_before, middle + 1, b)
        after = gl.where(is_before, after, middle)
    return b


@gluon.jit
def _zero_gradients(pointers, b, num_kv, h, D: gl.constexpr, H: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    zero_ND = gl.full([8, D], 0.0, gl.float32, LAYOUT)
    dk_pointer, dv_pointer = pointers
    at = (b * num_kv).to(gl.int64) * (H * D) + h * D
    for n in range(0, num_kv, 8):
        store_rows(dk_pointer + at, zero_ND, n, num_kv, H * D, LAYOUT)
        store_rows(dv_pointer + at, zero_ND, n, num_kv, H * D, LAYOUT)


@gluon.jit
def _copy_next(x, row, column, full, tiles, empty, t):
    """Start the copy of tile t once its place in a ring is free."""
    PLACES: gl.constexpr = tiles.shape[0]
    mbarrier.wait(empty.index(t % PLACES), (t // PLACES & 1) ^ 1)
    copy_in(x, row, column, full, tiles.index(t % PLACES), True)


@gluon.jit
def _copy_keys(k, v, row, column, k_tiles, v_tiles, full, empty, pair):
    """Start the copies of an example's keys and values once their places are free."""
    mbarrier.wait(empty.index(0), (pair & 1) ^ 1)
    copy_keys(k, v, row, column, column, full, k_tiles, v_tiles, 0)


@gluon.jit
def _produce(
    x, k, v, pointers, offsets, num_rows, num_examples, num_kv, team, num_teams, h, tiles, barriers, news,
    D: gl.constexpr, H: gl.constexpr,
):  # fmt: skip
    """The warp that has the tiles of the team's examples copied; empty examples' gradients are its own work."""
    row_tiles, k_tiles, v_tiles = tiles
    full, empty, kv_full, kv_empty = barriers
    PLACES: gl.constexpr = full.shape[0]
    b_end = _first_example(team + 1, offsets, num_rows, num_examples, num_teams)
    b_end = gl.where(team + 1 == num_teams, num_examples, b_end)
    t = 0
    pair = 0
    waiting = t - 1
    for b in range(_first_example(team, offsets, num_rows, num_examples, num_teams), b_end):
        first = gl.load(offsets + b)
        num_q = gl.load(offsets + b + 1) - first
        for m in range(0, num_q, M):
            announce((num_q - m, first + m, b), news, t)
            for i in gl.static_range(3):
                _copy_next(x[i], first + m, h * D, full.index(t % PLACES), row_tiles[i], empty[i], t)
            # An example's keys after its second tile, or what follows: they have to wait for the example before.
            if waiting >= 0:
                _copy_keys(k, v, waiting * num_kv, h * D, k_tiles, v_tiles, kv_full, kv_empty, pair)
                pair += 1
            waiting = gl.where(m == 0, b, -1)
            t += 1
        if num_q == 0:
            _zero_gradients(pointers, b, num_kv, h, D, H)
    if waiting >= 0:
        _copy_keys(k, v, waiting * num_kv, h * D, k_tiles, v_tiles, kv_full, kv_empty, pair)
    announce((0, 0, 0), news, t)


@gluon.jit
def _keep_gradients(
    grads, pointers, dk_ND, dv_ND, own_k, own_v, b, num_kv, own_n, h, D: gl.constexpr, H: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """dK and dV of this group's keys, through their places, which nobody reads any more."""
    dk, dv = grads
    dk_pointer, dv_pointer = pointers
    if num_kv >= own_n + 64:
        own_v.store(dv_ND.to(own_v.dtype))
        own_k.store(dk_ND.to(own_k.dtype))
        hopper.fence_async_shared()
        all_warps()
        store(dv, [b * num_kv + own_n, h * D], own_v)
        store(dk, [b * num_kv + own_n, h * D], own_k)
    else:
        at = (b * num_kv).to(gl.int64) * (H * D) + h * D
        store_rows(dk_pointer + at, dk_ND, own_n, num_kv, H * D, LAYOUT)
        store_rows(dv_pointer + at, dv_ND, own_n, num_kv, H * D, LAYOUT)


@gluon.jit
def _group(
    grads, pointers, norms, num_rows, num_kv, inner, outer, h, tiles, made, barriers, exchange, ready, second, news,
    D: gl.constexpr, H: gl.constexpr, GROUP: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """Products with the keys 64 GROUP to 64 GROUP + 63, and half of dQ's columns."""
    row_tiles, k_tiles, v_tiles = tiles
    dg_tiles, q_tiles = row_tiles[0], row_tiles[1]
    ds_tiles, p_tiles = made
    full, empty, kv_full, kv_empty = barriers
    own_full, other_full, own_free, other_free = exchange
    DGS: gl.constexpr = dg_tiles.shape[0]
    QS: gl.constexpr = q_tiles.shape[0]
    HALF: gl.constexpr = D // 2
    TYPE: gl.constexpr = k_tiles.dtype
    BARE: gl.constexpr = k_tiles.dtype == gl.bfloat16  # the range of fp16 is small
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    p_factor, ds_factor = common_factors(inner, outer, BARE, ACTIVATION)
    t = 0
    pair = 0
    left, row, b = take(news, 0, 3)
    while left > 0:
        b_now = b
        dk_ND = gl.full([64, D], 0.0, gl.float32, G_LAYOUT)
        dv_ND = gl.full([64, D], 0.0, gl.float32, G_LAYOUT)
        s_NM = gl.full([64, M], 0.0, gl.float32, S_LAYOUT)
        dq_MD = gl.full([M, HALF], 0.0, gl.float32, Q_LAYOUT)
        # Through a wait: registers of a product must be written before the first one is in flight.
        dk_ND, dv_ND, s_NM, dq_MD = hopper.warpgroup_mma_wait(0, deps=[dk_ND, dv_ND, s_NM, dq_MD])
        take_keys(k_tiles.index(GROUP), v_tiles.index(GROUP), kv_full, pair, GROUP * 64, num_kv)
        if t == 0:
            mbarrier.wait(ready.index(0), 0)
        q_t = q_tiles.index(t % QS)
        s = hopper.warpgroup_mma(k_tiles.index(GROUP), q_t.permute((1, 0)), s_NM, use_acc=False, is_async=True)
        s_NM = hopper.warpgroup_mma_wait(0, deps=[s])
        for _ in range(0, left, M):
            # 0 that changes with the row for all the compiler knows: addresses are computed where they are used.
            zero = row >> 31
            own_k, own_v = k_tiles.index(GROUP + zero), v_tiles.index(GROUP + zero)
            other_k = k_tiles.index(1 - GROUP + zero)
            own_ds, other_ds = ds_tiles.index(GROUP + zero), ds_tiles.index(1 - GROUP + zero)
            dg_t, q_t = dg_tiles.index(t % DGS), q_tiles.index(t % QS)
            next_left, next_row, next_b = take(news, t + 1, 3)
            row_M = row + gl.arange(0, M, gl.SliceLayout(1, Q_LAYOUT))
            rstd_M = gl.load(norms + (row_M.to(gl.int64) * 3 + 1), mask=row_M < num_rows, other=0.0)
            dk_sum, dv_sum = hopper.warpgroup_mma_init(dk_ND), hopper.warpgroup_mma_init(dv_ND)
            p_NM, slope_NM = activate_or_bare(s_NM, inner, outer, BARE, ACTIVATION, APPROX)
            p_tiles.index(GROUP).store(p_NM.to(TYPE))
            hopper.fence_async_shared()
            slope_NM = hopper.warpgroup_mma_wait(0, deps=[slope_NM])
            dp = hopper.warpgroup_mma(own_v, dg_t.permute((1, 0)), dq_MD, use_acc=False, is_async=True)
            dv_sum = hopper.warpgroup_mma(p_tiles.index(GROUP + zero), dg_t, dv_sum, is_async=True)
            dp_NM, slope_NM = hopper.warpgroup_mma_wait(1, deps=[dp, slope_NM])
            mbarrier.wait(own_free, (t & 1) ^ 1)
            own_ds.store((slope_NM * dp_NM).to(TYPE))
            hopper.fence_async_shared()
            mbarrier.arrive(own_full, count=1)
            dk_sum = hopper.warpgroup_mma(own_ds, q_t, dk_sum, is_async=True)
            k_half = own_k.slice(GROUP * HALF, HALF, 1)
            dq_sum = hopper.warpgroup_mma(own_ds.permute((1, 0)), k_half, dp_NM, use_acc=False, is_async=True)
            mbarrier.wait(other_full, t & 1)
            k_half = other_k.slice(GROUP * HALF, HALF, 1)
            dq_sum = hopper.warpgroup_mma(other_ds.permute((1, 0)), k_half, dq_sum, is_async=True)
            after = t + 1
            mbarrier.wait(ready.index(after % 2), after // 2 & 1)
            # Past an example's end with its keys, and leftovers, which nobody reads.
            q_t = q_tiles.index(after % QS)
            s = hopper.warpgroup_mma(own_k, q_t.permute((1, 0)), s_NM, use_acc=False, is_async=True)
            dk_ND, dv_ND, dq_MD = hopper.warpgroup_mma_wait(1, deps=[dk_sum, dv_sum, dq_sum])
            mbarrier.arrive(other_free, count=1)
            mbarrier.wait(full.index(t % QS), t // QS & 1)
            add_dq(second, t, dq_MD, ds_factor, rstd_M, row_tiles, GROUP, Q_LAYOUT)
            all_warps()
            mbarrier.arrive(empty[0].index(t % DGS), count=1)
            s_NM = hopper.warpgroup_mma_wait(0, deps=[s])
            row, left, b = next_row, next_left, next_b
            t += 1
        mbarrier.wait(own_free, (t & 1) ^ 1)
        _keep_gradients(grads, pointers, dk_ND * ds_factor, dv_ND * p_factor, k_tiles.index(GROUP),
                        v_tiles.index(GROUP), b_now, num_kv, GROUP * 64, h, D, H, G_LAYOUT)  # fmt: skip
        tma.store_wait(0)
        mbarrier.arrive(kv_empty.index(0), count=1)
        pair += 1


@gluon.jit(do_not_specialize=["num_rows", "num_examples", "num_teams"])
def _gdpa_block_bwd_many_hopper_kernel(
    s, out, do, k, v, ds, dk, dv, ds_pointer, dk_pointer, dv_pointer, norms, offsets, tickets, boxes,
    num_rows, num_examples, num_kv, num_teams, inner, outer,
    D: gl.constexpr, H: gl.constexpr, PLACES: gl.constexpr, REGISTERS: gl.constexpr, ROW_REGISTERS: gl.constexpr,
    ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """s to dv are the copy engine's descriptors, of 64 rows of a head. On chip are PLACES query tiles, one less of out.
    REGISTERS: of a thread of the groups of products; ROW_REGISTERS: of the third one.

    A program takes its place in a team off `tickets`, so that teams are complete whatever the order in which programs
    start; there must be no more programs than run at once. `tickets` (int32) and `boxes` (int64) hold zeros.
    """
    TYPE: gl.constexpr = s.dtype
    SCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, M], TYPE)
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    OTHERS: gl.constexpr = 512 - 2 * REGISTERS - ROW_REGISTERS
    AT_ONCE: gl.constexpr = (OTHERS - 16) // 4  # loads of four registers
    out_tiles = gl.allocate_shared_memory(TYPE, [PLACES - 1, M, D], s.layout)
    s_tiles = gl.allocate_shared_memory(TYPE, [PLACES, M, D], s.layout)
    do_tiles = gl.allocate_shared_memory(TYPE, [PLACES, M, D], s.layout)
    k_tiles = gl.allocate_shared_memory(TYPE, [2, 64, D], k.layout)
    v_tiles = gl.allocate_shared_memory(TYPE, [2, 64, D], v.layout)
    ds_tiles = gl.allocate_shared_memory(TYPE, [2, 64, M], SCORES)
    p_tiles = gl.allocate_shared_memory(TYPE, [2, 64, M], SCORES)
    factors = gl.allocate_shared_memory(gl.float32, [4, M], NUMBERS)
    partial = gl.allocate_shared_memory(gl.float32, [4, M], NUMBERS)
    news = news_of(_NEWS, 3, _READERS)
    full, empty = barriers_of(PLACES, 3), (barriers_of(PLACES - 1, 2), barriers_of(PLACES, 1), barriers_of(PLACES, 1))
    kv_full, kv_empty, ready = barriers_of(1, 4), barriers_of(1, 2), barriers_of(2, 1)
    single, double = barriers_of(4, 1), barriers_of(2, 2)
    full_0, full_1, free_0, free_1 = single.index(0), single.index(1), single.index(2), single.index(3)
    first = (factors, barriers_of(1, 1).index(0), barriers_of(1, 1).index(0))
    second = (partial, double.index(0), double.index(1))
    hopper.fence_async_shared()
    row_tiles = (out_tiles, s_tiles, do_tiles)
    ticket = gl.atomic_add(tickets, 1)
    team, h = ticket // H, ticket % H
    box = boxes + team * (3 * TURNS * M * H)
    barriers = (full, empty, kv_full, kv_empty)
    tiles, made = (row_tiles, k_tiles, v_tiles), (ds_tiles, p_tiles)
    grads, pointers = (dk, dv), (dk_pointer, dv_pointer)
    gl.warp_specialize(
        [
            (_group, (grads, pointers, norms, num_rows, num_kv, inner, outer, h, tiles, made, barriers,
                      (full_0, full_1, free_0, free_1), ready, second, news, D, H, 0, ACTIVATION, APPROX)),
            (_group, (grads, pointers, norms, num_rows, num_kv, inner, outer, h, tiles, made, barriers,
                      (full_1, full_0, free_1, free_0), ready, second, news, D, H, 1, ACTIVATION, APPROX)),
            (row_group, (ds, ds_pointer, h, row_tiles, full, empty[1], empty[2], ready, first, second, news, D, H)),
            (_produce, ((out, s, do), k, v, pointers, offsets, num_rows, num_examples, num_kv, team, num_teams, h,
                        tiles, barriers, news, D, H)),
            (exchange_first, (box, h, norms, first, news, D, H, AT_ONCE)),
            (exchange_second, (box, h, second, news, D, H, 0, AT_ONCE)),
            (exchange_second, (box, h, second, news, D, H, 1, AT_ONCE)),
        ],
        [4, 4, 1, 1, 1, 1],
        [REGISTERS, ROW_REGISTERS, OTHERS, OTHERS, OTHERS, OTHERS],
    )  # fmt: skip
