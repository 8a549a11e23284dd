"""`exfm bench zipper`: what to wait for, on a stream of hotel bookings whose cancellations come days to months later.

The arms see the same bookings and differ in how long each waits for its label: all briefly, all for the full window, or
Zipper's mix. Every booking is scored on its day with the weights as they are then, which have learned from what the
join had released by then and from nothing else; the prediction is kept, and judged when its label has matured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from rich.console import Console

from das.schema import FeatureSchema
from foundation_model.features import FeatureEncoder, TablesConfig
from services.bench.document import Row, write
from services.bench.zipper_judge import Judged, Predictions
from services.bench.zipper_learners import TABLES, models
from services.bench.zipper_report import Result, draw_results, label_rows, rows_of
from services.bench.zipper_stream import FOLDER, Day, Recording, join, read

RATES = (0.5, 1.0, 2.0)
"""Factors of both learning rates that every arm and model chooses from."""
TUNING_SEEDS = (101, 102)
STUDENT = (("student",),)
ALL = (("student",), ("teacher", "distilled"))
"""Models by pass over the stream: a distilled student needs its teacher beside it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which bookings are judged, by day of booking in UTC, the last day left out.

    Every label of the bookings that learning rates are chosen on has matured before the evaluation starts.
    """

    tune: tuple[str, str] = ("2016-01-01", "2016-05-01")
    evaluate: tuple[str, str] = ("2016-08-01", "2017-04-01")

    @staticmethod
    def span_ms(span: tuple[str, str]) -> tuple[int, int]:
        """First and last of a span in milliseconds since the epoch."""
        first, last = (datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp() for day in span)
        return round(first * 1000), round(last * 1000)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to wait. `immediate`: labels come at once, a bound on what fresh labels could bring."""

    name: str
    schema: FeatureSchema
    oracle_weighting: bool = True
    immediate: bool = False

    def days(self, recording: Recording) -> list[Day]:
        """What the arm scores and learns from, day by day."""
        encoder = FeatureEncoder(self.schema, tables=TablesConfig.model_validate(TABLES))
        return join(recording.immediate() if self.immediate else recording, self.schema, encoder)


def arms(schema: FeatureSchema, seed: int) -> Iterator[Arm]:
    """The arms of one seed; `schema` has Zipper's windows, whose salt the seed changes."""
    zipper = schema.zipper
    assert zipper is not None, "the bundled schema has Zipper's windows"
    first, middle = (w.window_s for w in zipper.windows[:2])
    yield Arm("fresh_only", _single(schema, first))
    yield Arm("middle_only", _single(schema, middle))
    yield Arm("long_only", schema.model_copy(update={"zipper": None}))
    salted = schema.model_copy(update={"zipper": zipper.model_copy(update={"salt": f"{zipper.salt}:{seed}"})})
    yield Arm("zipper", salted)
    yield Arm("zipper_unweighted", salted, oracle_weighting=False)
    yield Arm("no_delay", _single(schema, 0.001), immediate=True)


def _single(schema: FeatureSchema, window_s: float) -> FeatureSchema:
    """The schema with one window for all."""
    objectives = tuple(o.model_copy(update={"window_s": window_s}) for o in schema.objectives)
    return schema.model_copy(update={"zipper": None, "objectives": objectives})


def run_models(
    days: Sequence[Day], arm: Arm, names: tuple[str, ...], seed: int, rates: Mapping[str, float], span: tuple[str, str]
) -> dict[str, Judged]:
    """One pass: each day is scored, and only then what it released is learned from. Judged are the days of a span."""
    learners = models(names, arm.schema, seed, rates, oracle_weighting=arm.oracle_weighting)
    kept = {name: Predictions() for name in names}
    first_ms, last_ms = Plan.span_ms(span)
    for day in days:
        if day.time_ms >= last_ms:
            break
        if day.time_ms >= first_ms:
            for name, learner in learners.items():
                kept[name].keep(day, learner.score(day.impressions))
        for message in day.released:
            for learner in learners.values():
                learner.learn(message.batch)
    return {name: predictions.judge(arm.schema) for name, predictions in kept.items()}


