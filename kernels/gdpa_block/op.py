"""The public call of the GDPA block: checks, then the backend that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from kernels.backend import Backend, choose_backend
from kernels.gdpa.op import check_arguments
from kernels.gdpa_block.reference import gdpa_block_reference


def _gdpa_block_triton(*args: Any, **kwargs: Any) -> Tensor:
    """Imported at the first call: Triton is an extra that a CPU installation lacks."""
    from kernels.gdpa_block.launch import gdpa_block_triton

    return gdpa_block_triton(*args, **kwargs)


_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": gdpa_block_reference,
    "triton": _gdpa_block_triton,
}


def gdpa_block(
    s_THD: Tensor,
    offsets: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    activation: str | Sequence[str] = "gelu_tanh",
    inner_scale: float | None = None,
    outer_scale: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """`RMSNorm(gdpa(q) + q) + S` with `q = LayerNorm(S)`, the block that Kunlun deploys (arXiv 2602.10016).

    Both norms are over the whole row of H * D numbers, all heads together, without learned scale or shift.

    Args:
        s_THD: the sequence, rows of all examples, [T, H, D].
        offsets: int32 [B + 1]; the rows of example b are offsets[b] : offsets[b + 1].
        k: keys, dense [B, N, H, D].
        v: values, of k's shape. Matrix products are computed in k's type, norms and residuals in float32.
        activation: one of `kernels.gdpa.ACTIVATIONS`, or one per head. Default: "gelu_tanh".
        inner_scale: factor inside the activation. Default: None, 1 / sqrt(D).
        outer_scale: factor after the activation. Default: 1.
        backend: "triton", "reference" or "auto".

    Returns:
        [T, H, D], of s's dtype.

    Raises ValueError for arguments that do not fit, BackendUnavailable for "triton" where it cannot run.

    Example:
        >>> s, k = torch.randn(5, 2, 8), torch.randn(2, 16, 2, 8)
        >>> gdpa_block(s, torch.tensor([0, 3, 5], dtype=torch.int32), k, torch.randn_like(k)).shape
        torch.Size([5, 2, 8])
    """
    check_arguments("gdpa_block", s_THD, offsets, k, v, None, activation, None)
    run = choose_backend(backend, op="gdpa_block", device=s_THD.device, implementations=_IMPLEMENTATIONS)
    scale = 1.0 / math.sqrt(s_THD.shape[-1]) if inner_scale is None else inner_scale
    return run(s_THD, offsets, k, v, activation=activation, inner_scale=scale, outer_scale=outer_scale)
