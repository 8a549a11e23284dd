"""The mapping from a recorded table to messages: which column is what, and what the serving system would have logged.

The table holds one row per impression, in event-time order, with its outcomes in columns. Outcome columns are known
only after the impression: they become feedback, and through `counters` and histories features of later impressions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from das.config import Config, read_yaml
from das.errors import ConfigError
from das.schema import CategoricalFeature, FeatureSchema, Name, NumericFeature

IMPRESSION = "impression"
DOMAIN = "domain"
RATES = ("rate", "log_odds")
UNIT_MS = {"s": 1000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
Column = Annotated[str, Field(min_length=1)]


class IdConfig(Config):
    """Where `impression_id` comes from: `prefix` + the column's value, or the row number for no column."""

    column: Column | None = None
    prefix: str = Field("", max_length=64)


class TimeConfig(Config):
    """A column of times. `iso` is for text and for date columns, UTC unless it says otherwise."""

    column: Column
    unit: Literal["s", "ms", "us", "ns", "iso"] = "ms"


class DelayConfig(Config):
    """How long after the impression an outcome becomes known: a constant, a column, or a constant after a column."""

    seconds: float = Field(0.001, ge=0)
    column: Column | None = None
    unit: Literal["s", "ms", "us", "ns"] = "ms"


class OutcomeConfig(Config):
    """The outcome column of one objective. Feedback is sent for rows whose value is above `above`."""

    column: Column
    above: float = 0.0
    delay: DelayConfig = DelayConfig()
    known_at: TimeConfig | None = None
    """A column with the time the outcome became known, in place of `delay`."""


class CounterConfig(Config):
    """A numeric feature counted over past events with the same `keys` (features or `domain`; none: all events).

    count: number of past events. rate: past events per past impression, smoothed by `prior` impressions at the rate
    of the keys in `toward`. log_odds: log(rate / (1 - rate)). age: seconds since the last event, null before the first.
    An event is past only if it was known strictly before the impression.
    """

    name: Name
    keys: tuple[str, ...] = ()
    event: str = IMPRESSION
    kind: Literal["count", "rate", "log_odds", "age"]
    prior: float = Field(20.0, gt=0)
    toward: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _smoothing_is_for_rates(self) -> Self:
        rate = self.kind in RATES
        if rate and self.event == IMPRESSION:
            raise ValueError("the rate of impressions per impression is always 1; set event to an objective")
        if not rate and self.toward:
            raise ValueError(f"toward smooths rates; remove it from a counter of kind {self.kind}")
        if rate and not set(self.toward) <= set(self.keys):
            raise ValueError(f"toward must be among the counter's keys {list(self.keys)}")
        return self


