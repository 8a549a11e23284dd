"""`exfm check`: hold every section of a settings file against its owner's rules, before anything starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from das.schema import FeatureSchema
from services.process import EXIT_OK
from services.settings import Settings, load, student_configs, teacher_config


def run(settings_file: Path) -> int:
    """Print the resolved settings without secrets; returns the exit code. Raises ConfigError for the first problem."""
    settings, _ = validate(settings_file, os.environ)
    yaml.safe_dump({**settings.redacted(), "hash": settings.hash}, sys.stdout, sort_keys=False)
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
