"""What `exfm bench kernels` compares with: padded PyTorch, eager and compiled, and torch's varlen attention."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend
from kernels.gdpa import gdpa
from services.bench.kernel_shapes import Case

Baseline = tuple[str, Callable[..., Tensor], list[Tensor], Tensor]
"""Name, function, its leaves, the gradient of its output."""


def baselines(case: Case, *, compiled: bool) -> Iterator[Baseline]:
    """Those that exist for the case. Padding is done beforehand, in the baseline's favor."""
    if case.shape.op == "sum_kron":
        yield from _kron_orders(case)
        return
    if case.shape.op == "gdpa_block":
        yield from _around_gdpa(case)
    elif case.shape.op != "gdpa":
        varlen = _varlen(case)
        if varlen is not None:
            yield varlen
    function, leaves, options, grad = _padded(case)
    yield "eager", functools.partial(function, **options), leaves, grad
    if compiled:
        yield "compile", functools.partial(_compiled(function), **options), leaves, grad


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One graph serves all shapes of a function: compiling for each alone takes minutes."""
    return torch.compile(function, dynamic=True)


def _gdpa_padded(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    weights = F.gelu(q @ k.transpose(-1, -2) * scale, approximate="tanh")
    return (weights if mask is None else weights * mask) @ v


def _block_padded(s: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    """Norms over heads and width of (B, H, L, D)."""
    rows_BLHD = s.transpose(1, 2)
    q = F.layer_norm(rows_BLHD, rows_BLHD.shape[2:], eps=1e-5).transpose(1, 2)
    g_BLHD = (_gdpa_padded(q, k, v, mask=mask, scale=scale) + q).transpose(1, 2)
    return F.rms_norm(g_BLHD, g_BLHD.shape[2:], eps=1e-5).transpose(1, 2) + s


def _softmax_padded(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _padded(case: Case) -> tuple[Callable[..., Tensor], list[Tensor], dict[str, Any], Tensor]:
    """Function, leaves, its options, and the gradient of its output."""
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
    mask = None
    if shape.keys:
        k_BHLD, v_BHLD = (x.transpose(1, 2).contiguous() for x in (k, v))
    else:
        k_BHLD, v_BHLD = pad(k), pad(v)
        mask = is_real_BL[:, None, None, :]
        if shape.window is not None:
            row = torch.arange(longest, device=q.device)
            mask = mask & ((row[:, None] - row).abs() <= shape.window)
        if shape.op == "window_attention":
            mask = mask | ~is_real_BL[:, None, :, None]
    leaves = [x.requires_grad_() for x in (q_BHLD, k_BHLD, v_BHLD)]
    function = {"gdpa": _gdpa_padded, "gdpa_block": _block_padded}.get(shape.op, _softmax_padded)
    return function, leaves, {"mask": mask, "scale": shape.width**-0.5}, grad


def _around_gdpa(case: Case) -> Iterator[Baseline]:
    """GDPA alone, and torch's norms and sums around it."""
    offsets = case.offsets
    backend: Backend = "triton" if offsets.is_cuda else "reference"

    def bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return gdpa(q, offsets, k, v, backend=backend)

    def unfused(s: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = F.layer_norm(s, s.shape[1:], eps=1e-5)
        return F.rms_norm(gdpa(q, offsets, k, v, backend=backend) + q, s.shape[1:], eps=1e-5) + s

    yield "bare_gdpa", bare, case.leaves, case.grad
    yield "unfused", unfused, case.leaves, case.grad


def _kron_orders(case: Case) -> Iterator[Baseline]:
    """Z first, a batched product per example; W first."""
    n, m, width, terms = case.shape.kron

    def batched(h_BNW: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return (z.T @ h_BNW).unflatten(1, (-1, m)).transpose(1, 2).flatten(2) @ w

    def w_first(h_BNW: Tensor, z: Tensor, w: Tensor) -> Tensor:
        right = w.view(terms, width, width).transpose(0, 1).flatten(1)
        return z.reshape(n * terms, m).T @ (h_BNW @ right).view(-1, n * terms, width)

    yield "batched", batched, case.leaves, case.grad
    yield "w_first", w_first, case.leaves, case.grad


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
