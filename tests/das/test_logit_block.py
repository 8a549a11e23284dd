"""The logit block: what goes in comes out, and nothing but that is ever used."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from das import logit_block
from das.logit_block import (
    HEADER_BYTES,
    BlockDtype,
    BlockError,
    LogitBlock,
    decode_block,
    decode_blocks,
    encode_block,
)

FIELDS = {
    "teacher_version": 7,
    "trained_offset": 11,
    "trained_through_ms": 1_650_812_741_436,
    "schema_fingerprint": 0xFEDC_BA98_7654_3210,
    "message_checksum": 0x0123_4567_89AB_CDEF,
}
UNSIGNED, SIGNED = st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1)
GOLDEN = (
    "58464c420100020001000000"  # magic, format, dtype, objectives, rows
    "0700000000000000"  # teacher_version
    "0b00000000000000"  # trained_offset
    "3c671b5c80010000"  # trained_through_ms
    "1032547698badcfe"  # schema_fingerprint
    "efcdab8967452301"  # message_checksum
    "bcef600e4f73cf83"  # block_checksum
    "003c00c1"  # 1.0, -2.5
)


def encode(rows: int = 3, objectives: int = 2) -> bytes:
    return encode_block(np.random.default_rng(0).normal(size=(rows, objectives)), **FIELDS)


def forge(data: bytes, **header: int) -> bytes:
    """The block with header fields replaced and the checksum made to fit, as a hostile writer would."""
    names = ("magic", "format", "dtype", "objectives", "rows", "version", "offset", "through", "schema", "message")
    packing = struct.Struct("<4sBBHIQqqQQ")
    values = dict(zip(names, packing.unpack(data[: packing.size]), strict=True)) | header
    head, payload = packing.pack(*values.values()), data[HEADER_BYTES:]
    return head + xxhash.xxh64_intdigest(head + payload).to_bytes(8, "little") + payload


@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(0, 40), st.integers(0, 4)), elements=st.floats(-60_000, 60_000, width=32)
    ),
    st.sampled_from(["float16", "float32"]),
    st.fixed_dictionaries({n: SIGNED if n.startswith("trained") else UNSIGNED for n in FIELDS}),
)
def test_what_goes_in_comes_out(logits: np.ndarray, dtype: str, fields: dict[str, int]) -> None:
    block = decode_block(encode_block(logits, dtype=dtype, **fields))
    assert {name: getattr(block, name) for name in FIELDS} == fields
    assert block.logits.dtype == np.float32
    np.testing.assert_array_equal(block.logits, logits.astype(dtype).astype(np.float32))


def test_the_bytes_are_the_format_of_version_1() -> None:
    data = encode_block(np.array([[1.0, -2.5]], np.float32), **FIELDS)
    assert data.hex() == GOLDEN


def test_a_block_of_256_rows_fits_a_size_class() -> None:
    assert HEADER_BYTES <= 64
    assert len(encode(256, 2)) + 16 <= 1280  # jemalloc's class, less the allocation's own header inside Redis


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_large_logits_are_saturated(dtype: str) -> None:
    limit = float(np.finfo(dtype).max)
    block = decode_block(encode_block(np.array([[1e300, -1e300, 1e5]]), dtype=dtype, **FIELDS))
    assert block.logits.tolist() == [[limit, -limit, min(limit, 1e5)]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_logit_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="1 of 4 logits are NaN or infinite"):
        encode_block(np.array([[0, 1], [2, bad]]), **FIELDS)


@pytest.mark.parametrize("logits", [np.zeros(3), np.zeros((1, 2, 3)), np.zeros((2, 2), np.int64)])
def test_another_shape_or_type_is_refused(logits: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be floats of shape \(rows, objectives\)"):
        encode_block(logits, **FIELDS)


@pytest.mark.parametrize(
    ("field", "value"), [("teacher_version", -1), ("trained_offset", 2**63), ("message_checksum", 2**64)]
)
def test_a_number_too_large_for_the_header_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match="header field"):
        encode_block(np.zeros((1, 1)), **FIELDS | {field: value})


def test_every_flipped_bit_is_noticed() -> None:
    data = encode()
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BlockError) as error:
            decode_block(bytes(bad))
        assert error.value.reason == ("format" if bit < 40 else "corrupt")


def test_every_truncation_and_extension_is_noticed() -> None:
    data = encode()
    for bad in [*(data[:n] for n in range(len(data))), data + b"\0", data + data]:
        with pytest.raises(BlockError):
            decode_block(bad)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_never_decode(noise: bytes, with_magic: bool) -> None:
    with pytest.raises(BlockError):
        decode_block(b"XFLB\x01" + noise if with_magic else noise)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"format": 2}, "format"),
        ({"dtype": 9}, "format"),
        ({"rows": 4}, "corrupt"),
        ({"rows": 2**32 - 1, "objectives": 2**16 - 1}, "corrupt"),
        ({"rows": 3, "dtype": 1}, "corrupt"),
        ({"rows": 2, "objectives": 3}, None),
    ],
)
def test_a_forged_header_is_judged_by_its_sizes(header: dict[str, int], reason: str | None) -> None:
    data = forge(encode(), **header)
    if reason is None:
        assert decode_block(data).logits.shape == (
            2,
            3,
        )  # consistent in itself: the lookup compares it with the message
        return
    with pytest.raises(BlockError) as error:
        decode_block(data)
    assert error.value.reason == reason


def test_a_stored_nan_is_never_used() -> None:
    data = encode(1, 1)
    with pytest.raises(BlockError, match="NaN"):
        decode_block(forge(data[:HEADER_BYTES] + np.float16(np.nan).tobytes()))


def test_blocks_decoded_together_are_as_each_alone_and_bad_ones_spoil_no_other() -> None:
    normal = np.random.default_rng(3).normal(size=(9, 2))
    nan = forge(encode(1, 1)[:HEADER_BYTES] + np.float16(np.nan).tobytes())
    good = [
        encode(4, 2),
        encode_block(normal, dtype="float32", **FIELDS),
        encode(0, 3),
        encode_block(normal * 1e6, **FIELDS),  # saturated
        encode_block(normal[:1], dtype="float32", **FIELDS),
        encode(1, 5),
    ]
    together = decode_blocks([nan, *good[:3], b"no block", *good[3:], good[0][:-1]])
    bad = [block.reason if isinstance(block, BlockError) else None for block in together]
    assert bad == ["corrupt", None, None, None, "format", None, None, None, "corrupt"]
    found = [block for block in together if not isinstance(block, BlockError)]
    for block, data in zip(found, good, strict=True):
        np.testing.assert_array_equal(block.logits, decode_block(data).logits)
        assert {name: getattr(block, name) for name in FIELDS} == FIELDS


@pytest.mark.parametrize("shape", [(3, 2), (0, 2), (1, 1)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_blocks_of_one_kind_decode_together_to_what_each_holds(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: BlockDtype
) -> None:
    limits = {**FIELDS, "trained_offset": -1, "schema_fingerprint": 2**64 - 1, "message_checksum": 2**63}
    logits = np.random.default_rng(4).normal(size=(3, *shape))
    fields = [FIELDS, limits, {**FIELDS, "teacher_version": 2**64 - 1}]
    blocks = [encode_block(own, dtype=dtype, **of) for own, of in zip(logits, fields, strict=True)]
    alone = [decode_block(data) for data in blocks]
    monkeypatch.setattr(logit_block, "_decode", None)  # nothing is decoded by itself
    for block, single, of in zip(decode_blocks(blocks), alone, fields, strict=True):
        assert isinstance(block, LogitBlock)
        np.testing.assert_array_equal(block.logits, single.logits, strict=True)
        assert {name: getattr(block, name) for name in FIELDS} == of
        assert not block.logits.flags.writeable


def test_any_changed_byte_of_one_block_among_its_like_is_found_and_spoils_no_other() -> None:
    good = [encode(4, 2), encode_block(np.full((4, 2), 3.0), **FIELDS), encode(4, 2)]
    for place in range(len(good[0])):
        for which in range(len(good)):
            data = bytearray(good[which])
            data[place] ^= 0x55
            decoded = decode_blocks([*good[:which], bytes(data), *good[which + 1 :]])
            bad = [isinstance(block, BlockError) for block in decoded]
            assert bad == [i == which for i in range(len(good))], place


def test_logits_of_a_block_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        decode_block(encode()).logits[0, 0] = 1
