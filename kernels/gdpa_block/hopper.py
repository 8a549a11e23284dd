"""Launches of the GDPA block's Gluon kernels on Hopper: where they run, and their tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hopper import ROWS, HopperTiles, described, multiprocessors

_MOST_HEADS = 16  # of a team


@dataclass(frozen=True, slots=True)
class BlockTiles:
    """Tiles of GDPA's forward, and query tiles on chip a group."""

    ring: HopperTiles
    queries: int
    together: bool = True


_FORWARD: dict[int, BlockTiles] = {
    64: BlockTiles(HopperTiles(3, 64, 6), 3),
    128: BlockTiles(HopperTiles(2, 64, 4), 2),
}


def forward_on_hopper(
    s: Tensor, offsets: Tensor, k: Tensor, v: Tensor, out: Tensor, rms: Tensor,
    activation: str, inner: float, outer: float, tiles: BlockTiles,
) -> bool:  # fmt: skip
    """Fill out and each row's 1 / root mean square; False, with nothing done, where a tensor's layout forbids it."""
    ring = tiles.ring
    engine = described((s, k, v, out), (ROWS, ring.block_n, ring.block_n, ROWS))
    if engine is None:
        return False
    from kernels.gdpa_block.hopper_forward import _gdpa_block_fwd_hopper_kernel
    from kernels.launcher import launch

    num_rows, num_heads, width = s.shape
    teams = multiprocessors(s.device) // num_heads
    boxes = torch.zeros(teams * ring.groups * 6 * ROWS * num_heads + 1, dtype=torch.int64, device=s.device)
    launch(
        _gdpa_block_fwd_hopper_kernel, (teams * num_heads,),
        *engine, out, rms, offsets, boxes[-1:].view(torch.int32), boxes, num_rows, k.shape[0], k.shape[1], teams,
        inner, outer,
        D=width, H=num_heads, BLOCK_N=ring.block_n, SLOTS=ring.slots, S_SLOTS=tiles.queries, GROUPS=ring.groups,
        REGISTERS=ring.registers, TOGETHER=tiles.together, ACTIVATION=activation, APPROX=True, num_warps=4,
    )  # fmt: skip
    return True
