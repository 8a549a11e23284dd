"""The teacher's training: one forward scores a batch, and the same forward is then learned from. No IO.

Shape legend: B rows, K heads: one per objective and, with Zipper, window.
"""

from __future__ import annotations

import logging
from typing import cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from das.errors import ConfigError
from das.logit_block import BlockDtype
from das.schema import FeatureSchema
from das.telemetry import NullTelemetry, Telemetry
from foundation_model.batch import Batch
from foundation_model.features import FeatureEncoder
from foundation_model.kunlun import Kunlun
from foundation_model.kunlun_config import KunlunConfig
from foundation_model.metrics import LOGIT_LIMIT, ProgressiveMetrics
from foundation_model.optimizers import OptimizerConfig, Optimizers
from foundation_model.snapshot import Snapshot, load_rng_tensors, pack, rng_tensors, unpack
from foundation_model.training_config import TrainingConfig

logger = logging.getLogger(__name__)

BOUND = ("tables", "model", "seed", "eval_from")
"""Config fields that a snapshot binds: another value would be another model, or metrics of other rows."""


class TeacherConfig(TrainingConfig):
    """The teacher: its model, how it learns, and how often it saves."""

    name: str = Field("kunlun", pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    """Names the teacher's blocks in the store; a retrained teacher over the same stream needs another one."""
    model: KunlunConfig = KunlunConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective_weights: dict[str, float] = Field(default_factory=dict)
    """Weight of each objective in the loss; 1 where not named."""
    messages_per_step: int = Field(1, ge=1, le=1024)
    """Messages scored and trained as one batch. Above 1, a step waits until that many have arrived."""
    snapshot_every_messages: int = Field(100, ge=1)
    keep_snapshots: int = Field(3, ge=1, le=1000)
    put_timeout_s: float = Field(600.0, gt=0)
    """How long to wait for a store or a broker that is away before giving up."""
    logit_dtype: BlockDtype = "float16"
    embedding_width: int = Field(0, ge=0, le=1024)
    """Values per row of the embedding stored beside the logits: what the heads read, by a fixed random projection.
    0 = none is stored. No student reads it yet; a row takes 4 bytes and one per value in the store."""

    @model_validator(mode="after")
    def _weights_are_positive(self) -> TeacherConfig:
        for name, weight in self.objective_weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"objective_weights.{name} is {weight}; set 0 or more")
        return self


