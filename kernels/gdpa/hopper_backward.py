"""GDPA's backward on Hopper, in Gluon: a warp of its own asks for copies, and two groups of four warps compute.

Shape letters as in `kernels/gdpa/triton_kernels.py`; tiles have M = 64 queries and N = 128 keys, 64 of them a group's.
A group holds dK and dV of its keys in registers, and computes scores transposed, keys by queries. The groups exchange
dS through shared memory, and each makes half the columns of dQ.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gdpa.triton_activations import activate_with_slope
from kernels.hopper_ring import add, all_warps, copy_in, get, give_back, put, store, store_rows

_M = gl.constexpr(64)
_N = gl.constexpr(128)


@gluon.jit
def _wait_for_stores():
    """All that this thread stored, through the copy engine or not, comes before what the copy engine does next."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _describe(unit, offsets, sizes, PARTS: gl.constexpr, JAGGED: gl.constexpr):
    """Head, first row and number of queries and of keys, first and end of the unit's keys.

    An example of more keys than `longest` has none, and no queries.
    """
    q_offsets, kv_offsets = offsets
    num_heads, num_kv, longest = sizes
    item = unit // PARTS
    b, h = item // num_heads, item % num_heads
    first = gl.load(q_offsets + b)
    num_q = gl.load(q_offsets + b + 1) - first
    kv_first, length = b * num_kv, num_kv
    if JAGGED:
        kv_first = gl.load(kv_offsets + b)
        length = gl.load(kv_offsets + b + 1) - kv_first
        num_q = gl.where(length <= longest, num_q, 0)
        length = gl.where(length <= longest, length, 0)
    n_first, n_end = 0, length
    if PARTS > 1:
        n_first = unit % PARTS * _N
        n_end = gl.minimum(length, n_first + _N)
    return h, first, num_q, kv_first, length, n_first, n_end


