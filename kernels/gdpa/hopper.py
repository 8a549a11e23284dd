"""Launch of GDPA's forward on Hopper (`kernels/gdpa/hopper_forward.py`): where it runs, and its tiles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.gdpa.tiles import Problem

_ROWS = 64  # of a query tile that one group of warps takes
_counters: dict[tuple[torch.device, int], Tensor] = {}


@dataclass(frozen=True, slots=True)
class HopperTiles:
    """Groups of 64 query rows, rows of a key tile, stages of the ring of keys and values."""

    groups: int
    block_n: int
    slots: int

    @property
    def registers(self) -> int:
        """Of a thread of a group: all the multiprocessor has, less those of the copying warp, in steps of 8."""
        return 240 if self.groups == 2 else 152


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


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """The card is a Hopper, and this Triton has Gluon."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
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
    for x, rows in zip(qkvo, (_ROWS, tiles.block_n, tiles.block_n, _ROWS), strict=True):
        view = engine_view(x)
        if view is None:
            return False
        layout = _layout(rows, problem.width, problem.dtype)
        described.append(descriptor(TensorDescriptor, x, view, [rows, problem.width], layout))
    q, k, v, out = qkvo
    num_heads = q.shape[1]
    num_parts = problem.query_splits(tiles.groups * _ROWS)
    items = problem.num_examples * num_heads * num_parts
    launch(
        _gdpa_fwd_hopper_kernel, (min(items, _multiprocessors(q.device)),),
        *described, out, q_offsets, q_offsets if kv_offsets is None else kv_offsets, _counter(q.device),
        items, num_parts, num_heads, problem.dense_keys or 0, problem.window or 0, inner, outer,
        stride_qh=q.stride(-2), stride_kh=k.stride(-2), stride_vh=v.stride(-2),
        stride_ot=out.stride(0), stride_oh=out.stride(1),
        D=problem.width, BLOCK_N=tiles.block_n, SLOTS=tiles.slots, GROUPS=tiles.groups, REGISTERS=tiles.registers,
        JAGGED=kv_offsets is not None, WINDOW=problem.window is not None, ACTIVATION=activation,
        APPROX=True, num_warps=4,
    )  # fmt: skip
    return True


def _counter(device: torch.device) -> Tensor:
    """Two zeros, which a kernel leaves as it found them: a pair for each stream, whose kernels run one after another.

    A captured graph may be replayed beside kernels of the stream it was captured on, and gets a pair of its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    key = device, torch._C._cuda_getCurrentRawStream(device.index)
    if key not in _counters:
        _counters[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return _counters[key]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """Of a tile in shared memory."""
    from triton.experimental.gluon import language as gl

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([rows, columns], element)
