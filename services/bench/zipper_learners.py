"""The models of `exfm bench zipper`: the project's own trainers, fed in process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from das.logit_block import LogitBlock, decode_block, encode_block
from das.schema import FeatureSchema
from foundation_model.batch import Batch
from foundation_model.trainer import TeacherConfig, TeacherTrainer
from services.bench.zipper_stream import OBJECTIVE
from vertical_models.config import StudentConfig
from vertical_models.row_buffer import TrainingBatch
from vertical_models.trainer import StudentTrainer

TABLES = {"default_buckets": 1024}


class Learner(Protocol):
    """One model that serves one logit per row and learns from messages."""

    def score(self, batch: Batch) -> np.ndarray:
        """The served logits of rows, float32 (B,), with the weights as they are."""
        ...

    def learn(self, batch: Batch) -> None:
        """One step on one message."""
        ...


class Teacher:
    """A small Kunlun. `block` holds its logits of the last message, made before it learned from it."""

    def __init__(self, schema: FeatureSchema, seed: int, rate: float, *, oracle_weighting: bool) -> None:
        config = TeacherConfig.parse(
            {
                "seed": seed,
                "device": "cpu",
                "tables": TABLES,
                "model": {"preset": "small", "num_layers": 1, "width": 16, "wukong_hidden": 64},
                "optimizer": {"lr": 1e-3 * rate, "table_lr": 0.05 * rate},
                "oracle_weighting": oracle_weighting,
            }
        )
        self.trainer = TeacherTrainer(config, schema)
        self.block: LogitBlock | None = None

    @torch.no_grad()
    def score(self, batch: Batch) -> np.ndarray:
        """See `Learner`."""
        served = self.trainer.encoder.spec.served[0]
        return self.trainer.score(batch)[:, served].numpy()

    def learn(self, batch: Batch) -> None:
        """See `Learner`."""
        trainer = self.trainer
        logits_BK = trainer.score(batch)
        data = encode_block(
            logits_BK.detach().numpy(),
            teacher_version=trainer.version,
            trained_offset=trainer.version,
            trained_through_ms=trainer.trained_through_ms,
            schema_fingerprint=trainer.schema.fingerprint,
            message_checksum=0,
        )
        self.block = decode_block(data)
        trainer.step(logits_BK, batch)


class Student:
    """A DCN-V2; it learns from the blocks of `teacher` too if there is one, which must learn first."""

    def __init__(
        self, schema: FeatureSchema, seed: int, rate: float, *, oracle_weighting: bool, teacher: Teacher | None = None
    ) -> None:
        config = StudentConfig.parse(
            {
                "name": "student",
                "objectives": [OBJECTIVE],
                "seed": seed,
                "tables": TABLES,
                "optimizer": {"lr": 2e-3 * rate, "table_lr": 0.05 * rate},
                "distillation": {"mode": "none" if teacher is None else "auxiliary"},
                "oracle_weighting": oracle_weighting,
            }
        )
        self.trainer = StudentTrainer(config, schema)
        self._teacher = teacher

    @torch.no_grad()
    def score(self, batch: Batch) -> np.ndarray:
        """See `Learner`."""
        served = self.trainer.encoder.spec.served[0]
        return self.trainer.student(batch).logits_BK[:, served].numpy()

    def learn(self, batch: Batch) -> None:
        """See `Learner`."""
        block = self._teacher.block if self._teacher else None
        targets = self.trainer.targets(block, np.arange(batch.num_rows), batch)
        self.trainer.train(TrainingBatch(batch, targets, []))


def models(
    names: tuple[str, ...], schema: FeatureSchema, seed: int, rates: Mapping[str, float], *, oracle_weighting: bool
) -> dict[str, Learner]:
    """The named models of one run, in the order in which they learn from a message."""
    found: dict[str, Learner] = {}
    for name in names:
        if name == "teacher":
            found[name] = Teacher(schema, seed, rates[name], oracle_weighting=oracle_weighting)
        else:
            teacher = found["teacher"] if name == "distilled" else None
            assert teacher is None or isinstance(teacher, Teacher)
            found[name] = Student(schema, seed, rates[name], oracle_weighting=oracle_weighting, teacher=teacher)
    return found
