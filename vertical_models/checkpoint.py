"""A student's snapshots: where it stands in the stream, and everything it needs to go on as if never interrupted."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from das.errors import ConfigError
from das.position import Position, Positions
from foundation_model import snapshot
from vertical_models.config import StudentConfig
from vertical_models.row_buffer import decided_misses
from vertical_models.trainer import StudentTrainer

logger = logging.getLogger(__name__)

FIXED = ("domains", "objectives", "features", "tables", "inputs", "backbone", "batch_rows", "seed", "eval_from_ms")
"""Config fields that a snapshot binds: another value would be another model, or other metrics."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where to go on. version: of the snapshot that was read, 0 for none.

    misses: (partition, offset) of messages that were found to have no logits before the snapshot, and still have none.
    """

    positions: Positions
    version: int = 0
    misses: frozenset[tuple[int, int]] = frozenset()


def resume(trainer: StudentTrainer, root: Path, partitions: Collection[int]) -> Resumed:
    """Load the newest valid snapshot below `root` into `trainer`, if there is one. Cleans up after a killed writer.

    Raises ConfigError if the snapshot is of another schema or config.
    """
    snapshot.clean(root)
    path = snapshot.latest_snapshot(root)
    if path is None:
        return Resumed(dict.fromkeys(partitions, Position(0)))
    found = snapshot.read_snapshot(path)
    manifest = found.manifest
    remedy = f"give the student another name, or move {root} away to start it anew"
    if manifest.schema_fingerprint != f"{trainer.schema.fingerprint:016x}":
        raise ConfigError(f"{path} was trained on another feature schema; {remedy}")
    _compare(trainer.config, StudentConfig.parse(found.config, source=str(path / snapshot.CONFIG)), remedy)
    if gone := set(manifest.positions) - set(partitions):
        raise ConfigError(f"{path} has positions of the partitions {sorted(gone)}, which the topic lacks; {remedy}")
    trainer.load(found.model, found.state)
    logger.info("resumed from %s at %s", path, manifest.positions)
    positions = {p: manifest.positions.get(p, Position(0)) for p in partitions}
    return Resumed(positions, manifest.version, decided_misses(found.state["decisions"]))


def save(trainer: StudentTrainer, root: Path, version: int, positions: Positions, decisions: Tensor) -> Path:
    """Write one snapshot: the model after training on exactly the rows before `positions`."""
    counts = trainer.counts
    return snapshot.write_snapshot(
        root,
        version,
        model=trainer.model_tensors(),
        state=trainer.state_tensors() | {"decisions": decisions},
        config=trainer.config.model_dump(mode="json"),
        schema_fingerprint=trainer.schema.fingerprint,
        positions=dict(positions),
        trained_through_ms=counts.trained_through_ms,
        steps=counts.steps,
        rows=counts.rows_total,
        metrics=trainer.summaries(),
        parent=version - 1 or None,
        keep=trainer.config.snapshots_kept,
    )


def load_student(path: Path, trainer: StudentTrainer) -> int:
    """Only the weights of one snapshot, into `trainer.student`; returns its version. For export and evaluation."""
    found = snapshot.read_snapshot(path, with_state=False)
    with torch.no_grad():
        trainer.student.load_state_dict(found.model, strict=True)
    return found.manifest.version


def _compare(now: StudentConfig, then: StudentConfig, remedy: str) -> None:
    """Refuse a change that makes another model of it; say which other settings changed."""
    changed = [name for name in StudentConfig.model_fields if getattr(now, name) != getattr(then, name)]
    bound = [name for name in changed if name in FIXED]
    if now.distillation.mode != then.distillation.mode:
        bound.append("distillation.mode")
    if bound:
        raise ConfigError(f"student '{now.name}': {', '.join(bound)} changed since its snapshot; {remedy}")
    if changed:
        logger.warning("student %s goes on with other settings: %s", now.name, ", ".join(changed))
