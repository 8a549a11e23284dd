"""Kunlun, the teacher (arXiv 2602.10016): context tokens and past events, each informing the other in every layer.

Shape letters: B rows, C categorical features, T past events of all rows, N context tokens, M summary tokens,
D model width, W tower width, K heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from das.errors import ConfigError
from foundation_model.batch import Batch, JaggedSequence
from foundation_model.embeddings import EmbeddingTables
from foundation_model.features import InputSpec
from foundation_model.heads import ObjectiveHeads
from foundation_model.kunlun_config import KunlunConfig
from foundation_model.layers.context import ContextTokens
from foundation_model.layers.tower import EventInput, SequenceTower
from foundation_model.layers.weight_gen import WeightGen
from foundation_model.layers.wukong import WukongExperts

SHARED = "shared"


class Kunlun(nn.Module):
    """Logits (B, K) float32 of a Batch, K in the order of `FeatureSchema.heads`.

    Layer l reads the context tokens X and each tower's events S:
    `X_sum = WeightGen(X)`; `H_sum` = pooled S, fresh or cached; `X' = Experts([X_sum ; H_sum])`;
    `S' = SWA(GDPA_PFFN(S, X_sum))`. The heads read the last X and the last H_sum, flattened.

    Raises ConfigError if the configuration names sequences that the input does not have.
    """

    def __init__(self, config: KunlunConfig, spec: InputSpec) -> None:
        super().__init__()
        sequences = [s.name for s in spec.sequences]
        if unknown := set(config.towers) - set(sequences):
            raise ConfigError(f"towers: no sequence {sorted(unknown)}; known: {', '.join(sequences) or 'none'}")
        self.config = config
        self.spec = spec
        self.embeddings = EmbeddingTables(spec.tables, config.embedding_dim, init_std=config.embedding_init_std)
        self.context = ContextTokens(
            len(spec.categorical),
            config.embedding_dim,
            len(spec.numeric),
            config.width,
            num_numeric_tokens=config.num_numeric_tokens,
            num_domains=len(spec.domains) if config.domain_token else 0,
            normalize=config.normalize_numbers,
        )
        self._build_towers(sequences)
        num_history = sum(self._tower(name).n_tok for name in self.towers)
        num_out = config.interaction_tokens or config.n_sum + num_history
        sizes = [self.context.num_tokens] + [num_out] * config.num_layers
        self.summaries = nn.ModuleList(WeightGen(n, config.n_sum, config.width) for n in sizes[:-1])
        self.interactions = nn.ModuleList(
            WukongExperts(
                config.n_sum + num_history,
                num_out,
                config.width,
                num_experts=config.num_experts,
                rank=config.wukong_rank,
                hidden=config.wukong_hidden,
            )
            for _ in range(config.num_layers)
        )
        self.representation_width = (num_out + num_history) * config.width
        self.heads = ObjectiveHeads(
            self.representation_width,
            config.head_hidden,
            len(spec.heads),
            len(spec.domains),
            config.domain_head,
        )

    def _build_towers(self, sequences: list[str]) -> None:
        """One tower per sequence, or one for all; the event inputs are per sequence, since their fields differ."""
        config = self.config
        shared = not config.personalized_towers and len(sequences) > 1
        names = [SHARED] if shared else sequences
        self.towers = nn.ModuleDict({n: SequenceTower(config, config.tower_of(n)) for n in names})
        width = {s.name: config.tower_of(SHARED if shared else s.name).width for s in self.spec.sequences}
        self.inputs = nn.ModuleDict(
            {
                s.name: EventInput(
                    len(s.fields) * config.embedding_dim, config.event_hidden, width[s.name], time=config.time_encoding
                )
                for s in self.spec.sequences
            }
        )
        self.event_type = nn.Embedding(len(sequences), config.tower.width) if shared else None

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, K) float32."""
        logits: Tensor = self.heads(self.represent(batch), batch.domain_B)
        return logits

    def represent(self, batch: Batch) -> Tensor:
        """What the heads read, (B, `representation_width`): the last context tokens and pooled events, flattened."""
        x_BND = self.context(self.embeddings.categorical(batch.cat_BC), batch.num_BN, batch.domain_B)
        events = self._events(batch)
        angles = {n: self._tower(n).angles(offsets, age_s_T) for n, (_, offsets, age_s_T) in events.items()}
        states = {n: s_TW for n, (s_TW, _, _) in events.items()}
        pooled: dict[str, Tensor] = {}
        for layer, (weight_gen, interact) in enumerate(zip(self.summaries, self.interactions, strict=True)):
            x_sum_BMD = weight_gen(x_BND)
            for name, (_, offsets, _) in events.items():
                pooled[name] = self._tower(name).pool(layer, states[name], offsets, pooled.get(name))
            x_BND = interact(torch.cat([x_sum_BMD, *pooled.values()], dim=1))
            for name, (_, offsets, _) in events.items():
                states[name] = self._tower(name).advance(layer, states[name], offsets, x_sum_BMD, angles[name])
        for name, (_, offsets, _) in events.items():
            pooled[name] = self._tower(name).pool(self.config.num_layers, states[name], offsets, pooled[name])
        return torch.cat([x_BND, *pooled.values()], dim=1).flatten(1)

    def _tower(self, name: str) -> SequenceTower:
        tower = self.towers[name]
        assert isinstance(tower, SequenceTower)
        return tower

    def _events(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Per tower: events (T, W), offsets (B + 1) and ages (T,)."""
        parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, event_input in self.inputs.items():
            sequence = batch.seqs[name]
            events_TW = event_input(self.embeddings.events(sequence.ids_TF), sequence.age_s)
            parts[name] = events_TW, sequence.offsets, sequence.age_s
        if self.event_type is None:
            return parts
        typed = [part[0] + kind for part, kind in zip(parts.values(), self.event_type.weight, strict=True)]
        order_T, offsets = merge_by_time([batch.seqs[name] for name in self.inputs])
        return {SHARED: (torch.cat(typed)[order_T], offsets, torch.cat([p[2] for p in parts.values()])[order_T])}


def merge_by_time(sequences: list[JaggedSequence]) -> tuple[Tensor, Tensor]:
    """How to merge sequences of the same rows into one, oldest event first: (order (T,), offsets int32 (B + 1)).

    `order` indexes the concatenation of the sequences; events of equal age keep the order of the sequences.
    """
    row_T = torch.cat([_row_of_event(s) for s in sequences])
    oldest_first = torch.cat([s.age_s for s in sequences]).argsort(descending=True, stable=True)
    order_T = oldest_first[row_T[oldest_first].argsort(stable=True)]
    offsets = torch.stack([s.offsets for s in sequences]).sum(0, dtype=torch.int32)
    return order_T, offsets


def _row_of_event(sequence: JaggedSequence) -> Tensor:
    rows_B = torch.arange(len(sequence.offsets) - 1, device=sequence.offsets.device)
    return torch.repeat_interleave(rows_B, sequence.lengths, output_size=len(sequence.age_s))
