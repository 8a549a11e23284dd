"""What the teacher's and the students' configurations share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import AwareDatetime, Field

from das.config import Config
from das.errors import ConfigError
from das.zipper import Head
from foundation_model.features import TablesConfig


class TrainingConfig(Config):
    """Base of `TeacherConfig` and `StudentConfig`."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(1, ge=1, le=1024)
    """CPU threads of torch. Results are bit-identical for one value of it."""
    seed: int = Field(0, ge=0, lt=2**31)
    tables: TablesConfig = TablesConfig()
    eval_from: AwareDatetime | None = None
    """Progressive metrics cover rows from this event time on: ISO 8601 with its zone, or milliseconds."""

    oracle_weighting: bool = True
    """Zipper: a label counts 1 / share at the served head, so that each objective's served head learns as if every
    impression had waited for the full window; false: 1, as at the other heads."""

    def label_weights(self, heads: Sequence[Head]) -> list[float]:
        """How much a label counts at each head, before weights of the objectives; 1 everywhere without Zipper."""
        return [1 / head.share if head.served and self.oracle_weighting else 1.0 for head in heads]

    @property
    def eval_from_ms(self) -> int | None:
        """`eval_from` in milliseconds since the epoch."""
        return None if self.eval_from is None else round(self.eval_from.timestamp() * 1000)

    def torch_device(self) -> torch.device:
        """The device to use. Raises ConfigError if a GPU was asked for and there is none."""
        there = torch.cuda.is_available()
        if self.device == "cuda" and not there:
            raise ConfigError(f"{self.owner}: device: cuda, but torch sees no GPU here; set cpu or auto")
        return torch.device("cuda" if there and self.device != "cpu" else "cpu")

    @property
    def owner(self) -> str:
        """How errors name whose configuration this is."""
        return "teacher"
