"""The logit block: the teacher's logits for all rows of one `examples` message, as one Redis string.

Layout, little-endian: a 60-byte header, then rows x objectives logits in row-major order.

| field | type | meaning |
|---|---|---|
| magic | 4 bytes | `XFLB` |
| format | u8 | 1 |
| dtype | u8 | 0 float16, 1 float32 |
| heads | u16 | columns, in the order of `FeatureSchema.heads`: the objectives, without Zipper |
| rows | u32 | rows of the message |
| teacher_version | u64 | snapshot version of the weights that scored |
| trained_offset | i64 | those weights had trained on offsets below it, of this partition |
| trained_through_ms | i64 | newest event time they had trained on |
| schema_fingerprint | u64 | `FeatureSchema.fingerprint` |
| message_checksum | u64 | xxh64 of the whole Kafka value that was scored |
| block_checksum | u64 | xxh64 of everything else in the block |

At 256 rows x 2 objectives in float16 a block has 1,084 bytes: it stays inside jemalloc's class of 1,280 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from das.block_frame import (
    CHECKSUM,
    HEADER_BYTES,
    KIND_BYTES,
    ORIGIN,
    BlockError,
    Header,
    digests,
    frame,
    unframe,
)

__all__ = ["HEADER_BYTES", "BlockError", "LogitBlock", "decode_block", "decode_blocks", "encode_block"]

BlockDtype = Literal["float16", "float32"]

MAGIC = b"XFLB"
FORMAT = 1
_DTYPES: dict[int, np.dtype] = {0: np.dtype("<f2"), 1: np.dtype("<f4")}
_LIMITS = {code: float(np.finfo(dtype).max) for code, dtype in _DTYPES.items()}
_CODES: dict[BlockDtype, int] = {"float16": 0, "float32": 1}


class LogitBlock(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A decoded, self-consistent block. `logits`: float32 (rows, objectives), finite, read-only."""

    teacher_version: int
    trained_offset: int
    trained_through_ms: int
    schema_fingerprint: int
    message_checksum: int
    logits: npt.NDArray[np.float32]


def encode_block(
    logits: npt.NDArray[np.floating],
    *,
    teacher_version: int,
    trained_offset: int,
    trained_through_ms: int,
    schema_fingerprint: int,
    message_checksum: int,
    dtype: BlockDtype = "float16",
) -> bytes:
    """Encode logits (rows, objectives). The same input gives the same bytes.

    Finite values beyond the range of `dtype` are saturated (float16: +-65504).
    Raises ValueError on a NaN, an infinity, another shape, or a number that does not fit its header field.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or not np.issubdtype(logits.dtype, np.floating):
        raise ValueError(f"logits must be floats of shape (rows, objectives), not {logits.dtype} {logits.shape}")
    code = _CODES[dtype]
    limit = _LIMITS[code]
    if not _within(logits, limit):
        if not np.isfinite(logits).all():
            raise ValueError(f"{int((~np.isfinite(logits)).sum())} of {logits.size} logits are NaN or infinite")
        logits = np.clip(logits, -limit, limit)
    payload = logits.astype(_DTYPES[code]).tobytes()
    rows, objectives = logits.shape
    fields = teacher_version, trained_offset, trained_through_ms, schema_fingerprint, message_checksum
    return frame(Header(MAGIC, FORMAT, code, objectives, rows, *fields), payload)


def decode_block(data: bytes) -> LogitBlock:
    """Decode and verify one block; raises BlockError on anything but bytes that `encode_block` made."""
    (block,) = decode_blocks([data])
    if isinstance(block, BlockError):
        raise block
    return block


def decode_blocks(blocks: Sequence[bytes]) -> list[LogitBlock | BlockError]:
    """`decode_block` of each, or the error that it raises. Sound blocks of one kind and size are decoded together."""
    together = _decode_alike(blocks)
    return [_decode(data) for data in blocks] if together is None else [*together]


def _decode_alike(blocks: Sequence[bytes]) -> list[LogitBlock] | None:
    """All of them with one pass per check, None unless they are alike and every check passes."""
    if not blocks:
        return []
    opened = _open(blocks[0])  # what the first is, all are: they start with the same bytes and have the same length
    if isinstance(opened, BlockError):
        return None
    header, kind, size = opened[0], blocks[0][:KIND_BYTES], len(blocks[0])
    if not all([len(data) == size and data.startswith(kind) for data in blocks]):
        return None
    block_bytes = np.frombuffer(b"".join(blocks), np.uint8).reshape(len(blocks), size)
    origins = block_bytes[:, KIND_BYTES:HEADER_BYTES].copy().view(ORIGIN)[:, 0]
    if not np.array_equal(origins[CHECKSUM], np.array(digests(blocks), np.uint64)):
        return None
    logits = block_bytes[:, HEADER_BYTES:].view(_DTYPES[header.dtype]).astype(np.float32)
    if not _within(logits, _LIMITS[header.dtype]):
        return None
    logits.flags.writeable = False
    of_each = logits.reshape(len(blocks), header.rows, header.columns)
    return [
        LogitBlock(version, trained_offset, trained_through_ms, fingerprint, message_checksum, rows)
        for (version, trained_offset, trained_through_ms, fingerprint, message_checksum, _), rows in zip(
            origins.tolist(), of_each, strict=True
        )
    ]


def _decode(data: bytes) -> LogitBlock | BlockError:
    opened = _open(data)
    if isinstance(opened, BlockError):
        return opened
    header, payload = opened
    logits = np.frombuffer(payload, _DTYPES[header.dtype]).astype(np.float32)
    if not np.isfinite(logits).all():
        return BlockError("corrupt", "a logit is NaN or infinite")
    logits.flags.writeable = False
    return LogitBlock(*header.origin, logits.reshape(header.rows, header.columns))


def _open(data: bytes) -> tuple[Header, bytes] | BlockError:
    """Header and payload, whose sizes and checksum are right."""
    try:
        header, payload = unframe(data, MAGIC, FORMAT)
    except BlockError as error:
        return error
    if header.dtype not in _DTYPES:
        return BlockError("format", f"unknown dtype code {header.dtype}")
    if len(payload) != header.rows * header.columns * _DTYPES[header.dtype].itemsize:
        return BlockError("corrupt", f"{len(payload)} payload bytes for {header.rows} rows x {header.columns} columns")
    return header, payload


def _within(logits: npt.NDArray[np.floating], limit: float) -> bool:
    """True only if all values are finite and at most `limit`; False may be wrong, but then it is a rare case."""
    return float(np.vdot(logits, logits)) < limit * limit / 2  # NaN is not; far cheaper than isfinite of each
