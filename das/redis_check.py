"""What to know about a Redis before relying on it: eviction, keys that never expire, and persistence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import redis

from das.errors import ConfigError
from das.redis_client import RedisConfig, connect, errors_named

SECTIONS = ("memory", "persistence", "stats", "keyspace")
MOST_WITHOUT_TTL = 1000
"""Keys that may lack an expiry before it is said: the store has one small one per partition and teacher."""


def check_server(config: RedisConfig) -> list[str]:
    """`check_client` over a connection of its own. Raises ConfigError, Retryable or Fatal."""
    with errors_named(config.address):
        client = connect(config)
    try:
        return check_client(client, config.address)
    finally:
        client.close()


def check_client(client: redis.Redis, address: str) -> list[str]:
    """Look at the settings of the server; of every primary of a cluster.

    Raises ConfigError where logits would vanish silently; returns warnings for the rest.
    """
    with errors_named(address):
        found = list(_infos(client, address))
    return [f"redis at {node}: {text}" for node, info in found for text in _warnings(node, info)]


def _infos(client: redis.Redis, address: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Address and INFO of every node that takes writes."""
    cluster = cast(Any, client)
    nodes = cluster.get_primaries() if isinstance(client, redis.RedisCluster) else [None]
    for node in nodes:
        options: dict[str, Any] = {} if node is None else {"target_nodes": node}
        info: dict[str, Any] = {}
        for section in SECTIONS:  # several in one INFO are of Redis 7 on
            info |= cluster.info(section, **options)
        yield (address if node is None else node.name), info


def _warnings(address: str, info: dict[str, Any]) -> Iterator[str]:
    policy = info.get("maxmemory_policy", "noeviction")
    remedy = "run: CONFIG SET maxmemory-policy noeviction"
    if policy != "noeviction":
        if info.get("maxmemory", 0) > 0:
            raise ConfigError(f"redis at {address}: maxmemory-policy {policy} drops logits silently; {remedy}")
        yield f"maxmemory-policy {policy} will drop logits silently once maxmemory is set; {remedy}"
    if evicted := info.get("evicted_keys", 0):
        yield f"{evicted} keys were evicted since its start"
    spaces = [space for name, space in info.items() if name.startswith("db") and isinstance(space, dict)]
    if (stay := sum(space["keys"] - space["expires"] for space in spaces)) > MOST_WITHOUT_TTL:
        text = f"{stay} keys have no time to live: they fill the memory that logits need"
        yield f"{text}; give the logits a server of their own"
    if not info.get("aof_enabled", 0):
        text = "the append-only file is off: a restart loses logits, and students train on labels alone for them"
        yield f"{text}; run: CONFIG SET appendonly yes"
    for what in ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status"):
        if info.get(what, "ok") != "ok":
            yield f"{what} is {info[what]}: it cannot save to its disk and may refuse writes; see its log"
