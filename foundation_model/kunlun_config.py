"""Configuration of Kunlun (arXiv 2602.10016).

Marks of source in the docstrings: (p) the paper or the authors' kernel write-ups; (2) second-hand summaries of it;
(ours) our choice where those are silent or disagree.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from das.config import Config
from foundation_model.heads import DomainHead
from kernels.backend import Backend
from kernels.gdpa import ACTIVATIONS


class TowerConfig(Config):
    """One sequence tower: event-level personalization gives every event type its own sizes (2)."""

    width: int = Field(64, ge=2)
    """Tower width; a multiple of twice `heads`. Quoted: click 256, impression 128 (2)."""
    heads: int = Field(4, ge=1)
    """Attention and GDPA heads. Quoted: 8, 4 (2)."""
    n_tok: int = Field(16, ge=1)
    """Tokens of H_sum. Quoted: 32, 16 (2)."""
    n_seed: int = Field(64, ge=1)
    """Seeds of HSP; more than n_tok. Quoted: 256 (2)."""
    kron_terms: int = Field(4, ge=1)
    """Terms k of SumKronLinear. Quoted: 8 (2)."""
    n_kv: int = Field(64, ge=1)
    """Hidden width of the personalized FFN; production 128..256 (p)."""
    depth: int | None = Field(None, ge=0)
    """Layers that change the sequence; None = as many as the model. A shallower tower keeps its last H_sum (ours)."""
    window: int = Field(32, ge=0)
    """SWA sees |i - j| <= window. Quoted: click 100, impression 50 (2)."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} is not a multiple of 2 * heads = {2 * self.heads}: "
                "rotary embedding turns pairs within a head; change either"
            )
        return self


class KunlunConfig(Config):
    """Sizes and switches of the teacher. A file may start from a preset: `small`, or `{preset: small, n_sum: 8}`."""

    width: int = Field(64, ge=1)
    """Model width d (ours: 64 on a small machine)."""
    embedding_dim: int = Field(32, ge=1)
    """Width of the hashed embeddings, projected to `width` per feature (ours)."""
    embedding_init_std: float = Field(0.01, gt=0)
    """Initial spread of the embeddings; small, so that ids seen once or twice stay quiet (ours)."""
    num_layers: int = Field(4, ge=1)
    """Layers L, each an interaction block and a transformer block (p)."""
    n_sum: int = Field(16, ge=1)
    """Tokens of X_sum, WeightGen's summary (ours: 8..16)."""
    num_numeric_tokens: int = Field(4, ge=1)
    """Tokens that the numeric features map to (p: one, or a few)."""
    normalize_numbers: bool = True
    """Standardize the numeric features by their running mean and spread (ours)."""
    tower: TowerConfig = TowerConfig()
    """Sizes of every sequence tower that `towers` does not name."""
    towers: dict[str, TowerConfig] = Field(default_factory=dict)
    """Sizes by sequence name."""
    personalized_towers: bool = True
    """Off: one shared tower reads all sequences merged by time, with an event-type embedding (2, ablation)."""
    event_hidden: int = Field(64, ge=1)
    """Hidden width of the MLP over an event's fields and time encoding (ours)."""

    pffn: Literal["gdpa", "bilinear"] = "gdpa"
    """Off ("bilinear"): no activation, `S (K^T V)`, InterFormer's PFFN (p, ablation)."""
    activation: str = "gelu_tanh"
    """GDPA's elementwise activation (p: GELU in tanh form)."""
    inner_scale: float | None = None
    """GDPA's factor inside the activation; None = 1 / sqrt(head width) (ours: the paper's tau collapses GELU)."""
    outer_scale: float = 1.0
    """GDPA's factor after the activation (ours)."""
    pooling: Literal["hsp", "pma"] = "hsp"
    """Off ("pma"): pooling by multi-head attention (2, ablation)."""
    windowed: bool = True
    """Off: full self-attention (2, ablation)."""
    compute_skip: bool = True
    """CompSkip: even layers run PFFN and pool afresh, odd ones run SWA and reuse H_sum (2). Off: all in each."""
    final_pool: bool = True
    """Pool each tower once more after its last layer, for the head (ours). Off: the head sees the last layer's H_sum,
    and sequence layers that nothing would read are not built."""
    time_encoding: bool = True
    """ROTE's time term and the time encoding of events (2). Off: positions only."""
    time_scale_s: float = Field(86_400.0, gt=0)
    """ROTE's t_scale (ours)."""

    num_experts: int = Field(2, ge=1)
    """Wukong experts M; 1 is off (2)."""
    wukong_rank: int = Field(16, ge=1)
    """Rank k of the factorization machine block (ours)."""
    wukong_hidden: int = Field(256, ge=1)
    """Hidden width of its MLP (ours)."""
    interaction_tokens: int | None = Field(None, ge=2)
    """Tokens out of every interaction block; None = as many as go in (ours)."""

    head_hidden: tuple[int, ...] = Field((256, 64), min_length=1)
    """Hidden widths of each objective's MLP (2: an MLP per objective)."""
    domain_token: bool = True
    """A context token per domain (ours)."""
    domain_head: DomainHead = "adapter"
    """What the heads untie per domain: none, bias, adapter (ours)."""
    backend: Backend = "auto"
    """Backend of the kernels: Triton on a GPU, where a step takes two thirds of the reference's time
    (docs/kernels.md), the reference elsewhere; or ask for either."""

    @classmethod
    def small(cls, **changes: Any) -> KunlunConfig:
        """The preset `small` with changes.

        Measured on KuaiRand-Pure, progressive click AUC on the last 70 %, Adam 5e-4, tables' Adagrad 0.05, batches of
        256: .7416 to .7420 over three seeds, 0.2 ms per row on one core. Width 48 or three layers gain nothing.
        """
        return cls.model_validate({"preset": "small", **changes})

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"preset": data}
        if not isinstance(data, dict) or "preset" not in data:
            return data
        changes = {key: value for key, value in data.items() if key != "preset"}
        if data["preset"] not in PRESETS:
            raise ValueError(f"unknown preset '{data['preset']}'; known: {', '.join(PRESETS)}")
        return {**PRESETS[data["preset"]], **changes}

    @model_validator(mode="after")
    def _activation_is_known(self) -> Self:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation '{self.activation}' is not one of {', '.join(ACTIVATIONS)}")
        return self

    def tower_of(self, sequence: str) -> TowerConfig:
        """Sizes of the tower that reads `sequence`."""
        return self.towers.get(sequence, self.tower)


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "small": {
        "width": 32,
        "embedding_dim": 16,
        "num_layers": 2,
        "n_sum": 8,
        "num_numeric_tokens": 8,
        "tower": {"width": 32, "heads": 2, "n_tok": 4, "n_seed": 8, "kron_terms": 2, "n_kv": 16, "window": 16},
        "event_hidden": 32,
        "wukong_rank": 8,
        "wukong_hidden": 128,
        "head_hidden": (64,),
    },
}
