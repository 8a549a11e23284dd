"""Launches of GDPA's Gluon kernels on Hopper, here and in `kernels/window`: where they run, and their tiles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.gdpa.tiles import Problem
from kernels.hopper import ROWS, HopperTiles, counter, described, multiprocessors, shared_out
from kernels.window.hopper import SHORT_ROWS, window_backward_on_hopper, window_slots


@dataclass(frozen=True, slots=True)
class HopperRings:
    """Backward: query tiles on chip, places in which the groups exchange dS, key tiles on chip, and query tiles of an
    example whose dQ stays on chip from key tile to key tile (D = 64)."""

    slots: int
    swaps: int
    places: int
    kept: int = 0

    def dq_columns(self, width: int) -> int:
        """Of a tile of dQ that a group stores: half a head's, or where it stays on chip all."""
        return width if self.kept else width // 2


# By (class of keys, width), where it measured faster than Triton on an H100.
_FORWARD: dict[tuple[str, int], HopperTiles] = {
    ("128", 128): HopperTiles(2, 64, 4),
    ("256", 32): HopperTiles(3, 64, 12),
    ("256", 64): HopperTiles(3, 64, 6),
    ("256", 128): HopperTiles(2, 64, 4),
    ("long", 32): HopperTiles(3, 64, 6),
    ("long", 64): HopperTiles(3, 64, 6),
    ("long", 128): HopperTiles(2, 64, 4),
    ("window", 32): HopperTiles(2, 64, 12),
    ("window", 64): HopperTiles(3, 32, 12),
    ("window", 128): HopperTiles(2, 32, 8),
}


@functools.lru_cache(1024)
def hopper_tiles(problem: Problem) -> HopperTiles | None:
    """None: Triton's kernels are faster, or this one cannot take the problem."""
    return _FORWARD.get((problem.key_class, problem.width)) if problem.low_precision else None


# Likewise, where one program an example and head fills the card.
_BACKWARD: dict[tuple[str, bool], HopperRings] = {
    ("128", False): HopperRings(3, 2, 2),
    ("256", False): HopperRings(3, 2, 2),
    ("long", False): HopperRings(3, 2, 2, 8),
    ("128", True): HopperRings(3, 2, 1),
    ("256", True): HopperRings(3, 2, 1),
    ("long", True): HopperRings(3, 2, 1),
}
_ENOUGH_ELEMENTS = 2**25  # in all queries; with fewer the host takes longer than the card, and longer than for Triton's
_ENOUGH_QUERIES = 192  # in an example, of wide heads, whose start and end cost most


@functools.lru_cache(1024)
def hopper_rings(problem: Problem) -> HopperRings | None:
    """None: Triton's backward is faster, or the Gluon kernel cannot take the problem."""
    if not (problem.low_precision and problem.width in (64, 128) and problem.enough_examples):
        return None
    is_small = problem.query_rows * problem.num_heads * problem.width < _ENOUGH_ELEMENTS
    if is_small or (problem.width > 64 and problem.query_rows < _ENOUGH_QUERIES * problem.num_examples):
        return None
    return _BACKWARD.get((problem.key_class, problem.width > 64))


def key_parts(problem: Problem) -> int:
    """Backward: programs that share an example's keys.

    Two key tiles of wide heads, which are bound by memory, run side by side: both find the queries in the L2 cache.
    """
    return 2 if problem.width > 64 and problem.key_class == "256" else 1


