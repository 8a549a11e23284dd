"""Several `examples` messages decoded at once: most of the cost of a small message is per message and column.

Messages of one writer start with the same schema message, and an Arrow IPC stream may replace its dictionaries before
every record batch. So the messages of a poll are one stream, less what each begins with as the one before it did: the
schema message, and the dictionaries up to the first that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa

from das import examples
from das.arrow_guard import Buffers, StreamPlan, decoded_bytes, inspect_stream
from das.errors import Poison
from das.examples import ARROW_ERRORS, ExampleDecoder

MAX_TOGETHER_BYTES = 64 << 20
"""A poll of more bytes is decoded one by one: its messages are large, and little would be won by copying them."""
END_BYTES = 8
"""The end of an IPC stream: a continuation mark and length 0."""


@dataclass(frozen=True, slots=True)
class PollRows:
    """The rows of one message: [first, first + num_rows) of `poll`, which it may share with other messages."""

    poll: pa.RecordBatch
    first: int
    num_rows: int

    @property
    def batch(self) -> pa.RecordBatch:
        """The rows alone, without a copy."""
        return self.poll.slice(self.first, self.num_rows)


def decode_poll(values: Sequence[bytes | None], decoder: ExampleDecoder) -> list[PollRows | Poison]:
    """What `decoder.decode` makes of each value: its rows, or the Poison it raises.

    One value that is poison or has an unusual layout makes this decode all of them one by one.
    """
    if len(values) > 1 and sum(len(value or b"") for value in values) <= MAX_TOGETHER_BYTES:
        try:
            return [*_together(values, decoder)]
        except (Poison, *ARROW_ERRORS):
            pass
    return [_alone(value, decoder) for value in values]


def _alone(value: bytes | None, decoder: ExampleDecoder) -> PollRows | Poison:
    try:
        batch = decoder.decode(value)
    except Poison as poison:
        return poison
    return PollRows(batch, 0, batch.num_rows)


def _together(values: Sequence[bytes | None], decoder: ExampleDecoder) -> list[PollRows]:
    """All values through one reader, their columns concatenated. Raises Poison or one of ARROW_ERRORS if it cannot."""
    stream, schema_message = _splice(values)
    with decoder.open(stream, schema_message) as reader:
        batches = list(reader)
    if len(batches) != len(values):
        raise ValueError(f"{len(batches)} record batches in {len(values)} messages")
    for batch in batches:
        batch.validate(full=True)
    sizes = [batch.num_rows for batch in batches]
    poll = decoder.checked(pa.concat_batches(batches), schema_message)
    return [PollRows(poll, end - size, size) for end, size in zip(accumulate(sizes), sizes, strict=True)]


def _splice(values: Sequence[bytes | None]) -> tuple[pa.Buffer, bytes]:
    """The values as one stream, and its schema message.

    Raises ValueError unless each has the same schema message, one record batch, and all of its dictionaries before that
    (it would else be read with those of the message before), and all together decompress to MAX_DECODED_BYTES at most.
    """
    pieces: list[bytes | memoryview] = []
    compressed: list[Buffers] = []
    size = 0
    before: tuple[bytes, StreamPlan] | None = None
    for value in values:
        if value is None:
            raise ValueError("a message is empty")
        plan = inspect_stream(value, before)
        if plan.dictionaries is None or plan.num_batches != 1:
            raise ValueError("a message has an unusual layout")
        if before and not (plan.shared and plan.dictionaries == before[1].dictionaries):
            raise ValueError("the messages are of different kinds")
        moved = size - plan.shared
        compressed += [Buffers(pairs + moved, count, body + moved) for pairs, count, body in plan.compressed]
        pieces.append(memoryview(value)[plan.shared : -END_BYTES])
        size += len(pieces[-1])
        before = value, plan
    assert before
    last, plan = before
    pieces.append(memoryview(last)[-END_BYTES:])
    stream = pa.allocate_buffer(size + END_BYTES)
    place, target = 0, memoryview(stream).cast("B")
    for piece in pieces:
        target[place : (place := place + len(piece))] = piece
    if decoded_bytes(stream, compressed) > examples.MAX_DECODED_BYTES:
        raise ValueError("the messages are too large to decode together")
    return stream, last[: plan.schema_bytes]
