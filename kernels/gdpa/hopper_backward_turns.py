"""The two groups of four warps of GDPA's backward on Hopper, D = 64 and several key tiles an example.

Each has 64 of a key tile's 128 keys.

A group computes scores transposed, keys by queries, and holds dK and dV of its keys in registers. dS goes through
shared memory to the group whose turn it is: that makes all of a query tile's dQ, and adds what it has kept of it on
chip from the key tiles before. While a group computes the next tile's activations, dP and dQ of this one run. Ptxas
serializes all products if one that runs on into the next tile has a factor in registers, or if the scores are waited
for there and not at the end of this one.

A group announces that it has written a tile's dS. By then it is done with all products of the tile before, so that this
one barrier hands back that tile's queries and the other group's dS of it, too.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gdpa.hopper_backward_groups import (
    _keep_dk_dv,
    _keep_dq,
    _start,
    _wait_for_stores,
    activate_or_bare,
    common_factors,
    take_keys,
)
from kernels.gdpa.hopper_backward_units import M, N, describe, words
from kernels.hopper_ring import store_rows, take

# Of a 64 x 64 tile in shared memory, for a sum that each thread keeps for itself: its 32 numbers are four pieces of 16
# bytes, and a warp's pieces lie side by side.
KEPT_LAYOUT = gl.constexpr(
    gl.SharedLinearLayout(
        [[0, 1], [8, 0], [0, 8], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [0, 16], [0, 32]]
    )
)


@gluon.jit
def _real_queries(x_NM, m, num_q, LAYOUT: gl.constexpr):
    """Zeros past the example's queries, where the copy engine reads the next example: two 16-bit numbers at a time."""
    if m + M > num_q:
        bits_M = gl.where(m + gl.arange(0, M, gl.SliceLayout(0, LAYOUT)) < num_q, -1, 0).to(gl.int16)
        bits_NM = gl.full(x_NM.shape, 0, gl.int16, LAYOUT) | bits_M[None, :]
        x_NM = gl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [x_NM, bits_NM], dtype=x_NM.dtype, is_pure=True, pack=2
        )
    return x_NM


@gluon.jit
def _wait_for_ds(full, t, pred):
    """Wait until a group has written dS of query tile t."""
    SLOTS: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(t % SLOTS), t // SLOTS & 1, pred=pred)


