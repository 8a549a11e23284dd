"""A student's snapshots: where it stands in the stream, and everything it needs to go on as if never interrupted."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from das.errors import ConfigError
from das.position import Positions
from das.schema import FeatureSchema
from foundation_model.snapshot import CONFIG, Snapshot, read_snapshot
from foundation_model.snapshot_folder import SnapshotFolder
from vertical_models.config import StudentConfig
from vertical_models.row_buffer import decided_misses
from vertical_models.trainer import StudentTrainer

logger = logging.getLogger(__name__)

BOUND = ("domains", "objectives", "features", "tables", "inputs", "backbone", "batch_rows", "seed", "eval_from")
"""Config fields that a snapshot binds: another value would be another model, other batches, or other metrics."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where to go on. misses: (partition, offset) of messages that had no logits, which were decided and stay so."""

    positions: Positions
    misses: frozenset[tuple[int, int]] = field(default_factory=frozenset)


def resume(trainer: StudentTrainer, snapshots: SnapshotFolder, start: Positions) -> Resumed:
    """Load the newest valid snapshot, if there is one, into `trainer`.

    `start` names every partition and where one without a saved position begins (see
    `das.example_source.start_positions`). Raises ConfigError if the snapshot is of another schema, config or topic.
    """
    found = snapshots.latest()
    if found is None:
        return Resumed(dict(start))
    saved = found.manifest.positions
    if gone := set(saved) - set(start):
        raise ConfigError(f"{found.path} has positions of the partitions {sorted(gone)}, which the topic lacks")
    _compare(trainer, found)
    trainer.load(found.model, found.state)
    logger.info("resumed step %d at %s", trainer.counts.steps, saved)
    return Resumed({**start, **saved}, decided_misses(found.state["decisions"]))


def save(trainer: StudentTrainer, snapshots: SnapshotFolder, positions: Positions, decisions: Tensor) -> bool:
    """Write the model after training on exactly the rows before `positions`; False if the disk refused."""
    return snapshots.write(
        trainer.counts.steps,
        model=trainer.model_tensors(),
        state=trainer.state_tensors() | {"decisions": decisions},
        config=trainer.config.model_dump(mode="json"),
        schema_fingerprint=trainer.schema.fingerprint,
        positions=dict(positions),
        trained_through_ms=trainer.counts.trained_through_ms,
        steps=trainer.counts.steps,
        rows=trainer.counts.rows_total,
        metrics=trainer.summaries(),
    )


def load_trained(path: Path, schema: FeatureSchema) -> StudentTrainer:
    """The student of one snapshot, its config read from there; for export and evaluation.

    Raises SnapshotError if the snapshot cannot be trusted, ConfigError if it is of another schema.
    """
    found = read_snapshot(path)
    trainer = StudentTrainer(StudentConfig.parse(found.config, source=str(path / CONFIG)), schema)
    _compare(trainer, found)
    trainer.load(found.model, found.state)
    return trainer


def _compare(trainer: StudentTrainer, found: Snapshot) -> None:
    """Refuse a change that makes another model of it; say which other settings changed."""
    now, then = trainer.config, StudentConfig.parse(found.config, source=str(found.path / CONFIG))
    changed = [name for name in StudentConfig.model_fields if getattr(now, name) != getattr(then, name)]
    bound = [name for name in changed if name in BOUND]
    if now.distillation.mode != then.distillation.mode:
        bound.append("distillation.mode")
    if found.manifest.schema_fingerprint != f"{trainer.schema.fingerprint:016x}":
        bound.append("the feature schema")
    if bound:
        raise ConfigError(
            f"student '{now.name}': {', '.join(bound)} changed since {found.path} was written; undo the change, "
            f"give the student another name, or move {found.path.parent} away to start anew"
        )
    if changed:
        logger.warning("student %s goes on with other settings: %s", now.name, ", ".join(changed))
