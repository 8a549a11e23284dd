"""One student's training: predict a batch, count the prediction, then learn from it. No IO.

Shape legend: B rows, K the heads of the student's objectives: one each and, with Zipper, one per window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from das.errors import ConfigError
from das.logit_block import LogitBlock
from das.schema import FeatureSchema
from das.telemetry import NullTelemetry, Telemetry
from foundation_model.batch import Batch
from foundation_model.features import InputSpec
from foundation_model.metrics import ALL, LOGIT_LIMIT, ProgressiveMetrics
from foundation_model.optimizers import Optimizers
from foundation_model.snapshot import load_rng_tensors, pack, rng_tensors, unpack
from vertical_models.config import StudentConfig
from vertical_models.objective import StudentObjective, TeacherTargets
from vertical_models.row_buffer import TrainingBatch
from vertical_models.student import Student


@dataclass(slots=True)
class Counts:
    """What was trained so far, over all lives of the student. rows: int64 (domains of the schema)."""

    rows: Tensor
    rows_with_logits: int = 0
    steps: int = 0
    steps_nonfinite: int = 0
    trained_through_ms: int = 0

    @property
    def rows_total(self) -> int:
        """Rows trained."""
        return int(self.rows.sum())


class StudentTrainer:
    """Model, optimizers, progressive metrics and counts of one student; `state_tensors` has all that is not weights."""

    def __init__(
        self,
        config: StudentConfig,
        schema: FeatureSchema,
        *,
        telemetry: Telemetry | None = None,
    ) -> None:
        """Sets torch's thread count and seed. Raises ConfigError where the config does not fit schema or machine."""
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config = config
        self.schema = schema
        self.device = config.torch_device()
        self.encoder = config.encoder(schema)
        self.student = Student(config, self.encoder.spec).to(self.device)
        self.optimizers = Optimizers(self.student, config.optimizer)
        self.metrics = ProgressiveMetrics(schema.domains, config.objectives, eval_from_ms=config.eval_from_ms)
        self.counts = Counts(torch.zeros(len(schema.domains), dtype=torch.int64))
        self._telemetry = telemetry or NullTelemetry()
        spec = self.encoder.spec
        weights = config.label_weights(spec.heads)
        self._objective = StudentObjective(config.distillation, spec, weights, self.device)
        names = [head.name for head in schema.heads]
        self._columns = [names.index(head.name) for head in spec.heads]
        self._applies = torch.tensor([_applies(schema, domain, spec) for domain in schema.domains])

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the examples that the student reads."""
        return self.encoder.columns

    def targets(self, block: LogitBlock | None, rows: np.ndarray, batch: Batch) -> TeacherTargets | None:
        """The teacher's logits of `batch`, which is `rows` of the block's message; None if the student reads none.

        Masked where there is no block, and where an objective does not apply to the row's domain: the teacher never
        learned that column there.
        """
        if not self.config.distillation.reads_logits:
            return None
        mask_BK = self._applies[batch.domain_B]
        if block is None:
            none_BK = torch.zeros_like(mask_BK)
            return TeacherTargets(none_BK.float(), none_BK, none_BK[:, 0])
        logits_BK = torch.from_numpy(block.logits[rows][:, self._columns])
        found_B = torch.ones(batch.num_rows, dtype=torch.bool)
        return TeacherTargets(torch.where(mask_BK, logits_BK, 0.0), mask_BK, found_B)

    def train(self, item: TrainingBatch) -> bool:
        """Predict, count, learn. Returns whether the step was taken; a non-finite one leaves the model as it was."""
        batch = item.batch.to(self.device)
        output = self.student(batch)  # 1. predict, with the weights from before this batch
        self._evaluate(output.logits_BK, item.batch)  # 2. count the prediction
        teacher = item.teacher.to(self.device) if item.teacher else None
        loss = self._objective(output.logits_BK, output.distilled_BK, batch.labels_BK, batch.label_mask_BK, teacher)
        self.optimizers.backward(loss)
        ok = self.optimizers.step(loss)  # 3. learn
        self._count(item, ok)
        return ok

    def model_tensors(self) -> dict[str, Tensor]:
        """Every weight, live."""
        return self.student.state_dict()

    def state_tensors(self) -> dict[str, Tensor]:
        """Optimizers, metrics, counts and random generators by stable names, live."""
        counts = self.counts
        numbers = (counts.rows_with_logits, counts.steps, counts.steps_nonfinite, counts.trained_through_ms)
        return pack(
            counts={"rows": counts.rows, "numbers": torch.tensor(numbers)},
            generators=rng_tensors(self.device),
            optimizer=self.optimizers.state_tensors(),
            metrics=self.metrics.state_tensors(),
        )

    def load(self, model: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Restore what `model_tensors` and `state_tensors` gave. Raises ConfigError if they are of another config."""
        try:
            self.student.load_state_dict(dict(model), strict=True)
            counts = unpack(state, "counts")
            self.counts = Counts(counts["rows"].clone(), *(int(n) for n in counts["numbers"]))
            load_rng_tensors(unpack(state, "generators"), self.device)
        except (RuntimeError, KeyError) as error:
            where = f"student '{self.config.name}'"
            raise ConfigError(f"{where}: the snapshot is of another config: {error}; use another name") from error
        self.optimizers.load_state_tensors(unpack(state, "optimizer"))
        self.metrics.load_state_tensors(unpack(state, "metrics"))

    def portfolios(self) -> list[dict[str, Any]]:
        """Results per portfolio; the pooled ones only for students of several domains."""
        return [p for p in self.metrics.results() if f"{p['domain']}/{p['objective']}" in self._keys]

    def summaries(self) -> dict[str, dict[str, float | None]]:
        """Rows, NE, AUC and calibration so far, by portfolio key."""
        names = ("rows", "ne", "auc", "calibration")
        found = {key: self.metrics.summary(key) for key in self._keys}
        return {key: {name: getattr(summary, name) for name in names} for key, summary in found.items()}

    @property
    def _keys(self) -> tuple[str, ...]:
        pooled = len(self.student.serving.domains) > 1
        return tuple(key for key in self.metrics.keys if pooled or not key.startswith(f"{ALL}/"))

    def _evaluate(self, logits_BK: Tensor, batch: Batch) -> None:
        """Served heads only: of a row that did not wait for an objective's full window, they have no label."""
        served = self.encoder.spec.served
        logits_BO = logits_BK[:, served].detach().float().cpu().numpy()
        logits_BO = np.nan_to_num(logits_BO, nan=0.0, posinf=LOGIT_LIMIT, neginf=-LOGIT_LIMIT)
        labels = batch.labels_BK[:, served].numpy(), batch.label_mask_BK[:, served].numpy()
        self.metrics.update(logits_BO, *labels, batch.domain_B.numpy(), batch.event_time_ms_B)

    def _count(self, item: TrainingBatch, ok: bool) -> None:
        counts, batch = self.counts, item.batch
        counts.rows += torch.bincount(batch.domain_B, minlength=len(counts.rows))
        counts.rows_with_logits += int(item.teacher.found_B.sum()) if item.teacher else 0
        counts.steps += 1
        counts.steps_nonfinite += not ok
        counts.trained_through_ms = max(counts.trained_through_ms, int(batch.event_time_ms_B.max()))
        self._telemetry.count("exfm_train_steps_total", outcome="ok" if ok else "nonfinite")
        self._telemetry.count("exfm_rows_trained_total", batch.num_rows)


def _applies(schema: FeatureSchema, domain: str, spec: InputSpec) -> list[bool]:
    """Whether each head's objective is observed in the domain at all."""
    limits = {o.name: o.domains for o in schema.objectives}
    allowed = [limits[spec.objectives[head.objective]] for head in spec.heads]
    return [domains is None or domain in domains for domains in allowed]
