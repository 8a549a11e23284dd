"""Rows of the examples stream as model input: ids hashed into tables, numbers on unit scale, sequences jagged.

Shape legend: B rows, C categorical features, N numeric columns, T past events of all rows together,
F fields of one sequence, K heads, W windows.

All tables of one encoder share a single id space: table i owns the ids [offset_i, offset_i + size_i), so every
lookup of a row is one gather from one matrix. Inside a table, local id 0 means "missing" and a value `v` has
local id `splitmix64(v ^ seed(table)) % (size - 1) + 1`. Raw ids of the stream are never used as indices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from pydantic import Field

from das.config import Config
from das.errors import ConfigError, Poison
from das.schema import FeatureSchema, NumericFeature, SequenceFeature
from das.zipper import Head
from foundation_model.batch import Batch, JaggedSequence

NUMERIC_LIMIT = 1e6
"""Transformed numbers are clipped to +- this, so that one absurd value stays finite in float32."""


class TablesConfig(Config):
    """Rows per hashed embedding table."""

    default_buckets: int = Field(8_192, ge=2, le=2**31)
    buckets: dict[str, int] = Field(default_factory=dict)


@dataclass(frozen=True)
class TableLayout:
    """Where each table lies in the shared id space."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def total(self) -> int:
        """Rows of all tables together: the height of one embedding matrix."""
        return sum(self.sizes)


@dataclass(frozen=True)
class SequenceSpec:
    """One sequence as a model sees it."""

    name: str
    event: str
    fields: tuple[str, ...]
    max_length: int


@dataclass(frozen=True)
class InputSpec:
    """Everything a model needs to know about its batches."""

    tables: TableLayout
    categorical: tuple[str, ...]
    numeric: tuple[str, ...]
    sequences: tuple[SequenceSpec, ...]
    domains: tuple[str, ...]
    objectives: tuple[str, ...]
    heads: tuple[Head, ...]
    """A model's outputs in order; without Zipper one per objective. `Head.objective` indexes `objectives`."""

    @property
    def served(self) -> list[int]:
        """The served heads, one per objective in order: indices into `heads`."""
        return [k for k, head in enumerate(self.heads) if head.served]


