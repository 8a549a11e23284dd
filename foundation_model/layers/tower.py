"""A sequence tower: one event type's past, from raw events to H_sum, with its own sizes and depth.

Shape letters: B rows, T past events of all rows, I event inputs, W tower width, M tokens of H_sum, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foundation_model.kunlun_config import KunlunConfig, TowerConfig
from foundation_model.layers.gdpa_pffn import GdpaPffn
from foundation_model.layers.hsp import HierarchicalSeedPooling, SeedPooling
from foundation_model.layers.mlp import mlp
from foundation_model.layers.rote import Rote
from foundation_model.layers.swa import SlidingWindowAttention

AGE_SCALES_S = (60.0, 3_600.0, 86_400.0)


class EventInput(nn.Module):
    """An MLP over an event's embedded fields and its time encoding, `log(1 + age / scale)` at three scales."""

    def __init__(self, num_inputs: int, hidden: int, width: int, *, time: bool) -> None:
        super().__init__()
        self.scales: Tensor
        self.register_buffer("scales", torch.tensor(AGE_SCALES_S if time else ()), persistent=False)
        self.mlp = mlp([num_inputs + len(self.scales), hidden, width])

    def forward(self, events_TI: Tensor, age_s_T: Tensor) -> Tensor:
        """(T, W)."""
        out: Tensor = self.mlp(torch.cat([events_TI, torch.log1p(age_s_T[:, None] / self.scales)], dim=1))
        return out


@dataclass(frozen=True)
class LayerPlan:
    """What a tower does in one layer: pool a fresh H_sum, run the PFFN, run self-attention."""

    pool: bool
    pffn: bool
    attend: bool


def plan_layers(config: KunlunConfig, depth: int) -> list[LayerPlan]:
    """The plan of each layer that the tower takes part in, and a last one that only pools if `final_pool`.

    CompSkip goes by parity; work that no later pooling would read is left out.
    """
    even = [not config.compute_skip or layer % 2 == 0 for layer in range(depth)]
    odd = [not config.compute_skip or layer % 2 == 1 for layer in range(depth)]
    pools = [*even, config.final_pool or depth == 0]
    read = [any(pools[layer + 1 :]) for layer in range(depth + 1)]
    plans = [
        LayerPlan(pool=pools[layer], pffn=even[layer] and read[layer], attend=odd[layer] and read[layer])
        for layer in range(depth)
    ]
    return [*plans, LayerPlan(pool=pools[depth], pffn=False, attend=False)]


class SequenceTower(nn.Module):
    """Layers of GDPA-PFFN and SWA over one event type, pooled by HSP and projected to the model width."""

    def __init__(self, config: KunlunConfig, tower: TowerConfig) -> None:
        super().__init__()
        depth = config.num_layers if tower.depth is None else min(tower.depth, config.num_layers)
        self.plans = plan_layers(config, depth)
        self.n_tok = tower.n_tok
        self.rote = None
        if any(plan.attend for plan in self.plans):
            self.rote = Rote(tower.width // tower.heads, config.time_scale_s, time=config.time_encoding)
        self.pools = nn.ModuleDict()
        self.pffns = nn.ModuleDict()
        self.attentions = nn.ModuleDict()
        for layer, plan in enumerate(self.plans):
            if plan.pool:
                self.pools[str(layer)] = _pooling(config, tower)
            if plan.pffn:
                self.pffns[str(layer)] = _pffn(config, tower)
            if plan.attend:
                window = tower.window if config.windowed else None
                self.attentions[str(layer)] = SlidingWindowAttention(
                    tower.width, tower.heads, window, backend=config.backend
                )
        self.projections = nn.ModuleDict({layer: nn.Linear(tower.width, config.width) for layer in self.pools})

    def angles(self, offsets: Tensor, age_s_T: Tensor) -> Tensor | None:
        """ROTE's angles, shared by all layers; None if no layer attends."""
        return None if self.rote is None else self.rote.angles(offsets, age_s_T)

    def pool(self, layer: int, s_TW: Tensor, offsets: Tensor, cached: Tensor | None) -> Tensor:
        """H_sum (B, M, D) of a layer: a fresh one if the plan says so, else the cached one."""
        if layer < len(self.plans) and self.plans[layer].pool:
            fresh: Tensor = self.projections[str(layer)](self.pools[str(layer)](s_TW, offsets))
            return fresh
        assert cached is not None
        return cached

    def advance(self, layer: int, s_TW: Tensor, offsets: Tensor, x_sum_BND: Tensor, angle_TP: Tensor | None) -> Tensor:
        """The transformer block of a layer: PFFN, then self-attention, each if the plan says so."""
        if layer >= len(self.plans):
            return s_TW
        if self.plans[layer].pffn:
            s_TW = self.pffns[str(layer)](s_TW, offsets, x_sum_BND)
        if self.plans[layer].attend:
            s_TW = self.attentions[str(layer)](s_TW, offsets, angle_TP)
        return s_TW


def _pooling(config: KunlunConfig, tower: TowerConfig) -> nn.Module:
    if config.pooling == "pma":
        return SeedPooling(tower.width, tower.heads, n_tok=tower.n_tok, backend=config.backend)
    return HierarchicalSeedPooling(
        tower.width,
        tower.heads,
        n_seed=tower.n_seed,
        n_tok=tower.n_tok,
        num_terms=tower.kron_terms,
        backend=config.backend,
    )


def _pffn(config: KunlunConfig, tower: TowerConfig) -> nn.Module:
    return GdpaPffn(
        tower.width,
        tower.heads,
        config.width,
        config.n_sum,
        tower.n_kv,
        activation=config.activation if config.pffn == "gdpa" else "identity",
        inner_scale=config.inner_scale,
        outer_scale=config.outer_scale,
        backend=config.backend,
    )
