"""Units of work of GDPA's backward on Hopper, and the warp that hands them out and has their tiles copied."""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.hopper_ring import announce, copy_in, example, give_back

M = gl.constexpr(64)  # queries of a tile
N = gl.constexpr(128)  # keys of a tile


@gluon.constexpr_function
def words(jagged):
    """How many numbers tell of a unit."""
    return 5 if jagged else 4


@gluon.jit
def _find(turn, num_units, offsets, sizes, PARTS: gl.constexpr, JAGGED: gl.constexpr):
    """Of the unit that is taken in this turn, for `describe`: head and part as one number, first row and number of
    queries, first row of keys, and if these are JAGGED their number. Past the last unit -1, and nothing else is meant.

    An example of more keys than `longest` has none, and no queries.
    """
    q_offsets, kv_offsets = offsets
    num_heads, num_kv, longest = sizes
    each = PARTS * num_heads
    b = example(gl.minimum(turn, num_units - 1) // each, num_units // each, q_offsets)
    place = gl.where(turn < num_units, turn % each, -1)
    first = gl.load(q_offsets + b)
    num_q = gl.load(q_offsets + b + 1) - first
    if JAGGED:
        kv_first = gl.load(kv_offsets + b)
        length = gl.load(kv_offsets + b + 1) - kv_first
        num_q = gl.where(length <= longest, num_q, 0)
        length = gl.where(length <= longest, length, 0)
        return place, first, num_q, kv_first, length
    else:
        return place, first, num_q, b * num_kv


@gluon.jit
def describe(found, num_kv, PARTS: gl.constexpr):
    """Head, first row and number of queries and of keys, first and end of the unit's keys."""
    place, first, num_q, kv_first = found[0], found[1], found[2], found[3]
    length = found[4] if len(found) > 4 else num_kv
    n_first, n_end = 0, length
    if PARTS > 1:
        n_first = place % PARTS * N
        n_end = gl.minimum(length, n_first + N)
    return place // PARTS, first, num_q, kv_first, length, n_first, n_end


@gluon.jit
def query_tile(step, n, num_q, D: gl.constexpr, PARTS: gl.constexpr):
    """First row of the query tile that key tile n takes after `step` rows.

    At D = 128 every other key tile of a unit goes backwards: the rows that were last are still in the L2 cache.
    """
    if (D == 128) and (PARTS == 1):
        step = gl.where(n // N % 2 == 1, (num_q - 1) // M * M - step, step)
    return step


@gluon.jit
def _copy_keys(k, v, row, k_column, v_column, full, k_tiles, v_tiles, at):
    """Start the copies of both groups' keys and values to place `at`."""
    for c in gl.static_range(2):
        copy_in(k, row + c * 64, k_column, full.index(at), k_tiles.index(2 * at + c), True)
        copy_in(v, row + c * 64, v_column, full.index(at), v_tiles.index(2 * at + c), True)


@gluon.jit
def _copy_both(x, row, column, full, tiles, at):
    """Start the copy of a tile of keys or values, both groups', to place `at` and the next."""
    for c in gl.static_range(2):
        copy_in(x, row + c * 64, column, full, tiles.index(at + c), True)


@gluon.jit
def _wait_for_both(of_0, of_1, t):
    """For a barrier of each group to complete for query tile t, if there was one. For tile t - SWAPS it must have."""
    SWAPS: gl.constexpr = of_0.shape[0]
    mbarrier.wait(of_0.index(gl.maximum(t, 0) % SWAPS), t // SWAPS & 1, pred=t >= 0)
    mbarrier.wait(of_1.index(gl.maximum(t, 0) % SWAPS), t // SWAPS & 1, pred=t >= 0)


@gluon.jit
def produce(
    q, k, v, do, counter, offsets, sizes, num_units, units, tiles, barriers, exchange,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr, stride_doh: gl.constexpr,
    PARTS: gl.constexpr, JAGGED: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One warp: hands out units, the next one from a counter, and asks the copy engine for all tiles.

    TURNS: the groups hand query tiles back as `hopper_backward_turns` does.
    """
    q_tiles, do_tiles, k_tiles, v_tiles = tiles
    q_full, do_full, empty, kv_full, kv_empty = barriers
    SLOTS: gl.constexpr = q_tiles.shape[0]
    PLACES: gl.constexpr = 1 if q_tiles.shape[2] == 128 else k_tiles.shape[0] // 2
    t = 0  # query tiles so far
    pair = 0  # key tiles so far
    i = 0
    found = _find(gl.program_id(0), num_units, offsets, sizes, PARTS, JAGGED)
    announce(found, units, i)
    while found[0] >= 0:
        h, first, num_q, kv_first, _, n_first, n_end = describe(found, sizes[1], PARTS)
        if num_q == 0:
            n_end = n_first
        for n in range(n_first, n_end, N):
            before = t - 1
            if PLACES > 1:
                at = pair % PLACES
                mbarrier.wait(kv_empty.index(at), (pair // PLACES & 1) ^ 1)
                _copy_keys(k, v, kv_first + n, h * stride_kh, h * stride_vh, kv_full, k_tiles, v_tiles, at)
            for step in range(0, num_q, M):
                m = query_tile(step, n, num_q, q_tiles.shape[2], PARTS)
                slot = t % SLOTS
                if TURNS:
                    # Free when both groups have written dS of the tile after the one in it.
                    for group in gl.static_range(2):
                        mbarrier.wait(empty[group].index((t + 1) % SLOTS), ((t + 1) // SLOTS & 1) ^ 1, pred=t >= SLOTS)
                else:
                    mbarrier.wait(empty.index(slot), (t // SLOTS & 1) ^ 1)
                copy_in(q, first + m, h * stride_qh, q_full.index(slot), q_tiles.index(slot), True)
                copy_in(do, first + m, h * stride_doh, do_full.index(slot), do_tiles.index(slot), True)
                t += 1
                if PLACES == 1:  # noqa: SIM102
                    # After two tiles of queries, whose places are free earlier. V's place is when both groups have left
                    # dS of the last query tile before, and is the next K's; K's is when both are done with that. The
                    # barriers of two tiles earlier are complete: a group arrives there before it frees that tile's
                    # place, which is full now.
                    if step == gl.minimum(M, (num_q - 1) // M * M):
                        at = 2 * (pair % 2)
                        _wait_for_both(exchange[0], exchange[1], before)
                        _copy_both(k, kv_first + n, h * stride_kh, kv_full.index(0), k_tiles, at)
                        _wait_for_both(exchange[2], exchange[3], before)
                        _copy_both(v, kv_first + n, h * stride_vh, kv_full.index(1), k_tiles, 2 - at)
            pair += 1
        # Not earlier: a program that is busy would keep a unit from the others.
        i += 1
        turn = gl.num_programs(0) + gl.atomic_add(counter, 1)
        found = _find(turn, num_units, offsets, sizes, PARTS, JAGGED)
        announce(found, units, i)
    give_back(counter)
