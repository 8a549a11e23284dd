"""The public call of seed attention: checks, then the backend that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kernels.backend import Backend, choose_backend
from kernels.jagged import check_offsets
from kernels.seed_attention.reference import seed_attention_reference


def _seed_attention_triton(*args: Any, **kwargs: Any) -> Tensor:
    """Imported at the first call: Triton is an extra that a CPU installation lacks."""
    from kernels.attention.launch import seed_attention_triton

    return seed_attention_triton(*args, **kwargs)


_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": seed_attention_reference,
    "triton": _seed_attention_triton,
}


def seed_attention(
    q_NHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    offsets: Tensor,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention of the same N seeds over every example's rows (Kunlun's HSP, arXiv 2602.10016).

    Args:
        q_NHD: the seeds' queries, shared by all examples, [N, H, D].
        k_THD: keys of all examples, [T, H, D].
        v_THD: values, [T, H, D].
        offsets: int32 [B + 1]; the rows of example b are offsets[b] : offsets[b + 1].
        scale:
            factor on the scores. Default: None, 1 / sqrt(D).
        backend:
            "triton", "reference" or "auto".

    Returns:
        [B, N, H, D], of q's dtype; zeros for an example without rows.

    Raises:
        ValueError: shapes or offsets do not fit.
        BackendUnavailable: "triton" was asked for and cannot run here.

    Example:
        >>> k = torch.randn(5, 2, 8)
        >>> seed_attention(torch.randn(4, 2, 8), k, k, torch.tensor([0, 3, 5], dtype=torch.int32)).shape
        torch.Size([2, 4, 2, 8])
    """
    if q_NHD.dim() != 3 or k_THD.dim() != 3 or k_THD.shape[1:] != q_NHD.shape[1:] or v_THD.shape != k_THD.shape:
        raise ValueError(
            f"seed_attention: q must be (N, H, D), k and v (T, H, D), got {tuple(q_NHD.shape)}, "
            f"{tuple(k_THD.shape)} and {tuple(v_THD.shape)}"
        )
    check_offsets("seed_attention: offsets", offsets, k_THD.shape[0])
    run = choose_backend(backend, op="seed_attention", device=q_NHD.device, implementations=_IMPLEMENTATIONS)
    factor = 1.0 / math.sqrt(q_NHD.shape[-1]) if scale is None else scale
    return run(q_NHD, k_THD, v_THD, offsets, scale=factor)
