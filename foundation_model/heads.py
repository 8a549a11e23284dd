"""Heads: one MLP per objective (with Zipper, per objective and window), untied per domain.

Shape letters: B rows, I flattened inputs, J hidden width, D domains, K heads.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from foundation_model.layers.mlp import mlp

DomainHead = Literal["none", "bias", "adapter"]


class ObjectiveHeads(nn.Module):
    """Logits (B, K) from flattened tokens.

    `domain_head`: "none"; "bias", an offset per (domain, head); "adapter", also a change to the last layer's
    weights per (domain, head). Both start at zero, so that all domains start as one (ours).
    """

    def __init__(
        self, num_inputs: int, hidden: tuple[int, ...], num_heads: int, num_domains: int, domain_head: DomainHead
    ) -> None:
        super().__init__()
        self.trunks = nn.ModuleList(nn.Sequential(mlp([num_inputs, *hidden]), nn.SiLU()) for _ in range(num_heads))
        self.out = nn.ModuleList(nn.Linear(hidden[-1], 1) for _ in range(num_heads))
        self.bias_DK: nn.Parameter | None = None
        self.adapter_DKJ: nn.Parameter | None = None
        if domain_head != "none":
            self.bias_DK = nn.Parameter(torch.zeros(num_domains, num_heads))
        if domain_head == "adapter":
            self.adapter_DKJ = nn.Parameter(torch.zeros(num_domains, num_heads, hidden[-1]))

    def forward(self, flat_BI: Tensor, domain_B: Tensor) -> Tensor:
        """(B, K) float32."""
        hidden_KBJ = [trunk(flat_BI) for trunk in self.trunks]
        logits_BK = torch.cat([out(h_BJ) for out, h_BJ in zip(self.out, hidden_KBJ, strict=True)], dim=1)
        if self.adapter_DKJ is not None:
            adapter_BKJ = self.adapter_DKJ.index_select(0, domain_B)
            logits_BK = logits_BK + (adapter_BKJ * torch.stack(hidden_KBJ, dim=1)).sum(-1)
        if self.bias_DK is not None:
            logits_BK = logits_BK + self.bias_DK.index_select(0, domain_B)
        return logits_BK.float()