def forward_on_hopper(
    qkvo: Sequence[Tensor],
    q_offsets: Tensor,
    kv_offsets: Tensor | None,
    problem: Problem,
    tiles: HopperTiles,
    activation: str,
    inner: float,
    outer: float,
) -> bool:
    """Fill out, of one run of heads of one activation; False, with nothing done, where a tensor's layout forbids it."""
    engine = described(qkvo, (ROWS, tiles.block_n, tiles.block_n, ROWS))
    if engine is None:
        return False
    from kernels.gdpa.hopper_forward import _gdpa_fwd_hopper_kernel
    from kernels.launcher import launch

    q, k, v, out = qkvo
    num_heads = q.shape[1]
    num_tiles = problem.query_tiles(tiles.groups * ROWS)
    items, num_whole, num_parts = shared_out(problem.num_examples, num_heads, problem.width, num_tiles)
    launch(
        _gdpa_fwd_hopper_kernel, (min(items, multiprocessors(q.device)),),
        *engine, out, q_offsets, q_offsets if kv_offsets is None else kv_offsets, counter(q.device),
        items, num_whole, num_parts, num_heads, problem.dense_keys or 0, problem.window or 0, inner, outer,
        stride_qh=q.stride(-2), stride_kh=k.stride(-2), stride_vh=v.stride(-2),
        stride_ot=out.stride(0), stride_oh=out.stride(1),
        D=problem.width, BLOCK_N=tiles.block_n, SLOTS=tiles.slots, GROUPS=tiles.groups, REGISTERS=tiles.registers,
        JAGGED=kv_offsets is not None, WINDOW=problem.window is not None, ACTIVATION=activation,
        APPROX=True, num_warps=4,
    )  # fmt: skip
    return True


def backward_on_hopper(
    qkvg: Sequence[Tensor],
    grads: Sequence[Tensor],
    q_offsets: Tensor,
    kv_offsets: Tensor | None,
    problem: Problem,
    rings: HopperRings,
    activation: str,
    inner: float,
    outer: float,
    longest: int,
) -> bool:
    """Fill dQ, dK, dV of examples of at most `longest` keys, of one run of heads of one activation; False, with nothing
    done, where a tensor's layout forbids it."""
    *plain, dq, dk, dv = (*qkvg, *grads)
    whole, of_dq = described((*plain, dk, dv), [ROWS] * 6), described([dq], [ROWS], rings.dq_columns(problem.width))
    if whole is None or of_dq is None:
        return False
    from kernels.gdpa.hopper_backward import _gdpa_bwd_hopper_kernel
    from kernels.launcher import launch

    q, k, v, grad = qkvg
    num_heads = q.shape[1]
    parts = key_parts(problem)
    if parts > 1:
        dq.zero_()
    units = problem.num_examples * num_heads * parts
    launch(
        _gdpa_bwd_hopper_kernel, (min(units, multiprocessors(q.device)),),
        *whole[:4], *of_dq, *whole[4:], *grads, counter(q.device),
        q_offsets, q_offsets if kv_offsets is None else kv_offsets,
        units, num_heads, problem.dense_keys or 0, longest, inner, outer,
        stride_qh=q.stride(-2), stride_kh=k.stride(-2), stride_vh=v.stride(-2), stride_doh=grad.stride(-2),
        stride_gt=dq.stride(0), stride_gh=dq.stride(1),
        D=problem.width, SLOTS=rings.slots, SWAPS=rings.swaps, PLACES=rings.places, KEPT=rings.kept,
        PARTS=parts, JAGGED=kv_offsets is not None, ACTIVATION=activation, APPROX=True, num_warps=4,
    )  # fmt: skip
    return True


def window_on_hopper(
    qkvg: Sequence[Tensor],
    grads: Sequence[Tensor],
    q_offsets: Tensor,
    kv_offsets: Tensor | None,
    problem: Problem,
    activation: str,
    inner: float,
    outer: float,
) -> bool:
    """As `backward_on_hopper`, of self-attention over a window: keys and queries have one tensor of offsets."""
    programs = problem.num_examples * problem.num_heads
    short = problem.query_rows <= SHORT_ROWS * problem.num_examples
    slots = window_slots(problem.dtype, problem.width, programs, short, problem.window)
    if not slots or kv_offsets is None or kv_offsets.data_ptr() != q_offsets.data_ptr():
        return False
    scales = inner, outer
    return window_backward_on_hopper(qkvg, grads, None, q_offsets, problem.window or 0, slots, activation, scales)
