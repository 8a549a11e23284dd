"""The picture of `exfm bench kernels`: each row's share of its roofline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from das.errors import ConfigError

COLORS = {"fwd": "#2563c9", "fwd_bwd": "#c2570c"}
LABELS = {"fwd": "forward", "fwd_bwd": "forward + backward"}


def draw_file(json_file: Path, png: Path) -> None:
    """Draw a result file. Raises ConfigError if it is none of `exfm bench kernels`."""
    try:
        document = json.loads(json_file.read_text(encoding="utf-8"))
        shares = {(row["name"]): float(row["roofline_share"]) for row in document["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{json_file} is no result of 'exfm bench kernels': {error!r}; run it with --json") from None
    _draw(shares, png, f"{document['machine']['gpu']}, commit {document['commit'][:7]}")


def _draw(shares: dict[str, float], png: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in shares))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.34 * len(names)))
    for i, part in enumerate(COLORS):
        bars: Any = axes.barh(
            [row + 0.2 - 0.4 * i for row in range(len(names))],
            [100 * shares.get(f"{name}.{part}", 0.0) for name in names],
            height=0.38, color=COLORS[part], label=LABELS[part],
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.set_xlabel("% of the roofline")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(png, dpi=130)
    pyplot.close(figure)
