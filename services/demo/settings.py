"""The demo's settings: the bundled file, with the choices of one run."""

from __future__ import annotations

import importlib.resources
import itertools
import json
from pathlib import Path
from typing import Any

from das.config import read_yaml
from das.errors import ConfigError
from das.schema import FeatureSchema
from services.replay.dataset import DatasetConfig
from services.replay.reader import RowReader
from services.settings import Settings

EVAL_FROM_SHARE = 0.3


def build(out: Path, *, device: str, speed: str, seed: int, rows: int | None) -> str:
    """The settings of one run as YAML. Raises ConfigError for a choice that makes no sense."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: set cpu or cuda")
    if rows is not None and rows < 100:
        raise ConfigError(f"--rows {rows}: too few to evaluate anything; set 100 or more")
    folder = Path(str(importlib.resources.files("services.demo"))) / "kuairand"
    data: dict[str, Any] = read_yaml(folder / "demo.yaml")
    data["run_dir"] = str(out)
    data["schema_file"] = str(folder / data["schema_file"])
    data["replay"] |= {"dataset": str(folder / data["replay"]["dataset"]), "speed": speed, "limit": rows}
    data["teacher"] |= {"device": device, "seed": seed}
    for student in data["students"]:
        student["seed"] = seed
    if rows is not None:
        start_ms = event_time_ms(data["schema_file"], data["replay"]["dataset"], int(rows * EVAL_FROM_SHARE))
        data["teacher"]["eval_from"] = start_ms
        for student in data["students"]:
            student["eval_from"] = start_ms
    return json.dumps(data, indent=1, default=str)  # JSON is YAML; the bundled file shares parts by anchors


def event_time_ms(schema_file: str, dataset_file: str, row: int) -> int:
    """Event time of one row of a data set, counted from 0; of the last one if there are fewer."""
    times = (item.time_ms for item in _reader(schema_file, dataset_file).rows())
    return max(itertools.islice(times, row + 1))


def expected_rows(settings: Settings) -> int:
    """Impressions that the replay of `settings` will send, from the table itself."""
    assert settings.replay is not None
    rows = _reader(settings.schema_file, settings.replay.dataset).num_rows
    assert rows is not None, "the bundled table is Parquet, which knows its rows"
    return min(rows, settings.replay.limit or rows)


def _reader(schema_file: str | Path, dataset_file: str | Path) -> RowReader:
    schema = FeatureSchema.load(schema_file)
    dataset = DatasetConfig.load(dataset_file, schema)
    if dataset.data is None:
        raise ConfigError(f"{dataset_file}: name the table in data")
    return RowReader(dataset.data, dataset, schema)
