"""Launches of seed attention's backward on Hopper: where it runs, and its tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hopper import ROWS, described, engine_view, multiprocessors
from kernels.jagged import ENOUGH_PROGRAMS, like

_BLOCK_SEEDS = 256  # that fit on chip
_MOST_SEEDS = 512  # each block after the first rounds dK and dV once more
_KEYS = 64  # of a tile
_EXAMPLES = 1024  # whose tiles are counted at once
_BLOCK, _SHARES = 256, 16  # of a tile of shares that are added at once


@dataclass(frozen=True, slots=True)
class SeedsRings:
    """Parts of 64 seeds of each of two groups, key tiles on chip, examples' dO on chip."""

    parts: int
    places: int
    do_places: int


def takes_seeds(dtype: torch.dtype, width: int, programs: int, seeds: int) -> bool:
    """False: other kernels are faster, or this one cannot take the problem of so many (example, head) pairs."""
    is_taken = dtype in (torch.bfloat16, torch.float16) and width in (64, 128) and programs >= ENOUGH_PROGRAMS
    return is_taken and ROWS < seeds <= _MOST_SEEDS


@functools.lru_cache(64)
def seeds_rings(width: int, seeds: int) -> SeedsRings:
    """For a block of at most _BLOCK_SEEDS."""
    parts = 1 if seeds <= 2 * ROWS else 2
    return SeedsRings(parts, 1 if width * parts == 256 else 2, 2 if width * parts == 64 else 1)


def seeds_backward_on_hopper(tensors: tuple[Tensor, ...], scales: tuple[float, float]) -> Tensor | None:
    """Fill dK and dV, return dQ; None, with nothing done, where a tensor's layout forbids it."""
    q, k, v, out, grad, lse, dk, dv, offsets = tensors
    if any(engine_view(x) is None for x in (q, k, v, out, grad, dk, dv)):
        return None
    from kernels.attention.triton_seeds_kernels import _count_tiles_kernel
    from kernels.launcher import launch

    before, dq = torch.empty_like(offsets), like(q)
    num_examples = offsets.shape[0] - 1
    launch(_count_tiles_kernel, (1,), offsets, before, num_examples, KEYS=_KEYS, BLOCK=_EXAMPLES, num_warps=4)
    for first in range(0, q.shape[0], _BLOCK_SEEDS):
        block = slice(first, first + _BLOCK_SEEDS)
        of_seeds = q[block], out[first:], grad[first:], lse[first:], dq[block]
        _backward_of_block(of_seeds, (k, v, dk, dv, before, offsets), q.shape[0], scales, adds=first > 0)
    return dq


def _backward_of_block(
    of_seeds: tuple[Tensor, ...], of_keys: tuple[Tensor, ...], num_shared: int, scales: tuple[float, float], adds: bool
) -> None:
    """Fill dQ of some of each example's `num_shared` seeds; fill their dK and dV or add to what is there."""
    from kernels.attention.hopper_seeds_backward import _seeds_bwd_hopper_kernel
    from kernels.attention.triton_seeds_kernels import _add_shares_kernel
    from kernels.launcher import launch

    (q, out, grad, lse, dq), (k, v, dk, dv, before, offsets) = of_seeds, of_keys
    (num_seeds, num_heads, width), num_examples = q.shape, offsets.shape[0] - 1
    rings = seeds_rings(width, num_seeds)
    query_rows = 2 * rings.parts * ROWS
    # None without a tile: a head has as many as its rows fill at least.
    programs = min(multiprocessors(q.device), num_heads * -(-k.shape[0] // _KEYS))
    shares = torch.empty((programs + num_heads - 1) * query_rows * width, dtype=torch.float32, device=q.device)
    engine = described((q, k, v, out, grad, dk, dv), [ROWS] * 7)
    assert engine is not None
    launch(
        _seeds_bwd_hopper_kernel, (programs,),
        *engine, dk, dv, lse, shares, before, offsets, num_examples, num_heads, num_shared, num_seeds, *scales,
        stride_qh=q.stride(1), stride_kh=k.stride(1), stride_vh=v.stride(1), stride_doh=grad.stride(1),
        stride_gt=dk.stride(0), stride_gh=dk.stride(1),
        D=width, PARTS=rings.parts, PLACES=rings.places, DO_PLACES=rings.do_places, ADDS=adds, num_warps=4,
    )  # fmt: skip
    launch(
        _add_shares_kernel, (-(-num_seeds * width // _BLOCK), num_heads),
        shares, before, dq, num_examples, num_heads, num_seeds, query_rows, programs,
        D=width, BLOCK=_BLOCK, SHARES=_SHARES, num_warps=4,
    )  # fmt: skip
