"""The feature schema: one YAML names domains, objectives and features; every process reads it.

A categorical feature and a sequence field of the same name share one embedding table (`table` overrides the name).
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Self

import msgspec
import xxhash
from pydantic import Field, field_validator, model_validator

from das.config import Config, load_config
from das.zipper import Head, ZipperConfig, heads

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
RESERVED = frozenset({"impression_id", "event_time", "ingest_time", "domain", "window", "features"})


class CategoricalFeature(Config):
    """One id per row; hashed into the embedding table `table`."""

    kind: Literal["categorical"]
    name: Name
    dtype: Literal["int", "string"] = "int"
    nullable: bool = False
    table: Name | None = None

    @property
    def table_name(self) -> str:
        """The embedding table the feature reads."""
        return self.table or self.name


class NumericFeature(Config):
    """One number per row, transformed to about unit scale before the model sees it.

    `transform`: none; log1p, `log(1 + max(x, 0))`; standardize, `(x - mean) / std`.
    """

    kind: Literal["numeric"]
    name: Name
    nullable: bool = False
    transform: Literal["none", "log1p", "standardize"] = "none"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _mean_needs_standardize(self) -> Self:
        if self.transform != "standardize" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError("mean and std are read by transform: standardize only; set it or remove them")
        return self


class SequenceField(Config):
    """One id per past event."""

    name: Name
    dtype: Literal["int", "string"] = "int"
    table: Name | None = None

    @property
    def table_name(self) -> str:
        """The embedding table the field reads."""
        return self.table or self.name


class SequenceFeature(Config):
    """A user's past events of one type, oldest first, at most `max_length`, each with its time."""

    kind: Literal["sequence"]
    name: Name
    event: Name
    max_length: int = Field(50, ge=1, le=16_384)
    fields: tuple[SequenceField, ...] = Field(min_length=1)

    @field_validator("fields")
    @classmethod
    def _unique_fields(cls, fields: tuple[SequenceField, ...]) -> tuple[SequenceField, ...]:
        names = Counter(f.name for f in fields)
        if "time_ms" in names or max(names.values()) > 1:
            raise ValueError("field names must differ, and time_ms is always there: do not list it")
        return fields

    def column(self, field: str) -> str:
        """The `examples` column of one field; `time` is the field of event times."""
        return f"{self.name}.{field}"


Feature = Annotated[CategoricalFeature | NumericFeature | SequenceFeature, Field(discriminator="kind")]


class Objective(Config):
    """A binary label: 1 if feedback of this name comes within `window_s` after the impression.

    `domains` limits where the objective applies; elsewhere its label is null.
    """

    name: Name
    window_s: float = Field(gt=0, le=90 * 86_400)
    domains: tuple[str, ...] | None = None

    @property
    def window_ms(self) -> int:
        """The attribution window in milliseconds."""
        return math.ceil(self.window_s * 1000)


