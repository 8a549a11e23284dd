"""Which key tiles a program of seed attention's backward takes, and the warp that has them copied.

Shape letters as in `kernels/attention/hopper_seeds_backward.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.hopper_ring import announce, copy_in

M = gl.constexpr(64)
N = gl.constexpr(64)
WORDS = gl.constexpr(8)  # that an announcement has room for


@gluon.jit
def share(before, num_examples, num_heads):
    """This program's first tile and end, of all heads' tiles, and the tiles of one head."""
    each = gl.load(before + num_examples)
    total = each.to(gl.int64) * num_heads
    first = total * gl.program_id(0) // gl.num_programs(0)
    end = total * (gl.program_id(0) + 1) // gl.num_programs(0)
    return first.to(gl.int32), end.to(gl.int32), each


@gluon.jit
def _find(before, num_examples, tile):
    """The example that has this tile of a head's: before[b] <= tile < before[b + 1]."""
    b = 0
    width = num_examples
    while width > 1:
        step = (width + 127) // 128
        at_P = b + (gl.arange(0, 128, gl.BlockedLayout([4], [32], [gl.num_warps()], [0])) + 1) * step
        inside_P = at_P < b + width
        starts_P = gl.load(before + at_P, mask=inside_P, other=0)
        steps = gl.sum((inside_P & (starts_P <= tile)).to(gl.int32), 0)
        b += steps * step
        width = gl.minimum(step, width - steps * step)
    return b


@gluon.jit
def _rows(offsets, b):
    first = gl.load(offsets + b)
    return first, gl.load(offsets + b + 1) - first


@gluon.jit
def o_tile(o_tiles, group: gl.constexpr, j: gl.constexpr, PARTS: gl.constexpr):
    """Where part j of a group's O goes: a place of its own, or what P's (part 0) or dS's has been."""
    first, second = o_tiles
    if first.shape[0] == 2 * PARTS:
        return first.index(group * PARTS + j)
    elif j == 0:
        return first.index(group)
    else:
        return second.index(group)


@gluon.jit
def produce(
    q, k, v, o, do, before, offsets, num_examples, num_heads, num_shared, units, tiles, barriers,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    stride_gh: gl.constexpr,
):  # fmt: skip
    """One warp: announces key tiles and has them copied, with a head's first tile Q, with an example's dO and O."""
    q_tiles, o_tiles, do_tiles, k_tiles, v_tiles = tiles
    q_full, q_empty, o_full, o_empty, do_full, do_empty, k_full, k_empty, v_full, v_empty = barriers
    ALL: gl.constexpr = q_tiles.shape[0]
    PARTS: gl.constexpr = ALL // 2
    PLACES: gl.constexpr = k_tiles.shape[0]
    DO_PLACES: gl.constexpr = do_tiles.shape[0] // ALL
    first_tile, end, each = share(before, num_examples, num_heads)
    h = first_tile // each
    b = _find(before, num_examples, first_tile - h * each)
    n = (first_tile - h * each - gl.load(before + b)) * N
    kv_first, length = _rows(offsets, b)
    fresh = 2  # for a head's first tile here, 1 for an example's
    visit = 0  # examples so far
    heads = 0
    for i in range(end - first_tile):
        if n >= length:
            # The next tile is of an example after this one, or of the next head.
            n = 0
            b += 1
            fresh = 1
            if first_tile + i == (h + 1) * each:
                h += 1
                b = 0
                fresh = 2
            kv_first, length = _rows(offsets, b)
            while length == 0:
                b += 1
                kv_first, length = _rows(offsets, b)
        # The last tile of a head's.
        ends = (first_tile + i + 1 == end) | (first_tile + i + 1 == (h + 1) * each)
        announce((kv_first + n, length - n, h, b, fresh, ends.to(gl.int32)), units, i)
        at = i % PLACES
        mbarrier.wait(v_empty.index(at), (i // PLACES & 1) ^ 1)
        copy_in(v, kv_first + n, h * stride_vh, v_full.index(at), v_tiles.index(at), True)
        mbarrier.wait(k_empty.index(at), (i // PLACES & 1) ^ 1)
        copy_in(k, kv_first + n, h * stride_kh, k_full.index(at), k_tiles.index(at), True)
        if fresh == 2:
            mbarrier.wait(q_empty, (heads & 1) ^ 1)
            for part in gl.static_range(ALL):
                copy_in(q, part * M, h * stride_qh, q_full, q_tiles.index(part), True)
            heads += 1
        if fresh > 0:
            place = visit % DO_PLACES * ALL
            for part in gl.static_range(ALL):
                mbarrier.wait(do_empty.index(place + part), (visit // DO_PLACES & 1) ^ 1)
                full, tile = do_full.index(place + part), do_tiles.index(place + part)
                copy_in(do, b * num_shared + part * M, h * stride_doh, full, tile, True)
            mbarrier.wait(o_empty, (visit & 1) ^ 1)
            for part in gl.static_range(ALL):
                tile = o_tile(o_tiles, part // PARTS, part % PARTS, PARTS)
                copy_in(o, b * num_shared + part * M, h * stride_gh, o_full, tile, True)
            visit += 1
        fresh = 0
        n += N