@gluon.jit
def _pass_on_dq(
    dq, base, dq_MD, staged, kept_tiles, first, column, m, num_q, is_first, is_last,
    stride: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add what the key tiles before this one made of a query tile's dQ, and keep the sum for the next one or store it.
    Query tiles for which there is no place are stored by the first key tile, and the others add in the L2 cache."""
    at = m // M
    stays = at < kept_tiles.shape[0]
    if stays:
        kept = kept_tiles.index(at)
        if not is_first:
            dq_MD = dq_MD + kept.load(LAYOUT)
        if not is_last:
            kept.store(dq_MD)
    if is_last | (not stays):
        _keep_dq(dq, base, dq_MD, staged, first, column, m, num_q, (not stays) & (not is_first), stride, LAYOUT)


@gluon.jit
def _make_dq(
    dq, base, staged, kept_tiles, first, column, num_q, is_first, is_last, t, pair, kv_full, kv_empty,
    own_full, other_full, own_done, ds_tiles, k_tiles, ds_factor, stride: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Group 1's part of a key tile of at most 64 keys, which are all group 0's: dQ of all query tiles. Returns the
    number of query tiles so far."""
    PLACES: gl.constexpr = kv_full.shape[0]
    at = pair % PLACES
    mbarrier.wait(kv_full.index(at), pair // PLACES & 1)
    tma.store_wait(0)
    mbarrier.arrive(kv_empty.index((pair + 1) % PLACES), count=1, pred=pair > 0)
    for m in range(0, num_q, M):
        _wait_for_ds(other_full, t, True)
        ds_t = ds_tiles.index(2 * (t % (ds_tiles.shape[0] // 2))).permute((1, 0))
        dq_MD = gl.full([M, k_tiles.shape[2]], 0.0, gl.float32, LAYOUT)
        dq_MD = hopper.warpgroup_mma(ds_t, k_tiles.index(2 * at), dq_MD, use_acc=False, is_async=True)
        dq_MD = hopper.warpgroup_mma_wait(0, deps=[dq_MD])
        mbarrier.arrive(own_full.index(t % own_full.shape[0]), count=1)
        rounded = (dq_MD * ds_factor).to(ds_tiles.dtype)
        _pass_on_dq(dq, base, rounded, staged, kept_tiles, first, column, m, num_q, is_first, is_last, stride, LAYOUT)
        t += 1
    mbarrier.arrive(own_done.index(at), count=1)
    return t


@gluon.jit
def turns_group(
    grads, pointers, num_kv, inner, outer, units, tiles, made, barriers, exchange,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr, GROUP: gl.constexpr,
    JAGGED: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """The keys 64 GROUP to 64 GROUP + 63 of each key tile. P and dS are factors from registers."""
    dq, dk, dv = grads
    dq_pointer, dk_pointer, dv_pointer = pointers
    q_tiles, do_tiles, k_tiles, v_tiles = tiles
    ds_tiles, kept_tiles, dq_tiles = made
    q_full, do_full, _, kv_full, kv_empty = barriers
    own_full, other_full, own_done, other_done = exchange
    SLOTS: gl.constexpr = q_tiles.shape[0]
    SWAPS: gl.constexpr = ds_tiles.shape[0] // 2
    PLACES: gl.constexpr = k_tiles.shape[0] // 2
    D: gl.constexpr = q_tiles.shape[2]
    TYPE: gl.constexpr = q_tiles.dtype
    BARE: gl.constexpr = q_tiles.dtype == gl.bfloat16  # the range of fp16 is small
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    p_factor, ds_factor = common_factors(inner, outer, BARE, ACTIVATION)
    staged = dq_tiles.index(GROUP)
    t = 0  # query tiles so far
    pair = 0  # key tiles so far
    i = 0
    found = take(units, i, words(JAGGED))
    while found[0] >= 0:
        h, first, num_q, kv_first, length, n_first, n_end = describe(found, num_kv, 1)
        column = h * stride_gh
        dq_base = dq_pointer + first.to(gl.int64) * stride_gt + column
        key_base = kv_first.to(gl.int64) * stride_gt + column
        for n in range(n_first, n_end, N):
            if (n > n_first) & (num_q > kept_tiles.shape[0] * M):
                _wait_for_stores()
            own_n = n + GROUP * 64
            is_first, is_last = n == n_first, n + N >= n_end
            half = n + 64 >= length  # group 1 has no keys: it makes dQ, all of it
            works = num_q > 0
            if GROUP == 1:
                works = works & (not half)
                if half & (num_q > 0):
                    t = _make_dq(
                        dq, dq_base, staged, kept_tiles, first, column, num_q, is_first, is_last, t, pair,
                        kv_full, kv_empty, own_full, other_full, own_done, ds_tiles, k_tiles, ds_factor,
                        stride_gt, LAYOUT,
                    )  # fmt: skip
            dk_ND = gl.full([64, D], 0.0, gl.float32, LAYOUT)
            dv_ND = gl.full([64, D], 0.0, gl.float32, LAYOUT)
            if works:
                s_NM = gl.full([64, M], 0.0, gl.float32, LAYOUT)
                dp_NM = gl.full([64, M], 0.0, gl.float32, LAYOUT)
                dq_MD = gl.full([M, D], 0.0, gl.float32, LAYOUT)
                p_a = gl.full([64, M], 0.0, TYPE, A_LAYOUT)
                ds_a = gl.full([64, M], 0.0, TYPE, A_LAYOUT)
                # Through a wait: registers of a product must be written before the first one is in flight.
                dk_ND, dv_ND, s_NM, dp_NM, dq_MD = hopper.warpgroup_mma_wait(0, deps=[dk_ND, dv_ND, s_NM, dp_NM, dq_MD])
                dk_sum, dv_sum = hopper.warpgroup_mma_init(dk_ND), hopper.warpgroup_mma_init(dv_ND)
                at = pair % PLACES
                own_k, own_v = k_tiles.index(2 * at + GROUP), v_tiles.index(2 * at + GROUP)
                take_keys((own_k, own_v), kv_full.index(at), pair // PLACES & 1, own_n, length)
                s = _start(own_k, q_tiles, q_full, t, s_NM, True)
                dp = _start(own_v, do_tiles, do_full, t, dp_NM, True)
                p_before = p_a
                s_NM = hopper.warpgroup_mma_wait(1, deps=[s])
                # Gradients of the key tile before this one have left its place.
                tma.store_wait(0)
                mbarrier.arrive(kv_empty.index((pair + 1) % PLACES), count=1, pred=pair > 0)
                dq_sum = hopper.warpgroup_mma_init(dq_MD)
                for m in range(0, num_q, M):
                    # 0 that changes with m for all the compiler knows: addresses are computed where they are used.
                    zero = (num_q - m) >> 31
                    at = pair % PLACES + zero
                    own_k, own_v = k_tiles.index(2 * at + GROUP), v_tiles.index(2 * at + GROUP)
                    other_k = k_tiles.index(2 * at + 1 - GROUP)
                    q_t, do_t = q_tiles.index(t % SLOTS), do_tiles.index(t % SLOTS)
                    more = m + M < num_q
                    is_turn = (m // M & 1) == GROUP
                    p_NM, slope_NM = activate_or_bare(s_NM, inner, outer, BARE, ACTIVATION, APPROX)
                    p_a = gl.convert_layout(_real_queries(p_NM.to(TYPE), m, num_q, LAYOUT), A_LAYOUT)
                    dp_NM, dk_ND, dv_ND, dq_MD, slope_NM, p_a, p_before, ds_a = hopper.warpgroup_mma_wait(
                        0, deps=[dp, dk_sum, dv_sum, dq_sum, slope_NM, p_a, p_before, ds_a]
                    )
                    dk_sum, dv_sum = hopper.warpgroup_mma_init(dk_ND), hopper.warpgroup_mma_init(dv_ND)
                    ds_NM = _real_queries((slope_NM * dp_NM).to(TYPE), m, num_q, LAYOUT)
                    swap = t % SWAPS
                    own_ds, other_ds = ds_tiles.index(2 * swap + GROUP), ds_tiles.index(2 * swap + 1 - GROUP)
                    # The other group is done with dS of two tiles ago, which was in this place.
                    _wait_for_ds(other_full, t - 1, t > 0)
                    own_ds.store(ds_NM)
                    hopper.fence_async_shared()
                    ds_a = hopper.warpgroup_mma_wait(0, deps=[gl.convert_layout(ds_NM, A_LAYOUT)])
                    dv_sum = hopper.warpgroup_mma(p_a, do_t, dv_sum, is_async=True)
                    dk_sum = hopper.warpgroup_mma(ds_a, q_t, dk_sum, is_async=True)
                    s = _start(own_k, q_tiles, q_full, t + 1, s_NM, more)
                    dp = _start(own_v, do_tiles, do_full, t + 1, dp_NM, more)
                    mbarrier.arrive(own_full.index(t % SLOTS), count=1)
                    if (m > 0) & (not is_turn) & (not half):
                        rounded = (dq_MD * ds_factor).to(TYPE)
                        _pass_on_dq(dq, dq_base, rounded, staged, kept_tiles, first, column, m - M, num_q,
                                    is_first, is_last, stride_gt, LAYOUT)  # fmt: skip
                    dv_ND, dk_ND, s_NM, p_before, ds_a = hopper.warpgroup_mma_wait(
                        1, deps=[dv_sum, dk_sum, s, p_a, ds_a]
                    )
                    dq_sum = hopper.warpgroup_mma_init(dq_MD)
                    if is_turn & (not half):
                        _wait_for_ds(other_full, t, True)
                        dq_sum = hopper.warpgroup_mma(
                            own_ds.permute((1, 0)), own_k, dq_MD, use_acc=False, is_async=True
                        )
                        dq_sum = hopper.warpgroup_mma(other_ds.permute((1, 0)), other_k, dq_sum, is_async=True)
                    dk_sum, dv_sum = hopper.warpgroup_mma_init(dk_ND), hopper.warpgroup_mma_init(dv_ND)
                    t += 1
                # With leftovers of the products past the end.
                dk_ND, dv_ND, dp_NM, dq_MD = hopper.warpgroup_mma_wait(0, deps=[dk_sum, dv_sum, dp, dq_sum])
                mbarrier.arrive(own_done.index(pair % PLACES), count=1)
                m = (num_q - 1) // M * M
                if ((m // M & 1) == GROUP) & (not half):
                    rounded = (dq_MD * ds_factor).to(TYPE)
                    _pass_on_dq(dq, dq_base, rounded, staged, kept_tiles, first, column, m, num_q, is_first, is_last,
                                stride_gt, LAYOUT)  # fmt: skip
                dk_ND = dk_ND * ds_factor
                dv_ND = dv_ND * p_factor
            if (own_n + 64 <= length) & (num_q > 0):
                at = pair % PLACES
                own_k, own_v = k_tiles.index(2 * at + GROUP), v_tiles.index(2 * at + GROUP)
                _keep_dk_dv(dk, dv, dk_ND, dv_ND, own_k, own_v, kv_first, own_n, h, other_done, pair + 1, stride_gh)
            else:
                store_rows(dk_pointer + key_base, dk_ND, own_n, length, stride_gt, LAYOUT)
                store_rows(dv_pointer + key_base, dv_ND, own_n, length, stride_gt, LAYOUT)
            if num_q > 0:
                pair += 1
        # Without keys there is no gradient: tiles in turns.
        for m in range(GROUP * M, gl.where(length > 0, 0, num_q), 2 * M):
            store_rows(dq_base, gl.full([M, D], 0.0, gl.float32, LAYOUT), m, num_q, stride_gt, LAYOUT)
        i += 1
        found = take(units, i, words(JAGGED))
    tma.store_wait(0)
