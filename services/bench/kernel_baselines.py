"""What `exfm bench kernels` compares with: padded PyTorch, eager and compiled, and torch's varlen attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from services.bench.kernel_shapes import Case

Baseline = tuple[str, Callable[..., Tensor], list[Tensor], Tensor]
"""Name, function, its leaves, the gradient of its output."""


def baselines(case: Case, *, compiled: bool) -> Iterator[Baseline]:
    """Those that exist for the case. Padding is done beforehand, in the baseline's favor."""
    if case.shape.op != "gdpa":
        varlen = _varlen(case)
        if varlen is not None:
            yield varlen
    function, leaves, grad = _padded(case)
    yield "eager", function, leaves, grad
    if compiled:
        yield "compile", torch.compile(function, dynamic=False), leaves, grad


def _padded(case: Case) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    shape = case.shape
    q, k, v = (x.detach() for x in case.leaves)
    lengths = torch.tensor(case.lengths, device=q.device)
    longest = max(case.lengths)

    is_real_BL = torch.arange(longest, device=q.device) < lengths[:, None]

    def pad(x: Tensor) -> Tensor:
        """(T, H, D) to (B, H, L, D)."""
        padded_BLHD = x.new_zeros(*is_real_BL.shape, *x.shape[1:])
        padded_BLHD[is_real_BL] = x
        return padded_BLHD.transpose(1, 2).contiguous()

    if shape.seeds:
        q_BHLD = q.transpose(0, 1).expand(len(lengths), -1, -1, -1).contiguous()
        grad = case.grad.transpose(1, 2).contiguous()
    else:
        q_BHLD, grad = pad(q), pad(case.grad)
    if shape.keys:
        k_BHLD, v_BHLD = (x.transpose(1, 2).contiguous() for x in (k, v))
        mask = None
    else:
        k_BHLD, v_BHLD = pad(k), pad(v)
        mask = is_real_BL[:, None, None, :]
        if shape.window is not None:
            row = torch.arange(longest, device=q.device)
            mask = mask & ((row[:, None] - row).abs() <= shape.window)
        if shape.op == "window_attention":
            mask = mask | ~is_real_BL[:, None, :, None]
    scale = shape.width**-0.5
    leaves = [x.requires_grad_() for x in (q_BHLD, k_BHLD, v_BHLD)]
    if shape.op != "gdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), leaves, grad

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = F.gelu(q @ k.transpose(-1, -2) * scale, approximate="tanh")
        return (weights if mask is None else weights * mask) @ v

    return run, leaves, grad


def _varlen(case: Case) -> Baseline | None:
    """torch's varlen attention; without its window where this torch has none, which is then extra work."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    shape = case.shape
    q, k, v = (x.detach() for x in case.leaves)
    longest, num_examples = max(case.lengths), len(case.lengths)
    q_offsets, max_q, grad = case.offsets, longest, case.grad
    if shape.seeds:
        q = q.expand(num_examples, -1, -1, -1).flatten(0, 1).contiguous()
        q_offsets = torch.arange(num_examples + 1, dtype=torch.int32, device=q.device) * shape.seeds
        max_q, grad = shape.seeds, case.grad.flatten(0, 1)
    extra: dict[str, Any] = {}
    if shape.window is not None and "window_size" in inspect.signature(varlen_attn).parameters:
        extra["window_size"] = (shape.window, shape.window)
    name = "varlen" if shape.window is None or extra else "varlen_without_window"

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = varlen_attn(q, k, v, q_offsets, case.offsets, max_q, longest, **extra)
        assert isinstance(out, Tensor)
        return out

    return name, run, [x.clone().requires_grad_() for x in (q, k, v)], grad
