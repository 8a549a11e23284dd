"""Launches of the softmax attention kernels, and their registration as one torch op with a gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.attention import triton_kernels
from kernels.attention.hopper import (
    TINY,
    backward_on_hopper,
    backward_tiles,
    forward_on_hopper,
    forward_tiles,
    window_on_hopper,
)
from kernels.attention.hopper_seeds import seeds_backward_on_hopper, takes_seeds
from kernels.attention.tiles import SHORT, Plan, Tiles, plan_for
from kernels.hopper import is_hopper
from kernels.jagged import MAX_SPLITS, accumulator, check_alike, like
from kernels.launcher import Bound, needs_gradient

_REMEMBERED = 1024  # classes of shapes
_LONG = 4096  # mean rows of an example above which one program alone takes too long
_FEW_NUMBERS = 2**14
_COLUMNS, _EXAMPLES_AT_ONCE = 32, 128  # of a tile of partial sums
_LOG2_E = math.log2(math.e)
_BACKWARD = ("q", "k", "v", "do", "g")  # tensors whose strides the backward kernels take


def window_attention_triton(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, offsets: Tensor, *, window: int | None, scale: float
) -> Tensor:
    """See `kernels.window_attention.window_attention`."""
    return _call(q_THD, k_THD, v_THD, offsets, False, window, scale)


def seed_attention_triton(q_NHD: Tensor, k_THD: Tensor, v_THD: Tensor, offsets: Tensor, *, scale: float) -> Tensor:
    """See `kernels.seed_attention.seed_attention`."""
    return _call(q_NHD, k_THD, v_THD, offsets, True, None, scale)


def _call(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, shared: bool, window: int | None, scale: float) -> Tensor:
    """Under autocast, computed in autocast's type. Out is (B, N, H, D) where queries are shared."""
    device_type = q.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_alike("seed_attention" if shared else "window_attention", q, k, v)
    if torch.compiler.is_compiling():
        out: Tensor = _softmax_attention(q, k, v, offsets, shared, window, scale)[0]
        return _by_example(out, q, offsets, shared)
    if not needs_gradient(q, k, v):
        return _by_example(forward(q, k, v, offsets, shared, window, scale)[0], q, offsets, shared)
    # Eagerly past the dispatcher, whose way through a Python op costs more than a small shape's kernel.
    out = _Eager.apply(q, k, v, offsets, shared, window, scale)
    return out


def _by_example(out: Tensor, q: Tensor, offsets: Tensor, shared: bool) -> Tensor:
    return out.view(offsets.shape[0] - 1, *q.shape) if shared else out


def forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, shared: bool, window: int | None, scale: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and base-2 log-sums, rows (B N) where queries are shared. `tiles` overrides the rule: for measurements."""
    q, k, v = _plain(q), _plain(k), _plain(v)
    num_examples, num_heads = offsets.shape[0] - 1, q.shape[1]
    out = q.new_empty((num_examples * q.shape[0], *q.shape[1:])) if shared else like(q)
    lse = torch.empty(out.shape[:2], dtype=accumulator(q.dtype), device=q.device)
    if num_examples == 0:
        return out, lse
    scale_log2 = scale * _LOG2_E
    if tiles is None and is_hopper(q.device):
        tiny = k.shape[0] < TINY * num_examples
        on_hopper = forward_tiles(q.dtype, q.shape[2], tiny, q.shape[0] if shared else None, window)
        if on_hopper and forward_on_hopper((q, k, v, out), lse, offsets, shared, window, scale_log2, on_hopper):
            return out, lse
    tiles = tiles or _plan(q, k, num_examples, window).forward
    splits = _splits(out.shape[0], num_examples, tiles.block_m, even=shared)
    run = _bound("_softmax_fwd_kernel", q.dtype, q.shape[2], tiles, (shared, window is not None), ("q", "k", "v", "o"),
                 q.stride(), k.stride(), v.stride(), out.stride())  # fmt: skip
    run((num_examples * num_heads, splits), q, k, v, out, lse, offsets, offsets, num_heads, q.shape[0], window or 0,
        scale_log2)  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, out: Tensor, lse: Tensor,
    shared: bool, window: int | None, scale: float, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ, dK, dV. `plan` overrides the rule: for measurements."""
    q, k, v, grad = _plain(q), _plain(k), _plain(v), _plain(grad)
    dk, dv = like(k), like(v)
    num_examples, num_heads = offsets.shape[0] - 1, q.shape[1]
    if num_examples == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), dk, dv
    scales = (scale, scale * _LOG2_E)
    on_hopper, by_rule = None, plan is None and is_hopper(q.device)
    if by_rule:
        short, seeds = k.shape[0] <= SHORT * num_examples, q.shape[0] if shared else None
        on_hopper = backward_tiles(q.dtype, q.shape[2], num_examples * num_heads, short, seeds, window)
        if seeds and takes_seeds(q.dtype, q.shape[2], num_examples * num_heads, seeds):
            dq_of_seeds = seeds_backward_on_hopper((q, k, v, out, grad, lse, dk, dv, offsets), scales)
            if dq_of_seeds is not None:
                return dq_of_seeds, dk, dv
    dq = like(out)
    plan = plan or _plan(q, k, num_examples, window)
    tiles = plan.backward_seeds
    if shared and q.shape[0] <= tiles.block_m and k.shape[0] <= _LONG * num_examples:
        run = _bound("_softmax_bwd_seeds_kernel", q.dtype, q.shape[2], tiles, (), _BACKWARD,
                     q.stride(), k.stride(), v.stride(), grad.stride(), out.stride())  # fmt: skip
        run((num_examples * num_heads,), q, k, v, out, grad, lse, dq, dk, dv, offsets, num_heads, q.shape[0], *scales)
    else:
        tensors = (q, k, v, out, grad, lse, dq, dk, dv, offsets)
        in_window = by_rule and not shared and window_on_hopper(tensors, window, scales)
        if not (in_window or (on_hopper and backward_on_hopper(tensors, shared, window, scales, on_hopper))):
            _backward_in_passes(tensors, shared, window, scales, plan)
    return _sum_examples(dq, q, num_examples) if shared else dq, dk, dv


