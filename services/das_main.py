"""The `exfm das` process."""

from __future__ import annotations

from pathlib import Path

from das.broker import wait_for_broker
from das.deadline import Deadline
from das.joiner import Joiner
from das.schema import FeatureSchema
from services.process import Context
from services.process import run as run_process
from services.wiring import START_S


def run(settings_file: Path) -> int:
    """Join until the stream ends or it is asked to stop; returns the exit code."""
    return run_process("das", settings_file, join)


def join(context: Context) -> None:
    """Run one joiner worker. Raises ConfigError, Retryable when the broker is not there, or Fatal."""
    settings = context.settings
    schema = FeatureSchema.load(settings.schema_file)
    joiner = Joiner(
        settings.kafka,
        schema,
        settings.joiner,
        context.telemetry,
        limit=settings.quarantine,
        stop_at_end=settings.stop_at_end,
    )
    wait_for_broker(settings.kafka, Deadline.after(START_S))
    context.set_ready()
    joiner.run(context.stop)
