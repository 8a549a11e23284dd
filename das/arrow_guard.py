"""What an Arrow IPC stream would allocate, read from its metadata before anything is decompressed.

A compressed buffer starts with its length once decompressed, which the reader allocates on trust, and many buffers may
share the same bytes: a small message can ask for terabytes. Layout: Arrow columnar format, "Encapsulated message
format" and "Compression"; metadata are flatbuffers (Message.fbs).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

_CONTINUATION = 0xFFFFFFFF
_DICTIONARY, _RECORD_BATCH = 2, 3  # MessageHeader of Message.fbs; 1 is the schema

_PREFIX = struct.Struct("<II")
_VTABLE = struct.Struct("<HH4H")  # its size, the table's size, where in the table the first fields are
_PAIR_BYTES = 16
_I32 = struct.Struct("<i")
_U32 = struct.Struct("<I")
_I64 = struct.Struct("<q")


class Buffers(NamedTuple):
    """The compressed buffers of a record batch: where their (offset, length) pairs are, how many; where the body is."""

    pairs: int
    number: int
    body: int


class StreamPlan(NamedTuple):
    """What one IPC stream holds: the length of its schema message, its record batches, its compressed buffers.

    dictionaries: their ids, if it is a schema, then one whole dictionary for each id, then record batches, and nothing
    else; None otherwise. ends: where each dictionary ends. shared: its first bytes, whole messages, that the stream
    before it began with too; `compressed` leaves those out.
    """

    schema_bytes: int
    num_batches: int
    compressed: list[Buffers]
    dictionaries: list[int] | None
    ends: list[int]
    shared: int


def inspect_stream(value: bytes, before: tuple[bytes, StreamPlan] | None = None) -> StreamPlan:
    """Walk the messages of a whole IPC stream. Raises ValueError if it is cut short or its metadata make no sense.

    `before`: another stream and its plan; what both begin with is taken from the plan.
    """
    schema_bytes, dictionaries, ends = _common(value, *before) if before else (0, [], [])
    shared = position = ends[-1] if ends else schema_bytes
    num_batches = 0
    compressed: list[Buffers] = []
    plain = True
    try:
        while True:
            mark, length = _PREFIX.unpack_from(value, position)
            if mark != _CONTINUATION:
                raise ValueError(f"no Arrow message at byte {position}")
            meta = position + _PREFIX.size
            if length == 0:
                break
            message = meta + _U32.unpack_from(value, meta)[0]
            _, kind_slot, header_slot, size_slot = _slots(value, message)
            body = meta + length
            body_bytes = _I64.unpack_from(value, message + size_slot)[0] if size_slot else 0
            position = body + body_bytes
            if body_bytes < 0 or position > len(value):
                raise ValueError(f"message body of {body_bytes} bytes does not fit into the value")
            kind = value[message + kind_slot] if kind_slot else 0
            if kind == _RECORD_BATCH:
                num_batches += 1
                _note_buffers(value, _child(value, message, header_slot), body, compressed)
            elif kind == _DICTIONARY:
                header = _child(value, message, header_slot)
                id_slot, data_slot, delta_slot, _ = _slots(value, header)
                plain &= not (num_batches or (delta_slot and value[header + delta_slot]))
                dictionaries.append(_I64.unpack_from(value, header + id_slot)[0] if id_slot else 0)
                ends.append(position)
                _note_buffers(value, _child(value, header, data_slot), body, compressed)
            else:
                plain &= not schema_bytes
            schema_bytes = schema_bytes or position
    except (struct.error, IndexError) as error:
        raise ValueError(f"Arrow stream is cut short: {error}") from None
    if meta != len(value):
        raise ValueError(f"{len(value) - meta} bytes follow the end of the Arrow stream")
    plain &= len(set(dictionaries)) == len(dictionaries)
    return StreamPlan(schema_bytes, num_batches, compressed, dictionaries if plain else None, ends, shared)


def _common(value: bytes, before: bytes, plan: StreamPlan) -> tuple[int, list[int], list[int]]:
    """What both begin with: the length of the schema message (0: nothing), the next dictionaries, their ends."""
    start = plan.schema_bytes
    if plan.dictionaries is None or not value.startswith(before[:start]):
        return 0, [], []
    count = 0
    for count, end in enumerate(plan.ends, 1):
        if value[start:end] != before[start:end]:
            count -= 1
            break
        start = end
    return plan.schema_bytes, plan.dictionaries[:count], plan.ends[:count]


def _note_buffers(value: bytes, batch: int, body: int, compressed: list[Buffers]) -> None:
    """Add the buffers of one record batch, a dictionary's or a whole one, if they are compressed."""
    _, _, buffers_slot, compression_slot = _slots(value, batch)
    if not compression_slot:
        return
    vector = _child(value, batch, buffers_slot)
    count = _U32.unpack_from(value, vector)[0]
    if vector + _U32.size + count * _PAIR_BYTES > len(value):
        raise ValueError(f"{count} buffers do not fit into the metadata")
    compressed.append(Buffers(vector + _U32.size, count, body))


def decoded_bytes(stream: bytes | pa.Buffer, compressed: Sequence[Buffers]) -> int:
    """Bytes that the reader allocates for these buffers of a stream. Raises ValueError if one lies outside of it.

    Those inside the stream but outside their body are the reader's to refuse: it does so before it allocates.
    """
    if not compressed:
        return 0
    pairs = np.concatenate([np.frombuffer(stream, "<i8", 2 * each.number, each.pairs) for each in compressed])
    offsets, lengths = pairs.reshape(-1, 2).T
    bodies = np.repeat([each.body for each in compressed], [each.number for each in compressed])
    last = len(stream) - _I64.size
    offsets, bodies = offsets[lengths != 0], bodies[lengths != 0]
    if not ((offsets >= 0) & (offsets <= last - bodies)).all():
        raise ValueError("a buffer lies outside the stream")
    at_every_byte = np.ndarray((last + 1,), "<i8", stream, 0, (1,))
    stated = at_every_byte[bodies + offsets]
    return int(np.maximum(stated, 0).sum(dtype=np.float64))  # -1: stored uncompressed, not copied


def _slots(value: bytes, table: int) -> tuple[int, int, int, int]:
    """Where the first four fields of a flatbuffer table are, from the table's start; 0 for a field that is absent."""
    size, _, first, second, third, fourth = _VTABLE.unpack_from(value, table - _I32.unpack_from(value, table)[0])
    if size >= _VTABLE.size:
        return first, second, third, fourth
    present = (size - 4) // 2
    return first * (present > 0), second * (present > 1), third * (present > 2), 0


def _child(value: bytes, table: int, slot: int) -> int:
    """Position of the table or vector that the field at `slot` points at."""
    if not slot:
        raise ValueError("Arrow metadata lack a field")
    at = table + slot
    return at + int(_U32.unpack_from(value, at)[0])
