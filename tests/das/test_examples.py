"""Arrow messages of the `examples` topic: exact round trip, projection by name, and hostile bytes."""

from __future__ import annotations

import random
import resource
import struct
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from example_kit import NOW_MS, joined, small_schema
from hypothesis import given, settings
from hypothesis import strategies as st

from das import examples
from das.arrow_guard import decoded_bytes, inspect_stream
from das.errors import Poison
from das.examples import Compression, JoinedRow, arrow_schema, decode_examples, encode_examples, example_batch

SCHEMA = small_schema()
ROWS = joined(SCHEMA, 9)
VALUE = encode_examples(ROWS, SCHEMA, "lz4")


def _stream(batch: pa.RecordBatch, *, batches: int = 1, compression: str | None = "lz4") -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _with_column(name: str, column: pa.Array) -> pa.RecordBatch:
    """The rows, one column of which was replaced by another (of any type)."""
    batch = example_batch(ROWS, SCHEMA)
    place = batch.schema.get_field_index(name)
    fields = [f if f.name != name else pa.field(name, column.type) for f in batch.schema]
    columns = [c if i != place else column for i, c in enumerate(batch.columns)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def _millis(time: Any) -> int:
    return int(time.timestamp() * 1000 + 0.5)


def test_round_trip_keeps_every_value() -> None:
    rows = decode_examples(VALUE, SCHEMA).to_pylist()
    for row, joined_row in zip(rows, ROWS, strict=True):
        message, features = joined_row.impression, joined_row.impression.features
        assert (row["impression_id"], row["domain"], row["window"]) == (message.impression_id, message.domain, 0)
        for name in ("item", "maker", "tag", "color", "price", "age"):
            assert row[name] == getattr(features, name)
        for name in ("clicks.item", "clicks.tag", "buys.item"):
            sequence, field = name.split(".")
            assert row[name] == getattr(getattr(features, sequence), field)
        assert (row["click"], row["buy"]) == joined_row.labels
    batch = decode_examples(VALUE, SCHEMA)
    assert batch["event_time"].cast(pa.int64()).to_pylist() == [r.impression.event_time for r in ROWS]
    assert batch["ingest_time"].cast(pa.int64()).to_pylist() == [r.ingest_time_ms for r in ROWS]
    assert batch["clicks.time"].values.cast(pa.int64()).to_pylist() == [
        t for r in ROWS for t in r.impression.features.clicks.time_ms
    ]


def test_columns_are_the_contract() -> None:
    names = "impression_id event_time ingest_time domain window item maker tag color price age"
    names += " clicks.item clicks.tag clicks.time buys.item buys.time click buy"
    schema = arrow_schema(SCHEMA)
    assert schema.names == names.split()
    assert {f.name for f in schema if f.nullable} == {"maker", "color", "age", "click", "buy"}
    assert decode_examples(VALUE, SCHEMA).schema == schema


def test_the_same_rows_give_the_same_bytes() -> None:
    assert encode_examples(joined(small_schema(), 9), small_schema(), "lz4") == VALUE


def test_the_order_of_rows_does_not_change_the_dictionaries() -> None:
    ways = [example_batch(rows, SCHEMA) for rows in (ROWS, ROWS[::-1])]
    for one, other in zip(*(way.columns for way in ways), strict=True):
        if pa.types.is_dictionary(one.type):
            assert one.dictionary.equals(other.dictionary)
            assert one.to_pylist() == other.to_pylist()[::-1]


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_compression_changes_no_row(compression: Compression) -> None:
    rows = joined(SCHEMA, 256)
    value = encode_examples(rows, SCHEMA, compression)
    assert decode_examples(value, SCHEMA).equals(example_batch(rows, SCHEMA))
    assert (len(value) < len(encode_examples(rows, SCHEMA))) == (compression != "none")


@pytest.mark.parametrize("count", [0, 1, 256])
def test_batch_sizes(count: int) -> None:
    batch = decode_examples(encode_examples(joined(SCHEMA, count), SCHEMA), SCHEMA)
    assert (batch.num_rows, batch.schema) == (count, arrow_schema(SCHEMA))


def test_projection_reads_by_name_in_the_order_asked() -> None:
    names = ["buy", "clicks.tag", "item", "domain", "clicks.time"]
    picked = decode_examples(VALUE, SCHEMA, names)
    assert picked.schema.names == names
    assert picked.to_pydict() == {n: decode_examples(VALUE, SCHEMA).to_pydict()[n] for n in names}
    with pytest.raises(ValueError, match="nope"):
        decode_examples(VALUE, SCHEMA, ["nope"])


def test_an_added_column_is_no_problem_for_an_older_reader() -> None:
    extra = {"kind": "categorical", "name": "aisle", "dtype": "string"}
    newer = small_schema(features=[*SCHEMA.model_dump()["features"], extra])
    rows = [JoinedRow(_wider(r, newer), r.ingest_time_ms, r.labels) for r in ROWS]
    assert decode_examples(encode_examples(rows, newer), SCHEMA).equals(decode_examples(VALUE, SCHEMA))


def _wider(row: JoinedRow, schema: Any) -> Any:
    import msgspec

    from das.messages import MessageCodec

    data = msgspec.to_builtins(row.impression)
    data["features"]["aisle"] = "a1"
    return MessageCodec(schema).impression(data)


def test_a_missing_column_is_refused_only_by_those_who_read_it() -> None:
    batch = example_batch(ROWS, SCHEMA)
    value = _stream(batch.select([n for n in batch.schema.names if n != "price"]))
    assert decode_examples(value, SCHEMA, ["item"]).num_rows == 9
    with pytest.raises(
        Poison, match=r"(?s)price is there 0 times.*wanted: .*price: float.*found: impression_id"
    ) as caught:
        decode_examples(value, SCHEMA)
    assert caught.value.reason == "schema"


RETYPED = {
    "item": pa.array(range(9), pa.int32()),
    "tag": pa.array(["a"] * 9),
    "price": pa.array([0.5] * 9, pa.float64()),
    "click": pa.array([True] * 9),
    "event_time": pa.array([NOW_MS] * 9, pa.timestamp("us")),
    "clicks.item": pa.array([[1]] * 9, pa.list_(pa.int32())),
}


@pytest.mark.parametrize("name", RETYPED)
def test_a_retyped_column_is_refused(name: str) -> None:
    with pytest.raises(Poison, match=f"{name} is ") as caught:
        decode_examples(_stream(_with_column(name, RETYPED[name])), SCHEMA)
    assert caught.value.reason == "schema"


def test_a_repeated_column_is_refused() -> None:
    batch = example_batch(ROWS, SCHEMA)
    twice = pa.RecordBatch.from_arrays(
        [*batch.columns, batch["item"]], schema=batch.schema.append(batch.schema.field("item"))
    )
    with pytest.raises(Poison, match="item is there 2 times"):
        decode_examples(_stream(twice), SCHEMA)


NULL_TAG = pa.DictionaryArray.from_arrays(pa.array([0] * 9, pa.int32()), pa.array([None], pa.string()))
IDS = pa.list_(pa.field("item", pa.int64(), nullable=False))
BAD_VALUES: dict[str, tuple[str, pa.Array]] = {
    "null instead of a list": ("clicks.item", pa.array([None, *[[1]] * 8], IDS)),
    "null in a required string": ("tag", pa.array([None, *"abcdefgh"]).dictionary_encode()),
    "null in a required column": ("item", pa.array([1, None, *range(7)], pa.int64())),
    "null hidden in a dictionary": ("tag", NULL_TAG),
    "label 2": ("click", pa.array([2] * 9, pa.int8())),
    "year 50000": ("event_time", pa.array([1 << 52] * 9, pa.int64()).view(pa.timestamp("ms"))),
    "fields of one sequence that differ in length": ("clicks.item", pa.array([[1]] * 9, IDS)),
    "a sequence past its max_length": ("buys.item", pa.array([[1, 2, 3]] * 9, IDS)),
    "a window that the schema does not have": ("window", pa.array([0] * 8 + [1], pa.int8())),
    "before 1970": ("ingest_time", pa.array([-1] * 9, pa.int64()).view(pa.timestamp("ms"))),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_values_outside_the_contract_are_refused(case: str) -> None:
    name, column = BAD_VALUES[case]
    with pytest.raises(Poison, match=name):
        decode_examples(_stream(_with_column(name, column)), SCHEMA)


def test_an_unknown_domain_is_refused() -> None:
    with pytest.raises(Poison) as caught:
        decode_examples(
            VALUE,
            small_schema(domains=["1"], objectives=[{"name": "click", "window_s": 1}, {"name": "buy", "window_s": 1}]),
        )
    assert caught.value.reason == "domain"


@pytest.mark.parametrize("value", [None, b"", b"{}", b"\xff" * 64, VALUE + b"x", VALUE[:-8]])
def test_bytes_that_are_no_stream_are_poison(value: bytes | None) -> None:
    with pytest.raises(Poison) as caught:
        decode_examples(value, SCHEMA)
    assert caught.value.reason == "arrow"


def test_other_than_one_batch_is_poison() -> None:
    for batches in (0, 2):
        with pytest.raises(Poison, match=f"{batches} record batches"):
            decode_examples(_stream(example_batch(ROWS, SCHEMA), batches=batches), SCHEMA)


def test_a_cut_message_is_poison_at_every_length() -> None:
    for length in range(0, len(VALUE), 7):
        with pytest.raises(Poison):
            decode_examples(VALUE[:length], SCHEMA)


def test_guard_counts_what_arrow_would_allocate() -> None:
    batch = pa.record_batch({"x": pa.array([7] * 50_000, pa.int64())})
    for compression, size in (("lz4", 400_000), (None, 0)):
        value = _stream(batch, compression=compression)
        assert decoded_bytes(value, inspect_stream(value).compressed) == size


def test_a_decompression_bomb_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = _with_column("item", pa.array([7] * 9, pa.int64()))
    big = pa.RecordBatch.from_arrays(
        [
            pa.concat_arrays([c] * 40_000) if not pa.types.is_dictionary(c.type) else c.take([0] * 360_000)
            for c in bomb.columns
        ],
        schema=bomb.schema,
    )
    value = _stream(big)
    monkeypatch.setattr(examples, "MAX_DECODED_BYTES", 1 << 20)
    with pytest.raises(Poison) as caught:
        decode_examples(value, SCHEMA)
    assert caught.value.reason == "size"


def test_a_lying_length_prefix_allocates_nothing() -> None:
    """Overwrite the decompressed length of every buffer in turn with 2^40."""
    plan = inspect_stream(VALUE)
    lie = struct.pack("<q", 1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for at in range(plan.schema_bytes, len(VALUE) - 8, 8):
        try:
            decode_examples(VALUE[:at] + lie + VALUE[at + 8 :], SCHEMA)
        except Poison as poison:
            refused += poison.reason == "size"
    assert refused > 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


FLIPS = st.lists(st.tuples(st.integers(0, len(VALUE) - 1), st.integers(0, 255)), min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(FLIPS)
def test_flipped_bytes_are_poison_or_readable_rows(flips: list[tuple[int, int]]) -> None:
    value = bytearray(VALUE)
    for place, byte in flips:
        value[place] = byte
    _poison_or_readable(bytes(value))


def test_seeded_fuzz_never_crashes() -> None:
    source = random.Random(7)
    changes: list[Callable[[int], int]] = [
        lambda b: b ^ 1 << source.randrange(8),
        lambda b: 0xFF,
        lambda b: 0x80,
        lambda b: 0,
    ]
    for _ in range(3000):
        value = bytearray(VALUE)
        for _ in range(source.choice([1, 2, 8])):
            place = source.randrange(len(value))
            value[place] = source.choice(changes)(value[place])
        _poison_or_readable(bytes(value))


def _poison_or_readable(value: bytes) -> None:
    try:
        batch = decode_examples(value, SCHEMA)
    except Poison as poison:
        reason: str | None = poison.reason
    else:
        reason = None
        assert len(batch.to_pylist()) == batch.num_rows
    assert reason in (None, "arrow", "schema", "size", "domain", "sequence")
