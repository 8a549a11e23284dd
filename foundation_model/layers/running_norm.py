"""Running standardization of the numeric columns, so that raw scales need no tuning by the user (ours).

Shape letters: B rows, N numeric columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LIMIT = 5.0
MEMORY_ROWS = 1_000_000.0


class RunningNorm(nn.Module):
    """`(x - mean) / std`, clipped to +-5, with the statistics of the rows seen before this batch.

    Training mode adds the batch to the statistics after it was used, so a row never depends on its neighbours and a
    scored row's own numbers are not in the weights that score it. They start as mean 0 and variance 1 with the weight
    of one row and forget rows older than about a million; a column that is not finite in a batch leaves its own alone.
    Buffers, so that a snapshot holds them.
    """

    def __init__(self, num_columns: int) -> None:
        super().__init__()
        self.rows: Tensor
        self.mean_N: Tensor
        self.variance_N: Tensor
        self.register_buffer("rows", torch.ones(()))
        self.register_buffer("mean_N", torch.zeros(num_columns))
        self.register_buffer("variance_N", torch.ones(num_columns))

    def forward(self, x_BN: Tensor) -> Tensor:
        """(B, N)."""
        out_BN = ((x_BN - self.mean_N) * torch.rsqrt(self.variance_N + 1e-6)).clamp(-LIMIT, LIMIT)
        if self.training and len(x_BN):
            self._update(x_BN)
        return out_BN

    @torch.no_grad()
    def _update(self, x_BN: Tensor) -> None:
        """Chan's merge of two sets' means and variances (Chan, Golub, LeVeque 1983)."""
        share = len(x_BN) / (self.rows + len(x_BN))
        shift_N = x_BN.mean(0) - self.mean_N
        between_N = share * (1 - share) * shift_N.square()
        variance_N = (1 - share) * self.variance_N + share * x_BN.var(0, correction=0) + between_N
        finite_N = torch.isfinite(variance_N)
        self.mean_N = torch.where(finite_N, self.mean_N + share * shift_N, self.mean_N)
        self.variance_N = torch.where(finite_N, variance_N, self.variance_N)
        self.rows = (self.rows + len(x_BN)).clamp(max=MEMORY_ROWS)
