"""What stands beside an exported graph: everything a serving team needs to feed it, in one JSON file.

An id of the graph is `offset + local`, with the table's offset from `encoding.tables`. `local` is 0 for a missing
value, else `splitmix64(v ^ xxh64(table name)) % (size - 1) + 1`, where v is the 64-bit integer, or the xxh64 of the
UTF-8 text (both with seed 0, all arithmetic modulo 2^64), and `splitmix64(x)` is: x += 0x9E3779B97F4A7C15;
x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9; x = (x ^ x >> 27) * 0x94D049BB133111EB; x ^ x >> 31.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from das.config import Config
from das.schema import FeatureSchema
from foundation_model.features import NUMERIC_LIMIT
from vertical_models.serving import ServingModel

FORMAT = 1
HASHING = (
    "local = 0 if missing else splitmix64(v ^ xxh64(table)) % (size - 1) + 1; id = offset + local; v of a text = xxh64"
)


class FileEntry(Config):
    """Size and hash of one file of an export."""

    bytes: int = Field(ge=0)
    sha256: str


class TensorSpec(Config):
    """One input; a null dimension is the batch."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class TableSpec(Config):
    """One hashed table of the shared id space."""

    name: str
    offset: int
    size: int


class CategoricalSpec(Config):
    """One column of `categorical`, or one field of a sequence's `ids`."""

    name: str
    table: str
    dtype: str


class NumericSpec(Config):
    """One column of `numeric`: `(t(x) - mean) / std`, t = log(1 + max(x, 0)) for log1p, then clipped; 0 if missing.

    transform `missing` is an indicator: 1 where the number of that name is missing, else 0.
    """

    name: str
    transform: str
    mean: float = 0.0
    std: float = 1.0


class SequenceEncoding(Config):
    """The inputs `<name>.ids` (fields in this order), `<name>.age_s` (seconds before the impression), `<name>.length`.

    The latest `length` events, oldest first, then zeros.
    """

    name: str
    event: str
    length: int
    fields: tuple[CategoricalSpec, ...]


class Encoding(Config):
    """How a row becomes the graph's inputs."""

    hashing: str = HASHING
    numeric_limit: float = NUMERIC_LIMIT
    tables: tuple[TableSpec, ...]
    categorical: tuple[CategoricalSpec, ...]
    numeric: tuple[NumericSpec, ...]
    sequences: tuple[SequenceEncoding, ...]
    domains: tuple[str, ...]
    """Index of a domain in the input `domain`, where there is one."""


class ExportManifest(Config):
    """manifest.json of an export. `version`: the student's snapshot."""

    format: int = FORMAT
    student: str
    version: int
    schema_name: str
    schema_version: int
    schema_fingerprint: str
    trained_through_ms: int
    domains: tuple[str, ...]
    objectives: tuple[str, ...]
    """Columns of the output `logits`; a probability is 1 / (1 + exp(-logit))."""
    inputs: tuple[TensorSpec, ...]
    encoding: Encoding
    files: dict[str, FileEntry]


def input_specs(example: dict[str, Tensor]) -> tuple[TensorSpec, ...]:
    """The graph's inputs in order, from an example with the batch in front."""
    kinds = {name: str(value.dtype).removeprefix("torch.") for name, value in example.items()}
    return tuple(TensorSpec(name=n, dtype=kinds[n], shape=(None, *v.shape[1:])) for n, v in example.items())


def encoding_of(schema: FeatureSchema, model: ServingModel) -> Encoding:
    """The encoding of the features that `model` reads."""
    spec, layout = model.spec, model.spec.tables
    categorical = {f.name: f for f in schema.categorical}
    sequences = {s.name: s for s in schema.sequences}
    tables = zip(layout.names, layout.offsets, layout.sizes, strict=True)
    return Encoding(
        tables=tuple(TableSpec(name=name, offset=offset, size=size) for name, offset, size in tables),
        categorical=tuple(_column(categorical[name]) for name in spec.categorical),
        numeric=tuple(_number(schema, name) for name in spec.numeric),
        sequences=tuple(
            SequenceEncoding(
                name=s.name,
                event=s.event,
                length=min(model.history, s.max_length),
                fields=tuple(_column(f) for f in sequences[s.name].fields),
            )
            for s in spec.sequences
        ),
        domains=spec.domains,
    )


def _column(feature: Any) -> CategoricalSpec:
    return CategoricalSpec(name=feature.name, table=feature.table_name, dtype=feature.dtype)


def _number(schema: FeatureSchema, name: str) -> NumericSpec:
    for feature in schema.numeric:
        if feature.name == name:
            return NumericSpec(name=name, transform=feature.transform, mean=feature.mean, std=feature.std)
    return NumericSpec(name=name.removesuffix(".missing"), transform="missing")
