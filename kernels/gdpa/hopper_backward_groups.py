"""The two groups of four warps of GDPA's backward on Hopper, each with 64 of a tile's keys: dK, dV and half of dQ.

A group computes scores transposed, keys by queries, and holds dK and dV of its keys in registers. The groups exchange
dS through shared memory. While a group computes the next tile's activations, products of this one run: at D = 64 dP and
dQ, at D = 128, where these two share registers, dK and dQ. Ptxas serializes all products if one that runs on into the
next tile has a factor in registers, or if the scores are waited for there and not at the end of this one.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gdpa.hopper_backward_units import M, N, describe, query_tile, words
from kernels.gdpa.triton_activations import activate_with_slope, bare_with_slope, slope_factors
from kernels.hopper_ring import add, all_warps, store, store_rows, take


@gluon.jit
def activate_or_bare(s_NM, inner, outer, BARE: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr):
    """P and the activation's slope. BARE: without the factors that all have in common."""
    if BARE:
        p_NM, slope_NM = bare_with_slope(s_NM, inner, outer, ACTIVATION, APPROX)
    else:
        p_NM, slope_NM = activate_with_slope(s_NM, inner, outer, ACTIVATION, APPROX)
    if ACTIVATION == "identity":
        slope_NM = gl.full(s_NM.shape, 0.0, gl.float32, s_NM.type.layout) + slope_NM
    return p_NM, slope_NM


@gluon.jit
def common_factors(inner, outer, BARE: gl.constexpr, ACTIVATION: gl.constexpr):
    """Of dV, and of dK and dQ."""
    if BARE:
        return slope_factors(inner, outer, ACTIVATION)
    else:
        return inner * 0.0 + 1.0, inner * 0.0 + 1.0


@gluon.jit
def _start(own, tiles, full, t, before, exists):
    """Start this group's keys (values) times query tile (dO tile) t. `before` lends its registers."""
    SLOTS: gl.constexpr = tiles.shape[0]
    mbarrier.wait(full.index(t % SLOTS), t // SLOTS & 1, pred=exists)
    x = tiles.index(t % SLOTS).permute((1, 0))
    return hopper.warpgroup_mma(own, x, before, use_acc=False, is_async=True)


@gluon.jit
def _real_queries(x_NM, m, num_q, LAYOUT: gl.constexpr):
    """Zeros past the example's queries, where the copy engine reads the next example."""
    if m + M > num_q:
        x_NM = gl.where((m + gl.arange(0, M, gl.SliceLayout(0, LAYOUT)) < num_q)[None, :], x_NM, 0.0)
    return x_NM


@gluon.jit
def zero_rows(tile, n, length):
    """Zeros past the example's keys: their rows need no masks then but at the stores."""
    D: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    row_N = n + gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT))
    tile.store(gl.where((row_N < length)[:, None], tile.load(LAYOUT), 0.0))


@gluon.jit
def take_keys(own, full, phase, own_n, length):
    """Wait for tiles of this group's keys or values."""
    mbarrier.wait(full, phase)
    if own_n + 64 > length:
        for i in gl.static_range(len(own)):
            zero_rows(own[i], own_n, length)
        hopper.fence_async_shared()
        all_warps()


@gluon.jit
def _wait_for_stores():
    """All that this thread stored, through the copy engine or not, comes before what the copy engine does next."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _keep_dq(dq, base, dq_MD, staged, first, column, m, num_q, adds, stride: gl.constexpr, LAYOUT: gl.constexpr):
    """Store this group's half of a tile of dQ, or add it to what the key tile before it left."""
    if (m + M <= num_q) | adds:
        if m + M > num_q:
            row_M = m + gl.arange(0, M, gl.SliceLayout(1, LAYOUT))
            # In the next example, which others may be storing: adding -0 leaves any number as it is.
            dq_MD = gl.where((row_M < num_q)[:, None], dq_MD, -0.0)
        tma.store_wait(0)
        staged.store(dq_MD)
        hopper.fence_async_shared()
        if adds:
            add(dq, [first + m, column], staged)
        else:
            store(dq, [first + m, column], staged)
    else:
        store_rows(base, dq_MD, m, num_q, stride, LAYOUT)


@gluon.jit
def _keep_whole(x, x_ND, place, row, column):
    """Store a whole tile through a place in shared memory."""
    place.store(x_ND.to(place.dtype))
    hopper.fence_async_shared()
    store(x, [row, column], place)


