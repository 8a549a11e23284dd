"""The start-up check of Redis: each bad setting of a real server is refused, or said with what to do."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import redis

from das.errors import ConfigError, Fatal, Retryable
from das.logit_store import LogitStore, RedisConfig
from das.redis_check import MOST_WITHOUT_TTL, check_server
from services.embedded import Server, start_redis


def config_of(server: Server, **changes: object) -> RedisConfig:
    return RedisConfig.parse({"url": f"redis://{server.address}/0", "socket_timeout_s": 1.0, **changes})


def warnings_of(server: Server) -> list[str]:
    found = check_server(config_of(server))
    assert all(text.startswith(f"redis at {server.address}: ") for text in found)
    return found


def test_a_server_as_we_start_it_has_no_warnings(own_redis: Server) -> None:
    assert warnings_of(own_redis) == []


def test_an_evicting_policy_is_refused_with_a_limit_and_warned_about_without(
    own_redis: Server, admin: redis.Redis
) -> None:
    for policy in ("allkeys-lru", "volatile-ttl"):
        admin.config_set("maxmemory-policy", policy)
        admin.config_set("maxmemory", 0)
        (text,) = warnings_of(own_redis)
        assert f"maxmemory-policy {policy} will drop logits silently once maxmemory is set" in text
        admin.config_set("maxmemory", 100_000_000)
        with pytest.raises(ConfigError, match=f"{policy} drops logits silently; run: CONFIG SET"):
            check_server(config_of(own_redis))
    admin.config_set("maxmemory-policy", "noeviction")
    assert warnings_of(own_redis) == []


def test_a_store_without_persistence_is_warned_about(tmp_path: Path) -> None:
    server = start_redis(tmp_path / "redis", append_only=False)
    try:
        (text,) = warnings_of(server)
    finally:
        server.stop()
    assert "run: CONFIG SET appendonly yes" in text


def test_a_disk_that_cannot_be_written_is_warned_about(tmp_path: Path) -> None:
    server = start_redis(tmp_path / "redis", append_only=False)
    try:
        shutil.rmtree(tmp_path / "redis")
        with redis.Redis.from_url(f"redis://{server.address}/0") as admin:
            admin.bgsave()
        end_s = time.monotonic() + 10
        while len(found := warnings_of(server)) < 2 and time.monotonic() < end_s:
            time.sleep(0.05)
    finally:
        server.stop()
    assert any("rdb_last_bgsave_status is err" in text for text in found)


def test_evicted_keys_are_warned_about(own_redis: Server, admin: redis.Redis) -> None:
    for number in range(100):
        admin.set(f"k{number}", "x" * 1000)
    admin.config_set("maxmemory-policy", "allkeys-lru")
    admin.config_set("maxmemory", 1)
    with pytest.raises(redis.OutOfMemoryError):
        admin.set("x", 1)
    admin.config_set("maxmemory", 0)
    admin.config_set("maxmemory-policy", "noeviction")
    (text,) = warnings_of(own_redis)
    assert "keys were evicted" in text


def test_keys_that_never_expire_are_warned_about_and_ours_are_not(own_redis: Server, admin: redis.Redis) -> None:
    store = LogitStore(config_of(own_redis), topic="t", teacher="m", ttl_s=60)
    store.acquire(0)
    store.put(0, {offset: b"block" for offset in range(2 * MOST_WITHOUT_TTL)}, 1)
    assert warnings_of(own_redis) == []
    admin.mset({f"other:{number}": "x" for number in range(MOST_WITHOUT_TTL)})
    (text,) = warnings_of(own_redis)
    assert f"{MOST_WITHOUT_TTL + 1} keys have no time to live" in text
    store.close()


def test_a_server_that_is_away_or_refuses_us_is_told_apart(own_redis: Server, admin: redis.Redis) -> None:
    admin.config_set("requirepass", "secret-word")
    with pytest.raises(Fatal, match="set username and password_file"):
        check_server(config_of(own_redis))
    own_redis.stop()
    with pytest.raises(Retryable, match="is away"):
        check_server(config_of(own_redis))
