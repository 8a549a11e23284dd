"""GDPA's forward on Hopper, in Gluon: matrix products, copies and waits are placed by hand.

Shape letters as in `kernels/gdpa/triton_kernels.py`. One program takes one example and head. Its query tiles and, for
each, all key tiles form one stream: the copy engine's loads run ahead across the ends of query tiles, and the first
scores of a query tile are in flight while the one before it is stored.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gdpa.triton_activations import activate

# Renamed in Triton 3.8.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _key_range(m, length, window, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WINDOW: gl.constexpr):
    """Keys that query tile m meets: at least one tile, if of masked keys, so that every query tile has scores."""
    lo = 0
    hi = length
    if WINDOW:
        lo = gl.maximum(m - window, 0) // BLOCK_N * BLOCK_N
        hi = gl.minimum(m + BLOCK_M + window, length)
    return lo, gl.maximum(hi, lo + 1)


@gluon.jit
def _copy_in(x, row, column, full, tile, pred):
    """Start the copy of a tile; barrier `full` completes when it is there."""
    BYTES: gl.constexpr = tile.shape[0] * tile.shape[1] * (x.dtype.primitive_bitwidth // 8)
    mbarrier.expect(full, BYTES, pred=pred)
    _load(x, [row, column], full, tile, pred=pred)


@gluon.jit
def _advance(cursor, step, length, window, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WINDOW: gl.constexpr):
    """The pair of tiles after this one: (query row, key row, end of its keys)."""
    m, n, hi = cursor
    n += BLOCK_N
    if n >= hi:
        m += step
        n, hi = _key_range(m, length, window, BLOCK_M, BLOCK_N, WINDOW)
    return m, n, hi


@gluon.jit
def _refill(
    k, v, k_column, v_column, kv_first, cursor, full, tiles, at, num_q, step, length, window,
    BLOCK_M: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """Ask for the next two tiles where the key tile at `at` and the values before it were."""
    SLOTS: gl.constexpr = tiles.shape[0]
    if at > 0:
        slot = (at - 1) % SLOTS
        _copy_in(k, kv_first + cursor[1], k_column, full.index(slot), tiles.index(slot), cursor[0] < num_q)
    slot = at % SLOTS
    _copy_in(v, kv_first + cursor[1], v_column, full.index(slot), tiles.index(slot), cursor[0] < num_q)
    return _advance(cursor, step, length, window, BLOCK_M, tiles.shape[1], WINDOW)


@gluon.jit
def _scores(q_tiles, q_full, kv_tiles, kv_full, tile, at, is_new, exists, before):
    """Start query tile number `tile` times the keys at `at`. Past the end it multiplies leftovers, which nobody reads:
    a branch here would keep the product from staying in flight. `before` lends its registers."""
    SLOTS: gl.constexpr = kv_tiles.shape[0]
    mbarrier.wait(q_full.index(tile % 2), tile // 2 & 1, pred=is_new & exists)
    mbarrier.wait(kv_full.index(at % SLOTS), at // SLOTS & 1, pred=exists)
    keys = kv_tiles.index(at % SLOTS).permute((1, 0))
    return hopper.warpgroup_mma(q_tiles.index(tile % 2), keys, before, use_acc=False, is_async=True)


@gluon.jit
def _weights(
    s_MN, m, n, length, window, inner, outer, TYPE: gl.constexpr, LAYOUT: gl.constexpr, WINDOW: gl.constexpr,
    ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """P; zeros past the example's keys, where the copy engine reads the next example, and outside of the window."""
    p_MN = activate(s_MN, inner, outer, ACTIVATION, APPROX)
    column_N = n + gl.arange(0, s_MN.shape[1], gl.SliceLayout(0, LAYOUT))
    if WINDOW:
        distance = (m + gl.arange(0, s_MN.shape[0], gl.SliceLayout(1, LAYOUT)))[:, None] - column_N[None, :]
        p_MN = gl.where((distance <= window) & (distance >= -window), p_MN, 0.0)
    if n + s_MN.shape[1] > length:
        p_MN = gl.where((column_N < length)[None, :], p_MN, 0.0)
    return p_MN.to(TYPE)


@gluon.jit
def _store_out(o_MD, out, out_base, column, staged, first, m, num_q, stride: gl.constexpr, LAYOUT: gl.constexpr):
    """A whole tile through shared memory and the copy engine, an example's last rows from the registers."""
    BLOCK_M: gl.constexpr = staged.shape[0]
    if m + BLOCK_M <= num_q:
        staged.store(o_MD.to(staged.dtype))
        hopper.fence_async_shared()
        _store(out, [first + m, column], staged)
    else:
        row_M = m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
        d_D = gl.arange(0, staged.shape[1], gl.SliceLayout(0, LAYOUT))
        pointers = out_base + (row_M[:, None] * stride + d_D[None, :])
        gl.store(pointers, o_MD.to(staged.dtype), mask=(row_M < num_q)[:, None])


