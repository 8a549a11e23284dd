"""A small recorded table with two objectives, its schema and its mapping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from das.schema import FeatureSchema
from services.replay.dataset import DatasetConfig

START_MS = 1_650_000_000_000
SCHEMA: dict[str, Any] = {
    "name": "shop",
    "domains": ["a", "b"],
    "objectives": [{"name": "click", "window_s": 10}, {"name": "buy", "window_s": 600}],
    "features": [
        {"kind": "categorical", "name": "user"},
        {"kind": "categorical", "name": "item"},
        {"kind": "categorical", "name": "tag", "dtype": "string"},
        {"kind": "categorical", "name": "size", "nullable": True},
        {"kind": "numeric", "name": "price"},
        {"kind": "sequence", "name": "seen", "event": "impression", "max_length": 2, "fields": [{"name": "item"}]},
        {
            "kind": "sequence",
            "name": "bought",
            "event": "buy",
            "max_length": 3,
            "fields": [{"name": "tag", "dtype": "string"}, {"name": "item"}],
        },
        {"kind": "numeric", "name": "item_shown"},
        {"kind": "numeric", "name": "user_size_clicks"},
        {"kind": "numeric", "name": "item_click_rate"},
        {"kind": "numeric", "name": "user_a_buy_odds"},
        {"kind": "numeric", "name": "user_last_buy_s", "nullable": True},
    ],
}
MAPPING: dict[str, Any] = {
    "id": {"column": "id", "prefix": "s-"},
    "time": {"column": "at", "unit": "ms"},
    "domain": "page",
    "user": "user",
    "features": {"item": "item_id"},
    "outcomes": {
        "click": {"column": "clicked", "delay": {"seconds": 0.002}},
        "buy": {"column": "bought_for", "above": 1.5, "delay": {"seconds": 0, "column": "wait", "unit": "s"}},
    },
    "outcome_columns": ["refunded"],
    "counters": [
        {"name": "item_shown", "keys": ["item"], "kind": "count"},
        {"name": "user_size_clicks", "keys": ["user", "size"], "event": "click", "kind": "count"},
        {"name": "item_click_rate", "keys": ["item"], "event": "click", "kind": "rate", "prior": 3},
        {
            "name": "user_a_buy_odds",
            "keys": ["user", "domain"],
            "event": "buy",
            "kind": "log_odds",
            "prior": 2,
            "toward": ["domain"],
        },
        {"name": "user_last_buy_s", "keys": ["user"], "event": "buy", "kind": "age"},
    ],
}


def schema(**changes: Any) -> FeatureSchema:
    """The schema, changed at the top level."""
    return FeatureSchema.parse({**SCHEMA, **changes})


def write_mapping(folder: Path, **changes: Any) -> Path:
    """The mapping as a YAML file, changed at the top level."""
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump({**MAPPING, **changes}))
    return path


def mapping(folder: Path, **changes: Any) -> DatasetConfig:
    """The mapping, loaded."""
    return DatasetConfig.load(write_mapping(folder, **changes), schema())


def record(number: int, **changes: Any) -> dict[str, Any]:
    """One row of the table."""
    base = {"id": number, "at": START_MS + 10 * number, "page": "ab"[number % 2], "user": number % 3}
    base |= {"item_id": number % 4, "tag": f"t{number % 2}", "price": number / 4}
    base["size"] = None if number % 5 == 0 else number % 3
    return {**base, "clicked": number % 2, "bought_for": float(number % 3), "wait": 0.015, "refunded": 1, **changes}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The table as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