@gluon.jit
def _keep_dk_dv(dk, dv, dk_ND, dv_ND, own_k, own_v, kv_first, n, h, own_free, t, stride: gl.constexpr):
    """Store whole tiles through the places of this group's keys and values, once the other group is done with the keys
    after all query tiles before t."""
    SWAPS: gl.constexpr = own_free.shape[0]
    _keep_whole(dv, dv_ND, own_v, kv_first + n, h * stride)
    mbarrier.wait(own_free.index((t - 1) % SWAPS), (t - 1) // SWAPS & 1)
    _keep_whole(dk, dk_ND, own_k, kv_first + n, h * stride)


@gluon.jit
def narrow_group(
    grads, pointers, num_kv, inner, outer, units, tiles, made, barriers, exchange,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr, GROUP: gl.constexpr,
    JAGGED: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """D = 64: the keys 64 GROUP to 64 GROUP + 63 of each key tile. P and dS are factors from registers."""
    dq, dk, dv = grads
    dq_pointer, dk_pointer, dv_pointer = pointers
    q_tiles, do_tiles, k_tiles, v_tiles = tiles
    ds_tiles, _, dq_tiles = made
    q_full, do_full, empty, kv_full, kv_empty = barriers
    own_full, other_full, own_free, other_free = exchange
    SLOTS: gl.constexpr = q_tiles.shape[0]
    SWAPS: gl.constexpr = own_full.shape[0]
    PLACES: gl.constexpr = k_tiles.shape[0] // 2
    D: gl.constexpr = q_tiles.shape[2]
    HALF: gl.constexpr = D // 2
    TYPE: gl.constexpr = q_tiles.dtype
    BARE: gl.constexpr = q_tiles.dtype == gl.bfloat16  # the range of fp16 is small
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, G_LAYOUT, 2)
    p_factor, ds_factor = common_factors(inner, outer, BARE, ACTIVATION)
    staged = dq_tiles.index(GROUP)
    t = 0
    pair = 0
    i = 0
    found = take(units, i, words(JAGGED))
    while found[0] >= 0:
        h, first, num_q, kv_first, length, n_first, n_end = describe(found, num_kv, 1)
        dq_base = dq_pointer + first.to(gl.int64) * stride_gt + h * stride_gh + GROUP * HALF
        column = h * stride_gh + GROUP * HALF
        key_base = kv_first.to(gl.int64) * stride_gt + h * stride_gh
        for n in range(n_first, n_end, N):
            if n > n_first:
                _wait_for_stores()
            own_n = n + GROUP * 64
            adds = n > 0
            dk_ND = gl.full([64, D], 0.0, gl.float32, G_LAYOUT)
            dv_ND = gl.full([64, D], 0.0, gl.float32, G_LAYOUT)
            if num_q > 0:
                s_NM = gl.full([64, M], 0.0, gl.float32, S_LAYOUT)
                dp_NM = gl.full([64, M], 0.0, gl.float32, S_LAYOUT)
                dq_MD = gl.full([M, HALF], 0.0, gl.float32, Q_LAYOUT)
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
                dq_sum = hopper.warpgroup_mma_init(dq_MD)
                for m in range(0, num_q, M):
                    # 0 that changes with m for all the compiler knows: addresses are computed where they are used.
                    zero = (num_q - m) >> 31
                    at = pair % PLACES + zero
                    own_k, own_v = k_tiles.index(2 * at + GROUP), v_tiles.index(2 * at + GROUP)
                    other_k = k_tiles.index(2 * at + 1 - GROUP)
                    q_t, do_t = q_tiles.index(t % SLOTS), do_tiles.index(t % SLOTS)
                    more = m + M < num_q
                    swap, phase = t % SWAPS, t // SWAPS & 1
                    p_NM, slope_NM = activate_or_bare(s_NM, inner, outer, BARE, ACTIVATION, APPROX)
                    p_a = gl.convert_layout(_real_queries(p_NM.to(TYPE), m, num_q, S_LAYOUT), A_LAYOUT)
                    dp_NM, dk_ND, dv_ND, dq_MD, slope_NM, p_a, p_before, ds_a = hopper.warpgroup_mma_wait(
                        0, deps=[dp, dk_sum, dv_sum, dq_sum, slope_NM, p_a, p_before, ds_a]
                    )
                    dk_sum, dv_sum = hopper.warpgroup_mma_init(dk_ND), hopper.warpgroup_mma_init(dv_ND)
                    mbarrier.arrive(empty.index((t + SLOTS - 1) % SLOTS), count=1, pred=m > 0)
                    mbarrier.arrive(other_free.index((t + 1) % SWAPS), count=1, pred=m > 0)
                    ds_NM = _real_queries((slope_NM * dp_NM).to(TYPE), m, num_q, S_LAYOUT)
                    own_ds, other_ds = ds_tiles.index(2 * swap + GROUP), ds_tiles.index(2 * swap + 1 - GROUP)
                    mbarrier.wait(own_free.index(swap), phase ^ 1)
                    own_ds.store(ds_NM)
                    hopper.fence_async_shared()
                    mbarrier.arrive(own_full.index(swap), count=1)
                    # Before its registers are another tile's.
                    rounded = hopper.warpgroup_mma_wait(0, deps=[(dq_MD * ds_factor).to(TYPE)])
                    ds_a = hopper.warpgroup_mma_wait(0, deps=[gl.convert_layout(ds_NM, A_LAYOUT)])
                    dv_sum = hopper.warpgroup_mma(p_a, do_t, dv_sum, is_async=True)
                    dk_sum = hopper.warpgroup_mma(ds_a, q_t, dk_sum, is_async=True)
                    s = _start(own_k, q_tiles, q_full, t + 1, s_NM, more)
                    dp = _start(own_v, do_tiles, do_full, t + 1, dp_NM, more)
                    k_half = own_k.slice(GROUP * HALF, HALF, 1)
                    dq_sum = hopper.warpgroup_mma(own_ds.permute((1, 0)), k_half, dq_MD, use_acc=False, is_async=True)
                    if m > 0:
                        _keep_dq(dq, dq_base, rounded, staged, first, column, m - M, num_q, adds, stride_gt, Q_LAYOUT)
                    else:
                        # Gradients of the key tile before this one have left its place.
                        tma.store_wait(0)
                        mbarrier.arrive(kv_empty.index((pair + 1) % PLACES), count=1, pred=pair > 0)
                    mbarrier.wait(other_full.index(swap), phase)
                    k_half = other_k.slice(GROUP * HALF, HALF, 1)
                    dq_sum = hopper.warpgroup_mma(other_ds.permute((1, 0)), k_half, dq_sum, is_async=True)
                    dv_ND, dk_ND, s_NM, p_before, ds_a = hopper.warpgroup_mma_wait(
                        3, deps=[dv_sum, dk_sum, s, p_a, ds_a]
                    )
                    dk_sum, dv_sum = hopper.warpgroup_mma_init(dk_ND), hopper.warpgroup_mma_init(dv_ND)
                    t += 1
                # With leftovers of the products past the end.
                dk_ND, dv_ND, dp_NM, dq_MD = hopper.warpgroup_mma_wait(0, deps=[dk_sum, dv_sum, dp, dq_sum])
                mbarrier.arrive(empty.index((t + SLOTS - 1) % SLOTS), count=1)
                mbarrier.arrive(other_free.index((t + 1) % SWAPS), count=1)
                m = (num_q - 1) // M * M
                rounded = (dq_MD * ds_factor).to(TYPE)
                _keep_dq(dq, dq_base, rounded, staged, first, column, m, num_q, adds, stride_gt, Q_LAYOUT)
                dk_ND = dk_ND * ds_factor
                dv_ND = dv_ND * p_factor
            if (own_n + 64 <= length) & (num_q > 0):
                at = pair % PLACES
                own_k, own_v = k_tiles.index(2 * at + GROUP), v_tiles.index(2 * at + GROUP)
                _keep_dk_dv(dk, dv, dk_ND, dv_ND, own_k, own_v, kv_first, own_n, h, own_free, t, stride_gh)
            else:
                store_rows(dk_pointer + key_base, dk_ND, own_n, length, stride_gt, G_LAYOUT)
                store_rows(dv_pointer + key_base, dv_ND, own_n, length, stride_gt, G_LAYOUT)
            if num_q > 0:
                pair += 1
        for m in range(0, gl.where(length > 0, 0, num_q), M):
            store_rows(dq_base, gl.full([M, HALF], 0.0, gl.float32, Q_LAYOUT), m, num_q, stride_gt, Q_LAYOUT)
        i += 1
        found = take(units, i, words(JAGGED))
    tma.store_wait(0)


@gluon.jit
def wide_group(
    grads, pointers, num_kv, inner, outer, units, tiles, made, barriers, exchange,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr, GROUP: gl.constexpr,
    PARTS: gl.constexpr, JAGGED: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """D = 128: as `narrow_group`, but P and dS are factors from shared memory, and there is one key tile on chip.

    `made` are four places for each group: two for dS, through which dK is stored too, and one for P and one for dQ,
    through which dV is. So the next keys and values can come in meanwhile: the keys to the place of the values, which
    is free earlier, and the values to that of the keys.
    """
    dq, dk, dv = grads
    dq_pointer, dk_pointer, dv_pointer = pointers
    q_tiles, do_tiles, k_tiles, _ = tiles
    q_full, do_full, empty, kv_full, _ = barriers
    own_full, other_full, own_free, other_free = exchange
    SLOTS: gl.constexpr = q_tiles.shape[0]
    SWAPS: gl.constexpr = own_full.shape[0]
    D: gl.constexpr = q_tiles.shape[2]
    HALF: gl.constexpr = D // 2
    TYPE: gl.constexpr = q_tiles.dtype
    BARE: gl.constexpr = q_tiles.dtype == gl.bfloat16
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    Q_LAYOUT: gl.constexpr = S_LAYOUT
    p_factor, ds_factor = common_factors(inner, outer, BARE, ACTIVATION)
    gl.static_assert(SWAPS == 2 and SLOTS <= SWAPS + 1)
    OWN: gl.constexpr = 4 * GROUP
    OTHER: gl.constexpr = 4 - OWN
    staged = made.index(OWN + 3)
    ways_out = made._reinterpret(TYPE, [4, 64, D], k_tiles.type.layout)
    t = 0
    pair = 0
    i = 0
    found = take(units, i, words(JAGGED))
    while found[0] >= 0:
        h, first, num_q, kv_first, length, n_first, n_end = describe(found, num_kv, PARTS)
        dq_base = dq_pointer + first.to(gl.int64) * stride_gt + h * stride_gh + GROUP * HALF
        column = h * stride_gh + GROUP * HALF
        key_base = kv_first.to(gl.int64) * stride_gt + h * stride_gh
        for n in range(n_first, n_end, N):
            own_n = n + GROUP * 64
            adds = n > (-1 if PARTS > 1 else 0)
            dk_ND = gl.full([64, D], 0.0, gl.float32, G_LAYOUT)
            dv_ND = gl.full([64, D], 0.0, gl.float32, G_LAYOUT)
            if num_q > 0:
                s_NM = gl.full([64, M], 0.0, gl.float32, S_LAYOUT)
                dq_MD = gl.full([M, HALF], 0.0, gl.float32, Q_LAYOUT)
                dk_ND, dv_ND, s_NM, dq_MD = hopper.warpgroup_mma_wait(0, deps=[dk_ND, dv_ND, s_NM, dq_MD])
                dk_sum, dv_sum = hopper.warpgroup_mma_init(dk_ND), hopper.warpgroup_mma_init(dv_ND)
                at = pair % 2
                take_keys((k_tiles.index(2 * at + GROUP),), kv_full.index(0), at, own_n, length)
                s = _start(k_tiles.index(2 * at + GROUP), q_tiles, q_full, t, s_NM, True)
                take_keys((k_tiles.index(2 - 2 * at + GROUP),), kv_full.index(1), at, own_n, length)
                if n > n_first:
                    _wait_for_stores()
                tma.store_wait(0)
                s_NM = hopper.warpgroup_mma_wait(0, deps=[s])
                dq_sum = hopper.warpgroup_mma_init(dq_MD)
                for step in range(0, num_q, M):
                    m = query_tile(step, n, num_q, D, PARTS)
                    # 0 that changes with m for all the compiler knows: addresses are computed where they are used.
                    zero = (num_q - m) >> 31
                    at = 2 * (pair % 2) + zero
                    own_k, own_v = k_tiles.index(at + GROUP), k_tiles.index(2 - at + GROUP)
                    other_k = k_tiles.index(at + 1 - GROUP)
                    q_t, do_t = q_tiles.index(t % SLOTS), do_tiles.index(t % SLOTS)
                    more = step + M < num_q
                    swap, phase = t % SWAPS, t // SWAPS & 1
                    p_NM, slope_NM = activate_or_bare(s_NM, inner, outer, BARE, ACTIVATION, APPROX)
                    made.index(OWN + 2).store(_real_queries(p_NM.to(TYPE), m, num_q, S_LAYOUT))
                    hopper.fence_async_shared()
                    dk_ND, dq_MD, slope_NM = hopper.warpgroup_mma_wait(0, deps=[dk_sum, dq_sum, slope_NM])
                    dk_sum = hopper.warpgroup_mma_init(dk_ND)
                    mbarrier.arrive(empty.index((t + SLOTS - 1) % SLOTS), count=1, pred=step > 0)
                    mbarrier.arrive(other_free.index((t + 1) % SWAPS), count=1, pred=step > 0)
                    # Before its registers are dP's.
                    rounded = hopper.warpgroup_mma_wait(0, deps=[(dq_MD * ds_factor).to(TYPE)])
                    dp = _start(own_v, do_tiles, do_full, t, dq_MD, True)
                    dv_sum = hopper.warpgroup_mma(made.index(OWN + 2 + zero), do_t, dv_sum, is_async=True)
                    if step > 0:
                        before = query_tile(step - M, n, num_q, D, PARTS)
                        _keep_dq(dq, dq_base, rounded, staged, first, column, before, num_q, adds, stride_gt, Q_LAYOUT)
                    dp_NM, slope_NM = hopper.warpgroup_mma_wait(1, deps=[dp, slope_NM])
                    ds_NM = _real_queries((slope_NM * dp_NM).to(TYPE), m, num_q, S_LAYOUT)
                    own_ds, other_ds = made.index(OWN + swap), made.index(OTHER + swap)
                    mbarrier.wait(own_free.index(swap), phase ^ 1)
                    own_ds.store(ds_NM)
                    hopper.fence_async_shared()
                    mbarrier.arrive(own_full.index(swap), count=1)
                    s = _start(own_k, q_tiles, q_full, t + 1, s_NM, more)
                    dk_sum = hopper.warpgroup_mma(own_ds, q_t, dk_sum, is_async=True)
                    k_half = own_k.slice(GROUP * HALF, HALF, 1)
                    dq_sum = hopper.warpgroup_mma(own_ds.permute((1, 0)), k_half, dp_NM, use_acc=False, is_async=True)
                    mbarrier.wait(other_full.index(swap), phase)
                    k_half = other_k.slice(GROUP * HALF, HALF, 1)
                    dq_sum = hopper.warpgroup_mma(other_ds.permute((1, 0)), k_half, dq_sum, is_async=True)
                    s_NM, dv_ND = hopper.warpgroup_mma_wait(3, deps=[s, dv_sum])
                    dv_sum = hopper.warpgroup_mma_init(dv_ND)
                    t += 1
                dk_ND, dv_ND, dq_MD = hopper.warpgroup_mma_wait(0, deps=[dk_sum, dv_sum, dq_sum])
                mbarrier.arrive(empty.index((t + SLOTS - 1) % SLOTS), count=1)
                mbarrier.arrive(other_free.index((t + 1) % SWAPS), count=1)
                m = query_tile((num_q - 1) // M * M, n, num_q, D, PARTS)
                rounded = (dq_MD * ds_factor).to(TYPE)
                _keep_dq(dq, dq_base, rounded, staged, first, column, m, num_q, adds, stride_gt, Q_LAYOUT)
                dk_ND = dk_ND * ds_factor
                dv_ND = dv_ND * p_factor
            if (own_n + 64 <= length) & (num_q > 0):
                mbarrier.wait(own_free.index((t - 1) % SWAPS), (t - 1) // SWAPS & 1)
                _keep_whole(dk, dk_ND, ways_out.index(2 * GROUP), kv_first + own_n, h * stride_gh)
                tma.store_wait(1)  # dQ, of the two that are on their way
                _keep_whole(dv, dv_ND, ways_out.index(2 * GROUP + 1), kv_first + own_n, h * stride_gh)
            else:
                store_rows(dk_pointer + key_base, dk_ND, own_n, length, stride_gt, G_LAYOUT)
                store_rows(dv_pointer + key_base, dv_ND, own_n, length, stride_gt, G_LAYOUT)
            if num_q > 0:
                pair += 1
        for m in range(0, gl.where(length > 0, 0, num_q), M):
            store_rows(dq_base, gl.full([M, HALF], 0.0, gl.float32, Q_LAYOUT), m, num_q, stride_gt, Q_LAYOUT)
        i += 1
        found = take(units, i, words(JAGGED))
    tma.store_wait(0)
