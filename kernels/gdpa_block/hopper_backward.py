"""The GDPA block's backward on Hopper in one kernel, in Gluon, for at most 128 keys: reads S, out and dOut, writes dS.

As in forward (`kernels/gdpa_block/hopper_forward.py`), a program has one head, and a team of programs, one a head,
takes the same query tiles in step and exchanges what both norms need of a row. With do = dOut and what forward kept of
a row (mean and rstd of S, rms), its W = H D numbers of all heads give

    q = (S - mean) rstd, unit = out - S, c = sum(do unit) / W, dg = rms (do - c unit);
    dq = dg + GDPA's gradient of q for dg, a = sum(dq) / W, b = sum(dq q) / W, dS = rstd (dq - a - b q) + do.

Eight warps compute, in two groups: each has half of the columns of a head, of query tiles and of dQ. Scores are
transposed. Of 64 keys a group has half of the queries of the scores and half of the columns of dK and dV, and P and dS
are in shared memory for both; of 128 it has 64 keys of scores, dK and dV, and P in registers. They are one partition,
and so run one copy of the code: two partitions of four warps have one each, more than the instruction cache holds, and
take twice the time. A query tile's place holds S, out and do; there q follows S, dg follows out and is followed by dq,
dS follows do. Sums are posted long before they are read: the next tile's first ones while the scores of this one are on
their way, and the tile before is finished while dV, dQ and dK are.

Shape letters: T rows of all examples, H heads, D = 128 head width, M = 64 rows of a query tile, N = 64 or 128 keys,
G = 2 groups, W = H D.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gdpa.hopper_backward_groups import activate_or_bare, common_factors, zero_rows
from kernels.gdpa_block.hopper_mailbox import GROUPS, TURNS, ask, ask_pair, own_place, read_asked, read_pair_asked
from kernels.gdpa_block.hopper_pairs import (
    PAIR_ROW,
    PAIRS,
    add_pairs,
    as_factor,
    as_pairs,
    both,
    fused,
    halves,
    high_of,
    low_of,
    multiply,
    post_sums,
    scaled,
    scaled_sum,
    subtract,
    whole,
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

SUM_STAYS = gl.constexpr(True)
DG_STAYS = gl.constexpr(True)
CLOSE_EARLY = gl.constexpr(False)
EARLY_EMPTY = gl.constexpr(True)
ASK_LATE = gl.constexpr(False)
_NEWS = gl.constexpr(4)  # query tiles that the copying warp tells of ahead
_PADDING = gl.constexpr(32)  # rows of an example's last tile that are not its own, in the mean


@gluon.jit
def _first_example(share, num_shares, offsets, num_rows, num_examples):
    """The first example of one of the shares of about as many rows each, padding of last tiles counted."""
    goal = (num_rows.to(gl.int64) + num_examples * _PADDING) * share // num_shares
    b = num_examples * 0
    after = num_examples
    while b < after:
        middle = (b + after) // 2
        is_before = gl.load(offsets + middle).to(gl.int64) + middle * _PADDING < goal
        b = gl.where(is_before, middle + 1, b)
        after = gl.where(is_before, after, middle)
    return b


@gluon.jit
def _produce(
    s, out, do, k, v, offsets, num_rows, num_examples, num_kv, team, num_teams, h, tiles, barriers, news
):  # fmt: skip
    """The warp that has tiles copied: those of the team's examples, one after another."""
    x_tiles, k_tiles, v_tiles, _ = tiles
    s_tiles, out_tiles, do_tiles = x_tiles
    full, empty, kv_full, kv_empty = barriers
    PLACES: gl.constexpr = empty.shape[0]
    KV_PLACES: gl.constexpr = kv_empty.shape[0]
    D: gl.constexpr = s_tiles.shape[2]
    begin = _first_example(team, num_teams, offsets, num_rows, num_examples)
    end = _first_example(team + 1, num_teams, offsets, num_rows, num_examples)
    tile = 0
    told = 0
    items = 0
    for b in range(begin, end):
        first = gl.load(offsets + b)
        num_q = gl.load(offsets + b + 1) - first
        if num_q == 0:
            announce((b, 0, 0, 0), news, told)
            told += 1
        for m in range(0, num_q, ROWS):
            place = tile % PLACES
            mbarrier.wait(empty.index(place), (tile // PLACES & 1) ^ 1)
            copy_in(s, first + m, h * D, full.index(place), s_tiles.index(place), True)
            copy_in(out, first + m, h * D, full.index(place), out_tiles.index(place), True)
            copy_in(do, first + m, h * D, full.index(place), do_tiles.index(place), True)
            announce((b, first + m, num_q - m, tile), news, told)
            told += 1
            tile += 1
            if m == 0:
                at = items % KV_PLACES
                mbarrier.wait(kv_empty.index(at), (items // KV_PLACES & 1) ^ 1)
                copy_in(k, b * num_kv, h * D, kv_full.index(at), k_tiles.index(at), True)
                copy_in(v, b * num_kv, h * D, kv_full.index(at), v_tiles.index(at), True)
                items += 1
    announce((-1, 0, 0, 0), news, told)


@gluon.jit
def _put_out(x, pointer, staged, row, rows, column, W: gl.constexpr):
    """Store a staged tile, or its first rows if it has more, at this row and column of x."""
    if rows >= staged.shape[0]:
        store(x, [row, column], staged)
    else:
        C: gl.constexpr = staged.shape[1]
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [gl.num_warps(), 1], [1, 0])
        # From 0 that changes with the row for all the compiler knows: addresses are computed where they are used.
        store_rows(pointer + row.to(gl.int64) * W + column, staged.load(LAYOUT), row >> 31, rows, W, LAYOUT)


@gluon.jit
def _next_tile(dk, dv, num_kv, column, told, news, N: gl.constexpr, D: gl.constexpr, W: gl.constexpr):
    """The next query tile: example, first row, rows left, number. Examples without rows get their zeros."""
    b, row, left, tile = take(news, told, 4)
    told += 1
    while (b >= 0) & (left == 0):
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
        base = b.to(gl.int64) * num_kv * W + column
        zero_ND = gl.full([N, D], 0.0, dk.dtype.element_ty, LAYOUT)
        # From 0 that changes for all the compiler knows: addresses are computed where they are used.
        store_rows(dk + base, zero_ND, row >> 31, num_kv, W, LAYOUT)
        store_rows(dv + base, zero_ND, row >> 31, num_kv, W, LAYOUT)
        b, row, left, tile = take(news, told, 4)
        told += 1
    return b, row, left, tile, told


@gluon.jit
def _norms_of(norms, row, left):
    """mean, rstd and rms of each row of a tile: zeros past the example's end."""
    row_M = gl.arange(0, ROWS, PAIR_ROW)
    kept_M = norms + (row + row_M).to(gl.int64) * 3
    mean_M = gl.load(kept_M, mask=row_M < left, other=0.0)
    rstd_M = gl.load(kept_M + 1, mask=row_M < left, other=0.0)
    rms_M = gl.load(kept_M + 2, mask=row_M < left, other=0.0)
    return mean_M, rstd_M, rms_M


@gluon.jit
def _words(box, zero, h, turn, SHARES: gl.constexpr, NUMBERS: gl.constexpr):
    """Places of this program's words of a turn, and the turn to write there."""
    row_M = zero + gl.arange(0, ROWS, PAIR_ROW)
    place_M = own_place(box, h * GROUPS, turn, row_M, SHARES, NUMBERS)
    return place_M, gl.full([ROWS], 1, gl.int32, PAIR_ROW) + turn


@gluon.jit
def _open(words, mean_M, rstd_M, tile, x_tiles, full):
    """Take a tile: q in the place of S and unit in that of out. Post this program's shares of its sum(do unit)."""
    s_tiles, out_tiles, do_tiles = x_tiles
    PLACES: gl.constexpr = full.shape[0]
    place = tile % PLACES
    s_tile, out_tile = as_pairs(s_tiles).index(place), as_pairs(out_tiles).index(place)
    mbarrier.wait(full.index(place), tile // PLACES & 1)
    s_MC = s_tile.load(PAIRS)
    unit_MC = subtract(out_tile.load(PAIRS), s_MC)
    out_tile.store(unit_MC)
    s_tile.store(scaled(s_MC, rstd_M[:, None], (-mean_M * rstd_M)[:, None]))
    place_M, turn_M = words
    post_sums(place_M, turn_M, as_pairs(do_tiles).index(place).load(PAIRS), unit_MC, 1)


@gluon.jit
def _transform(unit_tile, do_tile, rms_M, along_M):
    """dg = rms do - rms c unit, in the place of unit."""
    high_M, low_M = as_factor(rms_M)
    slant_M = both(-rms_M * along_M, -rms_M * along_M)
    do_MC = do_tile.load(PAIRS)
    rest_MC = fused(do_MC, low_M[:, None], multiply(unit_tile.load(PAIRS), slant_M[:, None]))
    dg_MC = fused(do_MC, high_M[:, None], rest_MC)
    unit_tile.store(dg_MC)
    return dg_MC


@gluon.jit
def _close(
    ds, pointer, asked, box, zero, turn, sum_MC, x_tiles, place, rstd_M, row, left, column,
    H: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """dS in the place of q, and stored, once the sums of dq and dq q are there. sum_MC: rstd dq + do."""
    s_tiles, _, do_tiles = x_tiles
    sum_MH, along_MH = read_pair_asked(asked, box, zero, turn, H)
    shift_M = rstd_M * gl.convert_layout(gl.sum(sum_MH, 1) * (-1.0 / W), PAIR_ROW)
    slant_M = rstd_M * gl.convert_layout(gl.sum(along_MH, 1) * (-1.0 / W), PAIR_ROW)
    q_tile = as_pairs(s_tiles).index(place)
    rest_MC = fused(q_tile.load(PAIRS), both(slant_M, slant_M)[:, None], both(shift_M, shift_M)[:, None])
    if not SUM_STAYS:
        sum_MC = as_pairs(do_tiles).index(place).load(PAIRS)
    q_tile.store(add_pairs(sum_MC, rest_MC))
    hopper.fence_async_shared()
    _put_out(ds, pointer, s_tiles.index(place), row, left, column, W)


@gluon.jit
def _consume(
    ds, dk, dv, ds_pointer, dk_pointer, dv_pointer, norms, num_kv, inner, outer, h, boxes, tiles, barriers, news,
    D: gl.constexpr, H: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """Two groups of four warps, each with its columns of all query tiles."""
    x_tiles, k_tiles, v_tiles, scores = tiles
    full, empty, kv_full, kv_empty = barriers
    first_box, second_box = boxes
    s_tiles, out_tiles, do_tiles = x_tiles
    p_tiles, ds_tiles = scores
    PLACES: gl.constexpr = full.shape[0]
    KV_PLACES: gl.constexpr = kv_full.shape[0]
    N: gl.constexpr = k_tiles.shape[1]
    TYPE: gl.constexpr = k_tiles.dtype
    BARE: gl.constexpr = k_tiles.dtype == gl.bfloat16  # the range of fp16 is small
    W: gl.constexpr = H * D
    SHARES: gl.constexpr = H * GROUPS  # of a row's sums
    BY_KEYS: gl.constexpr = N // 64  # groups that share out the keys; or 1, and each has all keys
    OTHERS: gl.constexpr = GROUPS // BY_KEYS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, D // GROUPS, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * BY_KEYS, OTHERS], [16, D // OTHERS, 16])
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * BY_KEYS, OTHERS], [16, ROWS // OTHERS, 16])
    p_factor, ds_factor = common_factors(inner, outer, BARE, ACTIVATION)
    column = h * D
    turn = 0  # query tiles so far
    items = 0  # examples so far
    is_first = True
    place_before, row_before, left_before = 0, 0, 0
    b, row, left, tile, told = _next_tile(dk_pointer, dv_pointer, num_kv, column, 0, news, N, D, W)
    dk_ND = gl.full([N, D], 0.0, gl.float32, G_LAYOUT)
    dv_ND = gl.full([N, D], 0.0, gl.float32, G_LAYOUT)
    mean_M, rstd_M, rms_M = _norms_of(norms, row, left)
    # Not rstd_M: a loop carries what differs from before after its body, the first time.
    rstd_before_M = gl.full([ROWS], 0.0, gl.float32, PAIR_ROW)
    if b >= 0:
        _open(_words(first_box, row >> 31, h, 0, SHARES, 1), mean_M, rstd_M, tile, x_tiles, full)
    asked_MH = ask(first_box, row >> 31, 0, SHARES)
    sum_MC = gl.full([ROWS, D // 2], 0, gl.int32, PAIRS)
    while b >= 0:
        # 0 that changes with the row for all the compiler knows: addresses are computed where they are used.
        zero = row >> 31
        place = tile % PLACES + zero
        at = items % KV_PLACES + zero
        k_tile, v_tile = k_tiles.index(at), v_tiles.index(at)
        p_tile, ds_tile = p_tiles.index(zero), ds_tiles.index(zero)
        q_tile, dg_tile = s_tiles.index(place), out_tiles.index(place)
        do_tile = as_pairs(do_tiles).index(place)
        b_after, row_after, left_after, tile_after, told = _next_tile(
            dk_pointer, dv_pointer, num_kv, column, told, news, N, D, W
        )
        mean_M, rstd_after_M, rms_after_M = _norms_of(norms, row_after, left_after)
        if is_first:
            mbarrier.wait(kv_full.index(at), items // KV_PLACES & 1)
            if num_kv < N:
                zero_rows(k_tile, zero, num_kv)
                zero_rows(v_tile, zero, num_kv)
        along_M = gl.sum(read_asked(asked_MH, first_box, zero, turn, SHARES), 1) * (1.0 / W)
        dg_MC = _transform(as_pairs(out_tiles).index(place), do_tile, rms_M, gl.convert_layout(along_M, PAIR_ROW))
        if left < ROWS:  # past the example's end, where the copy engine reads the next one
            zero_rows(q_tile, 0, left)
            zero_rows(dg_tile, 0, left)
        hopper.fence_async_shared()
        all_warps()
        s_NM = gl.full([N, ROWS], 0.0, gl.float32, S_LAYOUT)
        dp_NM = gl.full([N, ROWS], 0.0, gl.float32, S_LAYOUT)
        # Through a wait: registers of a product must be written before the first one is in flight.
        s_NM, dp_NM, dk_ND, dv_ND = hopper.warpgroup_mma_wait(0, deps=[s_NM, dp_NM, dk_ND, dv_ND])
        s = hopper.warpgroup_mma(k_tile, q_tile.permute((1, 0)), s_NM, use_acc=False, is_async=True)
        dp = hopper.warpgroup_mma(v_tile, dg_tile.permute((1, 0)), dp_NM, use_acc=False, is_async=True)
        if b_after >= 0:
            words = _words(first_box, row_after >> 31, h, turn + 1, SHARES, 1)
            _open(words, mean_M, rstd_after_M, tile_after, x_tiles, full)
        if not ASK_LATE:
            asked = ask_pair(second_box, zero, turn - 1, SHARES)
        s_NM = hopper.warpgroup_mma_wait(1, deps=[s])
        p_NM, slope_NM = activate_or_bare(s_NM, inner, outer, BARE, ACTIVATION, APPROX)
        p = p_tile
        if BY_KEYS > 1:
            p = gl.convert_layout(p_NM.to(TYPE), gl.DotOperandLayout(0, G_LAYOUT, 2))
        else:
            p_tile.store(p_NM.to(TYPE))
        slope_NM = slope_NM * ds_factor
        if CLOSE_EARLY:
            if turn > 0:
                _close(
                    ds, ds_pointer, asked, second_box, zero, turn - 1, sum_MC, x_tiles, place_before,
                    rstd_before_M, row_before, left_before, column, SHARES, W,
                )  # fmt: skip
        dp_NM, slope_NM = hopper.warpgroup_mma_wait(0, deps=[dp, slope_NM])
        ds_tile.store((slope_NM * dp_NM).to(TYPE))
        if ASK_LATE:
            asked = ask_pair(second_box, zero, turn - 1, SHARES)
        hopper.fence_async_shared()
        all_warps()
        if not DG_STAYS:
            dg_MC = as_pairs(out_tiles).index(place).load(PAIRS)
        dq_MD = whole(low_of(dg_MC), high_of(dg_MC), LAYOUT)
        dq_MD, dk_ND, dv_ND = hopper.warpgroup_mma_wait(0, deps=[dq_MD, dk_ND, dv_ND])
        dq_sum = hopper.warpgroup_mma(ds_tile.permute((1, 0)), k_tile, dq_MD, is_async=True)
        dv_sum = hopper.warpgroup_mma(p, dg_tile, dv_ND, use_acc=not is_first, is_async=True)
        dk_sum = hopper.warpgroup_mma(ds_tile, q_tile, dk_ND, use_acc=not is_first, is_async=True)
        if not CLOSE_EARLY:
            if turn > 0:
                _close(
                    ds, ds_pointer, asked, second_box, zero, turn - 1, sum_MC, x_tiles, place_before,
                    rstd_before_M, row_before, left_before, column, SHARES, W,
                )  # fmt: skip
        low_MC, high_MC = halves(hopper.warpgroup_mma_wait(2, deps=[dq_sum]))
        place_M, turn_M = _words(second_box, zero, h, turn, SHARES, 2)
        post_sums(place_M, turn_M, both(low_MC, high_MC), as_pairs(s_tiles).index(place).load(PAIRS), 2)
        sum_MC = scaled_sum(low_MC, high_MC, rstd_M[:, None], do_tile.load(PAIRS))
        if not SUM_STAYS:
            do_tile.store(sum_MC)
        asked_MH = ask(first_box, zero, turn + 1, SHARES)
        is_last = left <= ROWS
        if EARLY_EMPTY:
            tma.store_wait(0)
            all_warps()
            mbarrier.arrive(empty.index(place_before), count=1, pred=turn > 0)
            if KV_PLACES > 1:  # the example's before
                mbarrier.arrive(kv_empty.index((at + 1) % KV_PLACES), count=1, pred=is_first & (turn > 0))
        dv_ND, dk_ND = hopper.warpgroup_mma_wait(0, deps=[dv_sum, dk_sum])
        if is_last:
            all_warps()  # done with keys and values
            v_tile.store((dv_ND * p_factor).to(TYPE))
            k_tile.store(dk_ND.to(TYPE))
            hopper.fence_async_shared()
            _put_out(dv, dv_pointer, v_tile, b * num_kv, num_kv, column, W)
            _put_out(dk, dk_pointer, k_tile, b * num_kv, num_kv, column, W)
            if EARLY_EMPTY:
                if KV_PLACES == 1:
                    tma.store_wait(0)
                    all_warps()
                    mbarrier.arrive(kv_empty.index(at), count=1)
        if not EARLY_EMPTY:
            # What is stored has left its place.
            tma.store_wait(0)
            all_warps()
            mbarrier.arrive(empty.index(place_before), count=1, pred=turn > 0)
            mbarrier.arrive(kv_empty.index(at), count=1, pred=is_last)
        items += is_last.to(gl.int32)
        row_before, left_before, place_before, rstd_before_M = row, left, place, rstd_M
        b, row, left, tile, rstd_M, rms_M = b_after, row_after, left_after, tile_after, rstd_after_M, rms_after_M
        is_first = is_last
        turn += 1
    if turn > 0:
        zero = row_before >> 31
        _close(
            ds, ds_pointer, ask_pair(second_box, zero, turn - 1, SHARES), second_box, zero, turn - 1, sum_MC, x_tiles,
            place_before, rstd_before_M, row_before, left_before, column, SHARES, W,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "num_examples", "num_kv", "num_teams"])
def _gdpa_block_bwd_hopper_kernel(
    s, out, do, k, v, ds, dk, dv, ds_pointer, dk_pointer, dv_pointer, norms, offsets, tickets, boxes,
    num_rows, num_examples, num_kv, num_teams, inner, outer,
    D: gl.constexpr, H: gl.constexpr, N: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """s to dv are the copy engine's descriptors, of 64 rows, and those of keys of N.

    A program takes its place in a team off `tickets`, as in forward; there must be no more programs than run at once.
    `tickets` (int32) and `boxes` (int64) hold zeros. `num_kv` is at most N.
    """
    TYPE: gl.constexpr = s.dtype
    KV_PLACES: gl.constexpr = 128 // N
    P_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, ROWS], TYPE)
    # An allocation a tensor: Triton puts barriers between what touches the same one.
    s_tiles = gl.allocate_shared_memory(TYPE, [PLACES, ROWS, D], s.layout)
    out_tiles = gl.allocate_shared_memory(TYPE, [PLACES, ROWS, D], s.layout)
    do_tiles = gl.allocate_shared_memory(TYPE, [PLACES, ROWS, D], s.layout)
    k_tiles = gl.allocate_shared_memory(TYPE, [KV_PLACES, N, D], k.layout)
    v_tiles = gl.allocate_shared_memory(TYPE, [KV_PLACES, N, D], v.layout)
    ds_tiles = gl.allocate_shared_memory(TYPE, [1, N, ROWS], P_LAYOUT)
    p_tiles = ds_tiles
    if N == 64:
        p_tiles = gl.allocate_shared_memory(TYPE, [1, N, ROWS], P_LAYOUT)
    news = news_of(_NEWS, 4, 1)
    barriers = (barriers_of(PLACES, 3), barriers_of(PLACES, 1), barriers_of(KV_PLACES, 2), barriers_of(KV_PLACES, 1))
    hopper.fence_async_shared()
    tiles = ((s_tiles, out_tiles, do_tiles), k_tiles, v_tiles, (p_tiles, ds_tiles))
    ticket = gl.atomic_add(tickets, 1)
    team, h = ticket // H, ticket % H
    # Three words a row and share: for the second sums (two) and the first ones.
    BOX: gl.constexpr = TURNS * ROWS * H * GROUPS
    second_box = boxes + team * (3 * BOX)
    gl.warp_specialize(
        [
            (_consume, (ds, dk, dv, ds_pointer, dk_pointer, dv_pointer, norms, num_kv, inner, outer, h,
                        (second_box + 2 * BOX, second_box), tiles, barriers, news, D, H, ACTIVATION, APPROX)),
            (_produce, (s, out, do, k, v, offsets, num_rows, num_examples, num_kv, team, num_teams, h, tiles, barriers,
                        news)),
        ],
        [1], [PRODUCER_REGISTERS],
    )  # fmt: skip
