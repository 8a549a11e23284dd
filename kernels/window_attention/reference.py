"""Sliding-window softmax attention in plain PyTorch: the ground truth, and what runs on CPU.

Shape letters: T rows of all examples, H heads, D head width; G, L: examples and rows of one dense block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jagged import Blocks, group_by_length


def window_attention_reference(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, offsets: Tensor, *, window: int | None, scale: float
) -> Tensor:
    """See `kernels.window_attention.window_attention`. Computes in float32 at least."""
    if len(offsets) == 1:
        return q_THD
    dtype = torch.promote_types(q_THD.dtype, torch.float32)
    blocks = Blocks(offsets, group_by_length(offsets.diff()))
    q, k, v = (blocks.gather(x.to(dtype)) for x in (q_THD, k_THD, v_THD))
    out = []
    for q_GLHD, k_GLHD, v_GLHD, valid_GL in zip(q, k, v, blocks.valid, strict=True):
        row_L = torch.arange(valid_GL.shape[1], device=q_THD.device)
        allowed_GLL = valid_GL[:, None, :].expand(-1, len(row_L), -1)
        if window is not None:
            allowed_GLL = allowed_GLL & ((row_L[:, None] - row_L).abs() <= window)
        scores_GHLL = torch.einsum("glhd,gmhd->ghlm", q_GLHD, k_GLHD) * scale
        # The lowest number rather than -inf: a padding row has no allowed key, and its NaN would reach the gradients.
        scores_GHLL = scores_GHLL.masked_fill(~allowed_GLL[:, None], torch.finfo(dtype).min)
        out.append(torch.einsum("ghlm,gmhd->glhd", scores_GHLL.softmax(-1), v_GLHD))
    return blocks.scatter(out).to(q_THD.dtype)
