"""The GDPA block's forward on Hopper in one kernel, in Gluon, for more than 64 keys or heads of 64.

As for few keys (`kernels/gdpa_block/hopper_forward.py`), a team of programs takes the same query tiles in step and
exchanges sums of rows. A program has D = 128 columns, one head or two of 64.

Eight warps compute, in two groups: each has half of a program's columns (of two heads, one head). They are one
partition, and so run one copy of the code: two partitions have one each, more than the instruction cache holds. Keys
and values of an example stay on chip while its query tiles pass by. A query tile's place holds S, then the queries,
then the output; S itself stays in registers. The next tile's sums are posted while this one's scores are on their way,
and the tile before is finished while its values are; words are asked for before they are needed.

Shape letters: T rows of all examples, H programs of a team, D = 128 columns of a program, M = 64 rows of a query tile,
N rows of a key tile, G = 2 groups, W = H D.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gdpa.hopper_backward_groups import zero_rows
from kernels.gdpa.triton_activations import activate
from kernels.gdpa_block.hopper_forward import EPS, example_of, keep_norm, mean_and_rstd
from kernels.gdpa_block.hopper_mailbox import (
    GROUPS,
    TURNS,
    ask,
    ask_pair,
    post,
    post_pair,
    read_asked,
    read_pair_asked,
    sums_by_group,
)
from kernels.hopper_ring import (
    PRODUCER_REGISTERS,
    ROWS,
    all_warps,
    announce,
    barriers_of,
    copy_in,
    news_of,
    store,
    store_rows,
    take,
)

_NEWS = gl.constexpr(8)  # query tiles that the copying warp tells of ahead


@gluon.jit
def _share(offsets, num_rows, num_examples, team, num_teams):
    """A team's rows, and the example of the first one: query tiles that begin there are the team's."""
    begin = (num_rows.to(gl.int64) * team // num_teams).to(gl.int32)
    end = (num_rows.to(gl.int64) * (team + 1) // num_teams).to(gl.int32)
    return begin, end, example_of(begin, offsets, num_examples)


@gluon.jit
def _tiles_of(offsets, b, first, begin, end):
    """Of example b, which begins at row `first`: its rows, and the range in which query tiles of the share begin."""
    num_q = gl.load(offsets + b + 1) - first
    m_first = gl.maximum(begin - first + ROWS - 1, 0) // ROWS * ROWS
    return num_q, m_first, gl.minimum(num_q, end - first)


@gluon.jit
def _produce_queries(s, offsets, num_rows, num_examples, team, num_teams, h, s_tiles, full, empty, news):
    """The warp that has the team's query tiles copied."""
    PLACES: gl.constexpr = s_tiles.shape[0]
    D: gl.constexpr = s_tiles.shape[2]
    begin, end, b = _share(offsets, num_rows, num_examples, team, num_teams)
    tile = 0
    first = gl.load(offsets + b)
    while first < end:
        num_q, m_first, m_end = _tiles_of(offsets, b, first, begin, end)
        for m in range(m_first, m_end, ROWS):
            place = tile % PLACES
            mbarrier.wait(empty.index(place), (tile // PLACES & 1) ^ 1)
            copy_in(s, first + m, h * D, full.index(place), s_tiles.index(place), True)
            announce((first + m, num_q - m, (m + ROWS >= m_end).to(gl.int32)), news, tile)
            tile += 1
        b += 1
        first += num_q
    announce((0, 0, 0), news, tile)


@gluon.jit
def _copy_parts(x, row, h, items, full, empty, tiles):
    """Start the copies of an example's keys or values, all its tiles, once their place is empty."""
    PLACES: gl.constexpr = empty.shape[0]
    PARTS: gl.constexpr = full.shape[0] // PLACES
    N: gl.constexpr = tiles.shape[1]
    D: gl.constexpr = tiles.shape[2]
    place = items % PLACES
    mbarrier.wait(empty.index(place), (items // PLACES & 1) ^ 1)
    for part in gl.static_range(PARTS):
        at = place * PARTS + part
        copy_in(x, row + part * N, h * D, full.index(at), tiles.index(at), True)


@gluon.jit
def _produce_keys(k, v, offsets, num_rows, num_examples, num_kv, team, num_teams, h, kv_tiles, full, empty):
    """The warp that has keys and values copied, of the examples that the team has tiles of."""
    k_tiles, v_tiles = kv_tiles
    k_full, v_full = full
    k_empty, v_empty = empty
    begin, end, b = _share(offsets, num_rows, num_examples, team, num_teams)
    items = 0
    first = gl.load(offsets + b)
    while first < end:
        num_q, m_first, m_end = _tiles_of(offsets, b, first, begin, end)
        if m_first < m_end:
            _copy_parts(k, b * num_kv, h, items, k_full, k_empty, k_tiles)
            _copy_parts(v, b * num_kv, h, items, v_full, v_empty, v_tiles)
            items += 1
        b += 1
        first += num_q


@gluon.jit
def _packed(x_MD):
    """16-bit numbers in pairs: carried through a loop by themselves, each takes a register."""
    left, right = gl.split(x_MD.reshape([x_MD.shape[0], x_MD.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(
        "mov.b32 $0, {$1, $2};", "=r,h,h", [left, right], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _unpacked(x_MP, TYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The numbers in float32."""
    left, right = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [x_MP], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    x_MD = gl.join(left, right).reshape([x_MP.shape[0], 2 * x_MP.shape[1]])
    return gl.convert_layout(x_MD, LAYOUT).to(TYPE, bitcast=True).to(gl.float32)


@gluon.jit
def _open(box, zero, h, turn, s_tiles, full, SHARES: gl.constexpr, LAYOUT: gl.constexpr):
    """A tile's S, of which this tells the team this program's shares of LayerNorm's sums: the sum, and squares around
    the share's own mean, which lose nothing where a row's mean is far from 0."""
    PLACES: gl.constexpr = full.shape[0]
    C: gl.constexpr = s_tiles.shape[2] // GROUPS
    place = turn % PLACES
    mbarrier.wait(full.index(place), turn // PLACES & 1)
    s_MD = s_tiles.index(place).load(LAYOUT)
    s_MGC = s_MD.to(gl.float32).reshape([ROWS, GROUPS, C])
    sum_MG = gl.sum(s_MGC, 2)
    around_MGC = s_MGC - (sum_MG * (1.0 / C)).expand_dims(2)
    post_pair(box, zero, h, turn, sum_MG, gl.sum(around_MGC * around_MGC, 2), SHARES)
    return _packed(s_MD)


@gluon.jit
def _finish(
    out, out_pointer, norms, asked_MH, box, zero, turn, s_MP, g_MD, tile, row, left, h,
    H: gl.constexpr, SHARES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """RMSNorm and the outer residual of a tile, stored from its place, once the sums of squares are there."""
    D: gl.constexpr = g_MD.shape[1]
    W: gl.constexpr = H * D
    squares_MH = read_asked(asked_MH, box, zero, turn, SHARES)
    rms_M = gl.convert_layout(gl.rsqrt(gl.sum(squares_MH, 1) * (1.0 / W) + EPS), gl.SliceLayout(1, LAYOUT))
    out_MD = g_MD * rms_M[:, None] + _unpacked(s_MP, tile.dtype, LAYOUT)
    if left >= ROWS:
        tile.store(out_MD.to(tile.dtype))
        hopper.fence_async_shared()
        store(out, [row, h * D], tile)
    else:
        # From 0 that changes with the row for all the compiler knows: addresses are computed where they are used.
        store_rows(out_pointer + row.to(gl.int64) * W + h * D, out_MD, row >> 31, left, W, LAYOUT)
    keep_norm(norms, rms_M, 2, row, 0, left, h, H)


@gluon.jit
def _own_group():
    """Which of the two groups of warps this is: not the same number for all threads."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; shfl.sync.idx.b32 $0, t, 0, 31, 0xffffffff; }", "=r", [],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _consume(
    out, out_pointer, norms, num_kv, inner, outer, h, boxes, s_tiles, kv_tiles, p_tiles, barriers, news,
    H: gl.constexpr, PAIR: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """Two groups of four warps, each with its columns of all query tiles.

    PAIR: the program has two heads, each group one. Then a group's left operands are its head's.
    """
    k_tiles, v_tiles = kv_tiles
    full, empty, k_full, v_full, k_empty, v_empty = barriers
    sums_box, squares_box = boxes
    PLACES: gl.constexpr = full.shape[0]
    KV_PLACES: gl.constexpr = k_empty.shape[0]
    PARTS: gl.constexpr = k_full.shape[0] // k_empty.shape[0]
    N: gl.constexpr = k_tiles.shape[1]
    D: gl.constexpr = s_tiles.shape[2]
    TYPE: gl.constexpr = s_tiles.dtype
    S_N: gl.constexpr = 2 * N if PAIR else N
    SHARES: gl.constexpr = H * GROUPS
    HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D // GROUPS], TYPE)
    P_HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, N], TYPE)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, S_N // GROUPS, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, D // GROUPS, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    turn = 0  # query tiles so far
    items = 0  # examples so far
    is_first = True
    row_before, left_before = 0, 0
    g_MD = gl.full([ROWS, D], 0.0, gl.float32, LAYOUT)
    s_before_MP = _packed(gl.full([ROWS, D], 0.0, TYPE, LAYOUT))
    s_MP = s_before_MP
    row, left, is_last = take(news, 0, 3)
    if left > 0:
        s_MP = _open(sums_box, row >> 31, h, 0, s_tiles, full, SHARES, LAYOUT)
    asked = ask_pair(sums_box, row >> 31, 0, SHARES)
    while left > 0:
        # 0 that changes with the row for all the compiler knows: addresses are computed where they are used.
        zero = row >> 31
        tile = s_tiles.index(turn % PLACES + zero)
        before = s_tiles.index((turn + PLACES - 1) % PLACES + zero)
        kv = items % KV_PLACES + zero
        kv_phase = items // KV_PLACES & 1
        sum_MH, around_MH = read_pair_asked(asked, sums_box, zero, turn, SHARES)
        mean_M, rstd_M = mean_and_rstd(sum_MH, around_MH, D // GROUPS, SHARES)
        scale_M, shift_M = gl.convert_layout(rstd_M, ROW), gl.convert_layout(mean_M * rstd_M, ROW)
        o_MD = _unpacked(s_MP, TYPE, LAYOUT) * scale_M[:, None] - shift_M[:, None]
        tile.store(o_MD.to(TYPE))
        if is_first:
            mbarrier.wait(k_full.index(kv * PARTS + PARTS - 1), kv_phase)
            if num_kv < N * PARTS:
                zero_rows(k_tiles.index(kv * PARTS + PARTS - 1), (PARTS - 1) * N, num_kv)
        hopper.fence_async_shared()
        all_warps()
        # The queries are the sum's first term. Through a wait: registers of a product must be written before the first
        # one is in flight.
        s0_MN = gl.full([ROWS, S_N], 0.0, gl.float32, S_LAYOUT)
        s1_MN = gl.full([ROWS, S_N], 0.0, gl.float32, S_LAYOUT)
        o_MD, s0_MN, s1_MN = hopper.warpgroup_mma_wait(0, deps=[o_MD, s0_MN, s1_MN])
        o = hopper.warpgroup_mma_init(o_MD)
        queries = tile
        if PAIR:
            queries = tile._reinterpret(TYPE, [GROUPS, ROWS, D // GROUPS], HALF).index(_own_group())
        for part in gl.static_range(PARTS):
            mbarrier.wait(k_full.index(kv * PARTS + part), kv_phase)
            keys = k_tiles.index(kv * PARTS + part)
            if PAIR:
                keys = keys._reinterpret(TYPE, [GROUPS * N, D // GROUPS], k_tiles.layout)
            if part == 0:
                s0 = hopper.warpgroup_mma(queries, keys.permute((1, 0)), s0_MN, use_acc=False, is_async=True)
            else:
                s1 = hopper.warpgroup_mma(queries, keys.permute((1, 0)), s1_MN, use_acc=False, is_async=True)
        keep_norm(norms, mean_M, 0, row, 0, left, h, H)
        keep_norm(norms, rstd_M, 1, row, 0, left, h, H)
        row_after, left_after, is_last_after = take(news, turn + 1, 3)
        s_after_MP = s_MP
        if left_after > 0:
            s_after_MP = _open(sums_box, zero, h, turn + 1, s_tiles, full, SHARES, LAYOUT)
        asked_MH = ask(squares_box, zero, turn - 1, SHARES)
        for part in gl.static_range(PARTS):
            s_MN = hopper.warpgroup_mma_wait(PARTS - 1, deps=[s0 if part == 0 else s1])
            p_tile = p_tiles.index(part + zero)
            p_tile.store(activate(s_MN, inner, outer, ACTIVATION, APPROX).to(TYPE))
            hopper.fence_async_shared()
            all_warps()
            mbarrier.wait(v_full.index(kv * PARTS + part), kv_phase)
            if PAIR:
                p_tile = p_tile._reinterpret(TYPE, [GROUPS, ROWS, N], P_HALF).index(_own_group())
            o = hopper.warpgroup_mma(p_tile, v_tiles.index(kv * PARTS + part), o, is_async=True)
        mbarrier.arrive(k_empty.index(kv), count=1, pred=is_last != 0)
        if turn > 0:
            _finish(
                out, out_pointer, norms, asked_MH, squares_box, zero, turn - 1, s_before_MP, g_MD, before,
                row_before, left_before, h, H, SHARES, LAYOUT,
            )  # fmt: skip
        g_MD = hopper.warpgroup_mma_wait(0, deps=[o])
        post(squares_box, zero, h, turn, sums_by_group(g_MD * g_MD), SHARES)
        asked = ask_pair(sums_box, zero, turn + 1, SHARES)
        tma.store_wait(0)  # of the tile before, which has left its place
        all_warps()
        mbarrier.arrive(empty.index((turn + PLACES - 1) % PLACES), count=1, pred=turn > 0)
        mbarrier.arrive(v_empty.index(kv), count=1, pred=is_last != 0)
        items += is_last
        is_first = is_last != 0
        row_before, left_before, s_before_MP = row, left, s_MP
        row, left, is_last, s_MP = row_after, left_after, is_last_after, s_after_MP
        turn += 1
    if turn > 0:
        zero = row_before >> 31
        last = s_tiles.index((turn + PLACES - 1) % PLACES + zero)
        asked_MH = ask(squares_box, zero, turn - 1, SHARES)
        _finish(
            out, out_pointer, norms, asked_MH, squares_box, zero, turn - 1, s_before_MP, g_MD, last,
            row_before, left_before, h, H, SHARES, LAYOUT,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "num_examples", "num_kv", "num_teams"])
def _gdpa_block_fwd_many_hopper_kernel(
    s, k, v, out, out_pointer, norms, offsets, tickets, boxes, num_rows, num_examples, num_kv, num_teams,
    inner, outer,
    D: gl.constexpr, H: gl.constexpr, PAIR: gl.constexpr, BLOCK_N: gl.constexpr, PARTS: gl.constexpr,
    PLACES: gl.constexpr, KV_PLACES: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """s, k, v and out are the copy engine's descriptors, of 64 rows (s, out) and BLOCK_N rows (k, v), by D columns.

    Keys are at most PARTS BLOCK_N, of one example on chip or of two (KV_PLACES). A program takes its place in a team
    off `tickets`, so that teams are complete whatever the order in which programs start; there must be no more programs
    than run at once. `tickets` (int32) and `boxes` (int64) hold zeros.
    """
    TYPE: gl.constexpr = s.dtype
    S_N: gl.constexpr = 2 * BLOCK_N if PAIR else BLOCK_N
    P_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, S_N], TYPE)
    s_tiles = gl.allocate_shared_memory(TYPE, [PLACES, ROWS, D], s.layout)
    k_tiles = gl.allocate_shared_memory(TYPE, [KV_PLACES * PARTS, BLOCK_N, D], k.layout)
    v_tiles = gl.allocate_shared_memory(TYPE, [KV_PLACES * PARTS, BLOCK_N, D], v.layout)
    p_tiles = gl.allocate_shared_memory(TYPE, [PARTS, ROWS, S_N], P_LAYOUT)
    news = news_of(_NEWS, 3, 1)
    full, empty = barriers_of(PLACES, 1), barriers_of(PLACES, 1)
    k_full, v_full = barriers_of(KV_PLACES * PARTS, 1), barriers_of(KV_PLACES * PARTS, 1)
    k_empty, v_empty = barriers_of(KV_PLACES, 1), barriers_of(KV_PLACES, 1)
    hopper.fence_async_shared()
    barriers = (full, empty, k_full, v_full, k_empty, v_empty)
    ticket = gl.atomic_add(tickets, 1)
    team, h = ticket // H, ticket % H
    # Three words a row and share: for sums (two) and for squares.
    BOX: gl.constexpr = TURNS * ROWS * H * GROUPS
    own = boxes + team * (3 * BOX)
    gl.warp_specialize(
        [
            (_consume, (out, out_pointer, norms, num_kv, inner, outer, h, (own, own + 2 * BOX), s_tiles,
                        (k_tiles, v_tiles), p_tiles, barriers, news, H, PAIR, ACTIVATION, APPROX)),
            (_produce_queries, (s, offsets, num_rows, num_examples, team, num_teams, h, s_tiles, full, empty, news)),
            (_produce_keys, (k, v, offsets, num_rows, num_examples, num_kv, team, num_teams, h, (k_tiles, v_tiles),
                             (k_full, v_full), (k_empty, v_empty))),
        ],
        [1, 1], [PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
