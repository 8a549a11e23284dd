"""Launches of seed attention's backward on Hopper: where it runs, and its tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hopper import ROWS, described, multiprocessors
from kernels.jagged import ENOUGH_PROGRAMS

_KEYS = 64  # of a tile
_BLOCK_ROWS = 64
_EXAMPLES = 1024
_BLOCK, _SHARES = 256, 16


@dataclass(frozen=True, slots=True)
class SeedsRings:
    """Parts of 64 seeds of each of two groups, key tiles on chip, examples' dO on chip."""

    parts: int
    places: int
    do_places: int


@functools.lru_cache(1024)
def seeds_rings(dtype: torch.dtype, width: int, seeds: int, programs: int) -> SeedsRings | None:
    """None: other kernels are faster, or this one cannot take the problem."""
    if dtype not in (torch.bfloat16, torch.float16) or programs < ENOUGH_PROGRAMS:
        return None
    if width not in (64, 128) or not ROWS < seeds <= 4 * ROWS:
        return None
    parts = 1 if seeds <= 2 * ROWS else 2
    return SeedsRings(parts, 1, 1) if width * parts == 256 else SeedsRings(parts, 2, 2)


def seeds_backward_on_hopper(tensors: tuple[Tensor, ...], scales: tuple[float, float], rings: SeedsRings) -> Tensor | None:
    """Fill dK and dV, return dQ; None, with nothing done, where a tensor's layout forbids it."""
    q, k, v, out, grad, lse, dk, dv, offsets = tensors
    (num_shared, num_heads, width), num_examples = q.shape, offsets.shape[0] - 1
    parts = 2 * rings.parts  # of a head's seeds
    query_rows = parts * ROWS
    programs = multiprocessors(q.device)
    engine = described((q, k, v, grad, dk, dv), [ROWS] * 6)
    if engine is None:
        return None
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from kernels.attention.hopper_seeds_backward import _seeds_bwd_hopper_kernel
    from kernels.attention.triton_seeds_kernels import _add_shares_kernel, _prepare_seeds_kernel
    from kernels.launcher import descriptor, launch

    shares = torch.empty((programs + num_heads - 1) * query_rows * width, dtype=torch.float32, device=q.device)
    stats = torch.empty((num_examples * num_heads * parts, 2 * ROWS), dtype=torch.float32, device=q.device)
    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    view = list(stats.shape), [2 * ROWS, 1]
    stats_engine = descriptor(TensorDescriptor, stats, view, [parts, 2 * ROWS], flat)
    before = torch.empty_like(offsets)
    launch(
        _prepare_seeds_kernel, (1 + -(-num_examples * num_heads * query_rows // _BLOCK_ROWS),),
        out, grad, lse, offsets, stats, before, num_examples, num_shared, query_rows, scales[0],
        stride_dot=grad.stride(0), stride_doh=grad.stride(1), H=num_heads, D=width, BLOCK_ROWS=_BLOCK_ROWS, KEYS=_KEYS,
        EXAMPLES=_EXAMPLES, num_warps=4,
    )  # fmt: skip
    launch(
        _seeds_bwd_hopper_kernel, (programs,),
        *engine[:4], stats_engine, *engine[4:], dk, dv, shares, before, offsets, num_examples, num_heads, num_shared, *scales,
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
