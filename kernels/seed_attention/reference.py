"""Seed attention in plain PyTorch: the ground truth, and what runs on CPU.

Shape letters: B examples, T rows of all examples, N seeds, H heads, D head width; G, L: examples and rows of one dense
block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jagged import Blocks, group_by_length


def seed_attention_reference(q_NHD: Tensor, k_THD: Tensor, v_THD: Tensor, offsets: Tensor, *, scale: float) -> Tensor:
    """See `kernels.seed_attention.seed_attention`. Computes in float32 at least."""
    if len(offsets) == 1:
        return q_NHD.new_zeros(0, *q_NHD.shape)
    dtype = torch.promote_types(q_NHD.dtype, torch.float32)
    q = q_NHD.to(dtype)
    blocks = Blocks(offsets, group_by_length(offsets.diff()))
    out = []
    for k_GLHD, v_GLHD, valid_GL in zip(
        blocks.gather(k_THD.to(dtype)), blocks.gather(v_THD.to(dtype)), blocks.valid, strict=True
    ):
        scores_GHNL = torch.einsum("nhd,glhd->ghnl", q, k_GLHD) * scale
        valid_G11L = valid_GL[:, None, None]
        # The lowest number rather than -inf: an example without rows, among others, would otherwise give NaN.
        scores_GHNL = scores_GHNL.masked_fill(~valid_G11L, torch.finfo(dtype).min)
        out.append(torch.einsum("ghnl,glhd->gnhd", scores_GHNL.softmax(-1) * valid_G11L, v_GLHD))
    return blocks.scatter_examples(out).to(q_NHD.dtype)
