"""Turns a recorded table into rows in event-time order, in the types of the feature schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from das.errors import ConfigError
from das.schema import CategoricalFeature, FeatureSchema, NumericFeature
from services.replay.dataset import UNIT_MS, DatasetConfig, TimeConfig
from services.replay.serving_log import Row
from services.replay.table import Table

ID_TYPES = {"int": pa.int64(), "string": pa.string()}


class _Chunk(NamedTuple):
    batch: pa.RecordBatch
    rows: np.ndarray  # row numbers in the table, for messages


class RowReader:
    """Rows of one recorded table. Raises ConfigError naming the column, the row and the fix."""

    def __init__(self, path: Path, dataset: DatasetConfig, schema: FeatureSchema) -> None:
        self._path = path
        self._dataset = dataset
        self._schema = schema
        self._features = dataset.feature_columns(schema)
        self._table = Table(path, dataset.columns(schema), dataset.format)

    @property
    def num_rows(self) -> int | None:
        """Rows of the table, where the format says so without reading it all."""
        return self._table.num_rows

    def rows(self) -> Iterator[Row]:
        """All rows, in file order, which must be time order."""
        first, last_ms = 0, 0
        for batch in self._table.batches():
            chunk = _Chunk(batch, np.arange(first, first + batch.num_rows))
            times = self._times(chunk, self._dataset.time)
            earlier = np.flatnonzero(np.diff(times, prepend=last_ms) < 0)
            if earlier.size:
                raise self._error(chunk, earlier, self._dataset.time.column, "goes back in time; sort the table by it")
            yield from self._rows(chunk, times)
            first += batch.num_rows
            last_ms = int(times[-1]) if times.size else last_ms

    def _rows(self, chunk: _Chunk, times: np.ndarray) -> Iterator[Row]:
        own: tuple[CategoricalFeature | NumericFeature, ...] = (*self._schema.categorical, *self._schema.numeric)
        features = {f.name: f for f in own}
        columns = [self._feature(chunk, features[name], column) for name, column in self._features.items()]
        values = zip(*columns, strict=True) if columns else iter([()] * len(times))
        parts = (self._ids(chunk), times.tolist(), self._domains(chunk), values, self._outcomes(chunk, times))
        yield from map(Row._make, zip(*parts, strict=True))

    def _ids(self, chunk: _Chunk) -> list[str]:
        prefix, column = self._dataset.id.prefix, self._dataset.id.column
        if column is None:
            return [f"{prefix}{number}" for number in chunk.rows.tolist()]
        ids = self._filled(chunk, column, pa.string(), "every impression needs an id")
        return [prefix + value for value in ids.to_pylist()]

    def _domains(self, chunk: _Chunk) -> list[str]:
        column = self._dataset.domain
        if column is None:
            return [self._schema.domains[0]] * len(chunk.rows)
        domains: list[str] = self._filled(chunk, column, pa.string(), "every impression needs a domain").to_pylist()
        unknown = set(domains) - set(self._schema.domains)
        if unknown:
            where = [row for row, domain in enumerate(domains) if domain in unknown]
            raise self._error(chunk, where, column, f"has {sorted(unknown)}, not in the schema; add to its domains")
        return domains

    def _feature(self, chunk: _Chunk, feature: CategoricalFeature | NumericFeature, column: str) -> list[Any]:
        target = ID_TYPES[feature.dtype] if isinstance(feature, CategoricalFeature) else pa.float64()
        fix = f"set nullable: true for '{feature.name}' in the schema"
        values = self._cast(chunk, column, target) if feature.nullable else self._filled(chunk, column, target, fix)
        return list(values.to_pylist())

    def _times(self, chunk: _Chunk, time: TimeConfig) -> np.ndarray:
        """int64 milliseconds since the epoch."""
        kind = chunk.batch.column(time.column).type
        if pa.types.is_temporal(kind) != (time.unit == "iso") and not _is_text(kind):
            raise ConfigError(f"{self._path}: column '{time.column}' is {kind}; unit iso is for text and dates only")
        fix = "every row needs a time"
        if time.unit == "iso":
            micros = self._filled(chunk, time.column, pa.timestamp("us", "UTC"), fix).cast(pa.int64())
            return micros.to_numpy(zero_copy_only=False) // 1000
        target = pa.int64() if pa.types.is_integer(kind) else pa.float64()
        values = self._filled(chunk, time.column, target, fix).to_numpy(zero_copy_only=False)
        return np.rint(values * UNIT_MS[time.unit]).astype(np.int64)

    def _outcomes(self, chunk: _Chunk, times: np.ndarray) -> list[tuple[tuple[int, int], ...]]:
        """Per row, (objective, time it became known) of the outcomes that happened."""
        found: list[tuple[tuple[int, int], ...]] = [()] * len(times)
        for objective, name in enumerate(self._schema.objective_names):
            outcome = self._dataset.outcomes[name]
            value = self._cast(chunk, outcome.column, pa.float64(), truths=True)
            happened = pc.fill_null(pc.greater(value, outcome.above), False).to_numpy(zero_copy_only=False)
            places = np.flatnonzero(happened)
            if not places.size:
                continue
            part = _Chunk(chunk.batch.take(pa.array(places)), chunk.rows[places])
            known = self._known(part, times[places], name)
            early = np.flatnonzero(known < times[places])
            if early.size:
                fix = f"is known before its impression; check outcomes.{name}.delay or known_at, and the units"
                raise self._error(part, early, outcome.column, fix)
            for place, known_ms in zip(places.tolist(), known.tolist(), strict=True):
                found[place] = (*found[place], (objective, known_ms))
        return found

    def _known(self, chunk: _Chunk, times: np.ndarray, name: str) -> np.ndarray:
        """When each of these outcomes became known, int64 milliseconds."""
        outcome = self._dataset.outcomes[name]
        if outcome.known_at is not None:
            return self._times(chunk, outcome.known_at)
        delay = np.full(len(times), outcome.delay.seconds * 1000)
        if outcome.delay.column is not None:
            column = self._filled(chunk, outcome.delay.column, pa.float64(), f"an outcome '{name}' needs its delay")
            delay += column.to_numpy(zero_copy_only=False) * UNIT_MS[outcome.delay.unit]
        return times + np.rint(delay).astype(np.int64)

    def _filled(self, chunk: _Chunk, name: str, target: pa.DataType, fix: str) -> pa.Array:
        """A column without nulls. Raises ConfigError naming the first empty row and the fix."""
        column = self._cast(chunk, name, target)
        if column.null_count:
            empty = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
            raise self._error(chunk, empty, name, f"is empty; {fix}")
        return column

    def _cast(self, chunk: _Chunk, name: str, target: pa.DataType, *, truths: bool = False) -> pa.Array:
        """One column as `target`, NaN as null; `truths` reads the words true and false as 1 and 0.

        Raises ConfigError naming the column and the row.
        """
        column = chunk.batch.column(name)
        if truths and _is_text(column.type):
            column = _truths_to_digits(column)
        try:
            column = _as_type(column, target)
        except pa.ArrowException:
            place = next((n for n in range(len(column)) if not _reads_as(column.slice(n, 1), target)), 0)
            value = chunk.batch.column(name)[place].as_py()
            raise self._error(chunk, [place], name, f"does not read as {target}: {value!r}") from None
        column = _nan_to_null(column)
        if pa.types.is_floating(target):
            infinite = np.flatnonzero(pc.fill_null(pc.is_inf(column), False).to_numpy(zero_copy_only=False))
            if infinite.size:
                raise self._error(chunk, infinite, name, "is infinite; clip it or leave it empty")
        return column

    def _error(self, chunk: _Chunk, places: Any, column: str, problem: str) -> ConfigError:
        return ConfigError(f"{self._path} row {chunk.rows[places[0]]}: column '{column}' {problem}")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _as_type(column: pa.Array, target: pa.DataType) -> pa.Array:
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return _nan_to_null(column).cast(target)


def _reads_as(column: pa.Array, target: pa.DataType) -> bool:
    try:
        _as_type(column, target)
    except pa.ArrowException:
        return False
    return True


def _truths_to_digits(column: pa.Array) -> pa.Array:
    """The words true and false, in any case, as 1 and 0; other text as it is."""
    word = pc.utf8_lower(column)
    column = pc.if_else(pc.equal(word, "true"), pa.scalar("1", column.type), column)
    return pc.if_else(pc.equal(word, "false"), pa.scalar("0", column.type), column)


def _nan_to_null(column: pa.Array) -> pa.Array:
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