class FeatureSchema(Config):
    """Everything a message must look like. Raises ConfigError through `load`."""

    name: Name
    version: int = Field(1, ge=1)
    domains: tuple[str, ...] = Field(min_length=1)
    objectives: tuple[Objective, ...] = Field(min_length=1)
    features: tuple[Feature, ...] = Field(min_length=1)
    zipper: ZipperConfig | None = None
    """Several attribution windows in one stream; None: every impression waits for the longest window."""

    @classmethod
    def load(cls, path: str | Path) -> FeatureSchema:
        """Read a schema file."""
        return load_config(cls, path)

    @model_validator(mode="after")
    def _names_are_consistent(self) -> Self:
        names = Counter([f.name for f in self.features] + [o.name for o in self.objectives])
        for name, times in names.items():
            if times > 1:
                raise ValueError(f"'{name}' is used {times} times; give each feature and objective its own name")
            if name in RESERVED:
                raise ValueError(f"'{name}' is reserved for the envelope; rename the feature")
        if len(set(self.domains)) != len(self.domains):
            raise ValueError("a domain is listed twice")
        for objective in self.objectives:
            unknown = set(objective.domains or ()) - set(self.domains)
            if unknown:
                raise ValueError(f"objective '{objective.name}' names unknown domains {sorted(unknown)}; add them")
        if self.zipper and self.zipper.windows[-1].window_ms != self.max_window_ms:
            raise ValueError(
                f"zipper's longest window is {self.zipper.windows[-1].window_s:g} s, the objectives' longest is "
                f"{self.max_window_ms / 1000:g} s; make them equal, so that some impressions see the full window"
            )
        dtypes: dict[str, str] = {}
        for feature in self.categorical:
            self._one_dtype(dtypes, feature)
        for sequence in self.sequences:
            for field in sequence.fields:
                self._one_dtype(dtypes, field)
        return self

    @staticmethod
    def _one_dtype(dtypes: dict[str, str], column: CategoricalFeature | SequenceField) -> None:
        first = dtypes.setdefault(column.table_name, column.dtype)
        if first != column.dtype:
            raise ValueError(f"table '{column.table_name}' is read as {first} and as {column.dtype}; use one dtype")

    @property
    def categorical(self) -> tuple[CategoricalFeature, ...]:
        """Categorical features in file order."""
        return tuple(f for f in self.features if isinstance(f, CategoricalFeature))

    @property
    def numeric(self) -> tuple[NumericFeature, ...]:
        """Numeric features in file order."""
        return tuple(f for f in self.features if isinstance(f, NumericFeature))

    @property
    def sequences(self) -> tuple[SequenceFeature, ...]:
        """Sequence features in file order."""
        return tuple(f for f in self.features if isinstance(f, SequenceFeature))

    @property
    def objective_names(self) -> tuple[str, ...]:
        """Objectives in file order."""
        return tuple(o.name for o in self.objectives)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The models' outputs, which is also the order of a logit block's columns: the objectives without Zipper."""
        return heads(tuple((o.name, o.window_ms) for o in self.objectives), self.zipper)

    @property
    def windows_ms(self) -> tuple[int, ...]:
        """How long an impression of each window waits; without Zipper the one, longest."""
        return tuple(w.window_ms for w in self.zipper.windows) if self.zipper else (self.max_window_ms,)

    @property
    def waits(self) -> str:
        """How long impressions wait, in words; two schemas with the same words give the same release times."""
        if self.zipper is None:
            return f"every impression wait {self.max_window_ms} ms"
        each = ", ".join(f"a share of {w.share} {w.window_ms} ms" for w in self.zipper.windows)
        return f"impressions wait, hashed with salt '{self.zipper.salt}': {each}"

    def head_table(self) -> tuple[tuple[int, ...], ...]:
        """[objective][window] -> the index in `heads` that a row of this window trains."""
        index = {(h.objective, h.window_ms): i for i, h in enumerate(self.heads)}
        return tuple(
            tuple(index[k, min(window_ms, o.window_ms)] for window_ms in self.windows_ms)
            for k, o in enumerate(self.objectives)
        )

    @property
    def max_window_ms(self) -> int:
        """The longest attribution window: no example is released later than this after its impression."""
        return max(o.window_ms for o in self.objectives)

    def project(self, names: tuple[str, ...] | None) -> tuple[Feature, ...]:
        """The features called `names` in file order; all of them for None. Raises ValueError on an unknown name."""
        if names is None:
            return self.features
        unknown = set(names) - {f.name for f in self.features}
        if unknown:
            raise ValueError(
                f"schema '{self.name}' has no feature {sorted(unknown)}; known: "
                f"{', '.join(f.name for f in self.features)}"
            )
        return tuple(f for f in self.features if f.name in names)

    @property
    def fingerprint(self) -> int:
        """Unsigned 64-bit hash of the whole schema; carried by messages, blocks and snapshots."""
        unset = {"zipper"} if self.zipper is None else set()  # so a schema without one keeps the hash it always had
        text = msgspec.json.encode(self.model_dump(mode="json", exclude=unset), order="sorted")
        return xxhash.xxh64_intdigest(text)
