"""What a student minimizes: hard labels on the served head, the teacher's probabilities on the auxiliary one.

ExFM (arXiv 2502.17494), section 3.2, eq. 2 to 5. Shape legend: B rows, K heads (without Zipper: objectives). A loss is
the sum over heads of the mean over all rows of the batch, masked rows included: how much a row counts does not depend
on its neighbors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from das.config import Config
from das.errors import ConfigError
from foundation_model.features import InputSpec

PerObjective = float | dict[str, float]


class DistillationConfig(Config):
    """How the teacher's logits enter the loss. weight, beta and alpha are one number, or one per objective by name.

    auxiliary: `h(z_S, y) + weight * h(z_D, min(1, alpha * y_F))`, where z_D is a head of its own that sends `beta`
    times its gradient into the backbone (eq. 3 to 5). shared: `h(z_S, y) + weight * h(z_S, y_F)`, one served head with
    two targets, the baseline (eq. 2). none: hard labels only; logits are not looked up. With Zipper, each head learns
    from the teacher's logit of its own window, and `weight` is what the teacher counts against that head's labels.
    """

    mode: Literal["none", "auxiliary", "shared"] = "auxiliary"
    weight: PerObjective = 3.0
    beta: PerObjective = 1.0
    alpha: PerObjective = 1.0
    head_hidden: tuple[int, ...] = ()
    """Hidden widths of the auxiliary head; empty = linear, as the serving head."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("weight", "beta", "alpha"):
            for value in _values(getattr(self, name)):
                if not 0 <= value <= 1000 or (name == "alpha" and value == 0):
                    raise ValueError(f"{name}: {value} is not in {'(0' if name == 'alpha' else '[0'}, 1000]")
        unread = self.model_fields_set & {"beta", "alpha", "head_hidden"}
        if self.mode == "shared" and unread:
            raise ValueError(f"mode shared does not read {sorted(unread)}; remove them or set mode: auxiliary")
        return self

    @property
    def reads_logits(self) -> bool:
        """Whether the teacher's logits are needed at all."""
        return self.mode != "none"

    def per_objective(self, name: str, objectives: tuple[str, ...]) -> tuple[float, ...]:
        """weight, beta or alpha in the order of `objectives`. Raises ConfigError where one is missing or unknown."""
        value: float | Mapping[str, float] = getattr(self, name)
        if not isinstance(value, Mapping):
            return (float(value),) * len(objectives)
        if set(value) != set(objectives):
            raise ConfigError(
                f"distillation.{name} names {sorted(value)}, but the student's objectives are {sorted(objectives)}; "
                "give one number, or one for each objective"
            )
        return tuple(float(value[o]) for o in objectives)

    def per_head(self, name: str, spec: InputSpec) -> tuple[float, ...]:
        """weight, beta or alpha of each head's objective, in the order of `spec.heads`. Raises as `per_objective`."""
        values = self.per_objective(name, spec.objectives)
        return tuple(values[head.objective] for head in spec.heads)


def _values(value: PerObjective) -> tuple[float, ...]:
    return tuple(value.values()) if isinstance(value, dict) else (value,)


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """The teacher's side of a batch: logits_BK float32, 0 where the bool mask_BK is False (no logits, or no use).

    found_B: bool, whether the row had a logit block at all.
    """

    logits_BK: Tensor
    mask_BK: Tensor
    found_B: Tensor

    def slice(self, start: int, stop: int) -> TeacherTargets:
        """Rows [start, stop)."""
        return TeacherTargets(self.logits_BK[start:stop], self.mask_BK[start:stop], self.found_B[start:stop])

    def to(self, device: torch.device) -> TeacherTargets:
        """The same on `device`."""
        return TeacherTargets(self.logits_BK.to(device), self.mask_BK.to(device), self.found_B.to(device))

    @staticmethod
    def concat(parts: Sequence[TeacherTargets]) -> TeacherTargets | None:
        """Rows of all parts in order; None for no parts."""
        if not parts:
            return None
        names = ("logits_BK", "mask_BK", "found_B")
        return TeacherTargets(*(torch.cat([getattr(p, name) for p in parts]) for name in names))


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float) -> Tensor:
        ctx.beta = beta
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.beta, None


def scale_gradient(x: Tensor, beta: float) -> Tensor:
    """GS_beta: x as it is; its gradient times `beta` (eq. 4)."""
    scaled: Tensor = _ScaleGradient.apply(x, beta)
    return scaled


def scale_labels(p: Tensor, alpha: float | Tensor) -> Tensor:
    """LS_alpha: `min(1, alpha * p)` (eq. 5); engagement probabilities crowd near 0."""
    return (p * alpha).clamp(max=1.0)


def masked_loss(logits_BK: Tensor, targets_BK: Tensor, mask_BK: Tensor, weight_K: Tensor | None = None) -> Tensor:
    """Binary cross-entropy h(z, y), y in [0, 1], summed over heads and averaged over the B rows; a scalar."""
    loss_BK = F.binary_cross_entropy_with_logits(logits_BK, targets_BK, reduction="none")
    loss_K = torch.where(mask_BK, loss_BK, 0.0).mean(0)
    return (loss_K if weight_K is None else loss_K * weight_K).sum()


class StudentObjective:
    """The loss of one student."""

    def __init__(
        self, config: DistillationConfig, spec: InputSpec, label_weights: Sequence[float], device: torch.device | str
    ) -> None:
        """`label_weights`: how much a label counts at each head.

        A row's label reaches one head of an objective, the teacher's logits reach all: so their term also has the
        share of the rows whose labels reach the head. Raises ConfigError if a value per objective is missing.
        """
        self._shared = config.mode == "shared"
        self._label_weight_K = torch.tensor(label_weights, device=device)
        share_K = torch.tensor([head.share for head in spec.heads], device=device)
        weight_K = torch.tensor(config.per_head("weight", spec), device=device)
        self._weight_K = weight_K * self._label_weight_K * share_K
        self._alpha_K = torch.tensor(config.per_head("alpha", spec), device=device)

    def __call__(
        self,
        logits_BK: Tensor,
        distilled_BK: Tensor | None,
        labels_BK: Tensor,
        label_mask_BK: Tensor,
        teacher: TeacherTargets | None,
    ) -> Tensor:
        """The scalar loss: hard labels on `logits_BK`, plus the teacher's term where there is a teacher."""
        loss = masked_loss(logits_BK, labels_BK, label_mask_BK, self._label_weight_K)
        if teacher is None:
            return loss
        targets_BK = scale_labels(torch.sigmoid(teacher.logits_BK), self._alpha_K)
        student_BK = logits_BK if self._shared else distilled_BK
        assert student_BK is not None, "auxiliary distillation without its head"
        return loss + masked_loss(student_BK, targets_BK, teacher.mask_BK, self._weight_K)
