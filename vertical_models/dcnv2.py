"""DCN-V2, a backbone of explicit feature crosses beside a deep network (arXiv 2008.13535, sections 3.2 to 3.4).

Shape legend: B rows, D input width, H output width, R rank of a cross layer.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from das.config import Config


class DCNv2Config(Config):
    """Sizes of a DCN-V2 backbone."""

    kind: Literal["dcnv2"] = "dcnv2"
    cross_layers: int = Field(2, ge=0, le=8)
    cross_rank: int = Field(32, ge=0, le=4096)
    """Rank of a cross layer's matrix, U V^T; 0 = one full D x D matrix."""
    hidden: tuple[int, ...] = Field((64, 64), min_length=1)
    """Widths of the deep network."""
    structure: Literal["parallel", "stacked"] = "parallel"
    """parallel: [cross(x), deep(x)]; stacked: deep(cross(x))."""


class CrossLayer(nn.Module):
    """One cross, `x0 * (W x + b) + x` (eq. 1), with W full or of low rank (eq. 2): x0, x (B, D) -> (B, D)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.weight: nn.Module
        if rank:
            self.weight = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
        else:
            self.weight = nn.Linear(width, width)

    def forward(self, x0_BD: Tensor, x_BD: Tensor) -> Tensor:
        """One more degree of interaction between the columns of x0."""
        crossed: Tensor = x0_BD * self.weight(x_BD) + x_BD
        return crossed


class DCNv2(nn.Module):
    """x (B, D) -> (B, H); `output_width` is H."""

    def __init__(self, config: DCNv2Config, input_width: int) -> None:
        super().__init__()
        self.cross = nn.ModuleList(CrossLayer(input_width, config.cross_rank) for _ in range(config.cross_layers))
        widths = (input_width, *config.hidden)
        self.deep = nn.Sequential(*(m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())))
        self.parallel = config.structure == "parallel"
        self.output_width = config.hidden[-1] + (input_width if self.parallel else 0)

    def forward(self, x_BD: Tensor) -> Tensor:
        """The row's representation, read by the heads."""
        crossed_BD = x_BD
        for layer in self.cross:
            crossed_BD = layer(x_BD, crossed_BD)
        if self.parallel:
            return torch.cat([crossed_BD, self.deep(x_BD)], dim=1)
        deep: Tensor = self.deep(crossed_BD)
        return deep
