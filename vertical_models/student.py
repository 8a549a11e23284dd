"""A student: the serving graph, and in training an auxiliary head that learns from the teacher beside it.

ExFM (arXiv 2502.17494), section 3.2. With Zipper (Lattice, arXiv 2512.09200, section 2) an objective has a head for
each of its windows; the one of its full window is the serving graph's, the others exist in training only.
Shape legend: B rows, H backbone width, K heads, O objectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from foundation_model.batch import Batch
from foundation_model.features import InputSpec
from vertical_models.config import StudentConfig
from vertical_models.objective import DistillationConfig, scale_gradient
from vertical_models.serving import ServingModel

_AUXILIARY_SEED = 0x5EED
_WINDOWS_SEED = 0x21EE


class StudentOutput(NamedTuple):
    """logits_BK: what labels train; users get the served columns. distilled_BK: the auxiliary heads', None without."""

    logits_BK: Tensor
    distilled_BK: Tensor | None


class DistillHeads(nn.Module):
    """One auxiliary head beside each head, `z_D = head(GS_beta(x))`: x (B, H) -> (B, K) (eq. 3 and 4)."""

    def __init__(self, config: DistillationConfig, width: int, spec: InputSpec) -> None:
        super().__init__()
        self.betas = config.per_head("beta", spec)
        self.heads = nn.ModuleList(self._head((width, *config.head_hidden)) for _ in spec.heads)

    @staticmethod
    def _head(widths: tuple[int, ...]) -> nn.Sequential:
        hidden = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(widths[-1], 1))

    def forward(self, x_BH: Tensor) -> Tensor:
        """Logits that match the teacher's, (B, K)."""
        pairs = zip(self.heads, self.betas, strict=True)
        return torch.cat([head(scale_gradient(x_BH, beta)) for head, beta in pairs], dim=1)


class Student(nn.Module):
    """`serving` is exported; `distill` exists in training with mode auxiliary only, `windows` with Zipper only.

    The same seed gives the same serving weights with and without either, so that arms of a comparison pair.
    """

    def __init__(self, config: StudentConfig, spec: InputSpec) -> None:
        super().__init__()
        with _seeded(config.seed):
            self.serving = ServingModel(config.inputs, config.backbone, spec, config.domains or spec.domains)
        width = self.serving.backbone.output_width
        self.windows: nn.Linear | None = None
        unserved = [k for k, head in enumerate(spec.heads) if not head.served]
        if unserved:
            with _seeded(config.seed ^ _WINDOWS_SEED):
                self.windows = nn.Linear(width, len(unserved))
        self._place_K = np.argsort([*spec.served, *unserved]).tolist()
        self.distill: DistillHeads | None = None
        if config.distillation.mode == "auxiliary":
            with _seeded(config.seed ^ _AUXILIARY_SEED):
                self.distill = DistillHeads(config.distillation, width, spec)

    def forward(self, batch: Batch) -> StudentOutput:
        """All heads' logits of encoded rows, (B, K)."""
        x_BH = self.serving.represent(self.serving.inputs(batch))
        distilled_BK = None if self.distill is None else self.distill(x_BH)
        logits_BO: Tensor = self.serving.head(x_BH)
        if self.windows is None:
            return StudentOutput(logits_BO, distilled_BK)
        return StudentOutput(torch.cat([logits_BO, self.windows(x_BH)], dim=1)[:, self._place_K], distilled_BK)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a generator of our own; the process's goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
