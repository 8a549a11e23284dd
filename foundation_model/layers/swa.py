"""Sliding-window self-attention of a sequence with rotary position and time (Kunlun, arXiv 2602.10016).

Shape letters: T past events of all rows, W tower width, H heads, D head width, P rotated pairs.
"""

from __future__ import annotations

from torch import Tensor, nn

from foundation_model.layers.norms import rms_norm
from foundation_model.layers.rote import rotate
from kernels.backend import Backend
from kernels.window_attention import window_attention


class SlidingWindowAttention(nn.Module):
    """`S + W_o attention(RMSNorm(S))` over |i - j| <= window; `window` None is full attention."""

    def __init__(self, width: int, heads: int, window: int | None, *, backend: Backend) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.backend: Backend = backend
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, s_TW: Tensor, offsets: Tensor, angle_TP: Tensor) -> Tensor:
        """(T, W)."""
        q_THD, k_THD, v_THD = self.query_key_value(rms_norm(s_TW)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q_THD, k_THD = rotate(q_THD, angle_TP), rotate(k_THD, angle_TP)
        mixed_THD = window_attention(q_THD, k_THD, v_THD, offsets, window=self.window, backend=self.backend)
        return s_TW + self.out(mixed_THD.flatten(1))
