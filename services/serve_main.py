"""The `exfm serve` process."""

from __future__ import annotations

from pathlib import Path

from das.schema import FeatureSchema
from services.process import Context
from services.process import run as run_process
from services.serve.config import ServeConfig
from services.wiring import teacher_snapshots


def run(settings_file: Path) -> int:
    """Serve until asked to stop; returns the exit code."""
    return run_process("serve", settings_file, answer)


def answer(context: Context) -> None:
    """Serve the teacher's newest snapshot. Raises ConfigError when the address or the tokens are refused."""
    from services.serve.server import run_server

    settings = context.settings
    config = settings.serve or ServeConfig()
    schema = FeatureSchema.load(settings.schema_file)
    run_server(config, schema, teacher_snapshots(settings), context.telemetry, context.stop, context.set_ready)
