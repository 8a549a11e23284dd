"""ROTE: rotary embedding of queries and keys by position and by the age of the event (Kunlun, arXiv 2602.10016).

Shape letters: B rows, T past events of all rows, H heads, D head width, P = D / 2 rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROTARY_BASE = 10_000.0


class Rote(nn.Module):
    """Angles `pos * theta_i + log(1 + age / time_scale) * phi_i`.

    theta is RoFormer's (arXiv 2104.09864); phi is learned and starts at theta (ours). Without `time`, positions only.
    """

    def __init__(self, head_width: int, time_scale_s: float, *, time: bool) -> None:
        super().__init__()
        if head_width % 2:
            raise ValueError(f"rotary embedding turns pairs: the head width {head_width} must be even")
        self.time_scale_s = time_scale_s
        theta_P = ROTARY_BASE ** (-torch.arange(0, head_width, 2) / head_width)
        self.theta_P: Tensor
        self.register_buffer("theta_P", theta_P, persistent=False)
        self.phi_P = nn.Parameter(theta_P.clone()) if time else None

    def angles(self, offsets: Tensor, age_s_T: Tensor) -> Tensor:
        """(T, P), once per batch. `offsets` int32 (B + 1), `age_s_T` seconds."""
        starts_T = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=len(age_s_T))
        position_T = torch.arange(len(age_s_T), device=age_s_T.device) - starts_T
        angle_TP = position_T[:, None] * self.theta_P
        if self.phi_P is not None:
            angle_TP = angle_TP + torch.log1p(age_s_T / self.time_scale_s)[:, None] * self.phi_P
        return angle_TP


def rotate(x_THD: Tensor, angle_TP: Tensor) -> Tensor:
    """Turn the pair (x_i, x_{i+P}) of every head by angle i."""
    cos_T1P, sin_T1P = angle_TP.cos()[:, None], angle_TP.sin()[:, None]
    first, second = x_THD.chunk(2, dim=-1)
    return torch.cat([first * cos_T1P - second * sin_T1P, first * sin_T1P + second * cos_T1P], dim=-1)
