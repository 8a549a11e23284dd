"""The result document that every benchmark writes (see docs/results)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from services import machine


@dataclass(frozen=True, slots=True)
class Row:
    """One measured value beside its baseline. Larger `ratio` is better: ours over the baseline, inverted for times.

    `extra`: further fields of the row, by name.
    """

    name: str
    value: float
    unit: str
    baseline: str | None = None
    baseline_value: float | None = None
    smaller_is_better: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Ours over the baseline of the same run; None without one."""
        if not self.baseline_value or not self.value:
            return None
        return self.baseline_value / self.value if self.smaller_is_better else self.value / self.baseline_value

    def fields(self) -> dict[str, Any]:
        """The row as it is written."""
        named = {k: v for k, v in asdict(self).items() if k not in ("extra", "smaller_is_better")}
        return named | {"ratio": self.ratio} | self.extra


def heading(bench: str) -> dict[str, Any]:
    """What every document starts with: which benchmark, when, of which commit, on what."""
    return {
        "bench": bench,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "versions": machine.versions(),
    }


def write(path: Path, bench: str, rows: Sequence[Row]) -> None:
    """Write the document of `bench` and print its rows."""
    document = heading(bench) | {"rows": [row.fields() for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    table = Table(title=f"{bench}: {path}")
    for column in ("name", "value", "unit", "baseline", "baseline value", "ratio"):
        numeric = column in ("value", "baseline value", "ratio")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=column == "name")
    for row in rows:
        numbers = [f"{n:,.4g}" if n is not None else "-" for n in (row.value, row.baseline_value, row.ratio)]
        table.add_row(row.name, numbers[0], row.unit, row.baseline or "-", numbers[1], numbers[2])
    Console().print(table)
