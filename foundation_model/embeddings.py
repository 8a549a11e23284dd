"""Hashed embedding tables: one matrix over the encoder's shared id space, with sparse gradients.

Shape legend: B rows, C categorical features, T past events, F fields of one sequence, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foundation_model.features import TableLayout


class EmbeddingTables(nn.Module):
    """All tables of one width. Features and sequence fields of one table name share its rows.

    `sparse` gradients touch only the rows of a batch; the optimizer must then be one for sparse gradients
    (see foundation_model/optimizers.py). Use several instances for several widths.
    """

    def __init__(self, layout: TableLayout, dim: int, *, init_std: float = 0.01, sparse: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.embedding = nn.Embedding(layout.total, dim, sparse=sparse)
        with torch.no_grad():
            self.embedding.weight.normal_(0.0, init_std)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the ids of any shape (...): (..., D)."""
        out: Tensor = self.embedding(ids)
        return out

    def categorical(self, cat_BC: Tensor) -> Tensor:
        """One token per categorical feature: (B, C, D)."""
        return self.forward(cat_BC)

    def events(self, ids_TF: Tensor) -> Tensor:
        """The fields of each past event side by side: (T, F * D)."""
        return self.forward(ids_TF).flatten(1)
