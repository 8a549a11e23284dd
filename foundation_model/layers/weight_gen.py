"""WeightGen: the context summary that personalizes the sequence layers (Kunlun, arXiv 2602.10016).

Shape letters: B rows, N tokens in, M summary tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foundation_model.layers.mlp import mlp


class WeightGen(nn.Module):
    """`X_sum = gate(Y + MLP(Y))` with `Y = W X`: a linear map over the token axis, an MLP on the width, a self-gate.

    The gate `x * sigmoid(MLP(x))` is InterFormer's (arXiv 2411.09852); its last weights start at zero, half open.
    The residual around the MLP is ours: without it a second layer costs more than it gives (KuaiRand-Pure, one pass).
    """

    def __init__(self, num_tokens: int, num_summary: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Linear(num_tokens, num_summary, bias=False)
        self.transform = mlp([width, width, width])
        self.gate = mlp([width, width, width])
        last = self.gate[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, M, D)."""
        mixed_BMD = self.tokens.weight @ x_BND
        summary_BMD = mixed_BMD + self.transform(mixed_BMD)
        gated_BMD: Tensor = summary_BMD * torch.sigmoid(self.gate(summary_BMD))
        return gated_BMD
