"""The public call of GDPA: checks, then the backend that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from kernels.backend import Backend, choose_backend
from kernels.gdpa.reference import ACTIVATION_FUNCTIONS, gdpa_reference
from kernels.jagged import check_offsets

ACTIVATIONS = tuple(ACTIVATION_FUNCTIONS)


def _gdpa_triton(*args: Any, **kwargs: Any) -> Tensor:
    """Imported at the first call: Triton is an extra that a CPU installation lacks."""
    from kernels.gdpa.launch import gdpa_triton

    return gdpa_triton(*args, **kwargs)


_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"reference": gdpa_reference, "triton": _gdpa_triton}


def gdpa(
    q_THD: Tensor,
    q_offsets: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_offsets: Tensor | None = None,
    activation: str | Sequence[str] = "gelu_tanh",
    inner_scale: float | None = None,
    outer_scale: float = 1.0,
    window: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`act(inner_scale Q K^T) outer_scale V` per example and head; no softmax (Kunlun, arXiv 2602.10016).

    With `k` and `v` made from context this is a feed-forward network whose weights differ per example. An example
    without queries gives no rows, and its keys and values get zero gradients.

    Args:
        q_THD: queries of all examples, [T, H, D].
        q_offsets: int32 [B + 1]; the rows of example b are q_offsets[b] : q_offsets[b + 1].
        k: keys, dense [B, N, H, D], or jagged [S, H, D] with `kv_offsets`.
        v: values, of k's shape.
        kv_offsets:
            int32 [B + 1] of jagged keys and values. For self-attention pass `q_offsets` itself, not a copy: some
            kernels are for that alone. Default: None, dense.
        activation: one of ACTIVATIONS, or one per head. Default: "gelu_tanh".
        inner_scale: factor inside the activation. Default: None, 1 / sqrt(D).
        outer_scale: factor after the activation. Default: 1.
        window:
            only pairs with |i - j| <= window count, i and j the row numbers within the example; jagged keys only.
            Default: None, all pairs.
        backend: "triton", "reference" or "auto".

    Returns:
        [T, H, D], of q's dtype.

    Raises ValueError for arguments that do not fit, BackendUnavailable for "triton" where it cannot run.

    Example:
        >>> q, k = torch.randn(5, 2, 8), torch.randn(2, 16, 2, 8)
        >>> gdpa(q, torch.tensor([0, 3, 5], dtype=torch.int32), k, torch.randn_like(k)).shape
        torch.Size([5, 2, 8])
    """
    check_arguments("gdpa", q_THD, q_offsets, k, v, kv_offsets, activation, window)
    run = choose_backend(backend, op="gdpa", device=q_THD.device, implementations=_IMPLEMENTATIONS)
    scale = 1.0 / math.sqrt(q_THD.shape[-1]) if inner_scale is None else inner_scale
    options = {"kv_offsets": kv_offsets, "activation": activation, "window": window}
    return run(q_THD, q_offsets, k, v, inner_scale=scale, outer_scale=outer_scale, **options)


def check_arguments(
    op: str,
    q_THD: Tensor,
    q_offsets: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor | None,
    activation: str | Sequence[str],
    window: int | None,
) -> None:
    """Raise ValueError, named after `op`, unless all arguments of `gdpa` fit."""
    if q_THD.dim() != 3:
        raise ValueError(f"{op}: q must be (T, H, D), got {tuple(q_THD.shape)}")
    rows, num_heads, width = q_THD.shape
    check_offsets(f"{op}: q_offsets", q_offsets, rows)
    k_shape = k.shape
    dims = 4 if kv_offsets is None else 3
    if len(k_shape) != dims or k_shape != v.shape or k_shape[-2:] != (num_heads, width):
        layout = "(B, N, H, D)" if kv_offsets is None else "(S, H, D)"
        raise ValueError(
            f"{op}: k and v must be {layout} with (H, D) = ({num_heads}, {width}), "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if kv_offsets is None:
        if k_shape[0] != q_offsets.shape[0] - 1:
            raise ValueError(f"{op}: k has {k_shape[0]} examples, q_offsets {q_offsets.shape[0] - 1}")
        if window is not None:
            raise ValueError(f"{op}: a window needs jagged keys; pass kv_offsets or leave the window out")
    else:
        check_offsets(f"{op}: kv_offsets", kv_offsets, k_shape[0])
        if kv_offsets.shape != q_offsets.shape:
            raise ValueError(f"{op}: {len(kv_offsets)} kv_offsets for {len(q_offsets)} q_offsets")
    if window is not None and window < 0:
        raise ValueError(f"{op}: window must be >= 0, got {window}")
    names = [activation] if isinstance(activation, str) else list(activation)
    if not isinstance(activation, str) and len(names) != num_heads:
        raise ValueError(f"{op}: {len(names)} activations for {num_heads} heads; give one, or one per head")
    for name in names:
        if name not in ACTIVATION_FUNCTIONS:
            raise ValueError(f"{op}: unknown activation '{name}'; known: {', '.join(ACTIVATIONS)}")
