"""Launches of the GDPA block's Triton kernels around GDPA's own, and their registration as one torch op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.gdpa import launch as gdpa_launch
from kernels.gdpa_block import triton_kernels
from kernels.gdpa_block.hopper import backward_on_hopper, forward_on_hopper
from kernels.hopper import is_hopper
from kernels.jagged import accumulator, check_alike
from kernels.launcher import launch, needs_gradient

_PROGRAM_NUMBERS = 2048  # of the rows of one program: enough loads in flight, few enough for the registers


def gdpa_block_triton(
    s_THD: Tensor,
    offsets: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    activation: str | Sequence[str],
    inner_scale: float,
    outer_scale: float,
) -> Tensor:
    """See `kernels.gdpa_block.gdpa_block`. Under autocast k and v are cast to autocast's type."""
    names = activation if isinstance(activation, str) else ",".join(activation)
    device_type = s_THD.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        k, v = k.to(dtype), v.to(dtype)
    check_alike("gdpa_block", k, v)
    if torch.compiler.is_compiling():
        out: Tensor = _gdpa_block(s_THD, offsets, k, v, names, inner_scale, outer_scale)[0]
        return out
    # Eagerly past the dispatcher, whose way through a Python op costs more than a small shape's kernel.
    if not needs_gradient(s_THD, k, v):
        return forward(s_THD, offsets, k, v, names, inner_scale, outer_scale)[0]
    out = _Eager.apply(s_THD, offsets, k, v, names, inner_scale, outer_scale)
    return out


def forward(
    s: Tensor, offsets: Tensor, k: Tensor, v: Tensor, activation: str, inner: float, outer: float
) -> tuple[Tensor, Tensor]:
    """Output, and what backward needs of each row (T, 3): mean and 1 / standard deviation of s, 1 / root mean square
    before the outer residual.

    Backward needs these two, s, k and v; nothing else is kept. On Hopper, where that is faster, one kernel does it all,
    with 1.6 MB of words by which heads exchange sums; else it is three, with q and GDPA's result between them.
    """
    s = s.contiguous()
    out = torch.empty_like(s)
    norms = torch.empty(s.shape[0], 3, dtype=accumulator(s.dtype), device=s.device)
    if is_hopper(s.device) and forward_on_hopper(s, offsets, k, v, out, norms, activation, inner, outer):
        return out, norms
    q = torch.empty(s.shape, dtype=k.dtype, device=s.device)
    _launch(triton_kernels._gdpa_block_open_fwd_kernel, s, q)
    attended = gdpa_launch.forward(q, offsets, k, v, None, activation, inner, outer, None)
    _launch(triton_kernels._gdpa_block_close_fwd_kernel, s, attended, out, norms)
    return out, norms


def backward(
    grad: Tensor, s: Tensor, offsets: Tensor, k: Tensor, v: Tensor, out: Tensor, norms: Tensor,
    activation: str, inner: float, outer: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dS, dK, dV. On Hopper, where that is faster, in one kernel, as forward; else in three."""
    s, grad = s.contiguous(), grad.contiguous()
    if is_hopper(s.device):
        found = backward_on_hopper(grad, s, offsets, k, v, out, norms, activation, inner, outer)
        if found is not None:
            return found
    q, dg = (torch.empty(s.shape, dtype=k.dtype, device=s.device) for _ in range(2))
    _launch(triton_kernels._gdpa_block_open_bwd_kernel, s, out, grad, norms, q, dg)
    dq, dk, dv = gdpa_launch.backward(dg, q, offsets, k, v, None, activation, inner, outer, None)
    ds = torch.empty_like(s)
    _launch(triton_kernels._gdpa_block_close_bwd_kernel, s, out, grad, norms, dq, ds)
    return ds, dk, dv


def _launch(kernel: Any, *tensors: Tensor) -> None:
    num_rows, width = tensors[0].shape[0], tensors[0].shape[1:].numel()
    if num_rows == 0:
        return
    block = 1 << (width - 1).bit_length()
    rows = max(1, _PROGRAM_NUMBERS // block)
    launch(kernel, (-(-num_rows // rows),), *tensors, num_rows, W=width, BLOCK_W=block, ROWS=rows, num_warps=4)


@torch.library.custom_op("exfm::gdpa_block", mutates_args=())
def _gdpa_block(
    s: Tensor, offsets: Tensor, k: Tensor, v: Tensor, activation: str, inner: float, outer: float
) -> tuple[Tensor, Tensor]:
    return forward(s, offsets, k, v, activation, inner, outer)


@_gdpa_block.register_fake
def _(s: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    return out, torch.empty(s.shape[0], 3, dtype=accumulator(s.dtype), device=s.device)


@torch.library.custom_op("exfm::gdpa_block_backward", mutates_args=())
def _gdpa_block_backward(
    grad: Tensor, s: Tensor, offsets: Tensor, k: Tensor, v: Tensor, out: Tensor, norms: Tensor,
    activation: str, inner: float, outer: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(grad, s, offsets, k, v, out, norms, activation, inner, outer)


@_gdpa_block_backward.register_fake
def _(grad: Tensor, s: Tensor, offsets: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    ds, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (s, k, v))
    return ds, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    ds, dk, dv = _gdpa_block_backward(grad, *ctx.saved_tensors, *ctx.options)
    return ds, None, dk, dv, None, None, None


_gdpa_block.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same forward and backward without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out, norms = forward(*inputs)
        ctx.save_for_backward(*inputs[:4], out, norms)
        ctx.options = inputs[4:]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ds, dk, dv = backward(grad, *ctx.saved_tensors, *ctx.options)
        return ds, None, dk, dv, None, None, None
