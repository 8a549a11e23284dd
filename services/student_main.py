"""The `exfm student` process, and the export of what it trained."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from das.errors import ConfigError
from das.lookup import LogitLookup
from das.schema import FeatureSchema
from services.process import EXIT_OK, Context
from services.process import run as run_process
from services.settings import Settings, load, student_configs, teacher_config
from services.wiring import examples_reader, logit_store, results_file, student_snapshots

if TYPE_CHECKING:
    from vertical_models.config import StudentConfig


def run(name: str, settings_file: Path) -> int:
    """Run one student until the stream ends or it is asked to stop; returns the exit code."""
    return run_process(name, settings_file, train)


def train(context: Context) -> None:
    """Resume from the newest snapshot, then train. Raises ConfigError, Retryable or Fatal."""
    from foundation_model.snapshot_folder import SnapshotFolder
    from vertical_models.checkpoint import resume
    from vertical_models.online import StudentLoop
    from vertical_models.trainer import StudentTrainer

    settings, telemetry = context.settings, context.telemetry
    config = find_student(settings, context.name)
    schema = FeatureSchema.load(settings.schema_file)
    trainer = StudentTrainer(config, schema, telemetry=telemetry)
    folder = SnapshotFolder(student_snapshots(settings, config.name), config.keep_snapshots, telemetry)
    with ExitStack() as stack:
        snapshots = stack.enter_context(closing(folder))
        reader = stack.enter_context(examples_reader(context, schema))
        resumed = resume(trainer, snapshots, reader.oldest())
        lookup = None
        if config.distillation.reads_logits:
            store = stack.enter_context(logit_store(settings, teacher_config(settings).name))
            lookup = LogitLookup(store, schema, telemetry, config.lookup, stop=context.stop)
        loop = StudentLoop(
            reader.open(trainer.columns, resumed.positions),
            lookup,
            trainer,
            resumed,
            snapshots,
            results=results_file(settings, config.name),
            telemetry=telemetry,
            stop_at_end=settings.stop_at_end,
        )
        context.set_ready()
        loop.run(context.stop)


def export(name: str, settings_file: Path, to: Path) -> int:
    """Write the serving graph of a student's newest snapshot; returns the exit code. Raises ConfigError or Fatal."""
    from foundation_model.snapshot import latest_snapshot
    from vertical_models.checkpoint import load_trained
    from vertical_models.export import export_student

    settings = load(settings_file, os.environ)
    folder = student_snapshots(settings, find_student(settings, name).name)
    newest = latest_snapshot(folder)
    if newest is None:
        raise ConfigError(f"student '{name}' has no snapshot in {folder}; train it first")
    trainer = load_trained(newest, FeatureSchema.load(settings.schema_file))
    manifest = export_student(trainer, to)
    print(f"exported version {manifest.version} of {name} to {to}")
    return EXIT_OK


def find_student(settings: Settings, name: str) -> StudentConfig:
    """The validated config of one student. Raises ConfigError."""
    known = student_configs(settings)
    if name not in known:
        raise ConfigError(f"no student '{name}' in the settings; known: {', '.join(known) or 'none'}")
    return known[name]
