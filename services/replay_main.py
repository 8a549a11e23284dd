"""The `exfm replay` process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from das.broker import wait_for_broker
from das.deadline import Deadline
from das.errors import ConfigError
from das.schema import FeatureSchema
from services.process import Context
from services.process import run as run_process
from services.replay.config import ReplayConfig
from services.replay.run import Replay
from services.wiring import START_S


def run(settings_file: Path, options: dict[str, Any]) -> int:
    """Replay until the data ends or it is asked to stop; `options` override the settings. Returns the exit code."""
    return run_process("replay", settings_file, lambda context: replay(context, options))


def replay(context: Context, options: dict[str, Any]) -> None:
    """Send the recorded data set. Raises ConfigError on bad data, Retryable or Fatal from the broker."""
    settings = context.settings
    if settings.replay is None:
        raise ConfigError("replay: the settings have no such section; add one with dataset: mapping.yaml")
    config = ReplayConfig.parse({**settings.replay.model_dump(exclude_unset=True), **options}, source="replay")
    schema = FeatureSchema.load(settings.schema_file)
    work = Replay(config, schema, settings.kafka, context.telemetry)
    wait_for_broker(settings.kafka, Deadline.after(START_S))
    context.set_ready()
    result = work.run(context.stop)
    context.log.info("replayed", **dataclasses.asdict(result))
