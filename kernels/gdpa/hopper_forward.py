"""GDPA's forward on Hopper, in Gluon: one warp asks the copy engine for tiles, groups of four warps compute.

Shape letters as in `kernels/gdpa/triton_kernels.py`. An item is an example and a head, or one of `num_parts` that share
out its query tiles. These are taken one after another, GROUPS x 64 rows, 64 to a group; for each, all key tiles pass by
in a ring of stages that all groups read. A group's scores of the next key tile are computed while its weights of this
one meet the values, and the groups are not in step: while one computes activations, others have products in flight.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gdpa.triton_activations import activate, activate_bare, bare_factor

# Renamed in Triton 3.7 and 3.8.
_all_warps = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

_ROWS = gl.constexpr(64)  # of a group: what one matrix instruction takes
_PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def _key_range(m, rows, length, window, N: gl.constexpr, WINDOW: gl.constexpr):
    """Keys that rows [m, m + rows) meet: at least one tile, if of masked keys, so that every row has a result."""
    lo = 0
    hi = length
    if WINDOW:
        lo = gl.maximum(gl.minimum(m - window, length - 1), 0) // N * N
        hi = gl.minimum(m + rows + window, length)
    return lo, gl.maximum(hi, lo + 1)


@gluon.jit
def _publish(item, h, first, num_q, length, m_first, items, item_full, item_empty, at):
    """Tell the groups about an item."""
    slot = at % 2
    mbarrier.wait(item_empty.index(slot), (at // 2 & 1) ^ 1)
    zero = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    items.index(slot * 8).store(zero + item)
    items.index(slot * 8 + 1).store(zero + h)
    items.index(slot * 8 + 2).store(zero + first)
    items.index(slot * 8 + 3).store(zero + num_q)
    items.index(slot * 8 + 4).store(zero + length)
    items.index(slot * 8 + 5).store(zero + m_first)
    mbarrier.arrive(item_full.index(slot), count=1)


@gluon.jit
def _scalar(x):
    return gl.max(x.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def _next_item(items, item_full, item_empty, at):
    slot = at % 2
    mbarrier.wait(item_full.index(slot), at // 2 & 1)
    item = _scalar(items.index(slot * 8))
    h = _scalar(items.index(slot * 8 + 1))
    first = _scalar(items.index(slot * 8 + 2))
    num_q = _scalar(items.index(slot * 8 + 3))
    length = _scalar(items.index(slot * 8 + 4))
    m_first = _scalar(items.index(slot * 8 + 5))
    _all_warps()  # have read
    mbarrier.arrive(item_empty.index(slot), count=1)
    return item, h, first, num_q, length, m_first


@gluon.jit
def _produce(
    q, k, v, q_offsets, kv_offsets, counter, num_items, num_parts, num_heads, num_kv, window, tiles, barriers, news,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr,
    GROUPS: gl.constexpr, JAGGED: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """The warp that takes items and has their tiles copied, as far ahead as there is room."""
    q_tiles, k_tiles, v_tiles, _ = tiles
    q_full, q_empty, k_full, v_full, empty = barriers
    items, item_full, item_empty = news
    Q_SLOTS: gl.constexpr = q_tiles.shape[0] // GROUPS
    SLOTS: gl.constexpr = k_tiles.shape[0]
    N: gl.constexpr = k_tiles.shape[1]
    Q_BYTES: gl.constexpr = _ROWS * k_tiles.shape[2] * (q.dtype.primitive_bitwidth // 8)
    KEY_BYTES: gl.constexpr = N * k_tiles.shape[2] * (k.dtype.primitive_bitwidth // 8)
    tile = 0  # query tiles so far
    at = 0  # key tiles so far
    count = 0  # items so far
    item = gl.program_id(0)
    while item < num_items:
        b, h = item // num_parts // num_heads, item // num_parts % num_heads
        m_first = item % num_parts * (GROUPS * _ROWS)
        first = gl.load(q_offsets + b)
        num_q = gl.load(q_offsets + b + 1) - first
        kv_first, length = b * num_kv, num_kv
        if JAGGED:
            kv_first = gl.load(kv_offsets + b)
            length = gl.load(kv_offsets + b + 1) - kv_first
        _publish(item, h, first, num_q, length, m_first, items, item_full, item_empty, count)
        for m in range(m_first, num_q, num_parts * (GROUPS * _ROWS)):
            slot = tile % Q_SLOTS
            mbarrier.wait(q_empty.index(slot), (tile // Q_SLOTS & 1) ^ 1)
            for group in gl.static_range(GROUPS):
                row = m + group * _ROWS
                full = q_full.index(slot * GROUPS + group)
                mbarrier.arrive(full, count=1, pred=row >= num_q)
                mbarrier.expect(full, Q_BYTES, pred=row < num_q)
                _load(q, [first + row, h * stride_qh], full, q_tiles.index(slot * GROUPS + group), pred=row < num_q)
            tile += 1
            lo, hi = _key_range(m, GROUPS * _ROWS, length, window, N, WINDOW)
            for n in range(lo, hi, N):
                slot = at % SLOTS
                mbarrier.wait(empty.index(slot), (at // SLOTS & 1) ^ 1)
                mbarrier.expect(k_full.index(slot), KEY_BYTES)
                _load(k, [kv_first + n, h * stride_kh], k_full.index(slot), k_tiles.index(slot))
                mbarrier.expect(v_full.index(slot), KEY_BYTES)
                _load(v, [kv_first + n, h * stride_vh], v_full.index(slot), v_tiles.index(slot))
                at += 1
        # Not before this item's last copies are on their way: a program that is busy must not hold a second one.
        item = gl.atomic_add(counter, 1) + gl.num_programs(0)
        count += 1
    _publish(item, 0, 0, 0, 0, 0, items, item_full, item_empty, count)
    # The last program to come here leaves both counts as it found them.
    if gl.atomic_add(counter + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def _pass_by(at, count, k_full, v_full, empty):
    """Let `count` key tiles pass that this group does not need."""
    SLOTS: gl.constexpr = empty.shape[0]
    for _ in range(count):
        slot = at % SLOTS
        mbarrier.wait(k_full.index(slot), at // SLOTS & 1)
        mbarrier.wait(v_full.index(slot), at // SLOTS & 1)
        mbarrier.arrive(empty.index(slot), count=1)
        at += 1
    return at


@gluon.jit
def _weights(
    s_MN, m, n, length, window, inner, outer, TYPE: gl.constexpr, LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
    WINDOW: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr, BARE: gl.constexpr,
):  # fmt: skip
    """P; zeros past the example's keys, where the copy engine reads the next example, and outside of the window.

    BARE: without the factor that is the same for all, which `_consume` multiplies the result with."""
    p_MN = activate_bare(s_MN, inner, ACTIVATION, APPROX) if BARE else activate(s_MN, inner, outer, ACTIVATION, APPROX)
    column_N = n + gl.arange(0, s_MN.shape[1], gl.SliceLayout(0, LAYOUT))
    if WINDOW:
        distance = (m + gl.arange(0, s_MN.shape[0], gl.SliceLayout(1, LAYOUT)))[:, None] - column_N[None, :]
        p_MN = gl.where((distance <= window) & (distance >= -window), p_MN, 0.0)
    if n + s_MN.shape[1] > length:
        p_MN = gl.where((column_N < length)[None, :], p_MN, 0.0)
    return gl.convert_layout(p_MN.to(TYPE), gl.DotOperandLayout(0, O_LAYOUT, 2))


@gluon.jit
def _consume(
    out, out_pointer, num_items, num_parts, window, inner, outer, tiles, barriers, news,
    stride_ot: gl.constexpr, stride_oh: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
    WINDOW: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """One group: 64 rows of every query tile."""
    q_tiles, k_tiles, v_tiles, o_tiles = tiles
    q_full, q_empty, k_full, v_full, empty = barriers
    items, item_full, item_empty = news
    Q_SLOTS: gl.constexpr = q_tiles.shape[0] // GROUPS
    SLOTS: gl.constexpr = k_tiles.shape[0]
    N: gl.constexpr = k_tiles.shape[1]
    D: gl.constexpr = k_tiles.shape[2]
    TYPE: gl.constexpr = q_tiles.dtype
    BARE: gl.constexpr = q_tiles.dtype == gl.bfloat16  # the range of fp16 is small
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    staged = o_tiles.index(GROUP)
    tile = 0  # as in _produce
    at = 0
    count = 0
    item, h, first, num_q, length, m_first = _next_item(items, item_full, item_empty, count)
    while item < num_items:
        for tile_row in range(m_first, num_q, num_parts * (GROUPS * _ROWS)):
            m = tile_row + GROUP * _ROWS
            lo, hi = _key_range(tile_row, GROUPS * _ROWS, length, window, N, WINDOW)
            own_lo, own_hi = lo, hi
            if WINDOW:
                own_lo, own_hi = _key_range(m, _ROWS, length, window, N, WINDOW)
            end = at + gl.cdiv(hi - lo, N)
            slot = tile % Q_SLOTS
            if m < num_q:
                if WINDOW:
                    at = _pass_by(at, (own_lo - lo) // N, k_full, v_full, empty)
                queries = q_tiles.index(slot * GROUPS + GROUP)
                mbarrier.wait(q_full.index(slot * GROUPS + GROUP), tile // Q_SLOTS & 1)
                # Through a wait: registers of a product must be written before the first one is in flight.
                o_MD = gl.full([_ROWS, D], 0.0, gl.float32, O_LAYOUT)
                s_MN = gl.full([_ROWS, N], 0.0, gl.float32, S_LAYOUT)
                o_MD, s_MN = hopper.warpgroup_mma_wait(0, deps=[o_MD, s_MN])
                o = hopper.warpgroup_mma_init(o_MD)
                mbarrier.wait(k_full.index(at % SLOTS), at // SLOTS & 1)
                keys = k_tiles.index(at % SLOTS).permute((1, 0))
                s = hopper.warpgroup_mma(queries, keys, s_MN, use_acc=False, is_async=True)
                s_MN = hopper.warpgroup_mma_wait(0, deps=[s])
                p = _weights(s_MN, m, own_lo, length, window, inner, outer, TYPE, S_LAYOUT, O_LAYOUT,
                             WINDOW, ACTIVATION, APPROX, BARE)  # fmt: skip
                for n in range(own_lo + N, own_hi, N):
                    mbarrier.wait(k_full.index((at + 1) % SLOTS), (at + 1) // SLOTS & 1)
                    keys = k_tiles.index((at + 1) % SLOTS).permute((1, 0))
                    s = hopper.warpgroup_mma(queries, keys, s_MN, use_acc=False, is_async=True)
                    mbarrier.wait(v_full.index(at % SLOTS), at // SLOTS & 1)
                    is_first = n == own_lo + N
                    o = hopper.warpgroup_mma(p, v_tiles.index(at % SLOTS), o, use_acc=not is_first, is_async=True)
                    s_MN = hopper.warpgroup_mma_wait(1, deps=[s])
                    p_after = _weights(s_MN, m, n, length, window, inner, outer, TYPE, S_LAYOUT, O_LAYOUT,
                                       WINDOW, ACTIVATION, APPROX, BARE)  # fmt: skip
                    o_MD, p = hopper.warpgroup_mma_wait(0, deps=[o, p])
                    o = hopper.warpgroup_mma_init(o_MD)
                    p = p_after
                    mbarrier.arrive(empty.index(at % SLOTS), count=1)
                    at += 1
                mbarrier.arrive(q_empty.index(slot), count=1)
                mbarrier.wait(v_full.index(at % SLOTS), at // SLOTS & 1)
                is_only = own_lo + N >= own_hi
                o = hopper.warpgroup_mma(p, v_tiles.index(at % SLOTS), o, use_acc=not is_only, is_async=True)
                tma.store_wait(0)  # of the tile before
                o_MD = hopper.warpgroup_mma_wait(0, deps=[o])
                mbarrier.arrive(empty.index(at % SLOTS), count=1)
                at += 1
                if BARE:
                    o_MD = o_MD * bare_factor(inner, outer, ACTIVATION)
                if m + _ROWS <= num_q:
                    staged.store(o_MD.to(TYPE))
                    hopper.fence_async_shared()
                    _store(out, [first + m, h * stride_oh], staged)
                else:
                    row_M = m + gl.arange(0, _ROWS, gl.SliceLayout(1, O_LAYOUT))
                    d_D = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
                    rows = out_pointer + first.to(gl.int64) * stride_ot + h * stride_oh
                    gl.store(rows + (row_M[:, None] * stride_ot + d_D[None, :]), o_MD.to(TYPE),
                             mask=(row_M < num_q)[:, None])  # fmt: skip
                at = _pass_by(at, end - at, k_full, v_full, empty)
            else:
                at = _pass_by(at, end - at, k_full, v_full, empty)
                mbarrier.arrive(q_empty.index(slot), count=1)
            tile += 1
        count += 1
        item, h, first, num_q, length, m_first = _next_item(items, item_full, item_empty, count)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["window", "num_items"])
def _gdpa_fwd_hopper_kernel(
    q, k, v, out, out_pointer, q_offsets, kv_offsets, counter, num_items, num_parts, num_heads, num_kv, window,
    inner, outer,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr,
    stride_ot: gl.constexpr, stride_oh: gl.constexpr,
    D: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, GROUPS: gl.constexpr, REGISTERS: gl.constexpr,
    JAGGED: gl.constexpr, WINDOW: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """q, k, v and out are the copy engine's descriptors, of 64 rows (q, out) and BLOCK_N rows (k, v). A program that is
    done with an item takes another off `counter`, two int32 that are 0 before and after."""
    TYPE: gl.constexpr = q.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(TYPE, [2 * GROUPS, _ROWS, D], q.layout)
    o_tiles = gl.allocate_shared_memory(TYPE, [GROUPS, _ROWS, D], out.layout)
    k_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, BLOCK_N, D], k.layout)
    v_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, BLOCK_N, D], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2 * GROUPS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    items = gl.allocate_shared_memory(gl.int32, [16, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    item_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(2 * GROUPS):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(q_empty.index(i), count=GROUPS)
        mbarrier.init(item_full.index(i), count=1)
        mbarrier.init(item_empty.index(i), count=GROUPS)
    for i in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    hopper.fence_async_shared()
    tiles = (q_tiles, k_tiles, v_tiles, o_tiles)
    barriers = (q_full, q_empty, k_full, v_full, empty)
    news = (items, item_full, item_empty)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (out, out_pointer, num_items, num_parts, window, inner, outer, tiles, barriers, news,
                            stride_ot, stride_oh, 0, GROUPS, WINDOW, ACTIVATION, APPROX)),
                (_consume, (out, out_pointer, num_items, num_parts, window, inner, outer, tiles, barriers, news,
                            stride_ot, stride_oh, 1, GROUPS, WINDOW, ACTIVATION, APPROX)),
                (_produce, (q, k, v, q_offsets, kv_offsets, counter, num_items, num_parts, num_heads, num_kv, window,
                            tiles, barriers, news, stride_qh, stride_kh, stride_vh, GROUPS, JAGGED, WINDOW)),
            ],
            [4, 1], [REGISTERS, _PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (out, out_pointer, num_items, num_parts, window, inner, outer, tiles, barriers, news,
                            stride_ot, stride_oh, 0, GROUPS, WINDOW, ACTIVATION, APPROX)),
                (_consume, (out, out_pointer, num_items, num_parts, window, inner, outer, tiles, barriers, news,
                            stride_ot, stride_oh, 1, GROUPS, WINDOW, ACTIVATION, APPROX)),
                (_consume, (out, out_pointer, num_items, num_parts, window, inner, outer, tiles, barriers, news,
                            stride_ot, stride_oh, 2, GROUPS, WINDOW, ACTIVATION, APPROX)),
                (_produce, (q, k, v, q_offsets, kv_offsets, counter, num_items, num_parts, num_heads, num_kv, window,
                            tiles, barriers, news, stride_qh, stride_kh, stride_vh, GROUPS, JAGGED, WINDOW)),
            ],
            [4, 4, 1], [REGISTERS, REGISTERS, _PRODUCER_REGISTERS],
        )  # fmt: skip
