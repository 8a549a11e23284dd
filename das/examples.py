"""Messages of the `examples` topic: one Arrow IPC stream with one record batch each.

Columns, in order: `impression_id`, `event_time`, `ingest_time`, `domain`, `window`, the categorical features, the
numeric features (raw), `<sequence>.<field>` and `<sequence>.time` of each sequence, one int8 label per objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from das.arrow_guard import inspect_stream
from das.errors import Poison
from das.messages import MAX_TIME_MS, Impression
from das.schema import FeatureSchema

FORMAT = 1
MAX_DECODED_BYTES = 256 << 20
MAX_DETAIL_CHARS = 4000
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
_WRITE = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)


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
    return pa.array(values, pa.string()).dictionary_encode()


def _lists(columns: Any, offsets: np.ndarray, item: pa.DataType) -> pa.Array:
    """One list per row from the rows' Python lists, whose lengths are in `offsets`."""
    flat = chain.from_iterable(columns)
    if item == STRING:
        values = _strings(list(flat))
    else:
        values = pa.array(np.fromiter(flat, np.int64, int(offsets[-1]))).view(item)
    kind = pa.list_(pa.field("item", item, nullable=False))
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)


def encode_examples(rows: Sequence[JoinedRow], schema: FeatureSchema) -> bytes:
    """The value of one `examples` message; the same rows give the same bytes."""
    batch = example_batch(rows, schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=_WRITE) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def decode_examples(value: bytes | None, schema: FeatureSchema, columns: Sequence[str] | None = None) -> pa.RecordBatch:
    """The named columns (all of `arrow_schema(schema)` for None) of one message, in the order given.

    Columns that the schema does not know are skipped. Raises Poison: `schema` for a missing or retyped column, `arrow`
    for bytes that are not exactly one valid record batch, `size` for one that would decompress to more than
    MAX_DECODED_BYTES. Raises ValueError for a name in `columns` that is not in `arrow_schema(schema)`.
    """
    names = tuple(arrow_schema(schema).names) if columns is None else tuple(columns)
    wanted = _projection(schema, names)
    if not value:
        raise Poison("arrow", "empty message")
    try:
        plan = inspect_stream(value)
        if plan.num_batches != 1:
            raise Poison("arrow", f"{plan.num_batches} record batches, not 1")
        if plan.decoded_bytes > MAX_DECODED_BYTES:
            raise Poison("size", f"decompresses to {plan.decoded_bytes} bytes, more than {MAX_DECODED_BYTES}")
        indices = _locate(value[: plan.schema_bytes], wanted)
        options = pa.ipc.IpcReadOptions(included_fields=sorted(indices), use_threads=False)
        with pa.ipc.open_stream(value, options=options) as reader:
            batch = reader.read_next_batch()
        batch.validate(full=True)
        order = {index: place for place, index in enumerate(sorted(indices))}
        picked = pa.RecordBatch.from_arrays([batch.column(order[index]) for index in indices], schema=wanted)
    except (pa.ArrowException, ValueError, LookupError, OSError, MemoryError, OverflowError) as error:
        raise Poison("arrow", str(error)[:MAX_DETAIL_CHARS]) from None
    _check_values(picked, schema)
    return picked


@lru_cache(maxsize=64)
def _projection(schema: FeatureSchema, names: tuple[str, ...]) -> pa.Schema:
    expected = arrow_schema(schema)
    unknown = [name for name in names if name not in expected.names]
    if unknown or len(set(names)) != len(names):
        raise ValueError(
            f"columns {unknown or list(names)} are unknown or repeated; known: {', '.join(expected.names)}"
        )
    return pa.schema([expected.field(name) for name in names])


@lru_cache(maxsize=64)
def _locate(schema_message: bytes, wanted: pa.Schema) -> tuple[int, ...]:
    """Where the wanted columns are in a stream with this schema message. Raises Poison if one is missing or retyped."""
    found = pa.ipc.read_schema(pa.py_buffer(schema_message))
    indices, problems = [], []
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
    return tuple(indices)


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _check_values(batch: pa.RecordBatch, schema: FeatureSchema) -> None:
    """Refuse what the column types allow and the contract does not. Raises Poison."""
    for field, column in zip(batch.schema, batch.columns, strict=True):
        values = column.values if pa.types.is_list(field.type) else column
        if not field.nullable and (column.null_count or values.null_count):
            raise Poison("arrow", f"{field.name} has nulls")
        if pa.types.is_dictionary(values.type) and values.dictionary.null_count:
            raise Poison("arrow", f"{field.name} has a null in its dictionary")
        if field.name == "domain" and not set(values.dictionary.to_pylist()) <= set(schema.domains):
            raise Poison("domain", f"domains {values.dictionary.to_pylist()[:8]} are not all in the schema")
        if values.type == TIME and len(values):
            times = values.view(pa.int64()).to_numpy()
            if times.min() < 0 or times.max() > MAX_TIME_MS:
                raise Poison("arrow", f"{field.name} has times outside 0 to {MAX_TIME_MS} ms")
        if field.type == pa.int8() and field.nullable and not {0, 1, None}.issuperset(values.unique().to_pylist()):
            raise Poison("arrow", f"label {field.name} is not 0, 1 or null")
