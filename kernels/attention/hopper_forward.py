"""Softmax attention's forward on Hopper, in Gluon; `kernels/hopper_ring.py` says who does what.

Shape letters: M rows of a query tile, N rows of a key tile, H heads, D head width.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.hopper_ring import (
    PRODUCER_REGISTERS,
    ROWS,
    add_values,
    allocate,
    key_range,
    pass_by,
    produce,
    start_step,
    store_tile,
    take,
)


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
    s_MN, top_M, sum_M, m, n, length, window, scale_log2, TYPE: gl.constexpr, LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
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
    sum_M = sum_M * shrink_M + gl.sum(p_MN, 1)
    shrink_M = gl.convert_layout(shrink_M, gl.SliceLayout(1, O_LAYOUT))
    return gl.convert_layout(p_MN.to(TYPE), gl.DotOperandLayout(0, O_LAYOUT, 2)), higher_M, sum_M, shrink_M[:, None]


@gluon.jit
def _consume(
    out, out_pointer, lse, num_items, num_heads, window, scale_log2, tiles, barriers, news,
    stride_ot: gl.constexpr, stride_oh: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """One group: 64 rows of every query tile."""
    q_tiles, k_tiles, v_tiles, o_tiles = tiles
    q_full, q_empty, k_full, v_full, empty = barriers
    Q_SLOTS: gl.constexpr = q_tiles.shape[0] // GROUPS
    SLOTS: gl.constexpr = k_tiles.shape[0]
    N: gl.constexpr = k_tiles.shape[1]
    D: gl.constexpr = k_tiles.shape[2]
    TYPE: gl.constexpr = q_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    staged = o_tiles.index(GROUP)
    tile = 0  # as in `produce`
    at = 0
    count = 0
    item, h, first, num_q, length, m_first = take(news, count, 6)
    while item < num_items:
        for tile_row in range(m_first, num_q, GROUPS * ROWS):
            m = tile_row + GROUP * ROWS
            lo, hi = key_range(tile_row, GROUPS * ROWS, length, window, N, WINDOW)
            own_lo, own_hi = lo, hi
            if WINDOW:
                own_lo, own_hi = key_range(m, ROWS, length, window, N, WINDOW)
            end = at + gl.cdiv(hi - lo, N)
            slot = tile % Q_SLOTS
            if m < num_q:
                if WINDOW:
                    at = pass_by(at, (own_lo - lo) // N, k_full, v_full, empty)
                queries = q_tiles.index(slot * GROUPS + GROUP)
                mbarrier.wait(q_full.index(slot * GROUPS + GROUP), tile // Q_SLOTS & 1)
                # Through a wait: registers of a product must be written before the first one is in flight.
                o_MD = gl.full([ROWS, D], 0.0, gl.float32, O_LAYOUT)
                s_MN = gl.full([ROWS, N], 0.0, gl.float32, S_LAYOUT)
                o_MD, s_MN = hopper.warpgroup_mma_wait(0, deps=[o_MD, s_MN])
                o = hopper.warpgroup_mma_init(o_MD)
                mbarrier.wait(k_full.index(at % SLOTS), at // SLOTS & 1)
                keys = k_tiles.index(at % SLOTS).permute((1, 0))
                s = hopper.warpgroup_mma(queries, keys, s_MN, use_acc=False, is_async=True)
                top_M = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
                sum_M = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S_LAYOUT))
                s_MN = hopper.warpgroup_mma_wait(0, deps=[s])
                p, top_M, sum_M, shrink = _softmax(s_MN, top_M, sum_M, m, own_lo, length, window, scale_log2, TYPE,
                                                   S_LAYOUT, O_LAYOUT, WINDOW)  # fmt: skip
                for n in range(own_lo + N, own_hi, N):
                    s, o = start_step(queries, p, s_MN, o, k_tiles, v_tiles, k_full, v_full, at, n == own_lo + N)
                    s_MN = hopper.warpgroup_mma_wait(1, deps=[s])
                    p_after, top_M, sum_M, shrink = _softmax(s_MN, top_M, sum_M, m, n, length, window, scale_log2, TYPE,
                                                             S_LAYOUT, O_LAYOUT, WINDOW)  # fmt: skip
                    o_MD, p = hopper.warpgroup_mma_wait(0, deps=[o, p])
                    o = hopper.warpgroup_mma_init(o_MD * shrink)
                    p = p_after
                    mbarrier.arrive(empty.index(at % SLOTS), count=1)
                    at += 1
                mbarrier.arrive(q_empty.index(slot), count=1)
                o = add_values(p, o, v_tiles, v_full, at, own_lo + N >= own_hi)
                row_M = m + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
                empty_M = sum_M == 0.0
                sum_M = gl.where(empty_M, 1.0, sum_M)
                lse_M = gl.where(empty_M, 0.0, top_M * scale_log2 + gl.log2(sum_M))
                gl.store(lse + first.to(gl.int64) * num_heads + h + row_M * num_heads, lse_M, mask=row_M < num_q)
                part_M = gl.convert_layout(1.0 / sum_M, gl.SliceLayout(1, O_LAYOUT))
                tma.store_wait(0)  # of the tile before
                o_MD = hopper.warpgroup_mma_wait(0, deps=[o])
                mbarrier.arrive(empty.index(at % SLOTS), count=1)
                at += 1
                o_MD = o_MD * part_M[:, None]
                base = out_pointer + first.to(gl.int64) * stride_ot + h * stride_oh
                store_tile(o_MD, out, base, h * stride_oh, staged, first, m, num_q, stride_ot, O_LAYOUT)
                at = pass_by(at, end - at, k_full, v_full, empty)
            else:
                at = pass_by(at, end - at, k_full, v_full, empty)
                mbarrier.arrive(q_empty.index(slot), count=1)
            tile += 1
        count += 1
        item, h, first, num_q, length, m_first = take(news, count, 6)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["window", "num_items", "num_whole"])
def _softmax_fwd_hopper_kernel(
    q, k, v, out, out_pointer, lse, offsets, counter, num_items, num_whole, num_parts, num_heads, num_shared, window,
    scale_log2,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr,
    stride_ot: gl.constexpr, stride_oh: gl.constexpr,
    D: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, GROUPS: gl.constexpr, REGISTERS: gl.constexpr,
    SHARED: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """q, k, v and out are the copy engine's descriptors, of 64 rows (q, out) and BLOCK_N rows (k, v). With SHARED the
    same `num_shared` queries serve every example. The scale is positive."""
    tiles, barriers, news = allocate(q, k, out, D, BLOCK_N, SLOTS, GROUPS)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (out, out_pointer, lse, num_items, num_heads, window, scale_log2,
                            tiles, barriers, news, stride_ot, stride_oh, 0, GROUPS, WINDOW)),
                (_consume, (out, out_pointer, lse, num_items, num_heads, window, scale_log2,
                            tiles, barriers, news, stride_ot, stride_oh, 1, GROUPS, WINDOW)),
                (produce, (q, k, v, offsets, offsets, counter, num_items, num_whole, num_parts, num_heads, num_shared,
                           0, window, tiles, barriers, news, stride_qh, stride_kh, stride_vh,
                           GROUPS, SHARED, True, WINDOW)),
            ],
            [4, 1], [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (out, out_pointer, lse, num_items, num_heads, window, scale_log2,
                            tiles, barriers, news, stride_ot, stride_oh, 0, GROUPS, WINDOW)),
                (_consume, (out, out_pointer, lse, num_items, num_heads, window, scale_log2,
                            tiles, barriers, news, stride_ot, stride_oh, 1, GROUPS, WINDOW)),
                (_consume, (out, out_pointer, lse, num_items, num_heads, window, scale_log2,
                            tiles, barriers, news, stride_ot, stride_oh, 2, GROUPS, WINDOW)),
                (produce, (q, k, v, offsets, offsets, counter, num_items, num_whole, num_parts, num_heads, num_shared,
                           0, window, tiles, barriers, news, stride_qh, stride_kh, stride_vh,
                           GROUPS, SHARED, True, WINDOW)),
            ],
            [4, 4, 1], [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