class FeatureEncoder:
    """Encodes record batches of the examples stream; one instance per (schema, features, objectives).

    `features` and `objectives` select subsets by name (None = all). Raises ConfigError on a name or table that the
    schema does not have.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        features: Sequence[str] | None = None,
        tables: TablesConfig | None = None,
        objectives: Sequence[str] | None = None,
    ) -> None:
        try:
            chosen = {f.name for f in schema.project(None if features is None else tuple(features))}
        except ValueError as error:
            raise ConfigError(f"features: {error}") from None
        own = _of_objectives(schema, schema.objective_names if objectives is None else objectives)
        self.schema = schema
        self._categorical = tuple(f for f in schema.categorical if f.name in chosen)
        self._numeric = tuple(f for f in schema.numeric if f.name in chosen)
        self._sequences = tuple(f for f in schema.sequences if f.name in chosen)
        self._indicators = tuple(i for i, f in enumerate(self._numeric) if f.nullable)
        layout = self._layout(tables or TablesConfig())
        place = {name: i for i, name in enumerate(layout.names)}
        self._cat_tables = _Tables(layout, [place[f.table_name] for f in self._categorical])
        self._seq_tables = {s.name: _Tables(layout, [place[f.table_name] for f in s.fields]) for s in self._sequences}
        missing = tuple(f"{self._numeric[i].name}.missing" for i in self._indicators)
        self.spec = InputSpec(
            tables=layout,
            categorical=tuple(f.name for f in self._categorical),
            numeric=(*(f.name for f in self._numeric), *missing),
            sequences=tuple(
                SequenceSpec(s.name, s.event, tuple(f.name for f in s.fields), s.max_length) for s in self._sequences
            ),
            domains=schema.domains,
            objectives=own.objective_names,
            heads=own.heads,
        )
        self._trained_KW = _trained_heads(own)
        self._reads_window = not self._trained_KW.all()

    def _layout(self, tables: TablesConfig) -> TableLayout:
        known = {f.table_name for f in self.schema.categorical}
        known |= {f.table_name for s in self.schema.sequences for f in s.fields}
        if unknown := set(tables.buckets) - known:
            raise ConfigError(f"tables.buckets: no table {sorted(unknown)}; known: {', '.join(sorted(known))}")
        used = dict.fromkeys(f.table_name for f in self._categorical)
        used |= dict.fromkeys(f.table_name for s in self._sequences for f in s.fields)
        sizes = tuple(tables.buckets.get(name, tables.default_buckets) for name in used)
        if small := [n for n, size in zip(used, sizes, strict=True) if not 2 <= size <= 2**31]:
            raise ConfigError(f"tables.buckets.{small[0]}: a table has 2 to 2^31 buckets")
        offsets = tuple(int(x) for x in np.cumsum([0, *sizes])[:-1])
        return TableLayout(tuple(used), sizes, offsets)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the examples that `encode` reads."""
        sequences = [s.column(f) for s in self._sequences for f in [*(f.name for f in s.fields), "time"]]
        features = [*(f.name for f in self._categorical), *(f.name for f in self._numeric), *sequences]
        window = ("window",) if self._reads_window else ()
        return ("event_time", "ingest_time", "domain", *window, *features, *self.spec.objectives)

    def encode(self, batch: pa.RecordBatch, rows: np.ndarray | slice | None = None) -> Batch:
        """Encode all rows, a slice, or the rows whose indices (or boolean mask) are given, in that order.

        Raises Poison("domain") on a domain outside the schema and Poison("sequence") on fields of unequal length.
        """
        batch = _select(batch, rows)
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        event_time_ms_B = _fixed(columns["event_time"], np.int64)
        labels_BK, mask_BK = self._labels(columns, batch.num_rows)
        return Batch(
            cat_BC=torch.from_numpy(self._ids(columns, batch.num_rows)),
            num_BN=torch.from_numpy(self._numbers(columns, batch.num_rows)),
            seqs={s.name: self._sequence(s, columns, event_time_ms_B) for s in self._sequences},
            labels_BK=torch.from_numpy(labels_BK),
            label_mask_BK=torch.from_numpy(mask_BK),
            domain_B=torch.from_numpy(self._domain(columns["domain"])),
            event_time_ms_B=event_time_ms_B,
            ingest_time_ms_B=_fixed(columns["ingest_time"], np.int64),
        )

    def _ids(self, columns: dict[str, Any], num_rows: int) -> np.ndarray:
        return self._cat_tables.ids([columns[f.name] for f in self._categorical], num_rows)

    def _numbers(self, columns: dict[str, Any], num_rows: int) -> np.ndarray:
        num_NB = _empty((len(self.spec.numeric), num_rows), np.float32)
        count = len(self._numeric)
        with np.errstate(invalid="ignore", over="ignore"):  # the slots of nulls hold anything
            for num_B, feature in zip(num_NB, self._numeric, strict=False):
                _transform(_fixed(columns[feature.name], np.float32), feature, num_B)
            np.clip(num_NB[:count], -NUMERIC_LIMIT, NUMERIC_LIMIT, out=num_NB[:count])
        num_NB[count:] = 0.0
        for j, i in enumerate(self._indicators):
            column = columns[self._numeric[i].name]
            if column.null_count:
                missing_B = ~_validity(column)
                num_NB[i][missing_B] = 0.0
                num_NB[count + j] = missing_B
        return _transposed(num_NB)

    def _sequence(
        self, sequence: SequenceFeature, columns: dict[str, Any], event_time_ms_B: np.ndarray
    ) -> JaggedSequence:
        times = columns[sequence.column("time")]
        offsets = _fixed(times.offsets, np.int32)
        first, last = int(offsets[0]), int(offsets[-1])
        offsets = offsets - offsets[0]
        fields = []
        for field in sequence.fields:
            column = columns[sequence.column(field.name)]
            own = _fixed(column.offsets, np.int32)
            if not np.array_equal(own - own[0], offsets):
                detail = f"'{sequence.column(field.name)}' and '{sequence.column('time')}' differ in length"
                raise Poison("sequence", detail)
            fields.append(column.values.slice(int(own[0]), last - first))
        past_ms_T = _fixed(times.values.slice(first, last - first), np.int64)
        age_ms_T = np.repeat(event_time_ms_B, np.diff(offsets))
        age_ms_T -= past_ms_T
        np.maximum(age_ms_T, 0, out=age_ms_T)
        age_s_T = (age_ms_T / 1000.0).astype(np.float32)
        ids_TF = self._seq_tables[sequence.name].ids(fields, last - first)
        return JaggedSequence(torch.from_numpy(ids_TF), torch.from_numpy(offsets), torch.from_numpy(age_s_T))

    def _labels(self, columns: dict[str, Any], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """A row's label of an objective stands at the head of the row's window; its other heads are masked."""
        labels_BK = np.zeros((num_rows, len(self.spec.heads)), np.float32)
        mask_BK = np.ones(labels_BK.shape, bool)
        if self._reads_window:
            mask_BK[:] = self._trained_KW.T[_fixed(columns["window"], np.int8)]
        for k, head in enumerate(self.spec.heads):
            column = columns[self.spec.objectives[head.objective]]
            if column.null_count:
                mask_BK[:, k] &= _validity(column)
            labels_BK[:, k] = _fixed(column, np.int8) * mask_BK[:, k]
        return labels_BK, mask_BK

    def _domain(self, column: Any) -> np.ndarray:
        known = {name: i for i, name in enumerate(self.schema.domains)}
        names = column.dictionary.to_pylist()
        index = np.array([known.get(name, -1) for name in names] or [-1], np.int64)
        domain_B = index[_fixed(column.indices, np.int32)]
        if domain_B.size and domain_B.min() < 0:
            unknown = sorted(str(n) for n in names if n not in known)
            raise Poison("domain", f"not in the schema: {unknown[:3]}; known: {', '.join(self.schema.domains)}")
        return domain_B


def _of_objectives(schema: FeatureSchema, names: Sequence[str]) -> FeatureSchema:
    """The schema with these objectives alone, in this order."""
    known = {o.name: o for o in schema.objectives}
    if unknown := set(names) - set(known):
        raise ConfigError(f"objectives: schema '{schema.name}' has no {sorted(unknown)}; known: {', '.join(known)}")
    return schema.model_copy(update={"objectives": tuple(known[name] for name in names)})


def _trained_heads(schema: FeatureSchema) -> np.ndarray:
    """Which heads the rows of each window train: bool (K, W)."""
    table = schema.head_table()
    return np.array([np.array(table[head.objective]) == k for k, head in enumerate(schema.heads)])


class _Tables:
    """Hashes one group of columns, each into its own table, with one pass over all of them."""

    def __init__(self, layout: TableLayout, tables: list[int]) -> None:
        seeds = [xxhash.xxh64_intdigest(layout.names[t].encode()) for t in tables]
        self._seeds = np.array(seeds, np.uint64)[:, None]
        self._buckets = np.array([layout.sizes[t] - 1 for t in tables], np.uint64)[:, None]
        self._firsts = np.array([layout.offsets[t] + 1 for t in tables], np.int64)[:, None]

    def ids(self, columns: Sequence[Any], num_rows: int) -> np.ndarray:
        """Ids in the shared space, (B, C) int64, of C id columns of B rows; nulls get local id 0."""
        x_CB = _empty((len(columns), num_rows), np.uint64)
        for x_B, column, (seed,) in zip(x_CB, columns, self._seeds, strict=True):
            np.bitwise_xor(_id_values(column), seed, out=x_B)
        spare_CB = _empty(x_CB.shape, np.uint64)
        splitmix64(x_CB, spare_CB)
        for x_B, spare_B, (divisor,) in zip(x_CB, spare_CB, self._buckets, strict=True):
            np.floor_divide(x_B, divisor, out=spare_B)  # by one number it is fast, the remainder never is
        spare_CB *= self._buckets
        x_CB -= spare_CB
        ids_CB = x_CB.view(np.int64)
        ids_CB += self._firsts
        for ids_B, column, (first,) in zip(ids_CB, columns, self._firsts, strict=True):
            if column.null_count:
                ids_B[~_validity(column)] = first - 1
        return _transposed(ids_CB)


def _transform(values: np.ndarray, feature: NumericFeature, out: np.ndarray) -> None:
    """The numeric transform of one feature, not yet clipped."""
    if feature.transform == "log1p":
        np.log1p(np.maximum(values, 0.0, out=out), out=out)
    elif feature.transform == "standardize":
        np.subtract(values, np.float32(feature.mean), out=out)
        out /= np.float32(feature.std)
    else:
        out[:] = values


def splitmix64(x: np.ndarray, spare: np.ndarray) -> None:
    """The splitmix64 finalizer (Steele et al., OOPSLA 2014) of an uint64 array, wrapping, in place."""
    x += np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= np.right_shift(x, np.uint64(shift), out=spare)
        x *= np.uint64(factor)
    x ^= np.right_shift(x, np.uint64(31), out=spare)


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """From Arrow's pool, which keeps what was freed: the page faults of fresh memory cost more than the arithmetic."""
    array = np.frombuffer(pa.allocate_buffer(math.prod(shape) * np.dtype(dtype).itemsize), dtype)
    return array.reshape(shape)


def _transposed(values_CB: np.ndarray) -> np.ndarray:
    values_BC = _empty(values_CB.T.shape, values_CB.dtype)
    values_BC[:] = values_CB.T
    return values_BC


def _select(batch: pa.RecordBatch, rows: np.ndarray | slice | None) -> pa.RecordBatch:
    if rows is None:
        return batch
    if isinstance(rows, slice):
        start, stop, step = rows.indices(batch.num_rows)
        if (start, stop, step) == (0, batch.num_rows, 1):
            return batch
        if step == 1:
            return batch.slice(start, max(0, stop - start))
        rows = np.arange(start, stop, step)
    if rows.dtype == bool:
        rows = np.flatnonzero(rows)
    return batch.take(pa.array(rows, pa.int64()))


def _fixed(column: Any, dtype: Any) -> np.ndarray:
    """The values buffer of a fixed-width column without a copy; undefined where null."""
    data = column.buffers()[1]
    if data is None or len(column) == 0:
        return np.zeros(len(column), dtype)
    return np.frombuffer(data, dtype, count=len(column), offset=column.offset * np.dtype(dtype).itemsize)


def _validity(column: Any) -> np.ndarray:
    """True where the column is not null; the column must have nulls."""
    bits = np.unpackbits(np.frombuffer(column.buffers()[0], np.uint8), bitorder="little")
    return bits[column.offset : column.offset + len(column)].astype(bool)


def _id_values(column: Any) -> np.ndarray:
    """64-bit values of an id column, any where null; strings by the hash of each dictionary entry."""
    if not isinstance(column, pa.DictionaryArray):
        return _fixed(column, np.int64).view(np.uint64)
    hashes = [xxhash.xxh64_intdigest(word.encode()) for word in column.dictionary.to_pylist()]
    index = _fixed(column.indices, np.int32)
    if column.null_count:
        index = np.where(_validity(column), index, 0)
    return np.array(hashes or [0], np.uint64)[index]
