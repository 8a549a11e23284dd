"""Launch of GDPA's forward on Hopper (`kernels/gdpa/hopper_forward.py`): where it runs, and its tiles."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from kernels.gdpa.tiles import Problem
from kernels.hopper import ROWS, HopperTiles, counter, described, multiprocessors

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
    engine = described(qkvo, (ROWS, tiles.block_n, tiles.block_n, ROWS))
    if engine is None:
        return False
    from kernels.gdpa.hopper_forward import _gdpa_fwd_hopper_kernel
    from kernels.launcher import launch

    q, k, v, out = qkvo
    num_heads = q.shape[1]
    num_parts = problem.query_splits(tiles.groups * ROWS)
    items = problem.num_examples * num_heads * num_parts
    launch(
        _gdpa_fwd_hopper_kernel, (min(items, multiprocessors(q.device)),),
        *engine, out, q_offsets, q_offsets if kv_offsets is None else kv_offsets, counter(q.device),
        items, num_parts, num_heads, problem.dense_keys or 0, problem.window or 0, inner, outer,
        stride_qh=q.stride(-2), stride_kh=k.stride(-2), stride_vh=v.stride(-2),
        stride_ot=out.stride(0), stride_oh=out.stride(1),
        D=problem.width, BLOCK_N=tiles.block_n, SLOTS=tiles.slots, GROUPS=tiles.groups, REGISTERS=tiles.registers,
        JAGGED=kv_offsets is not None, WINDOW=problem.window is not None, ACTIVATION=activation,
        APPROX=True, num_warps=4,
    )  # fmt: skip
    return True
