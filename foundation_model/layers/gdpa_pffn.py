"""The personalized feed-forward network as attention: the GDPA PFFN block (Kunlun, arXiv 2602.10016).

Shape letters: B rows, T past events of all rows, W tower width, H heads, M summary tokens, D model width, N n_kv.
"""

from __future__ import annotations

from torch import Tensor, nn

from kernels.backend import Backend
from kernels.gdpa_block import gdpa_block


class GdpaPffn(nn.Module):
    """`out = RMSNorm(act(q K^T) V + q) + S` with `q = LayerNorm(S)` and K, V made from the context summary.

    K and V are `n_kv` rows per example and head: the hidden width of the network. They come from `X_sum` by a linear
    map over the token axis (M -> n_kv) and one over the width (D -> 2 W) (ours; the paper leaves w1, w2 open).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int,
        num_summary: int,
        n_kv: int,
        *,
        activation: str,
        inner_scale: float | None,
        outer_scale: float,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.activation = activation
        self.inner_scale = inner_scale
        self.outer_scale = outer_scale
        self.backend: Backend = backend
        self.rows = nn.Linear(num_summary, n_kv, bias=False)
        self.key_value = nn.Linear(context_width, 2 * width)

    def forward(self, s_TW: Tensor, offsets: Tensor, x_sum_BMD: Tensor) -> Tensor:
        """(T, W)."""
        key_value_BNW2 = self.key_value(self.rows.weight @ x_sum_BMD)
        key_BNHD, value_BNHD = key_value_BNW2.unflatten(-1, (2, self.heads, -1)).unbind(2)
        out_THD = gdpa_block(
            s_TW.unflatten(-1, (self.heads, -1)),
            offsets,
            key_BNHD,
            value_BNHD,
            activation=self.activation,
            inner_scale=self.inner_scale,
            outer_scale=self.outer_scale,
            backend=self.backend,
        )
        return out_THD.flatten(1)
