"""Launches of the GDPA block's Gluon kernels on Hopper: where they run, and their tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gdpa.tiles import Problem
from kernels.hopper import ROWS, HopperTiles, described, multiprocessors


@dataclass(frozen=True, slots=True)
class BlockTiles:
    """Tiles as of GDPA's forward, for two groups, and query tiles on chip a group."""

    ring: HopperTiles
    queries: int


# Where it measured faster than three kernels on an H100.
_TILES = BlockTiles(HopperTiles(2, 64, 3), 3)
_WIDTH = 128
_KEYS = ("64", "128", "256")  # classes
_HEADS = range(2, 9)  # of a team; of one head, no program waits for another
_BACKWARD_HEADS = (4,)  # those that backward was measured with, in bf16
_TURNS = 4  # as in the mailbox
_ENOUGH_ELEMENTS = 2**25  # in all rows; with fewer, teams have few tiles each
_ENOUGH_QUERIES = 192  # in an example: a team takes 128 rows at a time, whether they are full or not
BACKWARD_PLACES = 3  # query tiles on chip of the backward


def forward_tiles(s: Tensor, k: Tensor, activation: str) -> BlockTiles | None:
    """None: three kernels are faster, or this one cannot take the problem."""
    rows, num_heads, width = s.shape
    num_examples = k.shape[0]
    if width != _WIDTH or rows < _ENOUGH_QUERIES * num_examples or s.numel() < _ENOUGH_ELEMENTS:
        return None
    problem = Problem(k.dtype, num_examples, num_heads, width, rows, k.shape[1], None)
    alike = s.dtype == k.dtype and len(set(activation.split(","))) == 1
    is_taken = alike and problem.low_precision and num_heads in _HEADS and problem.key_class in _KEYS
    return _TILES if is_taken else None


def backward_keys(s: Tensor, k: Tensor, activation: str) -> int | None:
    """Rows of the tile in which backward has an example's keys; None where three kernels are faster or needed."""
    keys, num_heads = k.shape[1:3]
    is_measured = k.dtype == torch.bfloat16 and num_heads in _BACKWARD_HEADS and keys <= 2 * ROWS
    if not is_measured or forward_tiles(s, k, activation) is None:
        return None
    return ROWS if keys <= ROWS else 2 * ROWS


def forward_on_hopper(
    s: Tensor, offsets: Tensor, k: Tensor, v: Tensor, out: Tensor, norms: Tensor,
    activation: str, inner: float, outer: float,
) -> bool:  # fmt: skip
    """Fill out and what backward needs of each row. False, with nothing done, where three kernels are faster, or a
    tensor's layout forbids it."""
    tiles = forward_tiles(s, k, activation)
    if tiles is None:
        return False
    ring, k, v = tiles.ring, k.contiguous(), v.contiguous()
    engine = described((s, k, v, out), (ROWS, ring.block_n, ring.block_n, ROWS))
    if engine is None:
        return False
    from kernels.gdpa_block.hopper_forward import _gdpa_block_fwd_hopper_kernel
    from kernels.launcher import launch

    num_rows, num_heads, width = s.shape
    teams, boxes = _mailboxes(s, ring.groups)
    launch(
        _gdpa_block_fwd_hopper_kernel, (teams * num_heads,),
        *engine, out, norms, offsets, boxes[-1:].view(torch.int32), boxes, num_rows, k.shape[0], k.shape[1], teams,
        inner, outer,
        D=width, H=num_heads, BLOCK_N=ring.block_n, SLOTS=ring.slots, S_SLOTS=tiles.queries, REGISTERS=ring.registers,
        ACTIVATION=activation.split(",")[0], APPROX=True, num_warps=4,
    )  # fmt: skip
    return True


def backward_on_hopper(
    grad: Tensor, s: Tensor, offsets: Tensor, k: Tensor, v: Tensor, out: Tensor, norms: Tensor,
    activation: str, inner: float, outer: float,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """dS, dK, dV of a contiguous s and grad. None, with nothing done, where three kernels are faster, or a tensor's
    layout forbids it."""
    block_n = backward_keys(s, k, activation)
    if grad.dtype != s.dtype or block_n is None:
        return None
    num_rows, num_heads, width = s.shape
    k, v = k.contiguous(), v.contiguous()
    grads = torch.empty_like(s), torch.empty_like(k), torch.empty_like(v)
    engine = described((s, out, grad, k, v, *grads), (*[ROWS] * 3, block_n, block_n, ROWS, block_n, block_n))
    if engine is None:
        return None
    from kernels.gdpa_block.hopper_backward import _gdpa_block_bwd_hopper_kernel
    from kernels.launcher import launch

    teams, boxes = _mailboxes(s, 2)
    launch(
        _gdpa_block_bwd_hopper_kernel, (teams * num_heads,),
        *engine, *grads, norms, offsets, boxes[-1:].view(torch.int32), boxes,
        num_rows, k.shape[0], k.shape[1], teams, inner, outer,
        D=width, H=num_heads, N=block_n, PLACES=BACKWARD_PLACES, ACTIVATION=activation.split(",")[0], APPROX=True,
        num_warps=8,
    )  # fmt: skip
    return grads


def _mailboxes(s: Tensor, shares: int) -> tuple[int, Tensor]:
    """Teams of programs, and zeros: three words a row, turn, head and share of a head; the last one for tickets."""
    teams = multiprocessors(s.device) // s.shape[1]
    words = teams * shares * 3 * _TURNS * ROWS * s.shape[1] + 1
    return teams, torch.zeros(words, dtype=torch.int64, device=s.device)
