"""The demo's table: one row per portfolio and arm, the teacher's rows, and the paired differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from services.demo.compare import paired_ne_difference

BASE_ARM = "none"
COLUMNS = ("auc", "ne", "logloss", "calibration")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The result files of all trainers, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def make_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per (portfolio, arm), with the paired difference; the teacher's first: the same portfolios, and all."""
    rows = [_row(result, portfolio) for result in results for portfolio in result["portfolios"]]
    students = [row for row in rows if row["kind"] == "student" and row["domain"] != "all"]
    wanted = {row["portfolio"] for row in students} | {f"all/{row['objective']}" for row in students}
    rows = [row for row in rows if row["kind"] == "teacher" and row["portfolio"] in wanted] + students
    bases = {row["portfolio"]: row for row in rows if row["kind"] == "student" and row["arm"] == BASE_ARM}
    for row in rows:
        base = bases.get(row["portfolio"])
        if row["kind"] == "student" and row["arm"] != BASE_ARM and base is not None:
            difference = paired_ne_difference(base["blocks"], row["blocks"])
            if difference is not None:
                row["ne_change_percent"] = difference.percent
                row["ne_change_95"] = [difference.low, difference.high]
                row["ne_change_significant"] = difference.significant
                row["ne_change"] = str(difference)
    return sorted(rows, key=lambda r: (r["kind"] != "teacher", r["portfolio"], r["arm"] != BASE_ARM, r["arm"]))


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the rows, the paired differences, and how to read them."""
    table = Table(title="Each row predicted before it was trained on", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("portfolio", "arm", "rows", "AUC", "NE", "LogLoss", "calib.", "hit rate", "events/s"):
        table.add_column(heading, justify="left" if heading in ("portfolio", "arm") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["portfolio"],
            row["arm"],
            f"{row['rows']:,}",
            *(_number(row[column]) for column in COLUMNS),
            "-" if row["hit_rate"] is None else f"{row['hit_rate']:.2%}",
            f"{row['events_per_s']:,.0f}" if row["events_per_s"] else "-",
        )
    console.print(table)
    for row in rows:
        if "ne_change" in row:
            text = f"NE of {row['portfolio']}, {row['arm']} against {BASE_ARM}: {row['ne_change']}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(
        "The brackets are a 95 % interval over paired blocks of 1000 rows of this one stream and seed: it does not "
        "cover the spread between seeds or streams. A portfolio is domain/objective; calibration is sum p / sum y; "
        "events/s is the rate of a model's own rows.",
        style="dim",
        soft_wrap=not console.is_terminal,
    )


def _row(result: dict[str, Any], portfolio: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": result["name"],
        "kind": result["kind"],
        "arm": result.get("arm") or "teacher",
        "portfolio": f"{portfolio['domain']}/{portfolio['objective']}",
        "domain": portfolio["domain"],
        "objective": portfolio["objective"],
        "rows": portfolio["rows"],
        "positives": portfolio["positives"],
        **{column: portfolio[column] for column in COLUMNS},
        "hit_rate": result.get("hit_rate"),
        "events_per_s": result.get("rows_per_s"),
        "blocks": portfolio["blocks"],
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
