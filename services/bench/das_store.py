"""The logit store against one Redis key per event, through the same client (redis-py with hiredis).

Both sides start from float32 logits and end with float32 logits in stream order. They move 4,096 events in one round
trip, but the blocks are read a student's poll at a time; more keys in one MGET make it no faster. The baseline's keys
are short and its values are the bare bytes of the float16 logits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import redis

from das.errors import ConfigError, Fatal
from das.logit_block import BlockError, decode_blocks, encode_block
from das.logit_store import LogitStore
from das.redis_client import RedisConfig, connect
from services.bench.document import Row
from vertical_models.online import POLL_MESSAGES

ROWS = 256
OBJECTIVES = 2
MESSAGES = 16
"""Messages in one put, and in one round trip of the baselines."""
CHUNK = ROWS * MESSAGES
READ_CHUNK = ROWS * POLL_MESSAGES
"""Events that a student looks up in one round trip: its poll."""
FIRST_OFFSET = 10_000_000
"""Keys as long as those of a topic that has run for a while."""
TTL_S = 86_400.0
FINGERPRINT, CHECKSUM = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


def measure(url: str, *, events: int, memory_events: int, repeats: int) -> list[Row]:
    """The four `store.*` rows. The database at `url` must be empty, and is emptied.

    Raises ConfigError when it is not empty.
    """
    config = RedisConfig(url=url, socket_timeout_s=60)
    client = connect(config)
    try:
        if cast(int, client.dbsize()):
            raise ConfigError(f"redis at {config.address} holds keys: the measurement needs an empty database")
        try:
            return _measure(config, client, events, memory_events, repeats)
        finally:
            _empty(client)
    finally:
        client.close()


def _measure(config: RedisConfig, client: redis.Redis, events: int, memory_events: int, repeats: int) -> list[Row]:
    store = LogitStore(config, topic="examples", teacher="teacher", ttl_s=TTL_S)
    logits = np.random.default_rng(1).normal(-2, 1.5, (events // CHUNK * CHUNK or CHUNK, OBJECTIVES))
    logits_TK = logits.astype(np.float32)
    keys = _keys(len(logits_TK))
    server = _server(client)
    shared = {"events": len(logits_TK), "repeats": repeats, "rows_per_block": ROWS, "round_trip_events": CHUNK}
    shared |= server
    sides: dict[str, Callable[[], Any]] = {
        "blocks": lambda: _put_blocks(store, logits_TK),
        "keys": lambda: _put_keys(client, keys, logits_TK),
        "keys_ttl": lambda: _put_keys_ttl(client, keys, logits_TK),
    }
    writes = _median_s(sides, repeats, before=lambda: _empty(client))
    _empty(client)
    _put_blocks(store, logits_TK)
    _put_keys(client, keys, logits_TK)
    reads = _median_s(
        {
            "blocks": lambda: _same(_get_blocks(store, len(logits_TK)), logits_TK),
            "keys": lambda: _same(_get_keys(client, keys), logits_TK),
        },
        repeats,
    )
    ours, base = memory_events, max(1, memory_events // 10)
    rates = {name: len(logits_TK) / seconds for name, seconds in writes.items()}
    block_bytes, key_bytes = _bytes_per_event(store, client, ours, base)
    return [
        Row("store.write", rates["blocks"], "events/s", "MSET, one key per event", rates["keys"], extra=shared),
        Row("store.write_ttl", rates["blocks"], "events/s", "pipeline of SET PX, one key per event", rates["keys_ttl"]),
        Row(
            *("store.read", len(logits_TK) / reads["blocks"], "events/s", "MGET, one key per event"),
            len(logits_TK) / reads["keys"],
            extra={"round_trip_events": READ_CHUNK, "baseline_round_trip_events": CHUNK},
        ),
        Row(
            *("store.bytes_per_event", block_bytes, "B", "one key per event, no TTL", key_bytes),
            smaller_is_better=True,
            extra={"events": ours, "baseline_events": base, **server},
        ),
    ]


def _empty(client: redis.Redis) -> None:
    """At once: servers may otherwise free the memory in the background, during the next measurement."""
    client.execute_command("FLUSHDB", "SYNC")


def _median_s(
    sides: dict[str, Callable[[], Any]], repeats: int, before: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Median seconds of each side. They take turns, so that a disturbance of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            if before is not None:
                before()
            began_s = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(measured) for name, measured in times.items()}


def _put_blocks(store: LogitStore, logits_TK: np.ndarray, first: int = FIRST_OFFSET) -> None:
    """Blocks of 256 rows, 16 in one put, as the teacher writes them."""
    for start in range(0, len(logits_TK), CHUNK):
        blocks = {}
        for row in range(start, min(start + CHUNK, len(logits_TK)), ROWS):
            offset = first + row // ROWS
            blocks[offset] = encode_block(
                logits_TK[row : row + ROWS],
                teacher_version=7,
                trained_offset=offset,
                trained_through_ms=1_650_000_000_000 + row,
                schema_fingerprint=FINGERPRINT,
                message_checksum=CHECKSUM ^ offset,
            )
        if store.put(0, blocks, offset + 1).written != len(blocks):
            raise Fatal("a block was there before the measurement wrote it")


def _get_blocks(store: LogitStore, num_events: int) -> np.ndarray:
    """A poll's blocks in one round trip, decoded together, as students read them."""
    parts = []
    for start in range(0, num_events, READ_CHUNK):
        end = min(start + READ_CHUNK, num_events)
        offsets = [FIRST_OFFSET + row // ROWS for row in range(start, end, ROWS)]
        for block in decode_blocks([raw or b"" for raw in store.fetch(0, offsets).blocks]):
            if isinstance(block, BlockError):
                raise Fatal(f"a block was not read as it was written: {block}")
            parts.append(block.logits)
    return np.concatenate(parts)


def _keys(num_events: int, first: int = 1_000_000_000_000) -> list[bytes]:
    """An impression id of 13 digits behind a prefix of two characters."""
    return [b"l:%d" % (first + i) for i in range(num_events)]


def _values(logits_TK: np.ndarray) -> list[bytes]:
    raw, size = logits_TK.astype("<f2").tobytes(), 2 * OBJECTIVES
    return [raw[i : i + size] for i in range(0, len(raw), size)]


def _put_keys(client: redis.Redis, keys: list[bytes], logits_TK: np.ndarray) -> None:
    for start in range(0, len(keys), CHUNK):
        chunk = slice(start, start + CHUNK)
        client.mset(dict(zip(keys[chunk], _values(logits_TK[chunk]), strict=True)))


def _put_keys_ttl(client: redis.Redis, keys: list[bytes], logits_TK: np.ndarray) -> None:
    ttl_ms = int(TTL_S * 1000)
    for start in range(0, len(keys), CHUNK):
        chunk = slice(start, start + CHUNK)
        with client.pipeline(transaction=False) as pipeline:
            for key, value in zip(keys[chunk], _values(logits_TK[chunk]), strict=True):
                pipeline.set(key, value, px=ttl_ms)
            pipeline.execute()


def _get_keys(client: redis.Redis, keys: list[bytes]) -> np.ndarray:
    parts = []
    for start in range(0, len(keys), CHUNK):
        found = cast(list[bytes], client.mget(keys[start : start + CHUNK]))
        parts.append(np.frombuffer(b"".join(found), "<f2").reshape(-1, OBJECTIVES).astype(np.float32))
    return np.concatenate(parts)


def _same(read_TK: np.ndarray, logits_TK: np.ndarray) -> None:
    if read_TK.shape != logits_TK.shape or not np.array_equal(read_TK[-1], logits_TK[-1].astype(np.float16)):
        raise Fatal("the logits that were read are not those that were written")


def _bytes_per_event(store: LogitStore, client: redis.Redis, ours: int, base: int) -> tuple[float, float]:
    """Growth of `used_memory` per event: `ours` events as blocks with their TTL, then `base` events as keys."""
    piece_TK = np.random.default_rng(2).normal(-2, 1.5, (64 * CHUNK, OBJECTIVES)).astype(np.float32)

    def blocks() -> None:
        for start in range(0, ours, len(piece_TK)):
            _put_blocks(store, piece_TK[: ours - start], FIRST_OFFSET + start // ROWS)

    def keys() -> None:
        for start in range(0, base, len(piece_TK)):
            part = piece_TK[: base - start]
            _put_keys(client, _keys(len(part), 1_000_000_000_000 + start), part)

    grown = []
    for fill in (blocks, keys):
        _empty(client)
        before = _used_memory(client)
        fill()
        grown.append(_used_memory(client) - before)
    return grown[0] / ours, grown[1] / base


def _used_memory(client: redis.Redis) -> int:
    return int(cast(dict, client.info("memory"))["used_memory"])


def _server(client: redis.Redis) -> dict[str, Any]:
    """Which server and allocator the numbers are of."""
    info = cast(dict, client.info())
    name = "valkey" if "valkey_version" in info else "redis"
    return {
        "server": f"{name} {info.get('valkey_version', info['redis_version'])}",
        "allocator": info["mem_allocator"],
        "append_only": bool(info.get("aof_enabled")),
    }
