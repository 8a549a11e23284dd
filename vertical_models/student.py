"""A student: the serving graph, and in training an auxiliary head that learns from the teacher beside it.

ExFM (arXiv 2502.17494), section 3.2. Shape legend: B rows, H backbone width, K objectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foundation_model.batch import Batch
from foundation_model.features import InputSpec
from vertical_models.config import StudentConfig
from vertical_models.objective import DistillationConfig, scale_gradient
from vertical_models.serving import ServingModel

_AUXILIARY_SEED = 0x5EED


class StudentOutput(NamedTuple):
    """served_BK: the logits that users get. distilled_BK: the auxiliary head's, None where there is none."""

    served_BK: Tensor
    distilled_BK: Tensor | None


class DistillHeads(nn.Module):
    """One auxiliary head per objective, `z_D = head(GS_beta(x))`: x (B, H) -> (B, K) (eq. 3 and 4)."""

    def __init__(self, config: DistillationConfig, width: int, objectives: tuple[str, ...]) -> None:
        super().__init__()
        self.betas = config.per_objective("beta", objectives)
        self.heads = nn.ModuleList(self._head((width, *config.head_hidden)) for _ in objectives)

    @staticmethod
    def _head(widths: tuple[int, ...]) -> nn.Sequential:
        hidden = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(widths[-1], 1))

    def forward(self, x_BH: Tensor) -> Tensor:
        """Logits that match the teacher's, (B, K)."""
        pairs = zip(self.heads, self.betas, strict=True)
        return torch.cat([head(scale_gradient(x_BH, beta)) for head, beta in pairs], dim=1)


class Student(nn.Module):
    """`serving` is exported; `distill` exists in training with mode auxiliary only.

    The same seed gives the same serving weights in every distillation mode, so that arms of a comparison pair.
    """

    def __init__(self, config: StudentConfig, spec: InputSpec) -> None:
        super().__init__()
        with _seeded(config.seed):
            self.serving = ServingModel(config.inputs, config.backbone, spec, config.domains or spec.domains)
        self.distill: DistillHeads | None = None
        if config.distillation.mode == "auxiliary":
            with _seeded(config.seed ^ _AUXILIARY_SEED):
                width = self.serving.backbone.output_width
                self.distill = DistillHeads(config.distillation, width, spec.objectives)

    def forward(self, batch: Batch) -> StudentOutput:
        """Both heads' logits of encoded rows."""
        x_BH = self.serving.represent(self.serving.inputs(batch))
        distilled_BK = None if self.distill is None else self.distill(x_BH)
        return StudentOutput(self.serving.head(x_BH), distilled_BK)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a generator of our own; the process's goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
