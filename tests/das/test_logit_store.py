"""The logit store on a real Redis: atomic, first write wins, watermark monotone, fenced, and loud when full or away."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from das.deadline import Deadline
from das.errors import ConfigError, Fatal, Retryable
from das.logit_block import encode_block
from das.logit_store import LogitStore, PutResult, RedisConfig
from services.embedded import HOST, Server, start_redis

TTL_S = 60.0
NOWHERE = RedisConfig(url=f"redis://{HOST}:1/0")


def block(seed: int, rows: int = 256) -> bytes:
    return encode_block(
        np.random.default_rng(seed).normal(size=(rows, 2)),
        teacher_version=1,
        trained_offset=0,
        trained_through_ms=0,
        schema_fingerprint=2,
        message_checksum=seed,
    )


def store_at(address: str, prefix: str = "examples", **config: object) -> LogitStore:
    redis_config = RedisConfig.parse({"url": f"redis://{address}/0", "socket_timeout_s": 1.0, **config})
    return LogitStore(redis_config, topic=prefix, teacher="kunlun", ttl_s=TTL_S)


@pytest.fixture
def store(redis_url: str, prefix: str) -> Iterator[LogitStore]:
    store = LogitStore(RedisConfig(url=redis_url), topic=prefix, teacher="kunlun", ttl_s=TTL_S)
    yield store
    store.close()


def test_blocks_and_watermark_come_back_in_one_fetch(store: LogitStore) -> None:
    assert store.fetch(0, [0, 5]) == (0, [None, None])
    blocks = {o: block(o) for o in range(3)}
    assert store.put(0, blocks, 3) == PutResult(written=3, identical=0, refused=0)
    assert store.fetch(0, [2, 9, 0]) == (3, [blocks[2], None, blocks[0]])
    assert store.fetch_many({0: [1], 1: [1]}) == {0: (3, [blocks[1]]), 1: (0, [None])}
    assert store.watermark(0) == 3


def test_a_second_write_of_the_same_bytes_is_identical_and_of_others_is_refused(store: LogitStore) -> None:
    store.put(0, {0: block(0), 1: block(1)}, 2)
    assert store.put(0, {0: block(0), 1: block(99), 2: block(2)}, 3) == PutResult(written=1, identical=1, refused=1)
    assert store.fetch(0, [0, 1, 2]) == (3, [block(0), block(1), block(2)])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.dictionaries(st.integers(0, 5), st.integers(0, 2)), st.integers(0, 9)), max_size=6))
def test_any_writes_end_with_the_first_bytes_and_the_highest_watermark(
    store: LogitStore, forget: Callable[[], None], puts: list[tuple[dict[int, int], int]]
) -> None:
    forget()
    model: dict[int, int] = {}
    reached = 0
    for seeds, watermark in puts:
        fresh = seeds.keys() - model.keys()
        same = sum(model[o] == s for o, s in seeds.items() if o in model)
        result = store.put(0, {o: block(s, rows=1) for o, s in seeds.items()}, watermark)
        assert result == (len(fresh), same, len(seeds) - len(fresh) - same)
        model = seeds | model
        reached = max(reached, watermark)
        want = [block(model[o], rows=1) if o in model else None for o in range(6)]
        assert store.fetch(0, range(6)) == (reached, want)


def test_every_logit_key_expires(store: LogitStore, redis_client: redis.Redis, prefix: str) -> None:
    store.acquire(0)
    store.put(0, {0: block(0)}, 1)
    logits, watermark = store.block_key(0, 0), store.watermark_key(0)
    assert set(redis_client.keys(f"exfm:{{{prefix}:*")) == {k.encode() for k in (logits, watermark, store.epoch_key(0))}
    for key in (logits, watermark):
        assert TTL_S - 5 < redis_client.pttl(key) / 1000 <= TTL_S
    redis_client.pexpire(watermark, 1000)
    store.put(0, {}, 0)
    assert redis_client.pttl(watermark) / 1000 > TTL_S - 5  # a live teacher's watermark does not expire under it


def test_a_reader_never_sees_half_a_write(store: LogitStore) -> None:
    step, total = 7, 420
    torn: list[object] = []

    def write() -> None:
        for first in range(0, total, step):
            store.put(0, {o: block(o, rows=4) for o in range(first, first + step)}, first + step)

    writer = threading.Thread(target=write)
    writer.start()
    deadline, seen = Deadline.after(20), set()
    while len(seen) < total // step + 1 and not deadline.passed:
        fetched = store.fetch(0, range(total))
        seen.add(fetched.watermark)
        stored = [b is not None for b in fetched.blocks]
        if stored != [o < fetched.watermark for o in range(total)]:
            torn.append(fetched.watermark)
        if fetched.watermark == total:
            break
    writer.join()
    assert not torn
    assert total in seen


def test_a_fenced_writer_can_write_nothing(redis_url: str, prefix: str, redis_client: redis.Redis) -> None:
    zombie, successor, stranger = (
        LogitStore(RedisConfig(url=redis_url), topic=prefix, teacher="kunlun", ttl_s=TTL_S) for _ in range(3)
    )
    assert zombie.acquire(0) < successor.acquire(0)
    for writer in (zombie, stranger):
        with pytest.raises(Fatal, match="fenced"):
            writer.put(0, {0: block(0)}, 1)
    assert successor.fetch(0, [0]) == (0, [None])
    assert successor.put(0, {0: block(1)}, 1).written == 1
    assert zombie.put(1, {0: block(0)}, 1).written == 1, "another partition is another fence"


def test_epochs_rise_however_fast_they_are_taken(store: LogitStore) -> None:
    epochs = [store.acquire(0) for _ in range(200)]
    assert epochs == sorted(set(epochs))


def test_the_fence_outlives_a_flush_of_the_store(redis_url: str, prefix: str, forget: Callable[[], None]) -> None:
    old, new = (LogitStore(RedisConfig(url=redis_url), topic=prefix, teacher="kunlun", ttl_s=TTL_S) for _ in range(2))
    old.acquire(0)
    old.acquire(0)
    time.sleep(0.005)
    forget()
    new.acquire(0)
    with pytest.raises(Fatal, match="fenced"):
        old.put(0, {0: block(0)}, 1)
    forget()
    new.put(0, {0: block(0)}, 1)  # its epoch is in force again
    with pytest.raises(Fatal, match="fenced"):
        old.put(0, {1: block(1)}, 2)


def test_a_full_store_takes_nothing_of_the_call_and_says_so(own_redis: Server, admin: redis.Redis) -> None:
    store = store_at(own_redis.address)
    admin.config_set("maxmemory", admin.info("memory")["used_memory"] + 500_000)
    size = 50
    first = _fill(store, size)
    assert first > 0
    with pytest.raises(Retryable, match=f"{own_redis.address} is full"):
        store.put(0, {o: block(o) for o in range(first, first + size)}, first + size)
    assert store.watermark(0) == first
    assert store.fetch(0, range(first, first + size)).blocks == [None] * size
    assert None not in store.fetch(0, range(first)).blocks
    admin.config_set("maxmemory", 0)
    assert store.put(0, {o: block(o) for o in range(first, first + size)}, first + size).written == size


def _fill(store: LogitStore, size: int) -> int:
    """Put `size` blocks at a time until a call is refused; its first offset."""
    for first in range(0, 100 * size, size):
        try:
            store.put(0, {o: block(o) for o in range(first, first + size)}, first + size)
        except Retryable:
            return first
    raise AssertionError("the store never filled up")


def test_a_killed_store_is_retryable_and_named(own_redis: Server) -> None:
    store = store_at(own_redis.address)
    store.put(0, {0: block(0)}, 1)
    own_redis.process.kill()
    own_redis.process.wait()
    for call in (lambda: store.put(0, {1: block(1)}, 2), lambda: store.fetch(0, [0]), store.check):
        with pytest.raises(Retryable, match=f"redis at {own_redis.address} is away"):
            call()


def test_a_store_restarted_with_its_file_goes_on(own_redis: Server, tmp_path: Path, admin: redis.Redis) -> None:
    store = store_at(own_redis.address)
    store.put(0, {0: block(0)}, 1)
    own_redis.process.kill()
    own_redis.process.wait()
    again = start_redis(tmp_path / "redis", int(own_redis.address.rpartition(":")[2]))
    try:
        assert store.put(0, {0: block(0), 1: block(1)}, 2) == PutResult(written=1, identical=1, refused=0)
    finally:
        again.stop()


def test_a_forgotten_script_is_loaded_again(own_redis: Server, admin: redis.Redis) -> None:
    store = store_at(own_redis.address)
    store.put(0, {}, 1)
    admin.script_flush()
    assert store.put(0, {0: block(0)}, 2).written == 1


def test_a_stalled_store_costs_one_timeout(own_redis: Server) -> None:
    store = store_at(own_redis.address, socket_timeout_s=0.3)
    store.put(0, {}, 1)
    own_redis.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(Retryable, match="is away"):
            store.put(0, {0: block(0)}, 2)
        assert time.monotonic() - began < 1.0
    finally:
        own_redis.process.send_signal(signal.SIGCONT)
    assert sum(store.put(0, {0: block(0)}, 2)) == 1  # stored or not the first time: repeating is safe
    assert store.fetch(0, [0]) == (2, [block(0)])


def test_a_key_of_another_type_is_refused_and_read_as_absent(store: LogitStore, redis_client: redis.Redis) -> None:
    redis_client.rpush(store.block_key(0, 0), "foreign")
    assert store.put(0, {0: block(0), 1: block(1)}, 2) == PutResult(written=1, identical=0, refused=1)
    assert store.fetch(0, [0, 1]) == (2, [None, block(1)])


@pytest.mark.parametrize("foreign", ["list", "text"])
def test_a_foreign_watermark_stops_the_writer_before_it_wrote(
    store: LogitStore, redis_client: redis.Redis, foreign: str
) -> None:
    key = store.watermark_key(0)
    if foreign == "list":
        redis_client.rpush(key, "foreign")
    else:
        redis_client.set(key, "foreign")
    with pytest.raises(Fatal, match="refused a command"):
        store.put(0, {0: block(0)}, 1)
    assert store.fetch(0, [0]) == (0, [None])


def test_memory_per_event_is_within_the_budget(own_redis: Server, admin: redis.Redis) -> None:
    store, num_blocks, rows = store_at(own_redis.address), 4096, 256
    store.put(0, {}, 1)
    before = admin.info("memory")["used_memory"]
    for first in range(1_000_000, 1_000_000 + num_blocks, 128):
        store.put(0, {o: block(o, rows) for o in range(first, first + 128)}, first + 128)
    per_event = (admin.info("memory")["used_memory"] - before) / (num_blocks * rows)
    assert 4 < per_event <= 6  # bytes, key and expiry included; 4 are the logits themselves
    assert admin.memory_usage(store.block_key(0, 1_000_000)) / rows <= 6


@pytest.mark.parametrize(
    ("topic", "teacher", "ttl_s"), [("a{b}", "m", 1), ("t", "m:1", 1), ("t", "", 1), ("t", "m", 0)]
)
def test_a_name_or_time_that_would_break_the_keys_is_refused(topic: str, teacher: str, ttl_s: float) -> None:
    with pytest.raises(ConfigError):
        LogitStore(NOWHERE, topic=topic, teacher=teacher, ttl_s=ttl_s)


def test_a_store_connects_at_its_first_call_only() -> None:
    LogitStore(NOWHERE, topic="t", teacher="m", ttl_s=1).close()
