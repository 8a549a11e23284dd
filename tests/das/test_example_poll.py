"""A poll decoded at once gives what its messages give one by one, also when some of them are bad."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

import pyarrow as pa
import pytest
from example_kit import joined, small_schema

from das import example_poll, examples
from das.arrow_guard import inspect_stream
from das.errors import Poison
from das.example_poll import PollRows, decode_poll
from das.examples import ExampleDecoder, arrow_schema, encode_examples, example_batch

SCHEMA = small_schema()
ROWS = joined(SCHEMA, 40)
VALUES = [encode_examples(ROWS[a:b], SCHEMA, "lz4") for a, b in ((0, 7), (7, 8), (8, 8), (8, 25), (25, 40))]
DECODER = ExampleDecoder(SCHEMA)


def outcomes(results: Sequence[PollRows | Poison]) -> list[object]:
    return [(r.reason, r.detail) if isinstance(r, Poison) else r.batch.to_pylist() for r in results]


def one_by_one(values: Sequence[bytes | None], decoder: ExampleDecoder = DECODER) -> list[object]:
    return [outcomes(decode_poll([value], decoder))[0] for value in values]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many messages were decoded through one stream, per successful time."""
    found: list[int] = []
    original = example_poll._together

    def counted(values: Sequence[bytes | None], decoder: ExampleDecoder) -> list[PollRows]:
        rows = original(values, decoder)
        found.append(len(rows))
        return rows

    monkeypatch.setattr(example_poll, "_together", counted)
    return found


@pytest.mark.parametrize("compression", ["lz4", "zstd", None])
@pytest.mark.parametrize("columns", [None, ("buy", "clicks.tag", "tag", "domain", "clicks.time")])
def test_a_poll_decodes_as_its_messages_do(
    together: list[int], compression: str | None, columns: tuple[str, ...] | None
) -> None:
    decoder = ExampleDecoder(SCHEMA, columns)
    values = [_stream(example_batch(ROWS[a:b], SCHEMA), compression) for a, b in ((0, 7), (7, 8), (8, 8), (8, 40))]
    results = decode_poll(values, decoder)
    assert together == [4]
    assert outcomes(results) == one_by_one(values, decoder)
    assert [(r.first, r.num_rows) for r in results if isinstance(r, PollRows)] == [(0, 7), (7, 1), (8, 0), (8, 32)]
    assert len({id(r.poll) for r in results if isinstance(r, PollRows)}) == 1


def _stream(batch: pa.RecordBatch, compression: str | None = "lz4") -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _replaced(name: str, column: pa.Array) -> bytes:
    batch = example_batch(ROWS[:9], SCHEMA)
    place = batch.schema.get_field_index(name)
    columns = [c if i != place else column for i, c in enumerate(batch.columns)]
    return _stream(pa.RecordBatch.from_arrays(columns, schema=arrow_schema(SCHEMA)))


def _messages(value: bytes) -> list[bytes]:
    """The IPC messages of one stream: the schema, the dictionaries, the record batch, the end."""
    found, at = [], 0
    while at < len(value):
        end = at + 8 + struct.unpack_from("<I", value, at + 4)[0]
        table = at + 8 + struct.unpack_from("<I", value, at + 8)[0] if end > at + 8 else 0
        vtable = table - struct.unpack_from("<i", value, table)[0] if table else 0
        has_body = table and struct.unpack_from("<H", value, vtable)[0] >= 12
        body_slot = struct.unpack_from("<H", value, vtable + 10)[0] if has_body else 0
        end += struct.unpack_from("<q", value, table + body_slot)[0] if body_slot else 0
        found.append(value[at:end])
        at = end
    return found


def _with_delta() -> bytes:
    """A stream whose second dictionary adds to the first."""
    schema = pa.schema([pa.field("tag", examples.STRING)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)) as writer:
        for words in (["a"], ["a", "b"]):
            column = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), pa.array(words))
            writer.write_batch(pa.RecordBatch.from_arrays([column], schema=schema))
    start, first, batch, delta, *_, end = _messages(sink.getvalue().to_pybytes())
    return start + first + delta + batch + end


