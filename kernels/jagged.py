"""Jagged tensors: rows of all examples one after another, with int32 offsets (B+1) to tell them apart.

Shape letters: B examples, T rows of all examples, G examples of one group, L rows of its longest example.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENOUGH_PROGRAMS = 512  # fill the largest card a few times over
MAX_SPLITS = 65_535  # of a CUDA grid's second axis


def check_offsets(name: str, offsets: Tensor, num_rows: int) -> None:
    """Raise ValueError unless `offsets` are contiguous int32 (B+1) that cut `num_rows` rows.

    The values are read on the CPU only: on a device that would stall the stream.
    """
    if offsets.dtype != torch.int32 or offsets.dim() != 1 or offsets.shape[0] < 1 or not offsets.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous int32 offsets of shape (B+1,), got {offsets.dtype} of shape "
            f"{tuple(offsets.shape)} and strides {offsets.stride()}"
        )
    if offsets.device.type != "cpu":
        return
    if offsets[0] != 0 or offsets[-1] != num_rows or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{name}: must rise from 0 to the number of rows, {num_rows}")


def check_alike(op: str, *tensors: Tensor) -> None:
    """Raise ValueError unless all are of one type and on one device: a kernel goes by the first."""
    first = tensors[0]
    for x in tensors[1:]:
        if x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"{op}: expected {first.dtype} on {first.device} throughout, got {x.dtype} on {x.device}: cast or move"
            )


def group_by_length(sizes_B: Tensor) -> list[Tensor]:
    """Indices of the examples with sizes in (2^(i-1), 2^i], for each i that occurs; size 0 is a group of its own.

    Histories are short with a long tail (median 2, longest 50): padding all to the longest would cost fourteen times
    the rows, padding within a group at most doubles them. That is for the CPU: on a device, where launches cost more
    than padding, all examples are one group.
    """
    if sizes_B.device.type != "cpu":
        return [torch.arange(len(sizes_B), device=sizes_B.device)]
    power_B = torch.where(sizes_B > 0, sizes_B.clamp(min=1).double().log2().ceil(), -1.0).long()
    return [torch.nonzero(power_B == power).squeeze(1) for power in power_B.unique().tolist()]


class Blocks:
    """A jagged tensor's rows as one padded dense block per group of examples, and back.

    `valid[i]` (G, L) is False in the padding of block i, whose cells hold copies of some row. All blocks are gathered
    at once: on CPU a gather's gradient fills the whole source with zeros first.
    """

    def __init__(self, offsets: Tensor, groups: list[Tensor]) -> None:
        starts_B, lengths_B = offsets[:-1].long(), offsets.diff().long()
        self.valid: list[Tensor] = []
        self._order_B = torch.cat(groups) if groups else starts_B
        self._sizes = [len(examples_G) for examples_G in groups]
        rows = []
        for examples_G in groups:
            lengths_G = lengths_B[examples_G]
            column_L = torch.arange(int(lengths_G.max()), device=offsets.device)
            self.valid.append(column_L < lengths_G[:, None])
            rows.append(torch.where(self.valid[-1], starts_B[examples_G][:, None] + column_L, 0).flatten())
        self._row_of_cell = torch.cat(rows) if rows else starts_B
        valid_cells = [valid_GL.flatten() for valid_GL in self.valid]
        filled = torch.nonzero(torch.cat(valid_cells) if valid_cells else starts_B.bool()).squeeze(1)
        self._cell_of_row = filled[self._row_of_cell[filled].argsort()]

    def gather(self, x: Tensor) -> list[Tensor]:
        """(T, ...) to blocks (G, L, ...)."""
        cells = x.index_select(0, self._row_of_cell).split([valid_GL.numel() for valid_GL in self.valid])
        return [c.view(*valid_GL.shape, *x.shape[1:]) for c, valid_GL in zip(cells, self.valid, strict=True)]

    def scatter(self, blocks: list[Tensor]) -> Tensor:
        """Blocks (G, L, ...) to (T, ...)."""
        return torch.cat([block.flatten(0, 1) for block in blocks]).index_select(0, self._cell_of_row)

    def gather_examples(self, x: Tensor) -> list[Tensor]:
        """(B, ...) to (G, ...) per group."""
        return list(x.index_select(0, self._order_B).split(self._sizes))

    def scatter_examples(self, groups: list[Tensor]) -> Tensor:
        """(G, ...) per group to (B, ...)."""
        return torch.cat(groups).index_select(0, self._order_B.argsort())


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over rows of `dtype` are kept in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def like(x: Tensor) -> Tensor:
    """Uninitialized and contiguous; half the time of `torch.empty` with a shape, type and device."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def shares(num_programs: int, num_tiles: int) -> int:
    """Programs that share an example's tiles where each would else take an example: as few as fill the card."""
    return max(1, min(-(-ENOUGH_PROGRAMS // max(num_programs, 1)), num_tiles, MAX_SPLITS))
