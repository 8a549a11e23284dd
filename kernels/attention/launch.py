"""Launches of the softmax attention kernels, and their registration as one torch op with a gradient."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention import triton_kernels
from kernels.jagged import accumulator
from kernels.launcher import launch, needs_gradient

_MAX_SPLITS = 65_535  # of a CUDA grid's second axis
_REMEMBERED = 1024  # classes of shapes
_LONG = 4096  # mean rows of an example above which one program alone takes too long


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Rows of a query tile and of a key tile, warps of a program, depth of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Tiles of the kernels."""

    forward: Tiles
    backward_q: Tiles
    backward_kv: Tiles
    backward_seeds: Tiles
    """Where all shared queries fit one tile: one pass instead of the two before."""


# By (wide heads, D > 64; window), the fastest measured on an H100.
_SMALL = Tiles(32, 32, 4, 1)
_EXACT = Plan(_SMALL, _SMALL, _SMALL, _SMALL)
_PLANS: dict[tuple[bool, bool], Plan] = {
    (True, True): Plan(Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2)),
    (False, True): Plan(Tiles(128, 32, 4, 3), Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)),
    (True, False): Plan(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2)),
    (False, False): Plan(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3)),
}


def plan_for(dtype: torch.dtype, width: int, window: int | None) -> Plan:
    """By the shape's class. Float32, float64 and D > 128 take small tiles."""
    return (
        _PLANS[width > 64, window is not None] if dtype in (torch.bfloat16, torch.float16) and width <= 128 else _EXACT
    )


def window_attention_triton(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, offsets: Tensor, *, window: int | None, scale: float
) -> Tensor:
    """See `kernels.window_attention.window_attention`."""
    return _call(q_THD, k_THD, v_THD, offsets, False, window, scale)


def seed_attention_triton(q_NHD: Tensor, k_THD: Tensor, v_THD: Tensor, offsets: Tensor, *, scale: float) -> Tensor:
    """See `kernels.seed_attention.seed_attention`."""
    out = _call(q_NHD, k_THD, v_THD, offsets, True, None, scale)
    return out.view(offsets.shape[0] - 1, *q_NHD.shape)


def _call(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, shared: bool, window: int | None, scale: float) -> Tensor:
    """Under autocast, computed in autocast's type."""
    device_type = q.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if torch.compiler.is_compiling():
        out: Tensor = _softmax_attention(q, k, v, offsets, shared, window, scale)[0]
        return out
    if not needs_gradient(q, k, v):
        return forward(q, k, v, offsets, shared, window, scale)[0]
    # Eagerly past the dispatcher, whose way through a Python op costs more than a small shape's kernel.
    out = _Eager.apply(q, k, v, offsets, shared, window, scale)
    return out


def forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, shared: bool, window: int | None, scale: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and base-2 log-sums, rows (B N) where queries are shared. `tiles` overrides the rule: for measurements."""
    q, k, v = _plain(q), _plain(k), _plain(v)
    num_examples, num_heads = offsets.shape[0] - 1, q.shape[1]
    rows = num_examples * q.shape[0] if shared else q.shape[0]
    out = torch.empty((rows, *q.shape[1:]), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, num_heads), dtype=accumulator(q.dtype), device=q.device)
    if num_examples == 0:
        return out, lse
    tiles = tiles or plan_for(q.dtype, q.shape[2], window).forward
    splits = _splits(rows, num_examples, tiles.block_m, even=shared)
    launch(
        triton_kernels._softmax_fwd_kernel, (num_examples * num_heads, splits),
        q, k, v, out, lse, offsets, offsets, num_heads, q.shape[0], window or 0, scale * math.log2(math.e),
        SHARED=shared, WINDOW=window is not None, **_strides(q=q, k=k, v=v, o=out), **_options(q, tiles),
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, out: Tensor, lse: Tensor,
    shared: bool, window: int | None, scale: float, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ, dK, dV. `plan` overrides the rule: for measurements."""
    q, k, v, grad = _plain(q), _plain(k), _plain(v), _plain(grad)
    dq, dk, dv = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (out, k, v)]
    num_examples, num_heads = offsets.shape[0] - 1, q.shape[1]
    if num_examples == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), dk, dv
    plan = plan or plan_for(q.dtype, q.shape[2], window)
    scales = (scale, scale * math.log2(math.e))
    strides = _strides(q=q, k=k, v=v, do=grad, g=out)
    tiles = plan.backward_seeds
    if shared and q.shape[0] <= tiles.block_m and k.shape[0] <= _LONG * num_examples:
        launch(
            triton_kernels._softmax_bwd_seeds_kernel, (num_examples * num_heads,),
            q, k, v, out, grad, lse, dq, dk, dv, offsets, num_heads, q.shape[0], *scales,
            **strides, **_options(q, tiles),
        )  # fmt: skip
    else:
        tensors = (q, k, v, out, grad, lse, dq, dk, dv, offsets)
        _backward_in_two(tensors, shared, window, scales, strides, plan)
    if shared:
        dq = dq.view(num_examples, *q.shape).sum(0)  # added in float32 at least
    return dq, dk, dv


