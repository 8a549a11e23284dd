"""Launches of seed attention's backward on Hopper: where it runs, and its tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hopper import ROWS, described, multiprocessors
from kernels.jagged import ENOUGH_PROGRAMS

_KEYS = 64  # of a tile
_EXAMPLES = 1024  # whose tiles are counted at once
_BLOCK, _SHARES = 256, 16  # of a tile of shares that are added at once


@dataclass(frozen=True, slots=True)
class SeedsRings:
    """Parts of 64 seeds of each of two groups, key tiles on chip, examples' dO on chip."""

    parts: int
    places: int
    do_places: int


@functools.lru_cache(1024)
def seeds_rings(dtype: torch.dtype, width: int, programs: int, seeds: int) -> SeedsRings | None:
    """None: other kernels are faster, or this one cannot take the problem."""
    if dtype not in (torch.bfloat16, torch.float16) or programs < ENOUGH_PROGRAMS:
        return None
    if width not in (64, 128) or not ROWS < seeds <= 4 * ROWS:
        return None
    parts = 1 if seeds <= 2 * ROWS else 2
    return SeedsRings(parts, 1 if width * parts == 256 else 2, 2 if width * parts == 64 else 1)


def seeds_backward_on_hopper(
    tensors: tuple[Tensor, ...], scales: tuple[float, float], rings: SeedsRings
) -> Tensor | None:
    """Fill dK and dV, return dQ; None, with nothing done, where a tensor's layout forbids it."""
    q, k, v, out, grad, lse, dk, dv, offsets = tensors
    (num_shared, num_heads, width), num_examples = q.shape, offsets.shape[0] - 1
    parts = 2 * rings.parts  # of a head's seeds
    query_rows = parts * ROWS
    # None without a tile: a head has as many as its rows fill at least.
    programs = min(multiprocessors(q.device), num_heads * -(-k.shape[0] // _KEYS))
    engine = described((q, k, v, out, grad, dk, dv), [ROWS] * 7)
    if engine is None:
        return None
    from kernels.attention.hopper_seeds_backward import _seeds_bwd_hopper_kernel
    from kernels.attention.triton_seeds_kernels import _add_shares_kernel, _count_tiles_kernel
    from kernels.launcher import launch

    shares = torch.empty((programs + num_heads - 1) * query_rows * width, dtype=torch.float32, device=q.device)
    before = torch.empty_like(offsets)
    launch(_count_tiles_kernel, (1,), offsets, before, num_examples, KEYS=_KEYS, BLOCK=_EXAMPLES, num_warps=4)
    launch(
        _seeds_bwd_hopper_kernel, (programs,),
        *engine, dk, dv, lse, shares, before, offsets, num_examples, num_heads, num_shared, *scales,
        stride_qh=q.stride(1), stride_kh=k.stride(1), stride_vh=v.stride(1), stride_doh=grad.stride(1),
        stride_gt=dk.stride(0), stride_gh=dk.stride(1),
        D=width, PARTS=rings.parts, PLACES=rings.places, DO_PLACES=rings.do_places, num_warps=4,
    )  # fmt: skip
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    launch(
        _add_shares_kernel, (-(-num_shared * width // _BLOCK), num_heads),
        shares, before, dq, num_examples, num_heads, num_shared, query_rows, programs,
        D=width, BLOCK=_BLOCK, SHARES=_SHARES, num_warps=4,
    )  # fmt: skip
    return dq
