"""The `exfm teacher` process."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from das.deadline import Deadline
from das.errors import Retryable
from das.logit_store import LogitStore
from das.schema import FeatureSchema
from services.process import Context
from services.process import run as run_process
from services.settings import teacher_config
from services.wiring import examples_reader, logit_store, results_file, teacher_snapshots

STORE_START_S = 60.0
RETRY_S = 0.5


def run(settings_file: Path) -> int:
    """Run the teacher until the stream ends or it is asked to stop; returns the exit code."""
    return run_process("teacher", settings_file, train)


def train(context: Context) -> None:
    """Resume from the newest snapshot, then score and train. Raises ConfigError, Retryable or Fatal."""
    from foundation_model.online import TeacherLoop, resume
    from foundation_model.snapshot_folder import SnapshotFolder
    from foundation_model.trainer import TeacherTrainer

    settings, telemetry = context.settings, context.telemetry
    config = teacher_config(settings)
    schema = FeatureSchema.load(settings.schema_file)
    trainer = TeacherTrainer(config, schema, telemetry=telemetry)
    with (
        logit_store(settings, config.name) as store,
        closing(SnapshotFolder(teacher_snapshots(settings), config.keep_snapshots, telemetry)) as snapshots,
        examples_reader(context, schema) as reader,
    ):
        check_store(context, store)
        positions = resume(trainer, snapshots, reader.oldest())
        loop = TeacherLoop(
            reader.open(trainer.encoder.columns, positions),
            store,
            trainer,
            positions,
            snapshots,
            topic=settings.kafka.topics.examples,
            results=results_file(settings, context.name),
            telemetry=telemetry,
            stop_at_end=settings.stop_at_end,
        )
        context.set_ready()
        loop.run(context.stop)


def check_store(context: Context, store: LogitStore) -> None:
    """Log what the store's owner should know. Raises ConfigError where logits would vanish, Retryable when away."""
    patience = Deadline.after(STORE_START_S)
    while True:
        try:
            warnings = store.check()
        except Retryable as error:
            if patience.passed or context.stop.wait(min(RETRY_S, patience.left_s)):
                raise
            context.log.warning("waiting for the store", left_s=round(patience.left_s), error=str(error))
        else:
            for warning in warnings:
                context.log.warning(warning)
            return