@gluon.jit(do_not_specialize=["window"])
def _gdpa_fwd_hopper_kernel(
    q, k, v, out, out_pointer, q_offsets, kv_offsets, num_heads, num_kv, window, inner, outer,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr,
    stride_ot: gl.constexpr, stride_oh: gl.constexpr,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, EARLY: gl.constexpr,
    JAGGED: gl.constexpr, WINDOW: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """q, k, v and out are the copy engine's descriptors. Keys and values take turns in SLOTS tiles, an odd number.

    EARLY: the next scores are issued before this tile's activation, which hides it behind them, for a second set of
    score registers. Else another program on the same multiprocessor has to.
    """
    b, h = gl.program_id(0) // num_heads, gl.program_id(0) % num_heads
    first = gl.load(q_offsets + b)
    num_q = gl.load(q_offsets + b + 1) - first
    kv_first, length = b * num_kv, num_kv
    if JAGGED:
        kv_first = gl.load(kv_offsets + b)
        length = gl.load(kv_offsets + b + 1) - kv_first
    m_first, step = gl.program_id(1) * BLOCK_M, gl.num_programs(1) * BLOCK_M
    if m_first >= num_q:
        return
    TYPE: gl.constexpr = q.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    q_tiles = gl.allocate_shared_memory(TYPE, [2, BLOCK_M, D], q.layout)
    kv_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, BLOCK_N, D], k.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(kv_full.index(i), count=1)
    hopper.fence_async_shared()
    for i in gl.static_range(2):
        m = m_first + i * step
        _copy_in(q, first + m, h * stride_qh, q_full.index(i), q_tiles.index(i), m < num_q)
    lo, hi = _key_range(m_first, length, window, BLOCK_M, BLOCK_N, WINDOW)
    cursor = (m_first, lo, hi)
    for i in gl.static_range(SLOTS):
        x, column = (k, h * stride_kh) if i % 2 == 0 else (v, h * stride_vh)
        _copy_in(x, kv_first + cursor[1], column, kv_full.index(i), kv_tiles.index(i), cursor[0] < num_q)
        if i % 2 == 1:
            cursor = _advance(cursor, step, length, window, BLOCK_M, BLOCK_N, WINDOW)
    # Through a wait: registers of a product must be written before the first one is in flight.
    o = hopper.warpgroup_mma_wait(0, deps=[gl.full([BLOCK_M, D], 0.0, gl.float32, O_LAYOUT)])
    o = hopper.warpgroup_mma_init(o)
    s_MN = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, S_LAYOUT)
    s = _scores(q_tiles, q_full, kv_tiles, kv_full, 0, 0, True, True, s_MN)
    if EARLY:
        s_MN = hopper.warpgroup_mma_wait(0, deps=[s])
    out_base = out_pointer + first.to(gl.int64) * stride_ot + h * stride_oh
    tile = 0  # query tiles so far
    at = 0  # tiles of keys and of values so far
    for m in range(m_first, num_q, step):
        lo, hi = _key_range(m, length, window, BLOCK_M, BLOCK_N, WINDOW)
        for n in range(lo, hi, BLOCK_N):
            is_last = n + BLOCK_N >= hi
            more = (not is_last) | (m + step < num_q)
            tile_after = tile + is_last.to(gl.int32)
            if EARLY:
                s = _scores(q_tiles, q_full, kv_tiles, kv_full, tile_after, at + 2, is_last, more, s_MN)
            else:
                s_MN, o = hopper.warpgroup_mma_wait(0, deps=[s, o])
                cursor = _refill(k, v, h * stride_kh, h * stride_vh, kv_first, cursor, kv_full, kv_tiles, at,
                                 num_q, step, length, window, BLOCK_M, WINDOW)  # fmt: skip
            p_MN = _weights(s_MN, m, n, length, window, inner, outer, TYPE, S_LAYOUT, WINDOW, ACTIVATION, APPROX)
            p_MN = gl.convert_layout(p_MN, gl.DotOperandLayout(0, O_LAYOUT, 2))
            if EARLY:
                o = hopper.warpgroup_mma_wait(1, deps=[o])
            mbarrier.wait(kv_full.index((at + 1) % SLOTS), (at + 1) // SLOTS & 1)
            o = hopper.warpgroup_mma(p_MN, kv_tiles.index((at + 1) % SLOTS), o, use_acc=n > lo, is_async=True)
            if EARLY:
                cursor = _refill(k, v, h * stride_kh, h * stride_vh, kv_first, cursor, kv_full, kv_tiles, at,
                                 num_q, step, length, window, BLOCK_M, WINDOW)  # fmt: skip
            if (n == lo) & (tile > 0):
                # Where the tile before this one was staged for its store.
                tma.store_wait(0)
                spare = (tile + 1) % 2
                there = m + step < num_q
                _copy_in(q, first + m + step, h * stride_qh, q_full.index(spare), q_tiles.index(spare), there)
            at += 2
            if EARLY:
                s_MN = hopper.warpgroup_mma_wait(1, deps=[s])
            else:
                s = _scores(q_tiles, q_full, kv_tiles, kv_full, tile_after, at, is_last, more, s_MN)
        o_MD = hopper.warpgroup_mma_wait(0 if EARLY else 1, deps=[o])
        _store_out(o_MD, out, out_base, h * stride_oh, q_tiles.index(tile % 2), first, m, num_q, stride_ot, O_LAYOUT)
        o = hopper.warpgroup_mma_init(o_MD)
        tile += 1  # noqa: SIM113 - Gluon knows no enumerate
    if not EARLY:
        hopper.warpgroup_mma_wait(0, deps=[s])
    tma.store_wait(0)
