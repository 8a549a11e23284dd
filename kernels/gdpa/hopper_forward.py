"""GDPA's forward on Hopper, in Gluon; `kernels/hopper_ring.py` says who does what.

Shape letters as in `kernels/gdpa/triton_kernels.py`. A group's scores of the next key tile are computed while its
weights of this one meet the values.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gdpa.triton_activations import activate, activate_bare, bare_factor
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
def weights(
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
    out, out_pointer, num_items, window, inner, outer, tiles, barriers, news,
    stride_ot: gl.constexpr, stride_oh: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
    WINDOW: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """One group: 64 rows of every query tile."""
    q_tiles, k_tiles, v_tiles, o_tiles = tiles
    q_full, q_empty, k_full, v_full, empty = barriers
    Q_SLOTS: gl.constexpr = q_tiles.shape[0] // GROUPS
    SLOTS: gl.constexpr = k_tiles.shape[0]
    N: gl.constexpr = k_tiles.shape[1]
    D: gl.constexpr = k_tiles.shape[2]
    TYPE: gl.constexpr = q_tiles.dtype
    BARE: gl.constexpr = q_tiles.dtype == gl.bfloat16  # the range of fp16 is small
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
                s_MN = hopper.warpgroup_mma_wait(0, deps=[s])
                p = weights(s_MN, m, own_lo, length, window, inner, outer, TYPE, S_LAYOUT, O_LAYOUT,
                             WINDOW, ACTIVATION, APPROX, BARE)  # fmt: skip
                for n in range(own_lo + N, own_hi, N):
                    s, o = start_step(queries, p, s_MN, o, k_tiles, v_tiles, k_full, v_full, at, n == own_lo + N)
                    s_MN = hopper.warpgroup_mma_wait(1, deps=[s])
                    p_after = weights(s_MN, m, n, length, window, inner, outer, TYPE, S_LAYOUT, O_LAYOUT,
                                       WINDOW, ACTIVATION, APPROX, BARE)  # fmt: skip
                    o_MD, p = hopper.warpgroup_mma_wait(0, deps=[o, p])
                    o = hopper.warpgroup_mma_init(o_MD)
                    p = p_after
                    mbarrier.arrive(empty.index(at % SLOTS), count=1)
                    at += 1
                mbarrier.arrive(q_empty.index(slot), count=1)
                o = add_values(p, o, v_tiles, v_full, at, own_lo + N >= own_hi)
                tma.store_wait(0)  # of the tile before
                o_MD = hopper.warpgroup_mma_wait(0, deps=[o])
                mbarrier.arrive(empty.index(at % SLOTS), count=1)
                at += 1
                if BARE:
                    o_MD = o_MD * bare_factor(inner, outer, ACTIVATION)
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
def _gdpa_fwd_hopper_kernel(
    q, k, v, out, out_pointer, q_offsets, kv_offsets, counter, num_items, num_whole, num_parts, num_heads, num_kv,
    window, inner, outer,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr,
    stride_ot: gl.constexpr, stride_oh: gl.constexpr,
    D: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, GROUPS: gl.constexpr, REGISTERS: gl.constexpr,
    JAGGED: gl.constexpr, WINDOW: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """q, k, v and out are the copy engine's descriptors, of 64 rows (q, out) and BLOCK_N rows (k, v). A program that is
    done with an item takes another off `counter`, two int32 that are 0 before and after."""
    tiles, barriers, news = allocate(q, k, out, D, BLOCK_N, SLOTS, GROUPS)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (out, out_pointer, num_items, window, inner, outer, tiles, barriers, news,
                            stride_ot, stride_oh, 0, GROUPS, WINDOW, ACTIVATION, APPROX)),
                (_consume, (out, out_pointer, num_items, window, inner, outer, tiles, barriers, news,
                            stride_ot, stride_oh, 1, GROUPS, WINDOW, ACTIVATION, APPROX)),
                (produce, (q, k, v, q_offsets, kv_offsets, counter, num_items, num_whole, num_parts, num_heads, 0,
                           num_kv, window, tiles, barriers, news, stride_qh, stride_kh, stride_vh,
                           GROUPS, False, JAGGED, WINDOW)),
            ],
            [4, 1], [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (out, out_pointer, num_items, window, inner, outer, tiles, barriers, news,
                            stride_ot, stride_oh, 0, GROUPS, WINDOW, ACTIVATION, APPROX)),
                (_consume, (out, out_pointer, num_items, window, inner, outer, tiles, barriers, news,
                            stride_ot, stride_oh, 1, GROUPS, WINDOW, ACTIVATION, APPROX)),
                (_consume, (out, out_pointer, num_items, window, inner, outer, tiles, barriers, news,
                            stride_ot, stride_oh, 2, GROUPS, WINDOW, ACTIVATION, APPROX)),
                (produce, (q, k, v, q_offsets, kv_offsets, counter, num_items, num_whole, num_parts, num_heads, 0,
                           num_kv, window, tiles, barriers, news, stride_qh, stride_kh, stride_vh,
                           GROUPS, False, JAGGED, WINDOW)),
            ],
            [4, 4, 1], [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
