"""The public call of sliding-window attention: checks, then the backend that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kernels.backend import Backend, choose_backend
from kernels.jagged import check_offsets
from kernels.window_attention.reference import window_attention_reference


def _window_attention_triton(*args: Any, **kwargs: Any) -> Tensor:
    """Imported at the first call: Triton is an extra that a CPU installation lacks."""
    from kernels.attention.launch import window_attention_triton

    return window_attention_triton(*args, **kwargs)


_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": window_attention_reference,
    "triton": _window_attention_triton,
}


def window_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    offsets: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax self-attention of a jagged sequence over |i - j| <= window (Kunlun's SWA, arXiv 2602.10016).

    Args:
        q_THD: queries of all examples, [T, H, D].
        k_THD: keys, [T, H, D].
        v_THD: values, [T, H, D].
        offsets: int32 [B + 1]; the rows of example b are offsets[b] : offsets[b + 1].
        window:
            rows on either side that a row sees. Default: None, the whole example.
        scale:
            factor on the scores. Default: None, 1 / sqrt(D).
        backend:
            "triton", "reference" or "auto".

    Returns:
        [T, H, D], of q's dtype.

    Raises:
        ValueError: shapes, offsets or the window do not fit.
        BackendUnavailable: "triton" was asked for and cannot run here.

    Example:
        >>> q = torch.randn(5, 2, 8)
        >>> window_attention(q, q, q, torch.tensor([0, 3, 5], dtype=torch.int32), window=1).shape
        torch.Size([5, 2, 8])
    """
    if q_THD.dim() != 3 or k_THD.shape != q_THD.shape or v_THD.shape != q_THD.shape:
        raise ValueError(
            f"window_attention: q, k and v must be (T, H, D) alike, got {tuple(q_THD.shape)}, "
            f"{tuple(k_THD.shape)} and {tuple(v_THD.shape)}"
        )
    if window is not None and window < 0:
        raise ValueError(f"window_attention: window must be >= 0, got {window}")
    check_offsets("window_attention: offsets", offsets, q_THD.shape[0])
    run = choose_backend(backend, op="window_attention", device=q_THD.device, implementations=_IMPLEMENTATIONS)
    factor = 1.0 / math.sqrt(q_THD.shape[-1]) if scale is None else scale
    return run(q_THD, k_THD, v_THD, offsets, window=window, scale=factor)
