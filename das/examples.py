"""Messages of the `examples` topic: one Arrow IPC stream with one record batch each.

Columns, in order: `impression_id`, `event_time`, `ingest_time`, `domain`, `window`, the categorical features, the
numeric features (raw), `<sequence>.<field>` and `<sequence>.time` of each sequence, one int8 label per objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from das.arrow_guard import decoded_bytes, inspect_stream
from das.errors import Poison
from das.messages import MAX_TIME_MS, Impression
from das.schema import FeatureSchema

FORMAT = 1
MAX_DECODED_BYTES = 256 << 20
MAX_DETAIL_CHARS = 4000
MAX_WRITERS = 64
"""Schema messages of different writers that a decoder remembers."""
HEADER_FORMAT = "exfm-format"
HEADER_SCHEMA = "exfm-schema"
HEADER_ROWS = "exfm-rows"
HEADER_SEQ = "exfm-seq"
HEADER_JOIN = "exfm-join"
HEADER_CONTROL = "exfm-control"
END_OF_STREAM = b"end-of-stream"

TIME = pa.timestamp("ms")
STRING = pa.dictionary(pa.int32(), pa.string())
ID_TYPES = {"int": pa.int64(), "string": STRING}
ARROW_ERRORS = (pa.ArrowException, ValueError, LookupError, OSError, MemoryError, OverflowError)
"""What pyarrow raises on bytes that are not what they should be."""
Compression = Literal["none", "lz4", "zstd"]
_WRITE: dict[Compression, pa.ipc.IpcWriteOptions] = {
    "none": pa.ipc.IpcWriteOptions(use_threads=False),
    "lz4": pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False),
    "zstd": pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False),
}


class JoinedRow(msgspec.Struct, frozen=True, gc=False):
    """An impression and its labels, in `schema.objective_names` order; None is not observed or not applicable."""

    impression: Impression
    ingest_time_ms: int
    labels: tuple[int | None, ...]
    window: int = 0


@lru_cache(maxsize=16)
def arrow_schema(schema: FeatureSchema) -> pa.Schema:
    """The Arrow schema of `examples` messages; everything that is not nullable here is never null."""
    fields = [
        pa.field("impression_id", pa.string(), nullable=False),
        pa.field("event_time", TIME, nullable=False),
        pa.field("ingest_time", TIME, nullable=False),
        pa.field("domain", STRING, nullable=False),
        pa.field("window", pa.int8(), nullable=False),
    ]
    fields += [pa.field(f.name, ID_TYPES[f.dtype], nullable=f.nullable) for f in schema.categorical]
    fields += [pa.field(f.name, pa.float32(), nullable=f.nullable) for f in schema.numeric]
    for sequence in schema.sequences:
        for field in sequence.fields:
            fields.append(_list_field(sequence.column(field.name), ID_TYPES[field.dtype]))
        fields.append(_list_field(sequence.column("time"), TIME))
    fields += [pa.field(name, pa.int8(), nullable=True) for name in schema.objective_names]
    return pa.schema(fields)


def _list_field(name: str, item: pa.DataType) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("item", item, nullable=False)), nullable=False)


def example_batch(rows: Sequence[JoinedRow], schema: FeatureSchema) -> pa.RecordBatch:
    """The rows as one record batch in the columns of `arrow_schema(schema)`; what serving encodes rows with."""
    impressions = [row.impression for row in rows]
    features: dict[str, Any] = {}
    if impressions:
        columns = zip(*(msgspec.structs.astuple(i.features) for i in impressions), strict=True)
        features = dict(zip(impressions[0].features.__struct_fields__, columns, strict=True))
    arrays: list[pa.Array] = [
        pa.array([i.impression_id for i in impressions], pa.string()),
        pa.array([i.event_time for i in impressions], TIME),
        pa.array([row.ingest_time_ms for row in rows], TIME),
        _strings([i.domain for i in impressions]),
        pa.array([row.window for row in rows], pa.int8()),
    ]
    for categorical in schema.categorical:
        values = features.get(categorical.name, ())
        arrays.append(pa.array(values, pa.int64()) if categorical.dtype == "int" else _strings(values))
    arrays += [pa.array(features.get(numeric.name, ()), pa.float32()) for numeric in schema.numeric]
    for sequence in schema.sequences:
        events = features.get(sequence.name, ())
        times = [event.time_ms for event in events]
        offsets = np.zeros(len(times) + 1, np.int32)
        np.cumsum([len(t) for t in times], out=offsets[1:])
        for field in sequence.fields:
            arrays.append(_lists(map(attrgetter(field.name), events), offsets, ID_TYPES[field.dtype]))
        arrays.append(_lists(times, offsets, TIME))
    arrays += [pa.array([row.labels[k] for row in rows], pa.int8()) for k in range(len(schema.objectives))]
    return pa.RecordBatch.from_arrays(arrays, schema=arrow_schema(schema))


def _strings(values: Sequence[str | None]) -> pa.Array:
    """Dictionary-encoded, the dictionary in order: of few words, messages that follow one another have the same."""
    array = pa.array(values, pa.string()).dictionary_encode()
    order = pc.sort_indices(array.dictionary)
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order))
    return pa.DictionaryArray.from_arrays(pa.array(place).take(array.indices), array.dictionary.take(order))


def _lists(columns: Any, offsets: np.ndarray, item: pa.DataType) -> pa.Array:
    """One list per row from the rows' Python lists, whose lengths are in `offsets`."""
    flat = chain.from_iterable(columns)
    if item == STRING:
        values = _strings(list(flat))
    else:
        values = pa.array(np.fromiter(flat, np.int64, int(offsets[-1]))).view(item)
    kind = pa.list_(pa.field("item", item, nullable=False))
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)


