"""WeightGen: the context summary that personalizes the sequence layers (Kunlun, arXiv 2602.10016).

Shape letters: B rows, N tokens in, M summary tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foundation_model.layers.mlp import mlp


class WeightGen(nn.Module):
    """`X_sum = gate(MLP(W X))`: a linear map over the token axis, an MLP on the width, then `x * sigmoid(MLP(x))`.

    The gate is InterFormer's (arXiv 2411.09852). Its last layer starts at zero: an open half gate for all.
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
        summary_BMD: Tensor = self.transform(self.tokens.weight @ x_BND)
        return summary_BMD * torch.sigmoid(self.gate(summary_BMD))
