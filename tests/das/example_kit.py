"""A small schema with every kind of feature, and rows of it."""

from __future__ import annotations

from typing import Any

from das.examples import JoinedRow
from das.messages import MessageCodec
from das.schema import FeatureSchema

NOW_MS = 1_650_812_741_436


def small_schema(**changes: Any) -> FeatureSchema:
    """Every kind of feature, nullable and not."""
    fields = [{"name": "item"}, {"name": "tag", "dtype": "string"}]
    data = {
        "name": "small",
        "domains": ["0", "1"],
        "objectives": [{"name": "click", "window_s": 10}, {"name": "buy", "window_s": 60, "domains": ["1"]}],
        "features": [
            {"kind": "categorical", "name": "item"},
            {"kind": "categorical", "name": "maker", "nullable": True},
            {"kind": "categorical", "name": "tag", "dtype": "string"},
            {"kind": "categorical", "name": "color", "dtype": "string", "nullable": True},
            {"kind": "numeric", "name": "price"},
            {"kind": "numeric", "name": "age", "nullable": True},
            {"kind": "sequence", "name": "clicks", "event": "click", "max_length": 3, "fields": fields},
            {"kind": "sequence", "name": "buys", "event": "buy", "max_length": 2, "fields": fields[:1]},
        ],
    }
    return FeatureSchema.parse({**data, **changes})


def features(**changes: Any) -> dict[str, Any]:
    """Valid features."""
    clicks = {"item": [4, 5], "tag": ["a", "b"], "time_ms": [NOW_MS - 9, NOW_MS - 3]}
    buys: dict[str, Any] = {"item": [], "time_ms": []}
    base = {"item": 7, "maker": 2, "tag": "x", "color": "red", "price": 1.5, "age": None}
    return {**base, "clicks": clicks, "buys": buys, **changes}


def impression(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A valid impression message."""
    data = {"impression_id": f"i{number}", "event_time": NOW_MS, "domain": "1", "features": features()}
    return {**data, **changes}


def joined(schema: FeatureSchema, count: int) -> list[JoinedRow]:
    """Rows that differ in every column, with nulls, empty and full histories."""
    codec = MessageCodec(schema)
    rows = []
    for n in range(count):
        past = list(range(n % 4))
        clicks = {"item": past, "tag": [f"t{p}" for p in past], "time_ms": [NOW_MS + p for p in past]}
        buys = {"item": past[:2], "time_ms": [NOW_MS + p for p in past[:2]]}
        changed = features(
            item=n - 2, maker=None if n % 3 else 2**63 - 1, tag=f"tag{n % 5}", color=None if n % 2 else "blue",
            price=n / 4, age=None if n % 4 else -1.0, clicks=clicks, buys=buys,
        )  # fmt: skip
        message = codec.impression(impression(n, event_time=NOW_MS + n + 3, domain=str(n % 2), features=changed))
        rows.append(JoinedRow(message, NOW_MS + n + 50, (n % 2, None if n % 2 == 0 else 1), window=0))
    return rows