class DatasetConfig(Config):
    """The whole mapping. Relative paths are relative to the mapping's file."""

    data: Path | None = None
    format: Literal["parquet", "csv", "jsonl"] | None = None
    """By the file's suffix if not set."""
    id: IdConfig = IdConfig()
    time: TimeConfig
    domain: Column | None = None
    """The domain column; not needed for a schema with a single domain."""
    user: Column | None = None
    """The feature whose values own the histories; needed for a schema with sequences."""
    features: dict[str, Column] = {}
    """Feature to column, where the names differ."""
    outcomes: dict[str, OutcomeConfig]
    outcome_columns: tuple[Column, ...] = ()
    """Further columns that are known only after the event: refused as features."""
    counters: tuple[CounterConfig, ...] = ()

    @classmethod
    def load(cls, path: str | Path, schema: FeatureSchema) -> DatasetConfig:
        """Read a mapping and check it against the schema. Raises ConfigError naming the field and the fix."""
        path = Path(path)
        data = read_yaml(path)
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: not a mapping of columns; see docs/data.md")
        config = cls.parse(data, source=str(path))
        if config.data is not None:
            config = config.model_copy(update={"data": path.parent / config.data})
        problems = config.problems(schema)
        if problems:
            raise ConfigError("\n  ".join([f"{path}: {len(problems)} problem(s)", *problems]))
        return config

    @property
    def counter_names(self) -> frozenset[str]:
        """Features that the replay computes, which therefore have no column."""
        return frozenset(counter.name for counter in self.counters)

    def feature_columns(self, schema: FeatureSchema) -> dict[str, str]:
        """Feature to column, for the features that are read from the table."""
        own: tuple[CategoricalFeature | NumericFeature, ...] = (*schema.categorical, *schema.numeric)
        names = [f.name for f in own if f.name not in self.counter_names]
        return {name: self.features.get(name, name) for name in names}

    def columns(self, schema: FeatureSchema) -> tuple[str, ...]:
        """Every column to read."""
        found = [self.time.column, *filter(None, (self.id.column, self.domain)), *self.feature_columns(schema).values()]
        for outcome in self.outcomes.values():
            dated = outcome.known_at.column if outcome.known_at else outcome.delay.column
            found += filter(None, (outcome.column, dated))
        return tuple(found)

    @property
    def forbidden_columns(self) -> frozenset[str]:
        """Columns known only after the impression."""
        found = {o.column for o in self.outcomes.values()} | set(self.outcome_columns)
        found |= {o.delay.column for o in self.outcomes.values() if o.delay.column}
        return frozenset(found | {o.known_at.column for o in self.outcomes.values() if o.known_at})

    def problems(self, schema: FeatureSchema) -> list[str]:
        """What does not fit the schema, one line each."""
        columns = self.feature_columns(schema)
        found = [
            f"features: '{name}' reads column '{column}', which is known only after the impression; remove the feature"
            for name, column in columns.items()
            if column in self.forbidden_columns
        ]
        found += [
            f"features.{name}: not a feature read from the table" for name in self.features if name not in columns
        ]
        objectives = set(schema.objective_names)
        if set(self.outcomes) != objectives:
            found.append(
                f"outcomes: need exactly the schema's objectives {sorted(objectives)}, not {sorted(self.outcomes)}"
            )
        if self.domain is None and len(schema.domains) > 1:
            found.append("domain: name the column that holds the domain, or list a single domain in the schema")
        if self.domain in self.forbidden_columns or self.time.column in self.forbidden_columns:
            found.append("domain, time: an outcome column cannot date or place an impression")
        return found + self._history_problems(schema, columns) + self._counter_problems(schema, columns)

    def _history_problems(self, schema: FeatureSchema, columns: dict[str, str]) -> list[str]:
        found = []
        kinds = {f.name: f.dtype for f in schema.categorical if f.name in columns}
        nullable = {f.name for f in schema.categorical if f.nullable}
        if schema.sequences and self.user not in kinds:
            found.append("user: name the categorical feature that owns the histories; the schema has sequences")
        for sequence in schema.sequences:
            if sequence.event not in (IMPRESSION, *schema.objective_names):
                known = ", ".join((IMPRESSION, *schema.objective_names))
                found.append(f"schema: sequence '{sequence.name}' is of event '{sequence.event}'; known: {known}")
            found += [
                f"schema: '{sequence.name}.{field.name}' needs a categorical feature '{field.name}' of the same dtype"
                for field in sequence.fields
                if kinds.get(field.name) != field.dtype
            ]
            found += [
                f"schema: '{sequence.name}.{field.name}' cannot hold nulls, but '{field.name}' is nullable; drop it"
                for field in sequence.fields
                if field.name in nullable
            ]
        return found

    def _counter_problems(self, schema: FeatureSchema, columns: dict[str, str]) -> list[str]:
        found = []
        numeric = {f.name: f for f in schema.numeric}
        known = {f.name for f in schema.categorical if f.name in columns} | {DOMAIN}
        for counter in self.counters:
            feature: Any = numeric.get(counter.name)
            if feature is None:
                found.append(f"counters: add a numeric feature '{counter.name}' to the schema, or remove the counter")
            elif counter.kind == "age" and not feature.nullable:
                found.append(
                    f"counters: '{counter.name}' is null before the first event; set nullable: true in the schema"
                )
            if counter.event not in (IMPRESSION, *schema.objective_names):
                found.append(f"counters: '{counter.name}' counts event '{counter.event}', which is no objective")
            if not set(counter.keys) <= known:
                found.append(
                    f"counters: '{counter.name}' has keys {list(counter.keys)}; known: {', '.join(sorted(known))}"
                )
        return found
