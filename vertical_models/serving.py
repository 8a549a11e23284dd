"""The serving graph of a student: what is exported, and all that is. It knows no teacher and no auxiliary head.

Inputs are dense tensors by name, so that any runtime can feed them (manifest.json of an export lists them):
`categorical` int64 (B, C) and `numeric` float32 (B, N); `domain` int64 (B) if the student serves several domains;
per sequence `<name>.ids` int64 (B, L, F), `<name>.age_s` float32 (B, L) and `<name>.length` int64 (B), the last
`length <= L` events, oldest first, then padding.

Shape legend: B rows, C categorical features, N numeric columns, L events of one sequence, F its fields,
D embedding width, H backbone width, O objectives.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from das.config import Config
from foundation_model.batch import Batch, JaggedSequence
from foundation_model.embeddings import EmbeddingTables
from foundation_model.features import InputSpec, SequenceSpec
from vertical_models.dcnv2 import DCNv2, DCNv2Config

NUMERIC_LIMIT = 10.0
SECONDS_PER_HOUR = 3600.0


class InputConfig(Config):
    """How a student reads its features."""

    dim: int = Field(8, ge=1, le=1024)
    """Embedding width."""
    init_std: float = Field(0.01, gt=0)
    history: int = Field(20, ge=1, le=16_384)
    """Events read of each sequence, the latest; a bound on serving cost."""


def serving_inputs(batch: Batch, spec: InputSpec, domains: tuple[str, ...], history: int) -> dict[str, Tensor]:
    """The inputs of a `ServingModel` for encoded rows; sequences padded to the longest one here, at most `history`."""
    inputs = {}
    if spec.categorical:
        inputs["categorical"] = batch.cat_BC
    if spec.numeric:
        inputs["numeric"] = batch.num_BN
    if len(domains) > 1:
        inputs["domain"] = batch.domain_B
    for sequence in spec.sequences:
        jagged = batch.seqs[sequence.name]
        longest = int(jagged.lengths.max()) if batch.num_rows else 0
        length = max(1, min(longest, history, sequence.max_length))
        ids, age, lengths = pad_sequence(jagged, length)
        inputs |= {f"{sequence.name}.ids": ids, f"{sequence.name}.age_s": age, f"{sequence.name}.length": lengths}
    return inputs


def pad_sequence(jagged: JaggedSequence, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The last `length` events of each row: ids (B, L, F), age_s (B, L), both 0 where padded, and lengths (B)."""
    ends_B = jagged.offsets[1:].long()
    lengths_B = jagged.lengths.long().clamp(max=length)
    step_L = torch.arange(length, device=ends_B.device)
    valid_BL = step_L < lengths_B[:, None]
    if jagged.ids_TF.shape[0] == 0:
        ids_BLF = jagged.ids_TF.new_zeros((*valid_BL.shape, jagged.ids_TF.shape[1]))
        return ids_BLF, jagged.age_s.new_zeros(valid_BL.shape), lengths_B
    index_BL = torch.where(valid_BL, (ends_B - lengths_B)[:, None] + step_L, 0)
    ids_BLF = torch.where(valid_BL[..., None], jagged.ids_TF[index_BL], 0)
    return ids_BLF, torch.where(valid_BL, jagged.age_s[index_BL], 0.0), lengths_B


class SequencePool(nn.Module):
    """One sequence as a vector: its events averaged with weights `(1 + age in hours)^-decay`, decay learned.

    Beside the average: the number of events, the age of the latest, and for each field that is also a feature of the
    candidate, how many events share the candidate's id.
    """

    def __init__(self, spec: SequenceSpec, categorical: tuple[str, ...], dim: int) -> None:
        super().__init__()
        self.name = spec.name
        self.matches = [(f, categorical.index(name)) for f, name in enumerate(spec.fields) if name in categorical]
        self.decay = nn.Parameter(torch.tensor(0.2))
        self.output_width = len(spec.fields) * dim + 2 + len(self.matches)

    def forward(self, inputs: dict[str, Tensor], events_BLE: Tensor) -> Tensor:
        """events_BLE: embedded fields side by side, E = F * D; returns (B, output_width)."""
        ids_BLF, length_B = inputs[f"{self.name}.ids"], inputs[f"{self.name}.length"]
        age_BL = torch.log1p(inputs[f"{self.name}.age_s"] / SECONDS_PER_HOUR)
        step_L = torch.arange(ids_BLF.shape[1], device=length_B.device)
        valid_BL = (step_L < length_B[:, None]).to(events_BLE.dtype)
        weight_BL = torch.exp(-self.decay * age_BL) * valid_BL
        pooled_BE = (events_BLE * weight_BL[..., None]).sum(1) / (weight_BL.sum(1, keepdim=True) + 1e-6)
        last_BL = valid_BL * (step_L == length_B[:, None] - 1)
        columns = [torch.log1p(length_B.to(events_BLE.dtype)), (age_BL * last_BL).sum(1)]
        for field, column in self.matches:
            same_BL = (ids_BLF[..., field] == inputs["categorical"][:, column, None]) * valid_BL
            columns.append(torch.log1p(same_BL.sum(1)))
        return torch.cat([pooled_BE, torch.stack(columns, dim=1)], dim=1)


class ServingModel(nn.Module):
    """Embeddings, backbone and one logit per objective: {input: tensor} -> (B, O) float32."""

    def __init__(self, config: InputConfig, backbone: DCNv2Config, spec: InputSpec, domains: tuple[str, ...]) -> None:
        """`domains`: those of the student, names of `spec.domains`."""
        super().__init__()
        self.spec = spec
        self.domains = domains
        self.history = config.history
        self.embeddings = EmbeddingTables(spec.tables, config.dim, init_std=config.init_std)
        pools = [SequencePool(s, spec.categorical, config.dim) for s in spec.sequences]
        self.pools = nn.ModuleList(pools)
        self.domain = nn.Embedding(len(spec.domains), config.dim) if len(domains) > 1 else None
        width = len(spec.categorical) * config.dim + len(spec.numeric) + (config.dim if self.domain else 0)
        width += sum(pool.output_width for pool in pools)
        self.backbone = DCNv2(backbone, width)
        self.head = nn.Linear(self.backbone.output_width, len(spec.objectives))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """`forward`'s argument for encoded rows."""
        return serving_inputs(batch, self.spec, self.domains, self.history)

    def represent(self, inputs: dict[str, Tensor]) -> Tensor:
        """The backbone's output, (B, H)."""
        parts = []
        if "categorical" in inputs:
            parts.append(self.embeddings(inputs["categorical"]).flatten(1))
        if "numeric" in inputs:
            parts.append(inputs["numeric"].clamp(-NUMERIC_LIMIT, NUMERIC_LIMIT))
        if self.domain is not None:
            parts.append(self.domain(inputs["domain"]))
        for pool, sequence in zip(self.pools, self.spec.sequences, strict=True):
            parts.append(pool(inputs, self.embeddings(inputs[f"{sequence.name}.ids"]).flatten(2)))
        representation: Tensor = self.backbone(torch.cat(parts, dim=1))
        return representation

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits, (B, O)."""
        logits: Tensor = self.head(self.represent(inputs))
        return logits