def encode_examples(rows: Sequence[JoinedRow], schema: FeatureSchema, compression: Compression = "none") -> bytes:
    """The value of one `examples` message; the same rows give the same bytes.

    `compression` is of each column by itself. The broker's client compresses whole batches of messages anyway
    (`kafka.compression`), to the same size and without a fixed cost per column.
    """
    batch = example_batch(rows, schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=_WRITE[compression]) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def decode_examples(value: bytes | None, schema: FeatureSchema, columns: Sequence[str] | None = None) -> pa.RecordBatch:
    """`ExampleDecoder(schema, columns).decode(value)`; for many messages make one decoder."""
    return _decoder(schema, None if columns is None else tuple(columns)).decode(value)


class ExampleDecoder:
    """Decodes messages to some columns of `arrow_schema(schema)` (all for None), in the order given.

    Raises ValueError for a name in `columns` that is not in `arrow_schema(schema)` or is there twice.
    """

    def __init__(self, schema: FeatureSchema, columns: Sequence[str] | None = None) -> None:
        expected = arrow_schema(schema)
        names = list(expected.names if columns is None else columns)
        unknown = [name for name in names if name not in expected.names]
        if unknown or len(set(names)) != len(names):
            known = ", ".join(expected.names)
            raise ValueError(f"columns {unknown or names} are unknown or repeated; known: {known}")
        self._wanted = pa.schema([expected.field(name) for name in names])
        self._checks = [_check(field, schema) for field in self._wanted]
        members = {s: [s.column(f) for f in [*(f.name for f in s.fields), "time"]] for s in schema.sequences}
        places = [([names.index(c) for c in own if c in names], s.max_length) for s, own in members.items()]
        self._sequences = [(own, max_length) for own, max_length in places if own]
        self._located: dict[bytes, tuple[pa.ipc.IpcReadOptions, list[int]]] = {}

    def decode(self, value: bytes | None) -> pa.RecordBatch:
        """The columns of one message. Columns that the schema does not know are skipped.

        Raises Poison: `schema` for a missing or retyped column, `arrow` for bytes that are not exactly one valid record
        batch, `size` for one that would decompress to more than MAX_DECODED_BYTES, `domain` for an unknown domain,
        `sequence` for one that is too long or whose columns differ in length.
        """
        if not value:
            raise Poison("arrow", "empty message")
        try:
            plan = inspect_stream(value)
            if plan.num_batches != 1:
                raise Poison("arrow", f"{plan.num_batches} record batches, not 1")
            size = decoded_bytes(value, plan.compressed)
            if size > MAX_DECODED_BYTES:
                raise Poison("size", f"decompresses to {size} bytes, more than {MAX_DECODED_BYTES}")
            with self.open(value, value[: plan.schema_bytes]) as reader:
                batch = reader.read_next_batch()
            batch.validate(full=True)
        except ARROW_ERRORS as error:
            raise Poison("arrow", str(error)[:MAX_DETAIL_CHARS]) from None
        return self.checked(batch, value[: plan.schema_bytes])

    def open(self, stream: bytes | pa.Buffer, schema_message: bytes) -> pa.ipc.RecordBatchStreamReader:
        """A reader of the wanted fields. Raises Poison if one is missing or retyped, or one of ARROW_ERRORS."""
        return pa.ipc.open_stream(stream, options=self._locate(schema_message)[0])

    def checked(self, batch: pa.RecordBatch, schema_message: bytes) -> pa.RecordBatch:
        """The columns of a valid batch that `open` read, in the order wanted. Raises Poison unless all may be used."""
        found = batch.columns  # a new list of new objects at each access
        columns = [found[place] for place in self._locate(schema_message)[1]]
        for column, check in zip(columns, self._checks, strict=True):
            check(column)
        for members, max_length in self._sequences:
            _check_lengths(self._wanted.names, columns, members, max_length)
        return pa.RecordBatch.from_arrays(columns, schema=self._wanted)

    def _locate(self, schema_message: bytes) -> tuple[pa.ipc.IpcReadOptions, list[int]]:
        """How to read a stream with this schema message, and where each wanted column is among those read."""
        located = self._located.get(schema_message)
        if located is None:
            places = _locate(schema_message, self._wanted)
            included = sorted(places)
            options = pa.ipc.IpcReadOptions(included_fields=included, use_threads=False)
            located = options, [included.index(place) for place in places]
            if len(self._located) >= MAX_WRITERS:
                self._located.clear()
            self._located[schema_message] = located
        return located


