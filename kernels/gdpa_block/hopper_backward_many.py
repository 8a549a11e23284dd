"""Eight warps of the GDPA block's backward (`kernels/gdpa_block/hopper_backward.py`) for 65 to 128 keys, in Gluon.

Each group has half of a head's columns of query tiles and of dQ, and 64 of the keys in scores (transposed), dK and
dV; P is in registers, dS in shared memory for both. A query tile's place holds S, out and do; there q follows S, dg
follows out and is followed by dq, dS follows do. Sums are posted long before they are read: the next tile's first
ones while the scores of this one are on their way, and the tile before is finished while dV, dQ and dK are.

Shape letters: M = 64 rows of a query tile, N = 128 keys, D = 128 head width, H heads, W = H D.
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
from kernels.gdpa_block.hopper_mailbox import (
    GROUPS,
    ask,
    ask_pair,
    post,
    post_pair,
    read_asked,
    read_pair_asked,
    sums_by_group,
)
from kernels.hopper_ring import ROWS, all_warps


@gluon.jit
def _unit(out_MD, s_MD):
    """out - S in bf16, two numbers an instruction."""
    unit_MD = gl.inline_asm_elementwise(
        "sub.rn.bf16x2 $0, $1, $2;", "=r,r,r", [out_MD, s_MD], dtype=gl.bfloat16, is_pure=True, pack=2
    )
    return unit_MD.to(gl.float32)


@gluon.jit
def _open(norms, box, zero, h, turn, row, left, tile, x_tiles, full, H: gl.constexpr, LAYOUT: gl.constexpr):
    """Post this program's shares of a tile's sum(do unit).

    Returns mean, rstd and rms of each row: zeros past the example's end.
    """
    s_tiles, out_tiles, do_tiles = x_tiles
    PLACES: gl.constexpr = full.shape[0]
    mean_M, rstd_M, rms_M = norms_of(norms, row, left, gl.SliceLayout(1, LAYOUT))
    place = tile % PLACES
    mbarrier.wait(full.index(place), tile // PLACES & 1)
    unit_MD = _unit(out_tiles.index(place).load(LAYOUT), s_tiles.index(place).load(LAYOUT))
    post(box, zero, h, turn, sums_by_group(do_tiles.index(place).load(LAYOUT).to(gl.float32) * unit_MD), H)
    return mean_M, rstd_M, rms_M


@gluon.jit
def _transform(s_tile, out_tile, do_tile, mean_M, rstd_M, rms_M, along_M, left, LAYOUT: gl.constexpr):
    """q in the place of S and dg in that of out."""
    shift_M, both_M = mean_M * rstd_M, rms_M * along_M
    s_MD = s_tile.load(LAYOUT)
    unit_MD = _unit(out_tile.load(LAYOUT), s_MD)
    q_MD = (s_MD.to(gl.float32) * rstd_M[:, None] - shift_M[:, None]).to(s_tile.dtype)
    dg_MD = do_tile.load(LAYOUT).to(gl.float32) * rms_M[:, None] - unit_MD * both_M[:, None]
    s_tile.store(q_MD)
    out_tile.store(dg_MD.to(s_tile.dtype))
    if left < ROWS:  # past the example's end, where the copy engine reads the next one
        zero_rows(s_tile, 0, left)
        zero_rows(out_tile, 0, left)
    hopper.fence_async_shared()
    all_warps()


@gluon.jit
def _close(
    ds, pointer, asked, box, zero, turn, q_tile, dq_tile, do_tile, rstd_M, row, left, column,
    H: gl.constexpr, W: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """dS in the place of do, and stored, once the sums of dq and dq q are there."""
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    sum_MH, along_MH = read_pair_asked(asked, box, zero, turn, H)
    shift_M = rstd_M * gl.convert_layout(gl.sum(sum_MH, 1) * (1.0 / W), ROW)
    slant_M = rstd_M * gl.convert_layout(gl.sum(along_MH, 1) * (1.0 / W), ROW)
    ds_MD = do_tile.load(LAYOUT).to(gl.float32) - q_tile.load(LAYOUT).to(gl.float32) * slant_M[:, None]
    ds_MD += dq_tile.load(LAYOUT).to(gl.float32) * rstd_M[:, None] - shift_M[:, None]
    do_tile.store(ds_MD.to(do_tile.dtype))
    hopper.fence_async_shared()
    put_out(ds, pointer, do_tile, row, left, column, W)


@gluon.jit
def consume_many_keys(
    grads, norms, num_kv, inner, outer, h, boxes, tiles, barriers, news,
    D: gl.constexpr, H: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """Two groups of four warps, each with its columns of all query tiles."""
    ds, dk, dv, ds_pointer, dk_pointer, dv_pointer = grads
    x_tiles, k_tiles, v_tiles, scores = tiles
    full, empty, kv_full, kv_empty = barriers
    first_box, second_box = boxes
    s_tiles, out_tiles, do_tiles = x_tiles
    _, ds_tiles = scores
    PLACES: gl.constexpr = full.shape[0]
    N: gl.constexpr = k_tiles.shape[1]
    TYPE: gl.constexpr = k_tiles.dtype
    W: gl.constexpr = H * D
    SHARES: gl.constexpr = H * GROUPS  # of a row's sums
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, D // GROUPS, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUPS, 1], [16, D, 16])
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUPS, 1], [16, ROWS, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    p_factor, ds_factor = common_factors(inner, outer, True, ACTIVATION)
    column = h * D
    turn = 0  # query tiles so far
    items = 0  # examples so far
    is_first = True
    place_before, row_before, left_before = 0, 0, 0
    b, row, left, tile, told = next_tile(dk_pointer, dv_pointer, num_kv, column, 0, news, N, D, W)
    mean_M = gl.full([ROWS], 0.0, gl.float32, ROW)
    rstd_M, rms_M, rstd_before_M = mean_M, mean_M, mean_M
    dk_ND = gl.full([N, D], 0.0, gl.float32, G_LAYOUT)
    dv_ND = gl.full([N, D], 0.0, gl.float32, G_LAYOUT)
    if b >= 0:
        mean_M, rstd_M, rms_M = _open(norms, first_box, row >> 31, h, 0, row, left, tile, x_tiles, full, SHARES, LAYOUT)
    asked_MH = ask(first_box, row >> 31, 0, SHARES)
    while b >= 0:
        # 0 that changes with the row for all the compiler knows: addresses are computed where they are used.
        zero = row >> 31
        place = tile % PLACES + zero
        k_tile, v_tile, ds_tile = k_tiles.index(zero), v_tiles.index(zero), ds_tiles.index(zero)
        q_tile, dg_tile = s_tiles.index(place), out_tiles.index(place)
        along_M = gl.convert_layout(gl.sum(read_asked(asked_MH, first_box, zero, turn, SHARES), 1) * (1.0 / W), ROW)
        if is_first:
            mbarrier.wait(kv_full.index(0), items & 1)
            if num_kv < N:
                zero_rows(k_tile, zero, num_kv)
                zero_rows(v_tile, zero, num_kv)
        _transform(q_tile, dg_tile, do_tiles.index(place), mean_M, rstd_M, rms_M, along_M, left, LAYOUT)
        s_NM = gl.full([N, ROWS], 0.0, gl.float32, S_LAYOUT)
        dp_NM = gl.full([N, ROWS], 0.0, gl.float32, S_LAYOUT)
        # Through a wait: registers of a product must be written before the first one is in flight.
        s_NM, dp_NM, dk_ND, dv_ND = hopper.warpgroup_mma_wait(0, deps=[s_NM, dp_NM, dk_ND, dv_ND])
        s = hopper.warpgroup_mma(k_tile, q_tile.permute((1, 0)), s_NM, use_acc=False, is_async=True)
        dp = hopper.warpgroup_mma(v_tile, dg_tile.permute((1, 0)), dp_NM, use_acc=False, is_async=True)
        b_after, row_after, left_after, tile_after, told = next_tile(
            dk_pointer, dv_pointer, num_kv, column, told, news, N, D, W
        )
        rstd_now_M = rstd_M
        if b_after >= 0:
            mean_M, rstd_M, rms_M = _open(
                norms, first_box, row_after >> 31, h, turn + 1, row_after, left_after, tile_after, x_tiles, full,
                SHARES, LAYOUT,
            )  # fmt: skip
        s_NM = hopper.warpgroup_mma_wait(1, deps=[s])
        p_NM, slope_NM = activate_or_bare(s_NM, inner, outer, True, ACTIVATION, APPROX)
        p = gl.convert_layout(p_NM.to(TYPE), gl.DotOperandLayout(0, G_LAYOUT, 2))
        dp_NM, slope_NM = hopper.warpgroup_mma_wait(0, deps=[dp, slope_NM])
        ds_tile.store((slope_NM * dp_NM).to(TYPE))
        asked = ask_pair(second_box, zero, turn - 1, SHARES)
        hopper.fence_async_shared()
        all_warps()
        dq_MD = gl.full([ROWS, D], 0.0, gl.float32, LAYOUT)
        dq_MD, dk_ND, dv_ND = hopper.warpgroup_mma_wait(0, deps=[dq_MD, dk_ND, dv_ND])
        dv_sum = hopper.warpgroup_mma(p, dg_tile, dv_ND, use_acc=not is_first, is_async=True)
        dq_sum = hopper.warpgroup_mma(ds_tile.permute((1, 0)), k_tile, dq_MD, use_acc=False, is_async=True)
        dk_sum = hopper.warpgroup_mma(ds_tile, q_tile, dk_ND, use_acc=not is_first, is_async=True)
        if turn > 0:
            _close(
                ds, ds_pointer, asked, second_box, zero, turn - 1,
                s_tiles.index(place_before), out_tiles.index(place_before), do_tiles.index(place_before),
                rstd_before_M, row_before, left_before, column, SHARES, W, LAYOUT,
            )  # fmt: skip
        dv_ND, dq_MD = hopper.warpgroup_mma_wait(1, deps=[dv_sum, dq_sum])
        all_warps()  # done with dg
        dq_MD = dq_MD * ds_factor + dg_tile.load(LAYOUT).to(gl.float32)
        dg_tile.store(dq_MD.to(TYPE))
        along_MG = sums_by_group(dq_MD * q_tile.load(LAYOUT).to(gl.float32))
        post_pair(second_box, zero, h, turn, sums_by_group(dq_MD), along_MG, SHARES)
        asked_MH = ask(first_box, zero, turn + 1, SHARES)
        dk_ND = hopper.warpgroup_mma_wait(0, deps=[dk_sum])
        is_last = left <= ROWS
        if is_last:
            all_warps()  # done with keys and values
            v_tile.store((dv_ND * p_factor).to(TYPE))
            k_tile.store((dk_ND * ds_factor).to(TYPE))
            hopper.fence_async_shared()
            put_out(dv, dv_pointer, v_tile, b * num_kv, num_kv, column, W)
            put_out(dk, dk_pointer, k_tile, b * num_kv, num_kv, column, W)
        # What is stored has left its place.
        tma.store_wait(0)
        all_warps()
        mbarrier.arrive(empty.index(place_before), count=1, pred=turn > 0)
        mbarrier.arrive(kv_empty.index(0), count=1, pred=is_last)
        items += is_last.to(gl.int32)
        row_before, left_before, place_before, rstd_before_M = row, left, place, rstd_now_M
        b, row, left, tile = b_after, row_after, left_after, tile_after
        is_first = is_last
        turn += 1
    if turn > 0:
        _close(
            ds, ds_pointer, ask_pair(second_box, row_before >> 31, turn - 1, SHARES), second_box,
            row_before >> 31, turn - 1,
            s_tiles.index(place_before), out_tiles.index(place_before), do_tiles.index(place_before),
            rstd_before_M, row_before, left_before, column, SHARES, W, LAYOUT,
        )  # fmt: skip
    tma.store_wait(0)
