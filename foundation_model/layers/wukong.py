"""Wukong blocks and their partitioned mixture, Kunlun's global interaction (arXiv 2403.02545, 2602.10016).

Shape letters: B rows, N tokens in, L linear tokens out, F factorization tokens out, K rank, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from foundation_model.layers.mlp import mlp
from foundation_model.layers.norms import layer_norm


class WukongBlock(nn.Module):
    """`X' = LN(concat(FMB(X), LCB(X)) + R(X))`, half of the tokens out from each.

    `LCB(X) = W_L X`. `FMB(X) = MLP(LN(flatten(X (X^T Y))))`, the pairwise products of tokens at rank K. R is the
    identity if the number of tokens stays, else a linear map over the token axis.
    """

    def __init__(self, num_in: int, num_out: int, width: int, *, rank: int, hidden: int) -> None:
        super().__init__()
        num_factor = (num_out + 1) // 2
        self.width = width
        self.y_NK = nn.Parameter(torch.randn(num_in, rank) / math.sqrt(num_in))
        self.factor = mlp([num_in * rank, hidden, num_factor * width])
        self.linear = nn.Linear(num_in, num_out - num_factor, bias=False)
        self.residual = nn.Linear(num_in, num_out, bias=False) if num_in != num_out else None

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, F + L, D)."""
        products_BNK = x_BND @ (x_BND.transpose(1, 2) @ self.y_NK)
        factor_BFD = self.factor(layer_norm(products_BNK.flatten(1))).unflatten(1, (-1, self.width))
        mixed = torch.cat([factor_BFD, self.linear.weight @ x_BND], dim=1)
        return layer_norm(mixed + (x_BND if self.residual is None else self.residual.weight @ x_BND))


class WukongExperts(nn.Module):
    """The tokens dealt to `num_experts` Wukong blocks, outputs concatenated; no router.

    Token i goes to expert i mod M, so that every expert sees context and history (ours). Each expert's share of the
    `num_out` tokens is as even as can be.
    """

    def __init__(self, num_in: int, num_out: int, width: int, *, num_experts: int, rank: int, hidden: int) -> None:
        super().__init__()
        if min(num_in, num_out // 2) < num_experts:
            raise ValueError(f"{num_experts} experts need as many tokens in and twice as many out: {num_in}, {num_out}")
        self.num_experts = num_experts
        self.blocks = nn.ModuleList(
            WukongBlock(
                len(range(i, num_in, num_experts)),
                len(range(i, num_out, num_experts)),
                width,
                rank=rank,
                hidden=hidden,
            )
            for i in range(num_experts)
        )

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, num_out, D)."""
        return torch.cat([block(x_BND[:, i :: self.num_experts]) for i, block in enumerate(self.blocks)], dim=1)
