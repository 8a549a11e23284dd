"""Rows of `exfm bench zipper`: means over seeds, and paired differences with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from das.schema import FeatureSchema
from services.bench.document import Row
from services.bench.zipper_judge import Judged
from services.bench.zipper_stream import Recording
from services.demo.compare import paired_ne_difference, student_t
from services.demo.plot import draw

BASE = "long_only"
UNDRAWN = ("zipper_unweighted",)
"""Its lines lie on those of `zipper`."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one model of one arm and seed served. `rate`: the factor of its learning rates."""

    model: str
    arm: str
    seed: int
    rate: float
    judged: Judged


def rows_of(results: Sequence[Result]) -> list[Row]:
    """One row of NE per model and arm, beside `long_only`; further fields compare it with every other arm."""
    rows = []
    for model, by_arm in _by_model(results).items():
        for arm, own in by_arm.items():
            judged = [result.judged for result in own]
            extra = {
                **{name: fmean(map(attrgetter(name), judged)) for name in ("ne_shifted", "auc", "calibration")},
                "bookings": judged[0].rows,
                "canceled": judged[0].positives,
                "rate_factor": own[0].rate,
                "ne_by_seed": [j.ne for j in judged],
                "ne_change_against": {other: change(by_arm[other], own) for other in by_arm if other != arm},
            }
            base = None if arm == BASE else _mean_ne(by_arm[BASE])
            name = None if arm == BASE else f"{model}.{BASE}.ne"
            rows.append(Row(f"{model}.{arm}.ne", _mean_ne(own), "NE", name, base, True, extra))
    return rows


def change(base: Sequence[Result], other: Sequence[Result]) -> dict[str, Any]:
    """The relative change of NE from `base` to `other` in percent, paired by seed.

    `interval_seeds`: 95 %, Student's t over the seeds, for this stretch of the stream. `interval_blocks`: 95 % over
    blocks of 1000 bookings in order, each with its mean loss over the seeds: what another stretch might show, as far
    as blocks are independent. None from one seed, or from too few blocks.
    """
    changes = [100 * (b.judged.ne / a.judged.ne - 1) for a, b in zip(base, other, strict=True)]
    mean, count = fmean(changes), len(changes)
    seeds = None
    if count > 1:
        half = student_t(0.975, count - 1) * stdev(changes) / math.sqrt(count)
        seeds = [mean - half, mean + half]
    blocks = paired_ne_difference(_mean_blocks(base), _mean_blocks(other))
    return {
        "percent": mean,
        "interval_seeds": seeds,
        "significant": seeds is not None and (seeds[0] > 0 or seeds[1] < 0),
        "interval_blocks": blocks and [blocks.low, blocks.high],
    }


def label_rows(recording: Recording, schema: FeatureSchema, span_ms: tuple[int, int]) -> list[Row]:
    """How wrong the labels of each shorter window are: the share of matured cancellations that they miss."""
    assert schema.zipper is not None
    booked = {i.impression_id: i.event_time for day in recording.days for i in day.impressions}
    judged = {name for name, time_ms in booked.items() if span_ms[0] <= time_ms < span_ms[1]}
    delays = [
        given.event_time - booked[given.impression_id]
        for day in recording.days
        for given in day.feedback
        if given.impression_id in judged and recording.labels[given.impression_id]
    ]
    rows = []
    for window in schema.zipper.windows[:-1]:
        missed = sum(delay > window.window_ms for delay in delays) / len(delays)
        extra = {"positive": (1 - missed) * len(delays) / len(judged), "matured_positive": len(delays) / len(judged)}
        name = f"labels.{window.window_s / 86_400:g}d.missed"
        rows.append(Row(name, missed, "of matured", extra=extra))
    return rows


def draw_results(results: Sequence[Result], path: Path) -> None:
    """NE over the stream per model and arm, the mean over seeds, and AUC and calibration."""
    rows = []
    for model, by_arm in _by_model(results).items():
        for arm, own in by_arm.items():
            means = {name: fmean(getattr(r.judged, name) for r in own) for name in ("auc", "calibration")}
            if arm not in UNDRAWN:
                same = {"kind": "student", "portfolio": model, "arm": arm, "label": arm}
                rows.append({**same, "blocks": _mean_blocks(own), **means})
    draw(rows, path, "Hotel bookings: NE on labels matured over 90 days, each booking scored on its day")


def _by_model(results: Sequence[Result]) -> dict[str, dict[str, list[Result]]]:
    """Results by model and arm, in the order found; those of an arm by seed."""
    found: dict[str, dict[str, list[Result]]] = {}
    for result in sorted(results, key=attrgetter("seed")):
        found.setdefault(result.model, {}).setdefault(result.arm, []).append(result)
    return found


def _mean_ne(results: Sequence[Result]) -> float:
    return fmean(result.judged.ne for result in results)


def _mean_blocks(results: Sequence[Result]) -> list[list[float]]:
    blocks: list[list[float]] = np.mean([result.judged.blocks for result in results], axis=0).tolist()
    return blocks
