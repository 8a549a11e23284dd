"""The GDPA block's forward on Hopper in one kernel, in Gluon, for at most 64 keys: heads exchange a row's sums.

`kernels/hopper_ring.py` says who does what in a program. Here a program has one head, and a team of programs, one a
head, takes the same query tiles in step. What both norms need of a row is a few sums over all heads: each program
writes its head's to a mailbox in the L2 cache and reads the others' (`kernels/gdpa_block/hopper_mailbox.py`). A tile is
finished after the next one's sums are posted, so that there is work to do while its own are on their way.

Shape letters: T rows of all examples, H heads, D head width, M = 64 rows of a group's tile, N rows of a key tile,
W = H D.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gdpa.hopper_forward import weights
from kernels.gdpa_block.hopper_mailbox import TURNS, post, post_pair, read, read_pair
from kernels.hopper_ring import (
    PRODUCER_REGISTERS,
    ROWS,
    add_values,
    all_warps,
    announce,
    barriers_of,
    copy_in,
    news_of,
    start_step,
    store,
    store_rows,
    take,
)

EPS = gl.constexpr(1e-5)
_NEWS = gl.constexpr(4)  # query tiles that the copying warp tells the groups about ahead of them


@gluon.jit
def example_of(row, offsets, num_examples):
    """The last example that begins at this row or before."""
    b = num_examples * 0
    after = num_examples
    while after - b > 1:
        middle = (b + after) // 2
        begins_before = gl.load(offsets + middle) <= row
        b = gl.where(begins_before, middle, b)
        after = gl.where(begins_before, after, middle)
    return b


@gluon.jit
def _produce(
    s, k, v, offsets, num_rows, num_examples, num_kv, team, num_teams, h, tiles, barriers, news,
    D: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """The warp that has tiles copied: those query tiles that begin in the team's share of all rows.

    Both groups get a tile, if of the next example's rows, which come up next: nothing of them is stored.
    """
    s_tiles, _, k_tiles, v_tiles = tiles
    s_full, s_empty, k_full, v_full, kv_empty = barriers
    S_SLOTS: gl.constexpr = s_tiles.shape[0] // GROUPS
    SLOTS: gl.constexpr = k_tiles.shape[0]
    N: gl.constexpr = k_tiles.shape[1]
    TILE: gl.constexpr = GROUPS * ROWS
    begin = (num_rows.to(gl.int64) * team // num_teams).to(gl.int32)
    end = (num_rows.to(gl.int64) * (team + 1) // num_teams).to(gl.int32)
    tile = 0
    at = 0
    b = example_of(begin, offsets, num_examples)
    first = gl.load(offsets + b)
    while first < end:
        after = gl.load(offsets + b + 1)
        num_q = after - first
        m_first = gl.maximum(begin - first + TILE - 1, 0) // TILE * TILE
        for m in range(m_first, gl.minimum(num_q, end - first), TILE):
            announce((first + m, num_q - m), news, tile)
            slot = tile % S_SLOTS
            mbarrier.wait(s_empty.index(slot), (tile // S_SLOTS & 1) ^ 1)
            for group in gl.static_range(GROUPS):
                place = slot * GROUPS + group
                copy_in(s, first + m + group * ROWS, h * D, s_full.index(place), s_tiles.index(place), True)
            tile += 1
            for n in range(0, num_kv, N):
                slot = at % SLOTS
                mbarrier.wait(kv_empty.index(slot), (at // SLOTS & 1) ^ 1)
                copy_in(k, b * num_kv + n, h * D, k_full.index(slot), k_tiles.index(slot), True)
                copy_in(v, b * num_kv + n, h * D, v_full.index(slot), v_tiles.index(slot), True)
                at += 1
        b += 1
        first = after
    announce((0, 0), news, tile)


@gluon.jit
def _post_sums(box, zero, h, turn, s_tile, full, phase, D: gl.constexpr, H: gl.constexpr, LAYOUT: gl.constexpr):
    """Tell the team this head's share of LayerNorm's sums: the sum, and squares around the head's own mean, which lose
    nothing where a row's mean is far from 0."""
    mbarrier.wait(full, phase)
    x_MD = s_tile.load(LAYOUT).to(gl.float32)
    sum_M = gl.sum(x_MD, 1)
    around_MD = x_MD - (sum_M * (1.0 / D))[:, None]
    post_pair(box, zero, h, turn, sum_M, gl.sum(around_MD * around_MD, 1), H)


