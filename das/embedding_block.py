"""The embedding block: the teacher's representation of all rows of one `examples` message, beside its logit block.

For knowledge transfer (KTAP in Lattice, arXiv 2512.09200, section 2): a student that reads embeddings must train on the
embedding as it was when the row was scored, of one known teacher version; both are in the header, as in a logit block.

Layout, little-endian: the 60-byte header of `das.block_frame` with the magic `XFEB`, its own format number, 0 for int8
as dtype and the width as columns; then one float32 scale per row; then rows x width int8, row-major. A value is its
int8 times the scale of its row, which is the row's largest magnitude / 127.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from das.block_frame import BlockError, Header, frame, unframe
from das.logit_block import LogitBlock

MAGIC = b"XFEB"
FORMAT = 1
INT8 = 0
LEVELS = 127
_SCALE = np.dtype("<f4")


class EmbeddingBlock(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A decoded, self-consistent block. `embeddings`: float32 (rows, width), finite, read-only."""

    teacher_version: int
    trained_offset: int
    trained_through_ms: int
    schema_fingerprint: int
    message_checksum: int
    embeddings: npt.NDArray[np.float32]

    def belongs_to(self, block: LogitBlock) -> bool:
        """Whether both are of one message, scored once by the same weights."""
        return (self.message_checksum, self.teacher_version, self.trained_offset, len(self.embeddings)) == (
            *(block.message_checksum, block.teacher_version, block.trained_offset),
            len(block.logits),
        )


def encode_embeddings(
    embeddings: npt.NDArray[np.floating],
    *,
    teacher_version: int,
    trained_offset: int,
    trained_through_ms: int,
    schema_fingerprint: int,
    message_checksum: int,
) -> bytes:
    """Encode embeddings (rows, width), off by half a step of its row's scale at most. The same input, the same bytes.

    Raises ValueError on a NaN, an infinity, another shape, or a number that does not fit its header field.
    """
    values = np.asarray(embeddings)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"embeddings must be floats of shape (rows, width), not {values.dtype} {values.shape}")
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} values are NaN or infinite")
    rows, width = values.shape
    scales = (np.abs(values).max(axis=1, initial=0.0) / LEVELS).astype(_SCALE)
    steps = np.divide(values, scales[:, None], out=np.zeros_like(values), where=scales[:, None] > 0)
    payload = scales.tobytes() + np.rint(steps).clip(-LEVELS, LEVELS).astype(np.int8).tobytes()
    fields = teacher_version, trained_offset, trained_through_ms, schema_fingerprint, message_checksum
    return frame(Header(MAGIC, FORMAT, INT8, width, rows, *fields), payload)


def decode_embeddings(data: bytes) -> EmbeddingBlock:
    """Decode and verify one block; raises BlockError on anything but bytes that `encode_embeddings` made."""
    header, payload = unframe(data, MAGIC, FORMAT)
    rows, width = header.rows, header.columns
    if header.dtype != INT8:
        raise BlockError("format", f"unknown dtype code {header.dtype}")
    if len(payload) != rows * (_SCALE.itemsize + width):
        raise BlockError("corrupt", f"{len(payload)} payload bytes for {rows} rows of {width}")
    scales = np.frombuffer(payload, _SCALE, rows)
    if not np.isfinite(scales * LEVELS).all():
        raise BlockError("corrupt", "a scale is NaN or too large")
    steps = np.frombuffer(payload, np.int8, rows * width, rows * _SCALE.itemsize).reshape(rows, width)
    embeddings = steps.astype(np.float32) * scales[:, None]
    embeddings.flags.writeable = False
    return EmbeddingBlock(*header.origin, embeddings)
