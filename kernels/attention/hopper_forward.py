"""Softmax attention's forward on Hopper, in Gluon: GDPA's stream of tiles (`kernels/gdpa/hopper_forward.py`), its
products, copies and waits, with an online softmax in the activation's place.

Shape letters: M rows of a query tile, N rows of a key tile, H heads, D head width.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gdpa.hopper_forward import _advance, _copy_in, _key_range, _refill, _scores, _store_out


@gluon.jit
def _visible(row_M, column_N, length, window, WINDOW: gl.constexpr):
    """(M, N), True where row m sees column n. One unsigned comparison is both bounds: below the first, it wraps."""
    if WINDOW:
        lowest_M = row_M - window
        reach_M = gl.minimum(2 * window, length - 1 - lowest_M)
        return (column_N[None, :] - lowest_M[:, None]).to(gl.uint32) <= reach_M.to(gl.uint32)[:, None]
    else:
        return (column_N < length)[None, :]


@gluon.jit
def _is_cut(m, n, length, window, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WINDOW: gl.constexpr):
    """Some row of query tile m does not see some column of key tile n."""
    cut = n + BLOCK_N > length
    if WINDOW:
        cut = cut | (n < m + BLOCK_M - 1 - window) | (n + BLOCK_N - 1 > m + window)
    return cut


@gluon.jit
def _softmax(
    s_MN, top_M, sum_M, m, n, length, window, scale_log2, TYPE: gl.constexpr, LAYOUT: gl.constexpr, WINDOW: gl.constexpr
):
    """P, the highest score and the sum of exponentials so far, and what sums up to here shrink by."""
    BLOCK_M: gl.constexpr = s_MN.shape[0]
    BLOCK_N: gl.constexpr = s_MN.shape[1]
    if _is_cut(m, n, length, window, BLOCK_M, BLOCK_N, WINDOW):
        row_M = m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
        column_N = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        s_MN = gl.where(_visible(row_M, column_N, length, window, WINDOW), s_MN, float("-inf"))
    higher_M = gl.maximum(top_M, gl.max(s_MN, 1))
    # A row with no key so far must not compute inf - inf.
    base_M = gl.where(higher_M == float("-inf"), 0.0, higher_M) * scale_log2
    p_MN = gl.exp2(s_MN * scale_log2 - base_M[:, None])
    shrink_M = gl.exp2(top_M * scale_log2 - base_M)
    return p_MN.to(TYPE), higher_M, sum_M * shrink_M + gl.sum(p_MN, 1), shrink_M


@gluon.jit(do_not_specialize=["window"])
def _softmax_fwd_hopper_kernel(
    q, k, v, out, out_pointer, lse, offsets, num_heads, num_shared, window, scale_log2,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr,
    stride_ot: gl.constexpr, stride_oh: gl.constexpr,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, SHARED: gl.constexpr,
    WINDOW: gl.constexpr,
):  # fmt: skip
    """One example and head. q, k, v and out are the copy engine's descriptors; keys and values take turns in SLOTS
    tiles, an odd number. With SHARED the same `num_shared` queries serve every example. The scale is positive."""
    b, h = gl.program_id(0) // num_heads, gl.program_id(0) % num_heads
    kv_first = gl.load(offsets + b)
    length = gl.load(offsets + b + 1) - kv_first
    q_first, first, num_q = kv_first, kv_first, length
    if SHARED:
        q_first, first, num_q = b * 0, b * num_shared, num_shared
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
        _copy_in(q, q_first + m, h * stride_qh, q_full.index(i), q_tiles.index(i), m < num_q)
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
    out_base = out_pointer + first.to(gl.int64) * stride_ot + h * stride_oh
    lse_base = lse + first.to(gl.int64) * num_heads + h
    tile = 0  # query tiles so far
    at = 0  # tiles of keys and of values so far
    for m in range(m_first, num_q, step):
        lo, hi = _key_range(m, length, window, BLOCK_M, BLOCK_N, WINDOW)
        top_M = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        sum_M = gl.full([BLOCK_M], 0.0, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        for n in range(lo, hi, BLOCK_N):
            is_last = n + BLOCK_N >= hi
            more = (not is_last) | (m + step < num_q)
            s_MN, o_MD = hopper.warpgroup_mma_wait(0, deps=[s, o])
            cursor = _refill(k, v, h * stride_kh, h * stride_vh, kv_first, cursor, kv_full, kv_tiles, at,
                             num_q, step, length, window, BLOCK_M, WINDOW)  # fmt: skip
            p_MN, top_M, sum_M, shrink_M = _softmax(
                s_MN, top_M, sum_M, m, n, length, window, scale_log2, TYPE, S_LAYOUT, WINDOW
            )
            o_MD = o_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, O_LAYOUT))[:, None]
            p_MN = gl.convert_layout(p_MN, gl.DotOperandLayout(0, O_LAYOUT, 2))
            mbarrier.wait(kv_full.index((at + 1) % SLOTS), (at + 1) // SLOTS & 1)
            o = hopper.warpgroup_mma(p_MN, kv_tiles.index((at + 1) % SLOTS), o_MD, use_acc=n > lo, is_async=True)
            if (n == lo) & (tile > 0):
                # Where the tile before this one was staged for its store.
                tma.store_wait(0)
                spare = (tile + 1) % 2
                there = m + step < num_q
                _copy_in(q, q_first + m + step, h * stride_qh, q_full.index(spare), q_tiles.index(spare), there)
            at += 2
            s = _scores(q_tiles, q_full, kv_tiles, kv_full, tile + is_last.to(gl.int32), at, is_last, more, s_MN)
        o_MD = hopper.warpgroup_mma_wait(1, deps=[o])
        row_M = m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, S_LAYOUT))
        empty_M = sum_M == 0.0
        sum_M = gl.where(empty_M, 1.0, sum_M)
        lse_M = gl.where(empty_M, 0.0, top_M * scale_log2 + gl.log2(sum_M))
        gl.store(lse_base + row_M * num_heads, lse_M, mask=row_M < num_q)
        part_M = gl.convert_layout(1.0 / sum_M, gl.SliceLayout(1, O_LAYOUT))
        _store_out(o_MD * part_M[:, None], out, out_base, h * stride_oh, q_tiles.index(tile % 2), first, m, num_q,
                   stride_ot, O_LAYOUT)  # fmt: skip
        o = hopper.warpgroup_mma_init(o_MD)
        tile += 1  # noqa: SIM113 - Gluon knows no enumerate
    hopper.warpgroup_mma_wait(0, deps=[s])
    tma.store_wait(0)
