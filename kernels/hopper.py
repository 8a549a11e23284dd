"""What kernels on Hopper share on the host: where they run, the copy engine's views of tensors, items' counters.

`kernels/hopper_ring.py` is the device's side.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.jagged import MAX_SPLITS, shares

LAST_EXAMPLES = 32  # that are taken longest first (`kernels.hopper_ring.example`)
ROWS = 64  # of a query tile that one group of warps takes
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


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """The card is a Hopper, and this Triton has Gluon."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        import kernels.attention.hopper_seeds_ring
        import kernels.gdpa.hopper_backward_turns
        import kernels.gdpa_block.hopper_mailbox
        import kernels.hopper_ring  # noqa: F401
    except (ImportError, AttributeError):  # experimental: a name of it may be gone in another version
        return False
    return True


def engine_view(x: Tensor) -> tuple[list[int], list[int]] | None:
    """Shape and strides of x as (rows, columns of all heads), if the copy engine can read heads' tiles of it."""
    width, row_stride, rows = x.shape[-1], x.stride(-3), x.shape[:-2].numel()
    aligned = x.data_ptr() % 16 == 0 and row_stride > 0 and row_stride * x.element_size() % 16 == 0
    if not (rows and aligned and width >= 16 and width & (width - 1) == 0):
        return None
    return [rows, (x.shape[-2] - 1) * x.stride(-2) + width], [row_stride, 1]


def described(tensors: Sequence[Tensor], rows: Sequence[int], columns: int | None = None) -> list[Any] | None:
    """Copy-engine descriptors of tiles of so many rows of one head; None where it cannot read or write one.

    columns: of a tile. Default: None, the head's width.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from kernels.launcher import descriptor

    found = []
    for x, n in zip(tensors, rows, strict=True):
        view = engine_view(x)
        if view is None:
            return None
        width = columns or x.shape[-1]
        found.append(descriptor(TensorDescriptor, x, view, [n, width], _layout(n, width, x.dtype)))
    return found


def shared_out(num_examples: int, num_heads: int, width: int, num_tiles: int) -> tuple[int, int, int]:
    """A forward's items: how many, how many of them are whole (example, head) pairs, in how many parts the others come.

    Whole ones come first. Of few pairs all are shared out by query tiles, as far as fills the card; else of wide heads
    the examples that are taken last, so that programs end together.

    Args:
        num_tiles: query tiles of an example in the mean.
    """
    pairs = num_examples * num_heads
    whole, parts = 0, shares(pairs, num_tiles)
    if parts == 1:
        is_wide = width > 64
        whole = pairs - is_wide * min(num_examples, LAST_EXAMPLES) * num_heads
        parts = max(1, min(num_tiles, MAX_SPLITS)) if is_wide else 1
    return whole + (pairs - whole) * parts, whole, parts


def counter(device: torch.device) -> Tensor:
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
def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """Of a tile in shared memory."""
    from triton.experimental.gluon import language as gl

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([rows, columns], element)
