"""The GDPA block's backward on Hopper in one kernel, in Gluon, for at most 128 keys: reads S, out and dOut, writes dS.

As in forward (`kernels/gdpa_block/hopper_forward.py`), a program has one head, and a team of programs, one a head,
takes the same query tiles in step and exchanges what both norms need of a row. With do = dOut and what forward kept of
a row (mean and rstd of S, rms), its W = H D numbers of all heads give

    q = (S - mean) rstd, unit = out - S, c = sum(do unit) / W, dg = rms (do - c unit);
    dq = dg + GDPA's gradient of q for dg, a = sum(dq) / W, b = sum(dq q) / W, dS = rstd (dq - a - b q) + do.

Eight warps compute, in two groups of four (`hopper_backward_few.py`, `hopper_backward_many.py`, by the number of keys);
another one has tiles copied. The eight are one partition, and so run one copy of the code: two partitions of four warps
have one each, more than the instruction cache holds, and take twice the time.

Shape letters: T rows of all examples, H heads, D = 128 head width, N = 64 or 128 keys, W = H D.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.gdpa_block.hopper_backward_few import consume_few_keys
from kernels.gdpa_block.hopper_backward_many import consume_many_keys
from kernels.gdpa_block.hopper_mailbox import GROUPS, TURNS
from kernels.hopper_ring import PRODUCER_REGISTERS, ROWS, announce, barriers_of, copy_in, news_of

_NEWS = gl.constexpr(4)  # query tiles that the copying warp tells of ahead
_PADDING = gl.constexpr(32)  # rows of an example's last tile that are not its own, in the mean


@gluon.jit
def _first_example(share, num_shares, offsets, num_rows, num_examples):
    """The first example of one of the shares of about as many rows each, padding of last tiles counted."""
    goal = (num_rows.to(gl.int64) + num_examples * _PADDING) * share // num_shares
    b = num_examples * 0
    after = num_examples
    while b < after:
        middle = (b + after) // 2
        is_before = gl.load(offsets + middle).to(gl.int64) + middle * _PADDING < goal
        b = gl.where(is_before, middle + 1, b)
        after = gl.where(is_before, after, middle)
    return b


@gluon.jit
def _produce(
    s, out, do, k, v, offsets, num_rows, num_examples, num_kv, team, num_teams, h, tiles, barriers, news
):  # fmt: skip
    """The warp that has tiles copied: those of the team's examples, one after another."""
    x_tiles, k_tiles, v_tiles, _ = tiles
    s_tiles, out_tiles, do_tiles = x_tiles
    full, empty, kv_full, kv_empty = barriers
    PLACES: gl.constexpr = empty.shape[0]
    KV_PLACES: gl.constexpr = kv_empty.shape[0]
    D: gl.constexpr = s_tiles.shape[2]
    begin = _first_example(team, num_teams, offsets, num_rows, num_examples)
    end = _first_example(team + 1, num_teams, offsets, num_rows, num_examples)
    tile = 0
    told = 0
    items = 0
    for b in range(begin, end):
        first = gl.load(offsets + b)
        num_q = gl.load(offsets + b + 1) - first
        if num_q == 0:
            announce((b, 0, 0, 0), news, told)
            told += 1
        for m in range(0, num_q, ROWS):
            place = tile % PLACES
            mbarrier.wait(empty.index(place), (tile // PLACES & 1) ^ 1)
            copy_in(s, first + m, h * D, full.index(place), s_tiles.index(place), True)
            copy_in(out, first + m, h * D, full.index(place), out_tiles.index(place), True)
            copy_in(do, first + m, h * D, full.index(place), do_tiles.index(place), True)
            announce((b, first + m, num_q - m, tile), news, told)
            told += 1
            tile += 1
            if m == 0:
                at = items % KV_PLACES
                mbarrier.wait(kv_empty.index(at), (items // KV_PLACES & 1) ^ 1)
                copy_in(k, b * num_kv, h * D, kv_full.index(at), k_tiles.index(at), True)
                copy_in(v, b * num_kv, h * D, kv_full.index(at), v_tiles.index(at), True)
                items += 1
    announce((-1, 0, 0, 0), news, told)


@gluon.jit
def _consume(
    grads, norms, num_kv, inner, outer, h, boxes, tiles, barriers, news,
    D: gl.constexpr, H: gl.constexpr, N: gl.constexpr, ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    if N == 64:
        consume_few_keys(grads, norms, num_kv, inner, outer, h, boxes, tiles, barriers, news, D, H, ACTIVATION, APPROX)
    else:
        consume_many_keys(grads, norms, num_kv, inner, outer, h, boxes, tiles, barriers, news, D, H, ACTIVATION, APPROX)


@gluon.jit(do_not_specialize=["num_rows", "num_examples", "num_kv", "num_teams"])
def _gdpa_block_bwd_hopper_kernel(
    s, out, do, k, v, ds, dk, dv, ds_pointer, dk_pointer, dv_pointer, norms, offsets, tickets, boxes,
    num_rows, num_examples, num_kv, num_teams, inner, outer,
    D: gl.constexpr, H: gl.constexpr, N: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, APPROX: gl.constexpr,
):  # fmt: skip
    """s to dv are the copy engine's descriptors, of 64 rows, and those of keys of N.

    A program takes its place in a team off `tickets`, as in forward; there must be no more programs than run at once.
    `tickets` (int32) and `boxes` (int64) hold zeros. `num_kv` is at most N. All tensors but norms are bf16.
    """
    TYPE: gl.constexpr = s.dtype
    KV_PLACES: gl.constexpr = 128 // N
    P_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, ROWS], TYPE)
    # An allocation a tensor: Triton puts barriers between what touches the same one.
    s_tiles = gl.allocate_shared_memory(TYPE, [PLACES, ROWS, D], s.layout)
    out_tiles = gl.allocate_shared_memory(TYPE, [PLACES, ROWS, D], s.layout)
    do_tiles = gl.allocate_shared_memory(TYPE, [PLACES, ROWS, D], s.layout)
    k_tiles = gl.allocate_shared_memory(TYPE, [KV_PLACES, N, D], k.layout)
    v_tiles = gl.allocate_shared_memory(TYPE, [KV_PLACES, N, D], v.layout)
    ds_tiles = gl.allocate_shared_memory(TYPE, [1, N, ROWS], P_LAYOUT)
    p_tiles = ds_tiles
    if N == 64:
        p_tiles = gl.allocate_shared_memory(TYPE, [1, N, ROWS], P_LAYOUT)
    news = news_of(_NEWS, 4, 1)
    barriers = (barriers_of(PLACES, 3), barriers_of(PLACES, 1), barriers_of(KV_PLACES, 2), barriers_of(KV_PLACES, 1))
    hopper.fence_async_shared()
    tiles = ((s_tiles, out_tiles, do_tiles), k_tiles, v_tiles, (p_tiles, ds_tiles))
    ticket = gl.atomic_add(tickets, 1)
    team, h = ticket // H, ticket % H
    # Three words a row and share: for the second sums (two) and the first ones.
    BOX: gl.constexpr = TURNS * ROWS * H * GROUPS
    second_box = boxes + team * (3 * BOX)
    first_box = second_box + 2 * BOX
    boxes = (first_box, second_box)
    grads = (ds, dk, dv, ds_pointer, dk_pointer, dv_pointer)
    copies = (s, out, do, k, v, offsets, num_rows, num_examples, num_kv, team, num_teams, h, tiles, barriers, news)
    gl.warp_specialize(
        [
            (_consume, (grads, norms, num_kv, inner, outer, h, boxes, tiles, barriers, news, D, H, N,
                        ACTIVATION, APPROX)),
            (_produce, copies),
        ],
        [1], [PRODUCER_REGISTERS],
    )  # fmt: skip
