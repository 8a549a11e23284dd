"""Launches of softmax attention's kernels on Hopper: where they run, and their tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hopper import ROWS, HopperTiles, counter, described, engine_view, multiprocessors, shared_out
from kernels.jagged import ENOUGH_PROGRAMS
from kernels.window.hopper import SHORT_ROWS, window_backward_on_hopper, window_slots

_SMALL_WINDOW = 128  # up to it small tiles are faster: less of them is masked
_DELTA_ROWS = 64
TINY = 16  # keys an example in the mean, below which Triton's forward is faster


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """Rows of every tile, columns of scores for dK and dV that are computed at once, streamed tiles on chip (odd)."""

    block: int
    part: int
    slots: int


@functools.lru_cache(1024)
def forward_tiles(
    dtype: torch.dtype, width: int, tiny: bool, seeds: int | None, window: int | None
) -> HopperTiles | None:
    """None: Triton's kernel is faster, or this one cannot take the problem.

    Args:
        tiny: examples have fewer than TINY keys.
        seeds: how many queries all examples share.
    """
    if not _takes(dtype, width) or tiny or (seeds is not None and seeds <= ROWS):
        return None
    if width == 128:
        return HopperTiles(2, 64, 4)
    return HopperTiles(2, 64, 8) if seeds is not None or _is_small(window) else HopperTiles(3, 64, 6)


@functools.lru_cache(1024)
def backward_tiles(
    dtype: torch.dtype, width: int, programs: int, short: bool, seeds: int | None, window: int | None
) -> BackwardTiles | None:
    """As `forward_tiles`. `short`: few keys an example.

    Programs are (example, head) pairs: each walks all tiles of its own, so that few leave the card idle.
    """
    if not _takes(dtype, width) or programs < ENOUGH_PROGRAMS:
        return None
    if width == 64:
        return None if short else BackwardTiles(64, 64, 7)
    # Windows of at most 64 have `kernels/window`.
    return BackwardTiles(64, 32, 5) if seeds is not None or _is_small(window) else None


def forward_on_hopper(
    qkvo: tuple[Tensor, Tensor, Tensor, Tensor], lse: Tensor, offsets: Tensor, shared: bool, window: int | None,
    scale_log2: float, tiles: HopperTiles,
) -> bool:  # fmt: skip
    """Fill out and lse; False, with nothing done, where a tensor's layout or the scale's sign forbids it."""
    q, k, v, out = qkvo
    engine = described(qkvo, (ROWS, tiles.block_n, tiles.block_n, ROWS)) if scale_log2 > 0 else None
    if engine is None:
        return False
    from kernels.attention.hopper_forward import _softmax_fwd_hopper_kernel
    from kernels.launcher import launch

    num_examples, num_heads = offsets.shape[0] - 1, q.shape[1]
    num_tiles = -(-out.shape[0] // (num_examples * tiles.groups * ROWS))
    items, num_whole, num_parts = shared_out(num_examples, num_heads, q.shape[2], num_tiles)
    launch(
        _softmax_fwd_hopper_kernel, (min(items, multiprocessors(q.device)),),
        *engine, out, lse, offsets, counter(q.device),
        items, num_whole, num_parts, num_heads, q.shape[0], window or 0, scale_log2,
        stride_qh=q.stride(1), stride_kh=k.stride(1), stride_vh=v.stride(1),
        stride_ot=out.stride(0), stride_oh=out.stride(1),
        D=q.shape[2], BLOCK_N=tiles.block_n, SLOTS=tiles.slots, GROUPS=tiles.groups, REGISTERS=tiles.registers,
        SHARED=shared, WINDOW=window is not None, num_warps=4,
    )  # fmt: skip
    return True


def backward_on_hopper(
    tensors: tuple[Tensor, ...], shared: bool, window: int | None, scales: tuple[float, float], tiles: BackwardTiles
) -> bool:
    """Fill dQ, dK and dV; False, with nothing done, where a tensor's layout forbids it."""
    q, k, v, out, grad, lse, dq, dk, dv, offsets = tensors
    engine = described((q, k, v, grad, dq, dk, dv), [tiles.block] * 7)
    if engine is None:
        return False
    from kernels.attention.hopper_backward import _softmax_bwd_hopper_kernel
    from kernels.launcher import launch

    num_heads, width = out.shape[1:]
    delta = _delta(out, grad, lse)
    launch(
        _softmax_bwd_hopper_kernel, (2 * (offsets.shape[0] - 1) * num_heads,),
        *engine, dq, dk, dv, lse, delta, offsets, num_heads, q.shape[0], window or 0, *scales,
        stride_qh=q.stride(1), stride_kh=k.stride(1), stride_vh=v.stride(1), stride_doh=grad.stride(1),
        stride_gt=out.stride(0), stride_gh=out.stride(1),
        D=width, BLOCK=tiles.block, PART=tiles.part, SLOTS=tiles.slots,
        SHARED=shared, WINDOW=window is not None, num_warps=4,
    )  # fmt: skip
    return True


def window_on_hopper(tensors: tuple[Tensor, ...], window: int | None, scales: tuple[float, float]) -> bool:
    """As `backward_on_hopper`, where the tiles that a tile's window meets stay on chip."""
    q, k, v, out, grad, lse, dq, dk, dv, offsets = tensors
    num_examples = offsets.shape[0] - 1
    short = q.shape[0] <= SHORT_ROWS * num_examples
    slots = window_slots(q.dtype, q.shape[2], num_examples * q.shape[1], short, window)
    if slots is None or any(engine_view(x) is None for x in (q, k, v, grad)):
        return False
    return window_backward_on_hopper(
        (q, k, v, grad), (dq, dk, dv), (out, lse), offsets, window or 0, slots, "softmax", scales[::-1]
    )


def _delta(out: Tensor, grad: Tensor, lse: Tensor) -> Tensor:
    """rowsum(dO * O)."""
    from kernels.attention.triton_kernels import _softmax_delta_kernel
    from kernels.launcher import launch

    rows, num_heads, width = out.shape
    delta = torch.empty_like(lse)
    launch(
        _softmax_delta_kernel, (-(-rows * num_heads // _DELTA_ROWS),), out, grad, delta, rows, num_heads,
        stride_dot=grad.stride(0), stride_doh=grad.stride(1), D=width, BLOCK_ROWS=_DELTA_ROWS, num_warps=4,
    )  # fmt: skip
    return delta


def _is_small(window: int | None) -> bool:
    return window is not None and window <= _SMALL_WINDOW


def _takes(dtype: torch.dtype, width: int) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and width in (64, 128)
