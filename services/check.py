"""`exfm check`: hold every section of a settings file against its owner's rules, before anything starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml

from das.schema import FeatureSchema
from services.process import EXIT_OK
from services.settings import load, student_configs, teacher_config


def run(settings_file: Path) -> int:
    """Print the resolved settings without secrets; returns the exit code. Raises ConfigError for the first problem."""
    settings = load(settings_file, os.environ)
    schema = FeatureSchema.load(settings.schema_file)
    if settings.teacher is not None:
        teacher_config(settings)
    for student in student_configs(settings).values():
        student.check(schema)
    yaml.safe_dump({**settings.redacted(), "hash": settings.hash}, sys.stdout, sort_keys=False)
    return EXIT_OK
