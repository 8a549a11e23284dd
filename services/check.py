"""`exfm check`: hold every section of a settings file against its owner's rules, before anything starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from das.errors import ConfigError
from das.schema import FeatureSchema
from services.process import EXIT_OK
from services.replay.dataset import DatasetConfig
from services.replay.reader import RowReader
from services.settings import Settings, load, student_configs, teacher_config


def run(settings_file: Path) -> int:
    """Print the resolved settings without secrets; returns the exit code. Raises ConfigError for the first problem."""
    settings, schema = validate(settings_file, os.environ)
    table = check_table(settings, schema)
    yaml.safe_dump({**settings.redacted(), "hash": settings.hash}, sys.stdout, sort_keys=False)
    teacher = "no teacher" if settings.teacher is None else "teacher"
    print(f"ok: {teacher}, {len(settings.students)} students, {table}")
    return EXIT_OK


def validate(settings_file: Path, environ: Mapping[str, str]) -> tuple[Settings, FeatureSchema]:
    """The settings and their schema, with every section checked. Raises ConfigError for the first problem."""
    settings = load(settings_file, environ)
    schema = FeatureSchema.load(settings.schema_file)
    if settings.teacher is not None:
        teacher_config(settings)
    for student in student_configs(settings).values():
        student.check(schema)
    return settings, schema


def check_table(settings: Settings, schema: FeatureSchema) -> str:
    """Read the mapping and the first rows of the table to replay; returns what it is, for a person.

    Raises ConfigError naming file, column and fix.
    """
    if settings.replay is None:
        return "no replay"
    dataset = DatasetConfig.load(settings.replay.dataset, schema)
    data = settings.replay.data or dataset.data
    if data is None:
        raise ConfigError(f"{settings.replay.dataset}: set data here, or replay.data, to the table to replay")
    reader = RowReader(Path(data), dataset, schema)
    next(reader.rows(), None)
    return f"{Path(data).name} with {'unknown' if reader.num_rows is None else format(reader.num_rows, ',')} rows"
