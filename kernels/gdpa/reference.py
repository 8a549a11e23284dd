"""GDPA in plain PyTorch: the ground truth, and what runs on CPU.

Shape letters: B examples, T query rows of all examples, S key rows of all examples, N key rows per example, H heads,
D head width; G, L, M: examples, query rows and key rows of one dense block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jagged import Blocks, group_by_length

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_square": lambda x: F.relu(x).square(),
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
}


def gdpa_reference(
    q_THD: Tensor,
    q_offsets: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_offsets: Tensor | None,
    activation: str | Sequence[str],
    inner_scale: float,
    outer_scale: float,
    window: int | None,
) -> Tensor:
    """See `kernels.gdpa.gdpa`. Computes in float32 at least."""
    if len(q_offsets) == 1:
        return q_THD
    dtype = torch.promote_types(q_THD.dtype, torch.float32)
    lengths_B = q_offsets.diff() if kv_offsets is None else torch.maximum(q_offsets.diff(), kv_offsets.diff())
    groups = group_by_length(lengths_B)
    queries = Blocks(q_offsets, groups)
    keys = None if kv_offsets is None else Blocks(kv_offsets, groups)
    gather = queries.gather_examples if keys is None else keys.gather
    out = []
    for i, (q_GLHD, k_GMHD, v_GMHD) in enumerate(
        zip(queries.gather(q_THD.to(dtype)), gather(k.to(dtype)), gather(v.to(dtype)), strict=True)
    ):
        scores_GHLM = torch.einsum("glhd,gmhd->ghlm", q_GLHD, k_GMHD) * inner_scale
        weights_GHLM = _activate(scores_GHLM, activation) * outer_scale
        if keys is not None:
            weights_GHLM = weights_GHLM * _allowed(keys.valid[i], q_GLHD.shape[1], window)
        out.append(torch.einsum("ghlm,gmhd->glhd", weights_GHLM, v_GMHD))
    return queries.scatter(out).to(q_THD.dtype)


def _allowed(valid_GM: Tensor, num_queries: int, window: int | None) -> Tensor:
    """(G, 1, L, M), True where the pair counts."""
    allowed_GLM = valid_GM[:, None, :].expand(-1, num_queries, -1)
    if window is not None:
        row_L = torch.arange(num_queries, device=valid_GM.device)
        row_M = torch.arange(valid_GM.shape[1], device=valid_GM.device)
        allowed_GLM = allowed_GLM & ((row_L[:, None] - row_M).abs() <= window)
    return allowed_GLM[:, None]


def _activate(scores_GHLM: Tensor, activation: str | Sequence[str]) -> Tensor:
    if isinstance(activation, str):
        return ACTIVATION_FUNCTIONS[activation](scores_GHLM)
    heads = [ACTIVATION_FUNCTIONS[name](scores_GHLM[:, h]) for h, name in enumerate(activation)]
    return torch.stack(heads, dim=1)
