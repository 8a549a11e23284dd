"""The context tokens a model starts from: one per categorical feature, a few for the numbers, one for the domain.

Shape letters: B rows, C categorical features, E embedding width, N numeric columns, D model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from foundation_model.layers.running_norm import RunningNorm


class ContextTokens(nn.Module):
    """Embedded ids, numbers and the domain as (B, num_tokens, D).

    Each categorical feature has a projection E -> D and a bias of its own, so that embeddings may be narrower than
    the model; the numbers map linearly to `num_numeric_tokens` tokens. The domain token unties the domains' parameters.
    """

    def __init__(
        self,
        num_categorical: int,
        embedding_dim: int,
        num_numeric: int,
        width: int,
        *,
        num_numeric_tokens: int,
        num_domains: int,
        normalize: bool,
    ) -> None:
        super().__init__()
        self.width = width
        bound = 1.0 / math.sqrt(embedding_dim)
        self.weight_CED = nn.Parameter(torch.empty(num_categorical, embedding_dim, width).uniform_(-bound, bound))
        self.bias_CD = nn.Parameter(torch.zeros(num_categorical, width))
        self.num_numeric_tokens = num_numeric_tokens if num_numeric else 0
        self.normalize = RunningNorm(num_numeric) if normalize and num_numeric else nn.Identity()
        self.numeric = nn.Linear(num_numeric, self.num_numeric_tokens * width) if num_numeric else None
        self.domain = nn.Embedding(num_domains, width) if num_domains else None
        if self.domain is not None:
            nn.init.normal_(self.domain.weight, std=0.1)

    @property
    def num_tokens(self) -> int:
        """Tokens per row."""
        return len(self.bias_CD) + self.num_numeric_tokens + (self.domain is not None)

    def forward(self, embedded_BCE: Tensor, num_BN: Tensor, domain_B: Tensor) -> Tensor:
        """(B, num_tokens, D)."""
        projected_CBD = torch.baddbmm(self.bias_CD[:, None], embedded_BCE.transpose(0, 1), self.weight_CED)
        tokens = [projected_CBD.transpose(0, 1)]
        if self.numeric is not None:
            tokens.append(self.numeric(self.normalize(num_BN)).unflatten(1, (self.num_numeric_tokens, self.width)))
        if self.domain is not None:
            tokens.append(self.domain(domain_B)[:, None])
        return torch.cat(tokens, dim=1)