@gluon.jit
def _take(units, full, empty, i):
    """The i-th unit that the producer announced."""
    mbarrier.wait(full.index(i % 2), i // 2 & 1)
    unit = get(units.index(i % 2))
    all_warps()  # have read
    mbarrier.arrive(empty.index(i % 2), count=1)
    return unit


@gluon.jit
def _announce(unit, units, full, empty, i):
    mbarrier.wait(empty.index(i % 2), (i // 2 & 1) ^ 1)
    put(units.index(i % 2), unit)
    mbarrier.arrive(full.index(i % 2), count=1)


@gluon.jit
def _produce(
    q, k, v, do, counter, offsets, sizes, num_units, units, tiles, barriers,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    PARTS: gl.constexpr, JAGGED: gl.constexpr,
):  # fmt: skip
    """One warp: hands out units, the next one from a counter, and asks the copy engine for all tiles."""
    units, unit_full, unit_empty = units
    q_tiles, do_tiles, k_tiles, v_tiles = tiles
    q_full, do_full, empty, kv_full, kv_empty = barriers
    SLOTS: gl.constexpr = q_tiles.shape[0]
    PLACES: gl.constexpr = k_tiles.shape[0] // 2
    t = 0  # query tiles so far
    pair = 0  # key tiles so far
    i = 0
    unit = gl.program_id(0)
    _announce(unit, units, unit_full, unit_empty, i)
    while unit < num_units:
        h, first, num_q, kv_first, _, n_first, n_end = _describe(unit, offsets, sizes, PARTS, JAGGED)
        if num_q == 0:
            n_end = n_first
        for n in range(n_first, n_end, _N):
            at = pair % PLACES
            mbarrier.wait(kv_empty.index(at), (pair // PLACES & 1) ^ 1)
            for c in gl.static_range(2):
                copy_in(k, kv_first + n + c * 64, h * stride_kh, kv_full.index(at), k_tiles.index(2 * at + c), True)
                copy_in(v, kv_first + n + c * 64, h * stride_vh, kv_full.index(at), v_tiles.index(2 * at + c), True)
            pair += 1
            for m in range(0, num_q, _M):
                slot = t % SLOTS
                mbarrier.wait(empty.index(slot), (t // SLOTS & 1) ^ 1)
                copy_in(q, first + m, h * stride_qh, q_full.index(slot), q_tiles.index(slot), True)
                copy_in(do, first + m, h * stride_doh, do_full.index(slot), do_tiles.index(slot), True)
                t += 1
        # Not earlier: a program that is busy would keep a unit from the others.
        i += 1
        unit = gl.num_programs(0) + gl.atomic_add(counter, 1)
        _announce(unit, units, unit_full, unit_empty, i)
    give_back(counter)


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
    if m + _M > num_q:
        x_NM = gl.where((m + gl.arange(0, _M, gl.SliceLayout(0, LAYOUT)) < num_q)[None, :], x_NM, 0.0)
    return x_NM


@gluon.jit
def _real_keys(x_NM, n, length, LAYOUT: gl.constexpr):
    if n + x_NM.shape[0] > length:
        x_NM = gl.where((n + gl.arange(0, x_NM.shape[0], gl.SliceLayout(1, LAYOUT)) < length)[:, None], x_NM, 0.0)
    return x_NM


@gluon.jit
def _keep_dq(dq, base, dq_MD, staged, first, column, m, num_q, adds, stride: gl.constexpr, LAYOUT: gl.constexpr):
    """Store this group's half of a tile of dQ, or add it to what the key tile before it left."""
    if (m + _M <= num_q) | adds:
        if m + _M > num_q:
            row_M = m + gl.arange(0, _M, gl.SliceLayout(1, LAYOUT))
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
def _consume(
    grads, pointers, offsets, sizes, num_units, inner, outer, units, tiles, made, barriers, exchange,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr, GROUP: gl.constexpr,
    PARTS: gl.constexpr, JAGGED: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """Four warps, with the keys 64 GROUP to 64 GROUP + 63 of each key tile."""
    dq, dk, dv = grads
    dq_pointer, dk_pointer, dv_pointer = pointers
    units, unit_full, unit_empty = units
    q_tiles, do_tiles, k_tiles, v_tiles = tiles
    ds_tiles, p_tiles, dq_tiles = made
    q_full, do_full, empty, kv_full, kv_empty = barriers
    own_full, other_full, own_free, other_free = exchange
    SLOTS: gl.constexpr = q_tiles.shape[0]
    SWAPS: gl.constexpr = own_full.shape[0]
    PLACES: gl.constexpr = k_tiles.shape[0] // 2
    D: gl.constexpr = q_tiles.shape[2]
    HALF: gl.constexpr = D // 2
    TYPE: gl.constexpr = q_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _M, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, G_LAYOUT, 2)
    WIDE: gl.constexpr = D == 128  # registers are short
    staged = dq_tiles.index(GROUP)
    t = 0
    pair = 0
    i = 0
    unit = _take(units, unit_full, unit_empty, i)
    while unit < num_units:
        h, first, num_q, kv_first, length, n_first, n_end = _describe(unit, offsets, sizes, PARTS, JAGGED)
        dq_base = dq_pointer + first.to(gl.int64) * stride_gt + h * stride_gh + GROUP * HALF
        column = h * stride_gh + GROUP * HALF
        key_base = kv_first.to(gl.int64) * stride_gt + h * stride_gh
        for n in range(n_first, n_end, _N):
            if n > n_first:
                _wait_for_stores()
            own_n = n + GROUP * 64
            adds = n > (-1 if PARTS > 1 else 0)
            dk_ND = gl.full([64, D], 0.0, gl.float32, G_LAYOUT)
            dv_ND = gl.full([64, D], 0.0, gl.float32, G_LAYOUT)
            if num_q > 0:
                # Through a wait: registers of a product must be written before the first one is in flight.
                dk_ND, dv_ND = hopper.warpgroup_mma_wait(0, deps=[dk_ND, dv_ND])
                dk_sum, dv_sum = hopper.warpgroup_mma_init(dk_ND), hopper.warpgroup_mma_init(dv_ND)
                s_NM = gl.full([64, _M], 0.0, gl.float32, S_LAYOUT)
                dp_NM = gl.full([64, _M], 0.0, gl.float32, S_LAYOUT)
                dq_MD = gl.full([_M, HALF], 0.0, gl.float32, Q_LAYOUT)
                at = pair % PLACES
                mbarrier.wait(kv_full.index(at), pair // PLACES & 1)
                s = _start(k_tiles.index(2 * at + GROUP), q_tiles, q_full, t, s_NM, True)
                dp = _start(v_tiles.index(2 * at + GROUP), do_tiles, do_full, t, dp_NM, True)
                for m in range(0, num_q, _M):
                    # 0 that changes with m for all the compiler knows: addresses are computed where they are used.
                    zero = (num_q - m) >> 31
                    at = pair % PLACES + zero
                    own_k, own_v = k_tiles.index(2 * at + GROUP), v_tiles.index(2 * at + GROUP)
                    q_t, do_t = q_tiles.index(t % SLOTS), do_tiles.index(t % SLOTS)
                    s_NM = hopper.warpgroup_mma_wait(1, deps=[s])
                    p_NM, slope_NM = activate_with_slope(s_NM, inner, outer, ACTIVATION, APPROX)
                    if ACTIVATION == "identity":
                        slope_NM = gl.full([64, _M], 0.0, gl.float32, S_LAYOUT) + slope_NM
                    p_NM = _real_queries(p_NM.to(TYPE), m, num_q, S_LAYOUT)
                    if WIDE:
                        p_tiles.index(GROUP).store(p_NM)
                        dp_NM = hopper.warpgroup_mma_wait(0, deps=[dp])
                    else:
                        dp_NM, slope_NM = hopper.warpgroup_mma_wait(0, deps=[dp, slope_NM])
                    ds_NM = _real_queries(slope_NM * dp_NM, m, num_q, S_LAYOUT)
                    ds_NM = _real_keys(ds_NM, own_n, length, S_LAYOUT).to(TYPE)
                    swap, phase = t % SWAPS, t // SWAPS & 1
                    own_ds, other_ds = ds_tiles.index(2 * swap + GROUP), ds_tiles.index(2 * swap + 1 - GROUP)
                    mbarrier.wait(own_free.index(swap), phase ^ 1)
                    own_ds.store(ds_NM)
                    hopper.fence_async_shared()
                    mbarrier.arrive(own_full.index(swap), count=1)
                    p_a = p_tiles.index(GROUP + zero) if WIDE else gl.convert_layout(p_NM, A_LAYOUT)
                    ds_a = own_ds if WIDE else gl.convert_layout(ds_NM, A_LAYOUT)
                    dv_sum = hopper.warpgroup_mma(p_a, do_t, dv_sum, is_async=True)
                    dk_sum = hopper.warpgroup_mma(ds_a, q_t, dk_sum, is_async=True)
                    more = m + _M < num_q
                    s = _start(own_k, q_tiles, q_full, t + 1, s_NM, more)
                    if WIDE:
                        dq_MD = gl.convert_layout(dp_NM, Q_LAYOUT, assert_trivial=True)
                    k_half = own_k.slice(GROUP * HALF, HALF, 1)
                    dq_sum = hopper.warpgroup_mma(own_ds.permute((1, 0)), k_half, dq_MD, use_acc=False, is_async=True)
                    mbarrier.wait(other_full.index(swap), phase)
                    k_half = k_tiles.index(2 * at + 1 - GROUP).slice(GROUP * HALF, HALF, 1)
                    dq_sum = hopper.warpgroup_mma(other_ds.permute((1, 0)), k_half, dq_sum, is_async=True)
                    s_NM, dk_ND, dv_ND = hopper.warpgroup_mma_wait(2, deps=[s, dk_sum, dv_sum])
                    s = hopper.warpgroup_mma_init(s_NM)
                    dk_sum, dv_sum = hopper.warpgroup_mma_init(dk_ND), hopper.warpgroup_mma_init(dv_ND)
                    mbarrier.arrive(empty.index(t % SLOTS), count=1)
                    dq_MD = hopper.warpgroup_mma_wait(0, deps=[dq_sum])
                    rounded = dq_MD.to(TYPE)
                    if WIDE:
                        dp_NM = gl.convert_layout(dq_MD, S_LAYOUT, assert_trivial=True)
                    dp = _start(own_v, do_tiles, do_full, t + 1, dp_NM, more)
                    mbarrier.arrive(other_free.index(swap), count=1)
                    if PLACES > 1 and m == 0:
                        # Gradients of the key tile before this one have left its place.
                        tma.store_wait(0)
                        mbarrier.arrive(kv_empty.index((pair + 1) % PLACES), count=1, pred=pair > 0)
                    _keep_dq(dq, dq_base, rounded, staged, first, column, m, num_q, adds, stride_gt, Q_LAYOUT)
                    t += 1
                # Leftovers of the products past the end.
                hopper.warpgroup_mma_wait(0, deps=[s, dp])
            at = pair % PLACES
            if (own_n + 64 <= length) & (num_q > 0):
                # Through the places of this group's values and keys, once the other group is done with the keys.
                own_k, own_v = k_tiles.index(2 * at + GROUP), v_tiles.index(2 * at + GROUP)
                own_v.store(dv_ND.to(TYPE))
                hopper.fence_async_shared()
                store(dv, [kv_first + own_n, h * stride_gh], own_v)
                mbarrier.wait(own_free.index((t - 1) % SWAPS), (t - 1) // SWAPS & 1)
                own_k.store(dk_ND.to(TYPE))
                hopper.fence_async_shared()
                store(dk, [kv_first + own_n, h * stride_gh], own_k)
            else:
                store_rows(dk_pointer + key_base, dk_ND, own_n, length, stride_gt, G_LAYOUT)
                store_rows(dv_pointer + key_base, dv_ND, own_n, length, stride_gt, G_LAYOUT)
            if num_q > 0:
                if PLACES == 1:
                    tma.store_wait(0)
                    mbarrier.arrive(kv_empty.index(0), count=1)
                pair += 1
        for m in range(0, gl.where(length > 0, 0, num_q), _M):
            store_rows(dq_base, gl.full([_M, HALF], 0.0, gl.float32, Q_LAYOUT), m, num_q, stride_gt, Q_LAYOUT)
        i += 1
        unit = _take(units, unit_full, unit_empty, i)
    tma.store_wait(0)


@gluon.jit
def _barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit(do_not_specialize=["num_units", "longest"])
def _gdpa_bwd_hopper_kernel(
    q, k, v, do, dq, dk, dv, dq_pointer, dk_pointer, dv_pointer, counter, q_offsets, kv_offsets,
    num_units, num_heads, num_kv, longest, inner, outer,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr,
    D: gl.constexpr, SLOTS: gl.constexpr, SWAPS: gl.constexpr, PLACES: gl.constexpr, PARTS: gl.constexpr,
    JAGGED: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """q to dv are the copy engine's descriptors, of 64 rows; dq's are of half a head's columns.

    A unit of work is an example and head: its key tiles follow one another and add to dQ, in dQ's type. Or, of two
    PARTS, it is one key tile: each adds to the zeros that dQ holds, which is the same number in either order. `counter`
    is two int32, 0 before and after, that hand out the units. Examples of more keys than `longest` are left alone.
    """
    TYPE: gl.constexpr = q.dtype
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, _M], TYPE)
    q_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, _M, D], q.layout)
    do_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, _M, D], do.layout)
    k_tiles = gl.allocate_shared_memory(TYPE, [2 * PLACES, 64, D], k.layout)
    v_tiles = gl.allocate_shared_memory(TYPE, [2 * PLACES, 64, D], v.layout)
    ds_tiles = gl.allocate_shared_memory(TYPE, [2 * SWAPS, 64, _M], DS_LAYOUT)
    p_tiles = ds_tiles
    if D == 128:
        p_tiles = gl.allocate_shared_memory(TYPE, [2, 64, _M], DS_LAYOUT)
    dq_tiles = gl.allocate_shared_memory(TYPE, [2, _M, D // 2], dq.layout)
    units = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    units = (units, _barriers(2, 1), _barriers(2, 2))
    q_full, do_full, empty = _barriers(SLOTS, 1), _barriers(SLOTS, 1), _barriers(SLOTS, 2)
    barriers = (q_full, do_full, empty, _barriers(PLACES, 4), _barriers(PLACES, 2))
    full_0, full_1, free_0, free_1 = (
        _barriers(SWAPS, 1),
        _barriers(SWAPS, 1),
        _barriers(SWAPS, 1),
        _barriers(SWAPS, 1),
    )
    hopper.fence_async_shared()
    tiles = (q_tiles, do_tiles, k_tiles, v_tiles)
    made = (ds_tiles, p_tiles, dq_tiles)
    offsets = (q_offsets, kv_offsets)
    sizes = (num_heads, num_kv, longest)
    grads, pointers = (dq, dk, dv), (dq_pointer, dk_pointer, dv_pointer)
    gl.warp_specialize(
        [
            (_consume, (grads, pointers, offsets, sizes, num_units, inner, outer, units, tiles, made, barriers,
                        (full_0, full_1, free_0, free_1), stride_gt, stride_gh, 0, PARTS, JAGGED, ACTIVATION, APPROX)),
            (_consume, (grads, pointers, offsets, sizes, num_units, inner, outer, units, tiles, made, barriers,
                        (full_1, full_0, free_1, free_0), stride_gt, stride_gh, 1, PARTS, JAGGED, ACTIVATION, APPROX)),
            (_produce, (q, k, v, do, counter, offsets, sizes, num_units, units, tiles, barriers,
                        stride_qh, stride_kh, stride_vh, stride_doh, PARTS, JAGGED)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
