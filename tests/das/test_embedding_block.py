"""The embedding block: int8 with a scale per row, whole or refused, and its place beside its logit block."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from das.embedding_block import decode_embeddings, encode_embeddings
from das.errors import Fatal, Retryable
from das.logit_block import HEADER_BYTES, BlockError, decode_block, encode_block
from das.logit_store import LogitStore, PutResult, RedisConfig
from services.embedded import Server

FIELDS = {
    "teacher_version": 7,
    "trained_offset": 41,
    "trained_through_ms": 1_650_000_000_000,
    "schema_fingerprint": 2**64 - 1,
    "message_checksum": 99,
}


def embeddings(seed: int = 0, rows: int = 5, width: int = 16) -> bytes:
    return encode_embeddings(np.random.default_rng(seed).normal(size=(rows, width)), **FIELDS)


def logits(seed: int = 0, rows: int = 5) -> bytes:
    return encode_block(np.random.default_rng(seed).normal(size=(rows, 2)), **FIELDS)


@settings(max_examples=200)
@given(
    arrays(
        np.float32, st.tuples(st.integers(0, 6), st.integers(1, 9)), elements=st.floats(-(2.0**99), 2.0**99, width=32)
    )
)
def test_every_value_comes_back_within_half_a_step_of_its_row(values: np.ndarray) -> None:
    block = decode_embeddings(encode_embeddings(values, **FIELDS))
    assert block.embeddings.shape == values.shape
    step = np.abs(values).max(axis=1, initial=0.0, keepdims=True) / 127
    assert (np.abs(block.embeddings - values) <= 0.5001 * step + 1e-37).all()


def test_the_header_comes_back_and_names_its_logit_block() -> None:
    block = decode_embeddings(embeddings())
    assert {name: getattr(block, name) for name in FIELDS} == FIELDS
    assert block.belongs_to(decode_block(logits()))
    assert not block.belongs_to(decode_block(logits(rows=4)))
    for changed in ("teacher_version", "trained_offset", "message_checksum"):
        other = encode_block(np.zeros((5, 2)), **{**FIELDS, changed: 1})
        assert not block.belongs_to(decode_block(other)), changed


def test_a_row_takes_its_width_and_four_bytes() -> None:
    assert len(embeddings(rows=256, width=64)) == HEADER_BYTES + 256 * (64 + 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="1 of 6 values are NaN or infinite"):
        encode_embeddings(np.array([[0, 1, 2], [3, bad, 5]], np.float32), **FIELDS)


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((2, 2), int)])
def test_another_shape_or_type_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be floats of shape"):
        encode_embeddings(values, **FIELDS)


def test_every_flipped_bit_truncation_and_foreign_block_is_noticed() -> None:
    data = embeddings(rows=2, width=3)
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BlockError):
            decode_embeddings(bytes(bad))
    for cut in [*(data[:n] for n in range(len(data))), data + b"\0", logits()]:
        with pytest.raises(BlockError):
            decode_embeddings(cut)
    with pytest.raises(BlockError, match="block header"):
        decode_block(data)


@pytest.fixture
def store(redis_url: str, prefix: str) -> Iterator[LogitStore]:
    store = LogitStore(RedisConfig(url=redis_url), topic=prefix, teacher="kunlun", ttl_s=60)
    yield store
    store.close()


def test_logits_and_embeddings_are_put_and_fetched_together(store: LogitStore, redis_client: redis.Redis) -> None:
    pairs = {offset: (logits(offset), embeddings(offset)) for offset in range(3)}
    blocks, beside = ({o: pair[i] for o, pair in pairs.items()} for i in (0, 1))
    assert store.put(1, blocks, 3, beside) == PutResult(written=3, identical=0, refused=0)
    assert store.put(1, blocks, 3, beside) == PutResult(written=0, identical=3, refused=0)
    assert store.fetch_pairs({1: [2, 9, 0], 0: [0]}) == {
        1: (3, [blocks[2], None, blocks[0]], [beside[2], None, beside[0]]),
        0: (0, [None], [None]),
    }
    assert store.fetch(1, [2]) == (3, [blocks[2]])
    assert 55 < redis_client.pttl(store.embedding_key(1, 0)) / 1000 <= 60
    tag = store.embedding_key(1, 0).partition("{")[2].partition("}")[0]
    assert f"{{{tag}}}" in store.block_key(1, 0)  # one slot of a cluster


def test_values_of_two_scorings_never_meet(store: LogitStore, redis_client: redis.Redis) -> None:
    store.put(0, {0: logits(0)}, 1)
    assert store.put(0, {0: logits(0), 1: logits(1)}, 2, {0: embeddings(0), 1: embeddings(1)}).written == 2
    redis_client.delete(store.embedding_key(0, 0), store.block_key(0, 1))
    result = store.put(0, {o: logits(9) for o in range(3)}, 3, {o: embeddings(9) for o in range(3)})
    assert result == PutResult(written=1, identical=0, refused=2)
    assert store.fetch_pairs({0: range(3)})[0] == (
        *(3, [logits(0), None, logits(9)]),
        [None, embeddings(1), embeddings(9)],
    )


def test_embeddings_of_other_offsets_are_a_mistake_of_the_caller(store: LogitStore) -> None:
    with pytest.raises(ValueError, match="do not belong"):
        store.put(0, {0: logits()}, 1, {1: embeddings()})


def test_a_fenced_writer_and_a_full_store_take_neither(own_redis: Server, admin: redis.Redis) -> None:
    config = RedisConfig(url=f"redis://{own_redis.address}/0")
    zombie, owner = (LogitStore(config, topic="t", teacher="kunlun", ttl_s=60) for _ in range(2))
    zombie.acquire(0)
    owner.acquire(0)
    with pytest.raises(Fatal, match="fenced"):
        zombie.put(0, {0: logits()}, 1, {0: embeddings()})
    admin.config_set("maxmemory", 1)
    with pytest.raises(Retryable, match="is full"):
        owner.put(0, {0: logits()}, 1, {0: embeddings()})
    admin.config_set("maxmemory", 0)
    assert owner.fetch_pairs({0: [0]})[0] == (0, [None], [None])
