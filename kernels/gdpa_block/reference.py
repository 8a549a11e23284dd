"""The GDPA block in plain PyTorch: the ground truth, and what runs on CPU.

Shape letters: T rows of all examples, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gdpa.reference import gdpa_reference

EPS = 1e-5


def gdpa_block_reference(
    s_THD: Tensor,
    offsets: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    activation: str | Sequence[str],
    inner_scale: float,
    outer_scale: float,
) -> Tensor:
    """See `kernels.gdpa_block.gdpa_block`. Computes in float32 at least."""
    s = s_THD.to(torch.promote_types(s_THD.dtype, torch.float32))
    row = s.shape[1:]
    q = F.layer_norm(s, row, eps=EPS)
    attended = gdpa_reference(
        q, offsets, k, v,
        kv_offsets=None, activation=activation, inner_scale=inner_scale, outer_scale=outer_scale, window=None,
    )  # fmt: skip
    return (F.rms_norm(attended + q, row, eps=EPS) + s).to(s_THD.dtype)
