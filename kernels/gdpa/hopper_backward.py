"""GDPA's backward on Hopper, in Gluon: a warp of its own asks for copies, and two groups of four warps compute.

Shape letters as in `kernels/gdpa/triton_kernels.py`; tiles have M = 64 queries and N = 128 keys. The groups are in
`hopper_backward_groups`, the copying warp in `hopper_backward_units`.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from kernels.gdpa.hopper_backward_groups import narrow_group, wide_group
from kernels.gdpa.hopper_backward_turns import KEPT_LAYOUT, turns_group
from kernels.gdpa.hopper_backward_units import M, produce, words
from kernels.hopper_ring import barriers_of, news_of


@gluon.jit
def _group(
    grads, pointers, num_kv, inner, outer, units, tiles, made, barriers, exchange,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr, GROUP: gl.constexpr, KEPT: gl.constexpr,
    PARTS: gl.constexpr, JAGGED: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    if KEPT > 0:
        turns_group(grads, pointers, num_kv, inner, outer, units, tiles, made, barriers, exchange,
                    stride_gt, stride_gh, GROUP, JAGGED, ACTIVATION, APPROX)  # fmt: skip
    elif tiles[0].shape[2] == 64:
        narrow_group(grads, pointers, num_kv, inner, outer, units, tiles, made, barriers, exchange,
                     stride_gt, stride_gh, GROUP, JAGGED, ACTIVATION, APPROX)  # fmt: skip
    else:
        wide_group(grads, pointers, num_kv, inner, outer, units, tiles, made, barriers, exchange,
                   stride_gt, stride_gh, GROUP, PARTS, JAGGED, ACTIVATION, APPROX)  # fmt: skip


@gluon.jit(do_not_specialize=["num_units", "longest"])
def _gdpa_bwd_hopper_kernel(
    q, k, v, do, dq, dk, dv, dq_pointer, dk_pointer, dv_pointer, counter, q_offsets, kv_offsets,
    num_units, num_heads, num_kv, longest, inner, outer,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    stride_gt: gl.constexpr, stride_gh: gl.constexpr,
    D: gl.constexpr, SLOTS: gl.constexpr, SWAPS: gl.constexpr, PLACES: gl.constexpr, KEPT: gl.constexpr,
    PARTS: gl.constexpr, JAGGED: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """q to dv are the copy engine's descriptors, of 64 rows; dq's are of half a head's columns, or where dQ is KEPT of
    all.

    A unit of work is an example and head: its key tiles follow one another and add to dQ, in dQ's type. At D = 64 they
    may keep the sums of its first KEPT query tiles on chip. Or, of two PARTS (D = 128), it is one key tile: each adds
    to the zeros that dQ holds, which is the same number in either order. `counter` is two int32, 0 before and after,
    that hand out the units. Examples of more keys than `longest` are left alone.
    """
    TYPE: gl.constexpr = q.dtype
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, M], TYPE)
    q_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, M, D], q.layout)
    do_tiles = gl.allocate_shared_memory(TYPE, [SLOTS, M, D], do.layout)
    if D == 128:
        k_tiles = gl.allocate_shared_memory(TYPE, [4, 64, D], k.layout)
        v_tiles = k_tiles  # keys and values change places
        made = gl.allocate_shared_memory(TYPE, [2 * (SWAPS + 2), 64, M], DS_LAYOUT)
    else:
        k_tiles = gl.allocate_shared_memory(TYPE, [2 * PLACES, 64, D], k.layout)
        v_tiles = gl.allocate_shared_memory(TYPE, [2 * PLACES, 64, D], v.layout)
        ds_tiles = gl.allocate_shared_memory(TYPE, [2 * SWAPS, 64, M], DS_LAYOUT)
        kept_tiles = ds_tiles
        if KEPT > 0:
            kept_tiles = gl.allocate_shared_memory(TYPE, [KEPT, M, D], KEPT_LAYOUT)
        made = (ds_tiles, kept_tiles, gl.allocate_shared_memory(TYPE, [2, M, D if KEPT > 0 else D // 2], dq.layout))
    units = news_of(2, words(JAGGED), 2)
    q_full, do_full, kv_full = barriers_of(SLOTS, 1), barriers_of(SLOTS, 1), barriers_of(2, 2 if D == 128 else 4)
    kv_empty = kv_full  # not read
    if PLACES > 1:
        kv_empty = barriers_of(PLACES, 2)
    full_0, full_1 = barriers_of(SLOTS if KEPT > 0 else SWAPS, 1), barriers_of(SLOTS if KEPT > 0 else SWAPS, 1)
    free_0, free_1 = barriers_of(PLACES if KEPT > 0 else SWAPS, 1), barriers_of(PLACES if KEPT > 0 else SWAPS, 1)
    if KEPT > 0:
        barriers = (q_full, do_full, (full_0, full_1), kv_full, kv_empty)
    else:
        barriers = (q_full, do_full, barriers_of(SLOTS, 2), kv_full, kv_empty)
    hopper.fence_async_shared()
    tiles = (q_tiles, do_tiles, k_tiles, v_tiles)
    offsets, sizes = (q_offsets, kv_offsets), (num_heads, num_kv, longest)
    grads, pointers = (dq, dk, dv), (dq_pointer, dk_pointer, dv_pointer)
    gl.warp_specialize(
        [
            (_group, (grads, pointers, num_kv, inner, outer, units, tiles, made, barriers,
                      (full_0, full_1, free_0, free_1), stride_gt, stride_gh, 0, KEPT,
                      PARTS, JAGGED, ACTIVATION, APPROX)),
            (_group, (grads, pointers, num_kv, inner, outer, units, tiles, made, barriers,
                      (full_1, full_0, free_1, free_0), stride_gt, stride_gh, 1, KEPT,
                      PARTS, JAGGED, ACTIVATION, APPROX)),
            (produce, (q, k, v, do, counter, offsets, sizes, num_units, units, tiles, barriers,
                       (full_0, full_1, free_0, free_1), stride_qh, stride_kh, stride_vh, stride_doh,
                       PARTS, JAGGED, KEPT > 0)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