class TeacherTrainer:
    """Model, optimizers, progressive metrics and counts of the teacher.

    `version` counts the batches that were scored and then learned from, refused steps included, so that a version
    names one state of the weights and one place in the stream. `model` replaces Kunlun by another module with
    `forward(batch) -> logits (B, K)`, which stores no embeddings.
    """

    def __init__(
        self,
        config: TeacherConfig,
        schema: FeatureSchema,
        *,
        model: nn.Module | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        """Sets torch's thread count and seed. Raises ConfigError where the config does not fit the schema."""
        if unknown := set(config.objective_weights) - set(schema.objective_names):
            known = ", ".join(schema.objective_names)
            raise ConfigError(f"objective_weights: schema '{schema.name}' has no {sorted(unknown)}; known: {known}")
        self.config = config
        self.schema = schema
        self.device = config.torch_device()
        torch.set_num_threads(config.threads)
        self.encoder = FeatureEncoder(schema, tables=config.tables)
        if model is None:
            torch.manual_seed(config.seed)
            model = Kunlun(config.model, self.encoder.spec)
        width = getattr(model, "representation_width", 0)
        if config.embedding_width > width:
            raise ConfigError(f"teacher: embedding_width: {config.embedding_width}, the model has {width} to store")
        self._projection_IE = sign_projection(width, config.embedding_width).to(self.device)
        self.model = model.to(self.device).train()
        self.optimizers = Optimizers(self.model, config.optimizer)
        self.metrics = ProgressiveMetrics(schema.domains, schema.objective_names, eval_from_ms=config.eval_from_ms)
        self.version = 0
        self.rows = 0
        self.trained_through_ms = 0
        self._telemetry = telemetry or NullTelemetry()
        own = [config.objective_weights.get(name, 1.0) for name in schema.objective_names]
        heads = self.encoder.spec.heads
        weights = [own[h.objective] * w for h, w in zip(heads, config.label_weights(heads), strict=True)]
        self._weights_K = torch.tensor(weights, dtype=torch.float32, device=self.device)

    def score(self, batch: Batch) -> Tensor:
        """Logits (B, K) float32 of a batch on the trainer's device, with the graph that `step` needs."""
        logits_BK: Tensor = self.model(batch).float()
        return logits_BK

    def score_and_embed(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """`score`, and the embeddings (B, E) float32 of the same forward, detached; None where none are stored."""
        if not self.config.embedding_width:
            return self.score(batch), None
        model = cast(Kunlun, self.model)
        flat_BI = model.represent(batch)
        logits_BK: Tensor = model.heads(flat_BI, batch.domain_B).float()
        return logits_BK, flat_BI.detach().float() @ self._projection_IE

    def evaluate(self, logits_BK: np.ndarray, batch: Batch) -> None:
        """Count the predictions of a batch on the host that was not trained on; a NaN counts as logit 0.

        Served heads only: of a row that did not wait for an objective's full window, they have no label.
        """
        served = self.encoder.spec.served
        finite_BK = np.nan_to_num(logits_BK[:, served], nan=0.0, posinf=LOGIT_LIMIT, neginf=-LOGIT_LIMIT)
        labels = batch.labels_BK[:, served].numpy(), batch.label_mask_BK[:, served].numpy()
        self.metrics.update(finite_BK, *labels, batch.domain_B.numpy(), batch.event_time_ms_B)

    def step(self, logits_BK: Tensor, batch: Batch) -> bool:
        """Learn from logits of `score`. Returns whether the step was taken; a non-finite one leaves the weights."""
        loss = self.loss(logits_BK, batch)
        self.optimizers.backward(loss)
        ok = self.optimizers.step(loss)
        self.optimizers.zero_grad()
        self.version += 1
        self._telemetry.count("exfm_train_steps_total", outcome="ok" if ok else "nonfinite")
        if ok:
            self.rows += batch.num_rows
            self.trained_through_ms = max(self.trained_through_ms, int(batch.event_time_ms_B.max()))
            self._telemetry.count("exfm_rows_trained_total", batch.num_rows)
        else:
            logger.error("version %d: a non-finite loss or gradient; the step was not taken", self.version)
        return ok

    def loss(self, logits_BK: Tensor, batch: Batch) -> Tensor:
        """Mean of the weighted binary cross-entropies over the known labels; 0 if none is known."""
        mask_BK = batch.label_mask_BK.float()
        entropy_BK = F.binary_cross_entropy_with_logits(logits_BK, batch.labels_BK, reduction="none")
        return (entropy_BK * mask_BK * self._weights_K).sum() / mask_BK.sum().clamp(min=1.0)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything but the weights: optimizers, metrics, counts, random generators; live tensors."""
        counts = {"counts": torch.tensor([self.version, self.rows, self.trained_through_ms])}
        groups = {"optimizer": self.optimizers.state_tensors(), "metrics": self.metrics.state_tensors()}
        return pack(**groups, rng=rng_tensors(self.device), trainer=counts)

    def load(self, snapshot: Snapshot) -> None:
        """Go on where `snapshot` was taken. Raises ConfigError if it is of another schema or model."""
        remedy = f"restore the settings, or give the teacher another name and run folder than {snapshot.path.parent}"
        if snapshot.manifest.schema_fingerprint != f"{self.schema.fingerprint:016x}":
            raise ConfigError(f"{snapshot.path} was trained on another feature schema; {remedy}")
        then = TeacherConfig.parse(snapshot.config, source=str(snapshot.path))
        changed = [name for name in TeacherConfig.model_fields if getattr(self.config, name) != getattr(then, name)]
        if bound := [name for name in changed if name in BOUND]:
            raise ConfigError(f"teacher: {', '.join(bound)} changed since {snapshot.path}; {remedy}")
        if changed:
            logger.warning("going on from %s with other settings: %s", snapshot.path, ", ".join(changed))
        try:
            self.model.load_state_dict(snapshot.model)
            counts = unpack(snapshot.state, "trainer")["counts"]
        except (RuntimeError, KeyError) as error:
            raise ConfigError(f"{snapshot.path} does not fit the model: {error}; {remedy}") from None
        self.version, self.rows, self.trained_through_ms = (int(n) for n in counts)
        self.optimizers.load_state_tensors(unpack(snapshot.state, "optimizer"))
        self.metrics.load_state_tensors(unpack(snapshot.state, "metrics"))
        load_rng_tensors(unpack(snapshot.state, "rng"), self.device)


def sign_projection(width: int, out: int) -> Tensor:
    """(width, out) float32, +-1 / sqrt(width): a function of its sizes alone, so that no snapshot has to keep it.

    Random signs keep distances and what a linear model can read (Achlioptas, Database-friendly random projections,
    2003).
    """
    signs = torch.randint(2, (width, out), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    return signs / max(1, width) ** 0.5


def publish_metrics(metrics: ProgressiveMetrics, telemetry: Telemetry) -> None:
    """Set the gauges of every portfolio: NE of the recent blocks, AUC and calibration of everything evaluated."""
    for key in metrics.keys:
        summary = metrics.summary(key)
        values = {"ne": metrics.recent_ne(key), "auc": summary.auc, "calibration": summary.calibration}
        for name, value in values.items():
            if value is not None:
                telemetry.gauge(f"exfm_{name}", value, portfolio=key)
