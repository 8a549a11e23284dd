"""Launches of seed attention's backward on Hopper: where it runs, and its tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hopper import ROWS, described, multiprocessors
from kernels.jagged import ENOUGH_PROGRAMS

_KEYS = 128  # of a tile
_BLOCK_ROWS = 64
_EXAMPLES = 1024


@dataclass(frozen=True, slots=True)
class SeedsRings:
    """Query tiles on chip, places in which the groups exchange dS."""

    slots: int
    swaps: int


@functools.lru_cache(1024)
def seeds_rings(dtype: torch.dtype, width: int, programs: int, short: bool) -> SeedsRings | None:
    """None: other kernels are faster, or this one cannot take the problem."""
    if dtype not in (torch.bfloat16, torch.float16) or programs < ENOUGH_PROGRAMS:
        return None
    return {128: SeedsRings(2, 1), 64: SeedsRings(3, 2)}.get(width)


def seeds_backward_on_hopper(tensors: tuple[Tensor, ...], scales: tuple[float, float], rings: SeedsRings) -> Tensor | None:
    """Fill dK and dV, return dQ; None, with nothing done, where a tensor's layout forbids it."""
    q, k, v, out, grad, lse, dk, dv, offsets = tensors
    (num_shared, num_heads, width), num_examples = q.shape, offsets.shape[0] - 1
    query_rows = -(-num_shared // ROWS) * ROWS
    programs = multiprocessors(q.device)
    shares = torch.empty(((programs + num_heads - 1) * query_rows, 1, width), dtype=torch.float32, device=q.device)
    whole = described((q, k, v, grad, dk, dv), [ROWS] * 6)
    halves = described([shares], [ROWS], width // 2)
    if whole is None or halves is None:
        return None
    from kernels.attention.hopper_seeds_backward import _seeds_bwd_hopper_kernel
    from kernels.attention.triton_seeds_kernels import _add_shares_kernel, _prepare_seeds_kernel
    from kernels.launcher import launch

    stats = torch.empty(num_examples * num_heads * query_rows * 2, dtype=torch.float32, device=q.device)
    before = torch.empty_like(offsets)
    launch(
        _prepare_seeds_kernel, (1 + -(-num_examples * num_heads * query_rows // _BLOCK_ROWS),),
        out, grad, lse, offsets, stats, before, num_examples, num_heads, num_shared, query_rows, scales[0],
        stride_dot=grad.stride(0), stride_doh=grad.stride(1), D=width, BLOCK_ROWS=_BLOCK_ROWS, KEYS=_KEYS,
        EXAMPLES=_EXAMPLES, num_warps=4,
    )  # fmt: skip
    launch(
        _seeds_bwd_hopper_kernel, (programs,),
        *whole[:4], *halves, *whole[4:], dk, dv, stats, before, offsets, num_examples, num_heads, num_shared, *scales,
        stride_qh=q.stride(1), stride_kh=k.stride(1), stride_vh=v.stride(1), stride_doh=grad.stride(1),
        stride_gt=dk.stride(0), stride_gh=dk.stride(1),
        D=width, SLOTS=rings.slots, SWAPS=rings.swaps, num_warps=4,
    )  # fmt: skip
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows = 512 // width
    launch(
        _add_shares_kernel, (-(-num_shared // rows), num_heads),
        shares, before, dq, num_examples, num_heads, num_shared, query_rows, programs,
        D=width, BLOCK_ROWS=rows, num_warps=4,
    )  # fmt: skip
    return dq