def _sum_examples(parts: Tensor, q: Tensor, num_examples: int) -> Tensor:
    """Of dQ (B N, H, D) the sum over B, in float32 at least. Torch's takes the host longer, where that counts."""
    columns = q.numel()
    if not 0 < columns <= _FEW_NUMBERS:
        return parts.view(num_examples, *q.shape).sum(0)
    total = like(q)
    _bound_sum(q.dtype)((-(-columns // _COLUMNS),), parts, total, num_examples, columns)
    return total


@functools.cache
def _bound_sum(dtype: torch.dtype) -> Bound:
    import triton.language as tl

    acc = tl.float64 if dtype == torch.float64 else tl.float32
    return Bound(
        triton_kernels._sum_examples_kernel, EXAMPLES=_EXAMPLES_AT_ONCE, COLUMNS=_COLUMNS, ACC=acc, num_warps=4
    )


def _backward_in_passes(
    tensors: tuple[Tensor, ...], shared: bool, window: int | None, scales: tuple[float, float], plan: Plan
) -> None:
    """dQ by query tile, dK and dV by key tile: one launch where both take the same tiles, else one after another."""
    q, k, v, out, grad, lse, dq, dk, dv, offsets = tensors
    num_examples, num_heads = offsets.shape[0] - 1, q.shape[1]
    strides = q.stride(), k.stride(), v.stride(), grad.stride(), out.stride()
    scalars = (num_heads, q.shape[0], window or 0, *scales)
    together = plan.backward_q is plan.backward_kv
    kinds = [("all", plan.backward_q)] if together else [("dq", plan.backward_q), ("dkv", plan.backward_kv)]
    delta = lse if together else torch.empty_like(lse)  # together: a pointer that is not used
    for name, tiles in kinds:
        programs = num_examples * num_heads * (2 if together else 1)
        splits = max(
            _splits(out.shape[0], num_examples, tiles.block_m, even=shared) if name != "dkv" else 1,
            _splits(k.shape[0], num_examples, tiles.block_n, even=False) if name != "dq" else 1,
        )
        flags = shared, window is not None, name
        run = _bound("_softmax_bwd_kernel", q.dtype, q.shape[2], tiles, flags, _BACKWARD, *strides)
        run((programs, splits), q, k, v, out, grad, lse, delta, dq, dk, dv, offsets, offsets, *scalars)


def _plan(q: Tensor, k: Tensor, num_examples: int, window: int | None) -> Plan:
    return plan_for(q.dtype, q.shape[2], window is not None, k.shape[0] <= SHORT * num_examples)


def _splits(rows: int, num_examples: int, block: int, *, even: bool) -> int:
    """Programs per example and head, one a tile if lengths are within twice their mean; longer ones loop."""
    tiles = -(-rows // (num_examples * block))
    return max(1, min(tiles if even else 2 * tiles, MAX_SPLITS))


@functools.lru_cache(_REMEMBERED)
def _bound(
    kernel: str, dtype: torch.dtype, width: int, tiles: Tiles, flags: tuple[Any, ...], names: Sequence[str],
    *strides: tuple[int, ...],
) -> Bound:  # fmt: skip
    """The kernel for such tensors: strides by row and head are constants of it; `flags`: SHARED, WINDOW and OUTPUTS."""
    constants: dict[str, Any] = {
        f"stride_{name}{axis}": of_tensor[i]
        for name, of_tensor in zip(names, strides, strict=True)
        for i, axis in enumerate("th")
    }
    constants |= zip(("SHARED", "WINDOW", "OUTPUTS"), flags, strict=False)
    constants |= {
        "D": width,
        "BLOCK_D": max(16, 1 << (width - 1).bit_length()),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PRECISION": None if dtype in (torch.bfloat16, torch.float16) else "ieee",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    return Bound(getattr(triton_kernels, kernel), **constants)


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
        return _by_example(out, q, offsets, shared)  # in here: a view that autograd sees costs it a node

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, shared = ctx.saved_tensors, ctx.options[0]
        rows = grad.flatten(0, 1) if shared else grad
        dq, dk, dv = backward(rows, *saved, *ctx.options)
        return dq, dk, dv, None, None, None, None