PARTS = _messages(VALUES[0])
BAD: dict[str, bytes | None] = {
    "nothing": None,
    "cut short": VALUES[1][:-9],
    "without its first dictionary": b"".join([PARTS[0], *PARTS[2:]]),
    "without any dictionary": b"".join([PARTS[0], *PARTS[-2:]]),
    "a dictionary after the rows": b"".join([PARTS[0], *PARTS[2:-1], PARTS[1], PARTS[-1]]),
    "rows twice": b"".join([*PARTS[:-1], *PARTS[-2:]]),
    "a label of 2": _replaced("click", pa.array([2] * 9, pa.int8())),
    "a null in a dictionary": _replaced(
        "tag", pa.DictionaryArray.from_arrays(pa.array([0] * 9, pa.int32()), pa.array([None], pa.string()))
    ),
    "an unknown domain": _replaced("domain", pa.array(["7"] * 9).dictionary_encode()),
    "another writer's column less": _stream(example_batch(ROWS[:9], SCHEMA).drop_columns(["price"])),
    "text": b"{}",
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("place", [0, 2])
def test_a_bad_message_does_not_touch_the_others(case: str, place: int) -> None:
    values: list[bytes | None] = [*VALUES[:place], BAD[case], *VALUES[place:]]
    results = outcomes(decode_poll(values, DECODER))
    assert results == one_by_one(values)
    assert isinstance(results[place], tuple)  # its reason and detail
    assert [r for i, r in enumerate(results) if i != place] == one_by_one(VALUES)


def test_no_message_is_read_with_the_dictionary_of_the_one_before() -> None:
    (_, result) = decode_poll([VALUES[3], BAD["without its first dictionary"]], DECODER)
    assert isinstance(result, Poison)


def test_a_dictionary_that_adds_to_another_is_not_spliced() -> None:
    assert inspect_stream(VALUES[0]).dictionaries is not None
    assert inspect_stream(_with_delta()).dictionaries is None


def test_dictionaries_that_come_and_go_between_messages(together: list[int]) -> None:
    words = [["a", "b"], ["a", "b"], ["a", "b", "c"], ["a", "b"], ["b", "c"], ["a", "b"]]
    values = [_replaced("tag", pa.array(own * 9).dictionary_encode()[:9]) for own in words]
    assert outcomes(decode_poll(values, DECODER)) == one_by_one(values)
    assert together == [6]


def test_what_a_message_begins_with_as_the_one_before_it_is_spliced_once() -> None:
    first = inspect_stream(VALUES[0])
    same = inspect_stream(VALUES[0], (VALUES[0], first))
    assert (same.shared, same.dictionaries) == (first.ends[-1], first.dictionaries)
    other = _replaced("tag", pa.array(["z"] * 9).dictionary_encode())
    before = _replaced("tag", pa.array(["y"] * 9).dictionary_encode())
    plan = inspect_stream(before)
    tag = next(i for i, end in enumerate(plan.ends) if other[:end] != before[:end])
    assert tag > 0
    assert inspect_stream(other, (before, plan)).shared == plan.ends[tag - 1]


def test_a_message_with_a_dictionary_twice_is_decoded_by_itself(together: list[int]) -> None:
    values = [VALUES[0], b"".join([PARTS[0], PARTS[1], *PARTS[1:]]), VALUES[3]]
    assert outcomes(decode_poll(values, DECODER)) == one_by_one(values)
    assert together == []


def test_messages_of_different_writers_share_a_poll(together: list[int]) -> None:
    batch = example_batch(ROWS[:9], SCHEMA)
    wider = _stream(batch.append_column("aisle", pa.array(range(9))))
    assert outcomes(decode_poll([VALUES[0], wider, VALUES[3]], DECODER)) == one_by_one([VALUES[0], wider, VALUES[3]])
    assert together == []


def test_a_poll_that_would_be_too_large_is_decoded_one_by_one(
    together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = one_by_one(VALUES)
    monkeypatch.setattr(examples, "MAX_DECODED_BYTES", 4000)  # of about 3000 in the largest message
    assert outcomes(decode_poll(VALUES, DECODER)) == wanted
    assert together == []
    monkeypatch.setattr(examples, "MAX_DECODED_BYTES", 256 << 20)
    monkeypatch.setattr(example_poll, "MAX_TOGETHER_BYTES", sum(map(len, VALUES)) - 1)
    assert outcomes(decode_poll(VALUES, DECODER)) == wanted
    assert together == []


def test_seeded_fuzz_finds_no_difference_to_one_by_one() -> None:
    source = random.Random(11)
    for _ in range(400):
        values = [bytearray(value) for value in VALUES[:3]]
        value = source.choice(values)
        for _ in range(source.choice([1, 2, 8])):
            value[source.randrange(len(value))] = source.choice([0, 0x80, 0xFF, source.randrange(256)])
        poll = [bytes(value) for value in values]
        assert outcomes(decode_poll(poll, DECODER)) == one_by_one(poll)
