"""Eight warps of the GDPA block's backward (`kernels/gdpa_block/hopper_backward.py`) for at most 64 keys, in Gluon.

Each group has half of a head's columns of query tiles and of dQ, dK and dV, and half of the queries of the scores,
which are transposed; P and dS are in shared memory for both. With two warps a scheduler, the fewest instructions win:
rows are worked on as pairs of bf16 (`hopper_pairs.py`). A query tile's place holds S, out and do. When a tile is
opened, q follows S, and unit follows out; unit is followed by dg, with which dQ's sum starts. Registers keep what
closing the tile takes, q and rstd dq + do, so that the place is free a turn early; dS leaves through the next tile's
place of do. Sums are posted long before they are read: the next tile is opened while the scores of this one are on
their way, and the tile before is closed while dQ, dV and dK are.

Shape letters: M = 64 rows of a query tile, N = 64 keys, D = 128 head width, C = 64 pairs of columns, H heads, W = H
D.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gdpa.hopper_backward_groups import activate_or_bare, common_factors, zero_rows
from kernels.gdpa_block.hopper_backward_tiles import next_tile, norms_of, put_out
from kernels.gdpa_block.hopper_mailbox import GROUPS, ask, ask_pair, own_place, read_asked, read_pair_asked
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
from kernels.hopper_ring import ROWS, all_warps


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
    return dg_MC, do_MC


@gluon.jit
def _close(
    ds, pointer, asked, box, zero, turn, sum_MC, q_MC, do_tiles, place, rstd_M, row, left, column,
    H: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """dS in a place of do, and stored, once the sums of dq and dq q are there. sum_MC: rstd dq + do."""
    sum_MH, along_MH = read_pair_asked(asked, box, zero, turn, H)
    shift_M = rstd_M * gl.convert_layout(gl.sum(sum_MH, 1) * (-1.0 / W), PAIR_ROW)
    slant_M = rstd_M * gl.convert_layout(gl.sum(along_MH, 1) * (-1.0 / W), PAIR_ROW)
    do_tile = as_pairs(do_tiles).index(place)
    rest_MC = fused(q_MC, both(slant_M, slant_M)[:, None], both(shift_M, shift_M)[:, None])
    do_tile.store(add_pairs(sum_MC, rest_MC))
    hopper.fence_async_shared()
    put_out(ds, pointer, do_tiles.index(place), row, left, column, W)


@gluon.jit
def consume_few_keys(
    grads, norms, num_kv, inner, outer, h, boxes, tiles, barriers, news,
    D: gl.constexpr, H: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """Two groups of four warps, each with its columns of all query tiles."""
    ds, dk, dv, ds_pointer, dk_pointer, dv_pointer = grads
    x_tiles, k_tiles, v_tiles, scores = tiles
    full, empty, kv_full, kv_empty = barriers
    first_box, second_box = boxes
    s_tiles, out_tiles, do_tiles = x_tiles
    p_tiles, ds_tiles = scores
    PLACES: gl.constexpr = full.shape[0]
    KV_PLACES: gl.constexpr = kv_full.shape[0]
    N: gl.constexpr = k_tiles.shape[1]
    TYPE: gl.constexpr = k_tiles.dtype
    W: gl.constexpr = H * D
    SHARES: gl.constexpr = H * GROUPS  # of a row's sums
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, D // GROUPS, 16])
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, ROWS // GROUPS, 16])
    p_factor, ds_factor = common_factors(inner, outer, True, ACTIVATION)
    column = h * D
    turn = 0  # query tiles so far
    items = 0  # examples so far
    is_first = True
    place_before, row_before, left_before = 0, 0, 0
    b, row, left, tile, told = next_tile(dk_pointer, dv_pointer, num_kv, column, 0, news, N, D, W)
    dk_ND = gl.full([N, D], 0.0, gl.float32, LAYOUT)
    dv_ND = gl.full([N, D], 0.0, gl.float32, LAYOUT)
    mean_M, rstd_M, rms_M = norms_of(norms, row, left, PAIR_ROW)
    # Not rstd_M: a loop carries the names that its body gives another value than they came with, and this one's would
    # be the one it came with.
    rstd_before_M = gl.full([ROWS], 0.0, gl.float32, PAIR_ROW)
    if b >= 0:
        _open(_words(first_box, row >> 31, h, 0, SHARES, 1), mean_M, rstd_M, tile, x_tiles, full)
    asked_MH = ask(first_box, row >> 31, 0, SHARES)
    sum_MC = gl.full([ROWS, D // 2], 0, gl.int32, PAIRS)
    q_MC = gl.full([ROWS, D // 2], 0, gl.int32, PAIRS)
    while b >= 0:
        # 0 that changes with the row for all the compiler knows: addresses are computed where they are used.
        zero = row >> 31
        place = tile % PLACES + zero
        at = items % KV_PLACES + zero
        k_tile, v_tile = k_tiles.index(at), v_tiles.index(at)
        p_tile, ds_tile = p_tiles.index(zero), ds_tiles.index(zero)
        q_tile, dg_tile = s_tiles.index(place), out_tiles.index(place)
        do_tile = as_pairs(do_tiles).index(place)
        b_after, row_after, left_after, tile_after, told = next_tile(
            dk_pointer, dv_pointer, num_kv, column, told, news, N, D, W
        )
        mean_M, rstd_after_M, rms_after_M = norms_of(norms, row_after, left_after, PAIR_ROW)
        if is_first:
            mbarrier.wait(kv_full.index(at), items // KV_PLACES & 1)
            if num_kv < N:
                zero_rows(k_tile, zero, num_kv)
                zero_rows(v_tile, zero, num_kv)
        along_M = gl.sum(read_asked(asked_MH, first_box, zero, turn, SHARES), 1) * (1.0 / W)
        dg_MC, do_MC = _transform(
            as_pairs(out_tiles).index(place), do_tile, rms_M, gl.convert_layout(along_M, PAIR_ROW)
        )
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
        asked = ask_pair(second_box, zero, turn - 1, SHARES)
        s_NM = hopper.warpgroup_mma_wait(1, deps=[s])
        p_NM, slope_NM = activate_or_bare(s_NM, inner, outer, True, ACTIVATION, APPROX)
        p_tile.store(p_NM.to(TYPE))
        slope_NM = slope_NM * ds_factor
        dp_NM, slope_NM = hopper.warpgroup_mma_wait(0, deps=[dp, slope_NM])
        ds_tile.store((slope_NM * dp_NM).to(TYPE))
        hopper.fence_async_shared()
        all_warps()
        dq_MD = whole(low_of(dg_MC), high_of(dg_MC), LAYOUT)
        dq_MD, dk_ND, dv_ND = hopper.warpgroup_mma_wait(0, deps=[dq_MD, dk_ND, dv_ND])
        dq_sum = hopper.warpgroup_mma(ds_tile.permute((1, 0)), k_tile, dq_MD, is_async=True)
        dv_sum = hopper.warpgroup_mma(p_tile, dg_tile, dv_ND, use_acc=not is_first, is_async=True)
        dk_sum = hopper.warpgroup_mma(ds_tile, q_tile, dk_ND, use_acc=not is_first, is_async=True)
        if turn > 0:
            _close(
                ds, ds_pointer, asked, second_box, zero, turn - 1, sum_MC, q_MC, do_tiles, place,
                rstd_before_M, row_before, left_before, column, SHARES, W,
            )  # fmt: skip
        low_MC, high_MC = halves(hopper.warpgroup_mma_wait(2, deps=[dq_sum]))
        place_M, turn_M = _words(second_box, zero, h, turn, SHARES, 2)
        q_MC = as_pairs(s_tiles).index(place).load(PAIRS)
        post_sums(place_M, turn_M, both(low_MC, high_MC), q_MC, 2)
        sum_MC = scaled_sum(low_MC, high_MC, rstd_M[:, None], do_MC)
        asked_MH = ask(first_box, zero, turn + 1, SHARES)
        is_last = left <= ROWS
        dv_ND, dk_ND = hopper.warpgroup_mma_wait(0, deps=[dv_sum, dk_sum])
        # All is done with this tile; and what was stored, dK and dV of the example before too, has left its place.
        tma.store_wait(0)
        all_warps()
        mbarrier.arrive(empty.index(place), count=1)
        mbarrier.arrive(kv_empty.index((at + 1) % KV_PLACES), count=1, pred=is_first & (turn > 0))
        if is_last:
            v_tile.store((dv_ND * p_factor).to(TYPE))
            k_tile.store(dk_ND.to(TYPE))
            hopper.fence_async_shared()
            put_out(dv, dv_pointer, v_tile, b * num_kv, num_kv, column, W)
            put_out(dk, dk_pointer, k_tile, b * num_kv, num_kv, column, W)
        items += is_last.to(gl.int32)
        row_before, left_before, place_before, rstd_before_M = row, left, place, rstd_M
        b, row, left, tile, rstd_M, rms_M = b_after, row_after, left_after, tile_after, rstd_after_M, rms_after_M
        is_first = is_last
        turn += 1
    if turn > 0:
        zero = row_before >> 31
        asked = ask_pair(second_box, zero, turn - 1, SHARES)
        _close(
            ds, ds_pointer, asked, second_box, zero, turn - 1, sum_MC, q_MC, do_tiles, place_before,
            rstd_before_M, row_before, left_before, column, SHARES, W,
        )  # fmt: skip
    tma.store_wait(0)