@lru_cache(maxsize=64)
def _decoder(schema: FeatureSchema, columns: tuple[str, ...] | None) -> ExampleDecoder:
    return ExampleDecoder(schema, columns)


def _locate(schema_message: bytes, wanted: pa.Schema) -> list[int]:
    """Where the wanted fields are in a schema message. Raises Poison if one is missing or retyped."""
    found = pa.ipc.read_schema(pa.py_buffer(schema_message))
    indices: list[int] = []
    problems = []
    for field in wanted:
        places = found.get_all_field_indices(field.name)
        if len(places) != 1:
            problems.append(f"{field.name} is there {len(places)} times")
        elif found.field(places[0]).type != field.type:
            problems.append(f"{field.name} is {found.field(places[0]).type}, not {field.type}")
        indices.extend(places)
    if problems:
        text = f"{'; '.join(problems)}\nwanted: {_describe(wanted)}\nfound: {_describe(found)}"
        raise Poison("schema", text[:MAX_DETAIL_CHARS])
    return indices


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _check(field: pa.Field, schema: FeatureSchema) -> Callable[[pa.Array], None]:
    """What the contract asks of one column beyond its type. The check raises Poison."""
    name = field.name
    if pa.types.is_list(field.type):
        inner = _check(pa.field(name, field.type.value_type, nullable=False), schema)
        return lambda column: _check_lists(name, column, inner)
    if field.type == STRING:
        allowed = frozenset(schema.domains) if name == "domain" else None
        return lambda column: _check_strings(name, column, field.nullable, allowed)
    if field.type == TIME:
        return lambda column: _check_times(name, column)
    if name in schema.objective_names:
        return lambda column: _check_labels(name, column)
    if name == "window":
        return lambda column: _check_windows(column, len(schema.windows_ms))
    return (lambda column: None) if field.nullable else (lambda column: _no_nulls(name, column))


def _no_nulls(name: str, column: pa.Array) -> None:
    if column.null_count:
        raise Poison("arrow", f"{name} has nulls")


def _check_lists(name: str, column: pa.Array, inner: Callable[[pa.Array], None]) -> None:
    """The values that some list has: those between or beyond the lists are nobody's."""
    _no_nulls(name, column)
    offsets = column.offsets.to_numpy() if len(column) else np.zeros(1, np.int32)
    inner(column.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0])))


def _check_lengths(names: list[str], columns: list[pa.Array], members: list[int], max_length: int) -> None:
    """The columns of one sequence have the same lengths, at most `max_length`."""
    lengths = np.diff(columns[members[0]].offsets.to_numpy())
    if lengths.size and lengths.max() > max_length:
        raise Poison("sequence", f"{names[members[0]]} has {lengths.max()} events, max_length is {max_length}")
    for place in members[1:]:
        if not np.array_equal(np.diff(columns[place].offsets.to_numpy()), lengths):
            raise Poison("sequence", f"{names[members[0]]} and {names[place]} differ in length")


def _check_strings(name: str, column: pa.Array, nullable: bool, allowed: frozenset[str] | None) -> None:
    if not nullable:
        _no_nulls(name, column)
    if column.dictionary.null_count:
        raise Poison("arrow", f"{name} has a null in its dictionary")
    if allowed is not None and not allowed.issuperset(column.dictionary.to_pylist()):
        raise Poison("domain", f"{name} has {column.dictionary.to_pylist()[:8]}, not all in the schema")


def _check_times(name: str, column: pa.Array) -> None:
    _no_nulls(name, column)
    times = column.view(pa.int64()).to_numpy()
    if len(times) and (times.min() < 0 or times.max() > MAX_TIME_MS):
        raise Poison("arrow", f"{name} has times outside 0 to {MAX_TIME_MS} ms")


def _check_windows(column: pa.Array, count: int) -> None:
    _no_nulls("window", column)
    if not set(range(count)).issuperset(column.unique().to_pylist()):
        raise Poison("arrow", f"window has values outside 0 to {count - 1}; the schema has {count} windows")


def _check_labels(name: str, column: pa.Array) -> None:
    if not {0, 1, None}.issuperset(pc.min_max(column).as_py().values()):
        raise Poison("arrow", f"label {name} is not 0, 1 or null")
