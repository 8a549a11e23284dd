"""Launches of GDPA's Gluon kernels on Hopper (`kernels/gdpa/hopper_*.py`): where they run, and their tiles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.gdpa.tiles import Problem


@dataclass(frozen=True, slots=True)
class HopperTiles:
    """Rows of a query tile and of a key tile, tiles of keys and values on chip (odd), warps; EARLY of the kernel."""

    block_m: int
    block_n: int
    slots: int
    num_warps: int
    early: bool = False


# By (class of keys, wide heads), where it measured faster than Triton on an H100. Shared memory holds two programs of 4
# warps, or one of 8, whose activations then have to hide behind their own products.
_SMALL_WINDOW = 64
_FORWARD: dict[tuple[str, bool], HopperTiles] = {
    ("256", False): HopperTiles(128, 64, 7, 4),
    ("256", True): HopperTiles(128, 64, 9, 8, early=True),
    ("long", False): HopperTiles(128, 64, 7, 4),
    ("long", True): HopperTiles(128, 64, 9, 8, early=True),
    ("window", False): HopperTiles(64, 64, 7, 4),
    ("window", True): HopperTiles(64, 64, 5, 4),
}


@dataclass(frozen=True, slots=True)
class HopperRings:
    """Backward: query tiles on chip, places in which the groups exchange dS, key tiles on chip."""

    slots: int
    swaps: int
    places: int


# Likewise, where one program an example and head fills the card.
_BACKWARD: dict[tuple[str, bool], HopperRings] = {
    ("128", False): HopperRings(3, 2, 2),
    ("256", False): HopperRings(2, 2, 2),
    ("long", False): HopperRings(2, 2, 2),
    ("256", True): HopperRings(2, 2, 1),
    ("long", True): HopperRings(2, 2, 1),
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


@functools.lru_cache(1024)
def hopper_tiles(problem: Problem) -> HopperTiles | None:
    """None: Triton's kernels are faster, or this one cannot take the problem."""
    if not (problem.low_precision and problem.width in (32, 64, 128)):
        return None
    wide_window = problem.window is not None and problem.window > _SMALL_WINDOW
    return _FORWARD.get(("long" if wide_window else problem.key_class, problem.width > 64))


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """The card is a Hopper, and this Triton has Gluon."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        import kernels.gdpa.hopper_backward
        import kernels.gdpa.hopper_forward  # noqa: F401
    except (ImportError, AttributeError):  # experimental: a name of it may be gone in another version
        return False
    return True


def engine_view(x: Tensor) -> tuple[list[int], list[int]] | None:
    """Shape and strides of x as (rows, columns of all heads), if the copy engine can read heads' tiles of it."""
    width, row_stride, rows = x.shape[-1], x.stride(-3), x.shape[:-2].numel()
    aligned = x.data_ptr() % 16 == 0 and row_stride * x.element_size() % 16 == 0
    if not (rows and aligned and width >= 16 and width & (width - 1) == 0):
        return None
    return [rows, (x.shape[-2] - 1) * x.stride(-2) + width], [row_stride, 1]


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
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from kernels.gdpa.hopper_forward import _gdpa_fwd_hopper_kernel
    from kernels.launcher import descriptor, launch

    described: list[Any] = []
    for x, rows in zip(qkvo, (tiles.block_m, tiles.block_n, tiles.block_n, tiles.block_m), strict=True):
        view = engine_view(x)
        if view is None:
            return False
        layout = _layout(rows, problem.width, problem.dtype)
        described.append(descriptor(TensorDescriptor, x, view, [rows, problem.width], layout))
    q, k, v, out = qkvo
    num_heads = q.shape[1]
    launch(
        _gdpa_fwd_hopper_kernel, (problem.num_examples * num_heads, problem.query_splits(tiles.block_m)),
        *described, out, q_offsets, q_offsets if kv_offsets is None else kv_offsets, num_heads,
        problem.dense_keys or 0, problem.window or 0, inner, outer,
        stride_qh=q.stride(-2), stride_kh=k.stride(-2), stride_vh=v.stride(-2),
        stride_ot=out.stride(0), stride_oh=out.stride(1),
        D=problem.width, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, SLOTS=tiles.slots, EARLY=tiles.early,
        JAGGED=kv_offsets is not None, WINDOW=problem.window is not None, ACTIVATION=activation, APPROX=True,
        num_warps=tiles.num_warps,
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
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from kernels.gdpa.hopper_backward import _gdpa_bwd_hopper_kernel
    from kernels.launcher import descriptor, launch

    described: list[Any] = []
    half = problem.width // 2
    for x, width in zip((*qkvg, *grads), (problem.width,) * 4 + (half,) + (problem.width,) * 2, strict=True):
        view = engine_view(x)
        if view is None:
            return False
        described.append(descriptor(TensorDescriptor, x, view, [64, width], _layout(64, width, problem.dtype)))
    q, k, v, grad = qkvg
    dq, _, _ = grads
    num_heads = q.shape[1]
    # Two key tiles of wide heads, which are bound by memory, run side by side: both find the queries in the L2 cache.
    parts = 2 if problem.width > 64 and problem.key_class == "256" else 1
    if parts > 1:
        dq.zero_()
    units = problem.num_examples * num_heads * parts
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    launch(
        _gdpa_bwd_hopper_kernel, (min(units, _multiprocessors(q.device)),),
        *described, *grads, counter, q_offsets, q_offsets if kv_offsets is None else kv_offsets,
        units, num_heads, problem.dense_keys or 0, longest, inner, outer,
        stride_qh=q.stride(-2), stride_kh=k.stride(-2), stride_vh=v.stride(-2), stride_doh=grad.stride(-2),
        stride_gt=dq.stride(0), stride_gh=dq.stride(1),
        D=problem.width, SLOTS=rings.slots, SWAPS=rings.swaps, PLACES=rings.places, PARTS=parts,
        JAGGED=kv_offsets is not None, ACTIVATION=activation, APPROX=True, num_warps=4,
    )  # fmt: skip
    return True


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """Of a tile in shared memory."""
    from triton.experimental.gluon import language as gl

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([rows, columns], element)
