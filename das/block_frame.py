"""What logit and embedding blocks share: a 60-byte header before their values, with a checksum of all the rest.

`das.logit_block` has the table of its fields.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import xxhash

_CHECKED = struct.Struct("<4sBBHIQqqQQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _CHECKED.size + _CHECKSUM.size
KIND_BYTES = struct.calcsize("<4sBBHI")
"""The first fields, to the number of rows: blocks that agree in them and in length have the same layout."""
CHECKSUM = "block_checksum"


class BlockError(ValueError):
    """The bytes are not a block that may be used. `reason`: format (not ours, or another version) or corrupt."""

    def __init__(self, reason: Literal["format", "corrupt"], detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Header(NamedTuple):
    """The fields that the checksum covers beside the values, in order."""

    magic: bytes
    format: int
    dtype: int
    columns: int
    rows: int
    teacher_version: int
    trained_offset: int
    trained_through_ms: int
    schema_fingerprint: int
    message_checksum: int

    @property
    def origin(self) -> tuple[int, int, int, int, int]:
        """teacher_version, trained_offset, trained_through_ms, schema_fingerprint, message_checksum."""
        return self[5:]


ORIGIN = np.dtype([*zip(Header._fields[5:], ("<u8", "<i8", "<i8", "<u8", "<u8"), strict=True), (CHECKSUM, "<u8")])
"""The header after its first KIND_BYTES."""


def frame(header: Header, payload: bytes) -> bytes:
    """The whole block. Raises ValueError on a number that does not fit its field."""
    try:
        head = _CHECKED.pack(*header)
    except struct.error as error:
        raise ValueError(f"a header field is out of range: {error}") from None
    return b"".join((head, _CHECKSUM.pack(_digest(head, payload)), payload))


def unframe(data: bytes, magic: bytes, version: int) -> tuple[Header, bytes]:
    """Header and payload. Raises BlockError unless the bytes are a whole block of this magic and format version."""
    if len(data) < HEADER_BYTES or data[:4] != magic:
        raise BlockError("format", f"{len(data)} bytes that do not start with a block header of {magic.decode()}")
    head, payload = data[: _CHECKED.size], data[HEADER_BYTES:]
    header = Header._make(_CHECKED.unpack(head))
    if header.format != version:
        raise BlockError("format", f"block format {header.format}, this reader knows {version}")
    if _CHECKSUM.unpack_from(data, _CHECKED.size)[0] != _digest(head, payload):
        raise BlockError("corrupt", "the block checksum does not match")
    return header, payload


def digests(blocks: Sequence[bytes]) -> list[int]:
    """What the checksum of each block should be; each is a header at least."""
    checked = _CHECKED.size
    return [xxhash.xxh64_intdigest(data[:checked] + data[HEADER_BYTES:]) for data in blocks]


def _digest(head: bytes, payload: bytes) -> int:
    return int(xxhash.xxh64_intdigest(head + payload))
