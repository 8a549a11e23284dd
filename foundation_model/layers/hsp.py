"""Hierarchical seed pooling: a sequence as a few tokens (Kunlun, arXiv 2602.10016), and PMA, which it replaces.

Shape letters: B rows, T past events of all rows, N seeds, M tokens out, K Kronecker terms, W tower width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from foundation_model.layers.mlp import mlp
from foundation_model.layers.norms import layer_norm
from kernels.backend import Backend
from kernels.seed_attention import seed_attention


class SeedAttention(nn.Module):
    """`MHA(Norm(E), S, S)` with learned seeds E, shared by all rows; zeros for a row without events."""

    def __init__(self, num_seeds: int, width: int, heads: int, *, backend: Backend) -> None:
        super().__init__()
        self.heads = heads
        self.backend: Backend = backend
        self.seeds_NW = nn.Parameter(torch.randn(num_seeds, width))
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, s_TW: Tensor, offsets: Tensor) -> Tensor:
        """(B, N, W)."""
        q_NHD = self.query(layer_norm(self.seeds_NW)).unflatten(-1, (self.heads, -1))
        k_THD, v_THD = self.key_value(s_TW).unflatten(-1, (2, self.heads, -1)).unbind(1)
        pooled: Tensor = self.out(seed_attention(q_NHD, k_THD, v_THD, offsets, backend=self.backend).flatten(2))
        return pooled


class SumKronLinear(nn.Module):
    """`Y = sum_k Z_k^T H W_k`: a linear map of (N, W) to (M, W) as a sum of K Kronecker products."""

    def __init__(self, num_in: int, num_out: int, width: int, num_terms: int) -> None:
        super().__init__()
        self.num_out = num_out
        self.z_NKM = nn.Parameter(torch.randn(num_in, num_terms * num_out) / math.sqrt(num_in))
        self.w_KWW = nn.Parameter(torch.randn(num_terms * width, width) / math.sqrt(num_terms * width))

    def forward(self, h_BNW: Tensor) -> Tensor:
        """(B, M, W)."""
        return sum_kron_linear(h_BNW, self.z_NKM, self.w_KWW, self.num_out)


def sum_kron_linear(h_BNW: Tensor, z_NKM: Tensor, w_KWW: Tensor, num_out: int) -> Tensor:
    """(B, M, W) of SumKronLinear. Z comes first: docs/kernels.md has the orders' times.

    To learn, as one product over all rows, whose gradient of Z is one product too; on a GPU without a gradient as one
    product per row of the batch, which copies nothing.
    """
    learns = torch.is_grad_enabled() and (h_BNW.requires_grad or z_NKM.requires_grad or w_KWW.requires_grad)
    if h_BNW.is_cuda and not learns:
        return (z_NKM.T @ h_BNW).unflatten(1, (-1, num_out)).transpose(1, 2).flatten(2) @ w_KWW
    mixed = z_NKM.T @ h_BNW.transpose(0, 1).flatten(1)
    mixed_KMBW = mixed.unflatten(1, h_BNW.shape[::2]).unflatten(0, (-1, num_out))
    return mixed_KMBW.permute(2, 1, 0, 3).flatten(2) @ w_KWW


class HierarchicalSeedPooling(nn.Module):
    """Many seeds read the sequence, then SumKronLinear folds them into `n_tok` tokens.

    A row without events gets tokens of its own, learned (ours).
    """

    def __init__(self, width: int, heads: int, *, n_seed: int, n_tok: int, num_terms: int, backend: Backend) -> None:
        super().__init__()
        self.attention = SeedAttention(n_seed, width, heads, backend=backend)
        self.fold = SumKronLinear(n_seed, n_tok, width, num_terms)
        self.nothing_MW = nn.Parameter(torch.zeros(n_tok, width))

    def forward(self, s_TW: Tensor, offsets: Tensor) -> Tensor:
        """(B, M, W)."""
        pooled_BMW = self.fold(self.attention(s_TW, offsets))
        return torch.where((offsets.diff() > 0)[:, None, None], pooled_BMW, self.nothing_MW)


class SeedPooling(nn.Module):
    """Pooling by multi-head attention (PMA, Set Transformer, arXiv 1810.00825): `H = LN(E + MHA)`, `LN(H + MLP(H))`."""

    def __init__(self, width: int, heads: int, *, n_tok: int, backend: Backend) -> None:
        super().__init__()
        self.attention = SeedAttention(n_tok, width, heads, backend=backend)
        self.mlp = mlp([width, width, width])

    def forward(self, s_TW: Tensor, offsets: Tensor) -> Tensor:
        """(B, M, W); the seeds alone for a row without events."""
        h_BMW = layer_norm(self.attention.seeds_NW + self.attention(s_TW, offsets))
        return layer_norm(h_BMW + self.mlp(h_BMW))