class Experiment:
    """All arms and seeds over one recording."""

    def __init__(self, schema: FeatureSchema, recording: Recording, plan: Plan) -> None:
        self._schema = schema
        self._recording = recording
        self._plan = plan
        self._began_s = time.monotonic()
        self._console = Console()
        self._known: tuple[Arm, list[Day]] | None = None

    def run(self, seeds: int, passes: Sequence[tuple[str, ...]], rate: float | None = None) -> list[Result]:
        """Judge each arm with every seed, at `rate` or at the learning rates that it chooses first."""
        found = []
        for name in [arm.name for arm in arms(self._schema, 0)]:
            rates: dict[str, float] = {}
            for names in passes:
                rates |= self._choose_rates(name, names) if rate is None else dict.fromkeys(names, rate)
            for seed in range(1, seeds + 1):
                arm, days = self._arm(name, seed)
                judged: dict[str, Judged] = {}
                for names in passes:
                    judged |= run_models(days, arm, names, seed, rates, self._plan.evaluate)
                found += [Result(model, name, seed, rates[model], value) for model, value in judged.items()]
                nes = ", ".join(f"{model} {value.ne:.4f}" for model, value in judged.items())
                self._say(f"{name}, seed {seed} of {seeds}: NE of {nes}")
        return found

    def shuffled(self) -> Row:
        """NE where outcomes were dealt out at random: below 1 would mean that a label reaches a prediction early."""
        arm, rates = next(a for a in arms(self._schema, 1) if a.name == "long_only"), {"student": 0.5}
        days = arm.days(self._recording.shuffled(seed=1))
        judged = run_models(days, arm, ("student",), 1, rates, self._plan.evaluate)["student"]
        self._say(f"long_only with outcomes dealt out at random: NE {judged.ne:.4f}")
        return Row("student.long_only_shuffled.ne", judged.ne, "NE", extra={"auc": judged.auc})

    def _choose_rates(self, name: str, names: tuple[str, ...]) -> dict[str, float]:
        """Per model, the factor of the learning rates with the best mean NE on the tuning span."""
        tried: dict[str, dict[float, list[float]]] = {model: {rate: [] for rate in RATES} for model in names}
        for seed in TUNING_SEEDS:
            arm, days = self._arm(name, seed)
            for rate in RATES:
                judged = run_models(days, arm, names, seed, dict.fromkeys(names, rate), self._plan.tune)
                for model, value in judged.items():
                    tried[model][rate].append(value.ne)
        means = {model: {rate: fmean(nes) for rate, nes in by_rate.items()} for model, by_rate in tried.items()}
        for model, by_rate in means.items():
            self._say(f"{name}, {model}: " + ", ".join(f"{ne:.4f} at rate x{r:g}" for r, ne in by_rate.items()))
        return {model: min(by_rate, key=by_rate.__getitem__) for model, by_rate in means.items()}

    def _arm(self, name: str, seed: int) -> tuple[Arm, list[Day]]:
        """An arm and its days, which are joined anew only if the seed changes what the join does."""
        arm = next(a for a in arms(self._schema, seed) if a.name == name)
        if self._known is None or self._known[0] != arm:
            self._known = arm, arm.days(self._recording)
        return self._known

    def _say(self, text: str) -> None:
        seconds = time.monotonic() - self._began_s
        self._console.print(f"{seconds:5.0f} s  {text}", highlight=False, soft_wrap=True)


def run(json_file: Path, *, seeds: int, teacher: bool, rate: float | None, plot: Path | None) -> None:
    """Measure all arms and write the rows, and a picture if `plot` names one.

    `rate`: one factor of the learning rates for every arm and model, in place of choosing.
    """
    schema = FeatureSchema.load(FOLDER / "schema.yaml")
    recording, plan = read(schema), Plan()
    experiment = Experiment(schema, recording, plan)
    results = experiment.run(seeds, ALL if teacher else STUDENT, rate)
    rows = [*rows_of(results), experiment.shuffled()]
    write(json_file, "zipper", rows + label_rows(recording, schema, Plan.span_ms(plan.evaluate)))
    if plot:
        draw_results(results, plot)
