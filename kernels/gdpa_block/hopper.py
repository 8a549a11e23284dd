"""Launches of the GDPA block's Gluon kernels on Hopper: where they run, and their tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gdpa.tiles import Problem
from kernels.hopper import ROWS, HopperTiles, described, multiprocessors


@dataclass(frozen=True, slots=True)
class FewTiles:
    """Forward of at most 64 keys, D = 128: tiles as of GDPA's forward, and query tiles on chip a group."""

    ring: HopperTiles
    queries: int


@dataclass(frozen=True, slots=True)
class ManyTiles:
    """Other forwards: rows of a key tile, key tiles of an example, and what is on chip: query tiles, examples' keys and
    values."""

    block_n: int
    parts: int
    places: int
    kv_places: int


# Where it measured faster than three kernels on an H100, by a head's width and the class of keys.
_FORWARD: dict[tuple[int, str], FewTiles | ManyTiles] = {
    (128, "64"): FewTiles(HopperTiles(2, 64, 3), 3),
    (128, "128"): ManyTiles(128, 1, 5, 2),
    (128, "256"): ManyTiles(128, 2, 4, 1),
    (64, "64"): ManyTiles(64, 1, 8, 2),
    (64, "128"): ManyTiles(128, 1, 4, 2),
}
_COLUMNS = 128  # of a program: a head or two
_PROGRAMS = range(2, 9)  # of a team; of one, no program waits for another
_TURNS, _GROUPS = 4, 2  # as in the mailbox
_ENOUGH_ELEMENTS = 2**25  # in all rows; with fewer, teams have few tiles each
_ENOUGH_QUERIES = 192  # in an example: a team takes 64 or 128 rows at a time, whether they are full or not
BACKWARD_PLACES = 3  # query tiles on chip of the backward


def forward_tiles(s: Tensor, k: Tensor, activation: str) -> FewTiles | ManyTiles | None:
    """None: three kernels are faster, or none of these can take the problem."""
    rows, num_heads, width = s.shape
    num_examples = k.shape[0]
    if rows < _ENOUGH_QUERIES * num_examples or s.numel() < _ENOUGH_ELEMENTS:
        return None
    problem = Problem(k.dtype, num_examples, num_heads, width, rows, k.shape[1], None)
    programs, rest = divmod(num_heads * width, _COLUMNS)
    alike = s.dtype == k.dtype and len(set(activation.split(","))) == 1
    is_taken = alike and problem.low_precision and programs in _PROGRAMS and rest == 0
    return _FORWARD.get((width, problem.key_class)) if is_taken else None


def backward_keys(s: Tensor, k: Tensor, activation: str) -> int | None:
    """Rows of the tile in which backward has an example's keys; None where three kernels are faster or needed."""
    keys, _, width = k.shape[1:]
    is_taken = k.dtype == torch.bfloat16 and width == _COLUMNS and keys <= 2 * ROWS
    if not is_taken or forward_tiles(s, k, activation) is None:
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
    k, v = k.contiguous(), v.contiguous()
    block_n = tiles.ring.block_n if isinstance(tiles, FewTiles) else tiles.block_n
    engine = described((s, k, v, out), (ROWS, block_n, block_n, ROWS), _COLUMNS)
    if engine is None:
        return False
    from kernels.gdpa_block.hopper_forward import _gdpa_block_fwd_hopper_kernel
    from kernels.gdpa_block.hopper_forward_many import _gdpa_block_fwd_many_hopper_kernel
    from kernels.launcher import launch

    own: dict[str, int]
    if isinstance(tiles, FewTiles):
        kernel, ring = _gdpa_block_fwd_hopper_kernel, tiles.ring
        own = {"SLOTS": ring.slots, "S_SLOTS": tiles.queries, "REGISTERS": ring.registers, "num_warps": 4}
    else:
        kernel, is_pair = _gdpa_block_fwd_many_hopper_kernel, s.shape[2] < _COLUMNS
        own = {"PAIR": is_pair, "PARTS": tiles.parts, "PLACES": tiles.places, "KV_PLACES": tiles.kv_places}
        own["num_warps"] = 8
    programs = s.shape[1] * s.shape[2] // _COLUMNS
    teams, boxes = _mailboxes(s, programs)
    launch(
        kernel, (teams * programs,),
        *engine, out, norms, offsets, boxes[-1:].view(torch.int32), boxes, s.shape[0], k.shape[0], k.shape[1], teams,
        inner, outer,
        D=_COLUMNS, H=programs, BLOCK_N=block_n, ACTIVATION=activation.split(",")[0], APPROX=True, **own,
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

    teams, boxes = _mailboxes(s, num_heads)
    launch(
        _gdpa_block_bwd_hopper_kernel, (teams * num_heads,),
        *engine, *grads, norms, offsets, boxes[-1:].view(torch.int32), boxes,
        num_rows, k.shape[0], k.shape[1], teams, inner, outer,
        D=width, H=num_heads, N=block_n, PLACES=BACKWARD_PLACES, ACTIVATION=activation.split(",")[0], APPROX=True,
        num_warps=8,
    )  # fmt: skip
    return grads


def _mailboxes(s: Tensor, programs: int) -> tuple[int, Tensor]:
    """Teams of so many programs, and zeros: three words a row, turn, program and group; the last one for tickets."""
    teams = multiprocessors(s.device) // programs
    words = teams * _GROUPS * 3 * _TURNS * ROWS * programs + 1
    return teams, torch.zeros(words, dtype=torch.int64, device=s.device)