@gluon.jit
def mean_and_rstd(sum_MH, squares_MH, D: gl.constexpr, H: gl.constexpr):
    mean_M = gl.sum(sum_MH, 1) * (1.0 / (H * D))
    apart_MH = sum_MH * (1.0 / D) - mean_M[:, None]
    head_H = gl.arange(0, sum_MH.shape[1], gl.SliceLayout(0, sum_MH.type.layout))
    apart_MH = gl.where((head_H < H)[None, :], apart_MH, 0.0)
    variance_M = gl.sum(squares_MH + apart_MH * apart_MH * D, 1) * (1.0 / (H * D))
    return mean_M, gl.rsqrt(variance_M + EPS)


@gluon.jit
def keep_norm(norms, x_M, WHICH: gl.constexpr, row, m, left, h, H: gl.constexpr):
    """A number of each row for backward, by one program of the team; the tile's first row is row + m."""
    if h == WHICH % H:
        m_M = m + gl.arange(0, ROWS, x_M.type.layout)
        gl.store(norms + (row + m_M).to(gl.int64) * 3 + WHICH, x_M, mask=m_M < left)


@gluon.jit
def _finish(
    out, out_pointer, norms, g_MD, squares_MH, s_tile, row, left, h,
    D: gl.constexpr, H: gl.constexpr, GROUP: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """RMSNorm and the outer residual of a tile, stored from the place of S; none if no rows are left."""
    W: gl.constexpr = H * D
    # Plus 0 that changes with the row for all the compiler knows: addresses are computed where they are used.
    m = GROUP * ROWS + (row >> 31)
    rms_M = gl.convert_layout(gl.rsqrt(gl.sum(squares_MH, 1) * (1.0 / W) + EPS), gl.SliceLayout(1, LAYOUT))
    out_MD = g_MD * rms_M[:, None] + s_tile.load(LAYOUT).to(gl.float32)
    if left >= m + ROWS:
        s_tile.store(out_MD.to(s_tile.dtype))
        hopper.fence_async_shared()
        store(out, [row + m, h * D], s_tile)
    else:
        store_rows(out_pointer + row.to(gl.int64) * W + h * D, out_MD, m, left, W, LAYOUT)
    keep_norm(norms, rms_M, 2, row, m, left, h, H)


@gluon.jit
def _consume(
    out, out_pointer, norms, num_kv, inner, outer, h, boxes, tiles, barriers, news,
    D: gl.constexpr, H: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
    ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """One group: 64 rows of every query tile of the team."""
    s_tiles, q_tiles, k_tiles, v_tiles = tiles
    s_full, s_empty, k_full, v_full, kv_empty = barriers
    S_SLOTS: gl.constexpr = s_tiles.shape[0] // GROUPS
    SLOTS: gl.constexpr = k_tiles.shape[0]
    N: gl.constexpr = k_tiles.shape[1]
    TYPE: gl.constexpr = s_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    sums_box, squares_box = boxes
    queries = q_tiles.index(GROUP)
    tile = 0
    at = 0
    row_before, left_before = 0, 0
    g_MD = gl.full([ROWS, D], 0.0, gl.float32, O_LAYOUT)
    row, left = take(news, tile, 2)
    while left > 0:
        # 0 that changes with the row for all the compiler knows: addresses are computed where they are used.
        zero = row >> 31
        place = tile % S_SLOTS * GROUPS + GROUP
        slot_before = (tile + S_SLOTS - 1) % S_SLOTS
        s_tile, before = s_tiles.index(place), s_tiles.index(slot_before * GROUPS + GROUP)
        _post_sums(sums_box, zero, h, tile, s_tile, s_full.index(place), tile // S_SLOTS & 1, D, H, O_LAYOUT)
        squares_MH = read(squares_box, row_before >> 31, tile - 1, H)
        _finish(out, out_pointer, norms, g_MD, squares_MH, before, row_before, left_before, h, D, H, GROUP, O_LAYOUT)
        sum_MH, around_MH = read_pair(sums_box, zero, tile, H)
        mean_M, rstd_M = mean_and_rstd(sum_MH, around_MH, D, H)
        scale_M, shift_M = gl.convert_layout(rstd_M, ROW_LAYOUT), gl.convert_layout(mean_M * rstd_M, ROW_LAYOUT)
        o_MD = s_tile.load(O_LAYOUT).to(gl.float32) * scale_M[:, None] - shift_M[:, None]
        keep_norm(norms, mean_M, 0, row, GROUP * ROWS + zero, left, h, H)
        keep_norm(norms, rstd_M, 1, row, GROUP * ROWS + zero, left, h, H)
        queries.store(o_MD.to(TYPE))
        hopper.fence_async_shared()
        all_warps()
        # The queries are the sum's first term. Through a wait: registers of a product must be written before the first
        # one is in flight.
        s_MN = gl.full([ROWS, N], 0.0, gl.float32, S_LAYOUT)
        o_MD, s_MN = hopper.warpgroup_mma_wait(0, deps=[o_MD, s_MN])
        o = hopper.warpgroup_mma_init(o_MD)
        mbarrier.wait(k_full.index(at % SLOTS), at // SLOTS & 1)
        keys = k_tiles.index(at % SLOTS).permute((1, 0))
        s = hopper.warpgroup_mma(queries, keys, s_MN, use_acc=False, is_async=True)
        tma.store_wait(0)  # of the tile before, which has left its place
        mbarrier.arrive(s_empty.index(slot_before), count=1, pred=tile > 0)
        s_MN = hopper.warpgroup_mma_wait(0, deps=[s])
        p = weights(s_MN, 0, 0, num_kv, 0, inner, outer, TYPE, S_LAYOUT, O_LAYOUT, False, ACTIVATION, APPROX, False)
        for n in range(N, num_kv, N):
            s, o = start_step(queries, p, s_MN, o, k_tiles, v_tiles, k_full, v_full, at, False)
            s_MN = hopper.warpgroup_mma_wait(1, deps=[s])
            p_after = weights(s_MN, 0, n, num_kv, 0, inner, outer, TYPE, S_LAYOUT, O_LAYOUT,
                              False, ACTIVATION, APPROX, False)  # fmt: skip
            o_MD, p = hopper.warpgroup_mma_wait(0, deps=[o, p])
            o = hopper.warpgroup_mma_init(o_MD)
            p = p_after
            mbarrier.arrive(kv_empty.index(at % SLOTS), count=1)
            at += 1
        o = add_values(p, o, v_tiles, v_full, at, False)
        g_MD = hopper.warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(kv_empty.index(at % SLOTS), count=1)
        at += 1
        post(squares_box, zero, h, tile, gl.sum(g_MD * g_MD, 1), H)
        row_before, left_before = row, left
        tile += 1
        row, left = take(news, tile, 2)
    last = s_tiles.index((tile + S_SLOTS - 1) % S_SLOTS * GROUPS + GROUP)
    squares_MH = read(squares_box, row_before >> 31, tile - 1, H)
    _finish(out, out_pointer, norms, g_MD, squares_MH, last, row_before, left_before, h, D, H, GROUP, O_LAYOUT)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "num_examples", "num_teams"])
def _gdpa_block_fwd_hopper_kernel(
    s, k, v, out, out_pointer, norms, offsets, tickets, boxes, num_rows, num_examples, num_kv, num_teams,
    inner, outer,
    D: gl.constexpr, H: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, S_SLOTS: gl.constexpr,
    REGISTERS: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """s, k, v and out are the copy engine's descriptors, of 64 rows (s, out) and BLOCK_N rows (k, v).

    A program takes its place in a team off `tickets`, so that teams are complete whatever the order in which programs
    start; there must be no more programs than run at once. `tickets` (int32) and `boxes` (int64) hold zeros.
    """
    TYPE: gl.constexpr = s.dtype
    GROUPS: gl.constexpr = 2
    s_tiles = gl.allocate_shared_memory(TYPE, [S_SLOTS * GROUPS, ROWS, D], s.layout)
    q_tiles = gl.allocate_shared_memory(TYPE, [GROUPS, ROWS, D], s.layout)
    k_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, BLOCK_N, D], k.layout)
    v_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, BLOCK_N, D], k.layout)
    news = news_of(_NEWS, 2, GROUPS)
    s_full, s_empty = barriers_of(S_SLOTS * GROUPS, 1), barriers_of(S_SLOTS, GROUPS)
    k_full, v_full, kv_empty = barriers_of(SLOTS, 1), barriers_of(SLOTS, 1), barriers_of(SLOTS, GROUPS)
    hopper.fence_async_shared()
    tiles = (s_tiles, q_tiles, k_tiles, v_tiles)
    barriers = (s_full, s_empty, k_full, v_full, kv_empty)
    ticket = gl.atomic_add(tickets, 1)
    team, h = ticket // H, ticket % H
    # A box a group, for sums (two numbers a row and head) and for squares (one).
    BOX: gl.constexpr = TURNS * ROWS * H
    own = boxes + team * (GROUPS * 3 * BOX)
    gl.warp_specialize(
        [
            (_consume, (out, out_pointer, norms, num_kv, inner, outer, h, (own, own + 2 * BOX),
                        tiles, barriers, news, D, H, 0, GROUPS, ACTIVATION, APPROX)),
            (_consume, (out, out_pointer, norms, num_kv, inner, outer, h, (own + 3 * BOX, own + 5 * BOX),
                        tiles, barriers, news, D, H, 1, GROUPS, ACTIVATION, APPROX)),
            (_produce, (s, k, v, offsets, num_rows, num_examples, num_kv, team, num_teams, h, tiles, barriers, news,
                        D, GROUPS)),
        ],
        [4, 1], [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