def _backward_in_two(
    tensors: tuple[Tensor, ...], shared: bool, window: int | None, scales: tuple[float, float],
    strides: dict[str, int], plan: Plan,
) -> None:  # fmt: skip
    """dQ by query tile, then dK and dV by key tile."""
    q, k, v, out, grad, lse, dq, dk, dv, offsets = tensors
    num_examples, num_heads = offsets.shape[0] - 1, q.shape[1]
    delta = torch.empty_like(lse)
    flags = {"SHARED": shared, "WINDOW": window is not None}
    sizes = (num_heads, q.shape[0], window or 0)
    tiles = plan.backward_q
    splits = _splits(out.shape[0], num_examples, tiles.block_m, even=shared)
    launch(
        triton_kernels._softmax_bwd_q_kernel, (num_examples * num_heads, splits),
        q, k, v, out, grad, lse, delta, dq, offsets, offsets, *sizes, *scales, **strides, **_options(q, tiles), **flags,
    )  # fmt: skip
    tiles = plan.backward_kv
    splits = _splits(k.shape[0], num_examples, tiles.block_n, even=False)
    launch(
        triton_kernels._softmax_bwd_kv_kernel, (num_examples * num_heads, splits),
        q, k, v, grad, lse, delta, dk, dv, offsets, offsets, *sizes, *scales, **strides, **_options(q, tiles), **flags,
    )  # fmt: skip


def _splits(rows: int, num_examples: int, block: int, *, even: bool) -> int:
    """Programs per example and head, one a tile if lengths are within twice their mean; longer ones loop."""
    tiles = -(-rows // (num_examples * block))
    return max(1, min(tiles if even else 2 * tiles, _MAX_SPLITS))


def _options(q: Tensor, tiles: Tiles) -> dict[str, Any]:
    return _options_of(q.dtype, q.shape[-1], tiles)


@functools.lru_cache(_REMEMBERED)
def _options_of(dtype: torch.dtype, width: int, tiles: Tiles) -> dict[str, Any]:
    return {
        "D": width,
        "BLOCK_D": max(16, 1 << (width - 1).bit_length()),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PRECISION": None if dtype in (torch.bfloat16, torch.float16) else "ieee",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _strides(**tensors: Tensor) -> dict[str, int]:
    """By row and by head: constants of a compiled kernel."""
    return _named_strides(*tensors, *[x.stride() for x in tensors.values()])


@functools.lru_cache(_REMEMBERED)
def _named_strides(*names_and_strides: Any) -> dict[str, int]:
    half = len(names_and_strides) // 2
    pairs = zip(names_and_strides[:half], names_and_strides[half:], strict=True)
    return {f"stride_{name}{axis}": strides[i] for name, strides in pairs for i, axis in enumerate("th")}


def _plain(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("exfm::softmax_attention", mutates_args=())
def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, shared: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, offsets, shared, window, scale)


@_softmax_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, shared: bool, *_: Any) -> tuple[Tensor, Tensor]:
    rows = (offsets.shape[0] - 1) * q.shape[0] if shared else q.shape[0]
    out = torch.empty((rows, *q.shape[1:]), dtype=q.dtype, device=q.device)
    return out, torch.empty((rows, q.shape[1]), dtype=accumulator(q.dtype), device=q.device)


@torch.library.custom_op("exfm::softmax_attention_backward", mutates_args=())
def _softmax_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, out: Tensor, lse: Tensor,
    shared: bool, window: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(grad, q, k, v, offsets, out, lse, shared, window, scale)


@_softmax_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, offsets, out, lse = ctx.saved_tensors
    dq, dk, dv = _softmax_attention_backward(grad, q, k, v, offsets, out, lse, *ctx.options)
    return dq, dk, dv, None, None, None, None


_softmax_attention.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same forward and backward without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, shared: bool, window: int | None, scale: float
    ) -> Tensor:
        out, lse = forward(q, k, v, offsets, shared, window, scale)
        ctx.save_for_backward(q, k, v, offsets, out, lse)
        ctx.options = (shared, window, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = backward(grad, *ctx.saved_tensors, *ctx.options)
        return dq, dk, dv, None, None, None, None
