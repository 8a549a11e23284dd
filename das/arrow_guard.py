"""What an Arrow IPC stream would allocate, read from its metadata before anything is decompressed.

A compressed buffer starts with its length once decompressed, which the reader allocates on trust, and many buffers may
share the same bytes: a small message can ask for terabytes. Layout: Arrow columnar format, "Encapsulated message
format" and "Compression"; metadata are flatbuffers (Message.fbs).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_CONTINUATION = 0xFFFFFFFF
_DICTIONARY, _RECORD_BATCH = 2, 3  # MessageHeader of Message.fbs; 1 is the schema
_HEADER_TYPE, _HEADER, _BODY_LENGTH = 1, 2, 3  # fields of Message
_DICTIONARY_DATA = 1  # field of DictionaryBatch
_BUFFERS, _COMPRESSION = 2, 3  # fields of RecordBatch

_PREFIX = struct.Struct("<II")
_U16 = struct.Struct("<H")
_I32 = struct.Struct("<i")
_U32 = struct.Struct("<I")
_I64 = struct.Struct("<q")


class StreamPlan(NamedTuple):
    """What one IPC stream holds: the length of its schema message, its record batches, its decompressed bytes."""

    schema_bytes: int
    num_batches: int
    decoded_bytes: int


def inspect_stream(value: bytes) -> StreamPlan:
    """Walk the messages of a whole IPC stream. Raises ValueError if it is cut short or its metadata make no sense."""
    position, schema_bytes, num_batches, decoded = 0, 0, 0, 0
    try:
        while True:
            mark, length = _PREFIX.unpack_from(value, position)
            if mark != _CONTINUATION:
                raise ValueError(f"no Arrow message at byte {position}")
            meta = position + _PREFIX.size
            if length == 0:
                break
            message = meta + _U32.unpack_from(value, meta)[0]
            body = meta + length
            body_bytes = _scalar(value, message, _BODY_LENGTH, _I64)
            position = body + body_bytes
            if body_bytes < 0 or position > len(value):
                raise ValueError(f"message body of {body_bytes} bytes does not fit into the value")
            slot = _slot(value, message, _HEADER_TYPE)
            kind = value[message + slot] if slot else 0
            if kind in (_DICTIONARY, _RECORD_BATCH):
                num_batches += kind == _RECORD_BATCH
                decoded += _decoded_bytes(value, message, kind, body)
            schema_bytes = schema_bytes or position
    except (struct.error, IndexError) as error:
        raise ValueError(f"Arrow stream is cut short: {error}") from None
    if meta != len(value):
        raise ValueError(f"{len(value) - meta} bytes follow the end of the Arrow stream")
    return StreamPlan(schema_bytes, num_batches, decoded)


def _decoded_bytes(value: bytes, message: int, kind: int, body: int) -> int:
    """Bytes that the reader allocates for the buffers of one dictionary or record batch message.

    Buffers outside the body are the reader's to refuse: it does so before it allocates.
    """
    batch = _child(value, message, _HEADER)
    if kind == _DICTIONARY:
        batch = _child(value, batch, _DICTIONARY_DATA)
    if not _slot(value, batch, _COMPRESSION):
        return 0
    vector = _child(value, batch, _BUFFERS)
    count = _U32.unpack_from(value, vector)[0]
    if count * 16 > len(value):
        raise ValueError(f"{count} buffers do not fit into the metadata")
    entries = struct.unpack_from(f"<{2 * count}q", value, vector + 4)
    read = _I64.unpack_from
    lengths = (
        read(value, body + offset)[0] for offset, length in zip(entries[::2], entries[1::2], strict=True) if length
    )
    return sum(length for length in lengths if length > 0)  # -1: stored uncompressed, not copied


def _slot(value: bytes, table: int, field: int) -> int:
    """Offset of one field of a flatbuffer table from the table's start; 0 if the field is absent."""
    vtable = table - int(_I32.unpack_from(value, table)[0])
    slot = 4 + 2 * field
    return int(_U16.unpack_from(value, vtable + slot)[0]) if slot < _U16.unpack_from(value, vtable)[0] else 0


def _scalar(value: bytes, table: int, field: int, kind: struct.Struct) -> int:
    slot = _slot(value, table, field)
    return int(kind.unpack_from(value, table + slot)[0]) if slot else 0


def _child(value: bytes, table: int, field: int) -> int:
    """Position of the table or vector that one field points at."""
    slot = _slot(value, table, field)
    if not slot:
        raise ValueError(f"Arrow metadata lack field {field}")
    at = table + slot
    return at + int(_U32.unpack_from(value, at)[0])
