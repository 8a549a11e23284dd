"""The demo's picture: NE over the stream per portfolio and arm, calibration, and AUC."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import Any

COLORS = ("#2563c9", "#c2570c", "#0f8a5f", "#a0369c", "#8a6d00", "#b3263a")
SMOOTH_BLOCKS = 10
BLOCK_ROWS = 1000


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Write one PNG from the rows of the table. A row's `label` names its line; else its arm does."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    students = [row for row in rows if row["kind"] == "student"]
    teachers = {row["portfolio"]: row for row in rows if row["kind"] == "teacher"}
    portfolios = sorted({row["portfolio"] for row in students})
    num_panels = len(portfolios) + 2
    num_columns = min(3, num_panels)
    figure, grid = pyplot.subplots(
        math.ceil(num_panels / num_columns),
        num_columns,
        figsize=(5 * num_columns, 3.6 * math.ceil(num_panels / num_columns)),
    )
    panels = list(grid.flat)
    for axes, portfolio in zip(panels, portfolios, strict=False):
        arms = [row for row in students if row["portfolio"] == portfolio]
        _draw_ne(axes, portfolio, arms, teachers.get(portfolio))
    models = students + [teachers[p] for p in portfolios if p in teachers]
    _draw_dots(panels[len(portfolios)], models, portfolios, "auc", "all portfolios: AUC (higher is better)")
    _draw_dots(
        panels[len(portfolios) + 1],
        models,
        portfolios,
        "calibration",
        "all portfolios: calibration, sum p / sum y (best: 1)",
    )
    panels[len(portfolios) + 1].axhline(1.0, color="#444444", linewidth=0.8)
    for axes in panels[num_panels:]:
        axes.set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def moving_ne(blocks: list[list[float]], width: int = SMOOTH_BLOCKS) -> tuple[list[float], list[float]]:
    """Rows seen and NE over a moving window of blocks; windows of one class are left out."""
    seen, values, total_rows = [], [], 0.0
    for index, block in enumerate(blocks):
        total_rows += block[0]
        window = blocks[max(0, index + 1 - width) : index + 1]
        rows, positives, loss = (math.fsum(b[i] for b in window) for i in range(3))
        if 0 < positives < rows:
            rate = positives / rows
            entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
            seen.append(total_rows)
            values.append(loss / rows / entropy)
    return seen, values


def _draw_ne(axes: Any, portfolio: str, arms: list[dict[str, Any]], teacher: dict[str, Any] | None) -> None:
    for arm, color in zip(sorted(arms, key=lambda row: row["arm"]), COLORS, strict=False):
        _draw_line(axes, arm, label=arm.get("label", f"student, {arm['arm']}"), color=color, linewidth=1.5)
    if teacher:
        _draw_line(axes, teacher, label="teacher", color="#777777", linewidth=1, linestyle="--")
    axes.set_title(f"{portfolio}: NE (lower is better)", fontsize=10)
    axes.set_xlabel(
        f"evaluated rows; a point: the last {SMOOTH_BLOCKS} blocks of {BLOCK_ROWS} rows up to it", fontsize=8
    )
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def _draw_line(axes: Any, row: dict[str, Any], **style: Any) -> None:
    """A line; a dot where there is one point only."""
    seen, values = moving_ne(row["blocks"])
    axes.plot(seen, values, marker="o" if len(seen) == 1 else None, **style)


def _draw_dots(axes: Any, models: list[dict[str, Any]], portfolios: list[str], column: str, title: str) -> None:
    ordered = sorted(models, key=lambda row: row["arm"])
    arms = [arm for arm, _ in groupby(ordered, key=lambda row: row["arm"])]
    width = 0.5 / max(1, len(arms))
    values = []
    for number, arm in enumerate(arms):
        of_arm = {row["portfolio"]: row[column] for row in models if row["arm"] == arm}
        heights = [of_arm.get(portfolio) or math.nan for portfolio in portfolios]
        values += [height for height in heights if math.isfinite(height)]
        places = [index + number * width for index in range(len(portfolios))]
        color = "#777777" if arm == "teacher" else COLORS[number % len(COLORS)]
        axes.plot(places, heights, "o", label=arm, color=color)
    axes.set_xticks([index + width * (len(arms) - 1) / 2 for index in range(len(portfolios))], portfolios, fontsize=8)
    if values:
        spread = max(max(values) - min(values), 0.02)
        axes.set_ylim(min(values) - spread / 4, max(values) + spread / 4)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.3)  # a dot may lie under it
