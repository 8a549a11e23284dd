"""The logit store on a Redis Cluster of three real servers: one round trip a node, and slots that move."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from lookup_rig import ROWS, SCHEMA, block_of, logits_of, message
from redis_cluster import Cluster, cluster_of

from das.errors import ConfigError, Fatal, Retryable
from das.logit_store import LogitStore, PutResult, RedisConfig
from das.lookup import LogitLookup, LookupConfig
from das.telemetry import RecordingTelemetry

PARTITIONS = range(12)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def store_on(cluster: Cluster, prefix: str) -> LogitStore:
    config = RedisConfig(url=cluster.url, cluster=True, socket_timeout_s=1.0)
    return LogitStore(config, topic=prefix, teacher="kunlun", ttl_s=60)


@pytest.fixture
def store(cluster: Cluster, prefix: str) -> Iterator[LogitStore]:
    store = store_on(cluster, prefix)
    yield store
    store.close()


def block(partition: int, offset: int) -> bytes:
    return b"block %d of %d" % (offset, partition)


def fill(store: LogitStore, count: int = 3) -> None:
    for partition in PARTITIONS:
        store.acquire(partition)
        blocks = {offset: block(partition, offset) for offset in range(count)}
        embeddings = {offset: b"e" + raw for offset, raw in blocks.items()}
        assert store.put(partition, blocks, count, embeddings) == PutResult(count, 0, 0)


def slot_of(cluster: Cluster, store: LogitStore, partition: int) -> int:
    return int(cluster.nodes[0].execute_command("CLUSTER", "KEYSLOT", store.block_key(partition, 0)))


def moved_answers(cluster: Cluster) -> int:
    """How many commands were sent to a node that does not have their slot any more."""
    return sum(node.info("errorstats").get("errorstat_MOVED", {"count": 0})["count"] for node in cluster.nodes)


def test_keys_of_a_partition_share_a_slot_and_partitions_are_spread(cluster: Cluster, store: LogitStore) -> None:
    fill(store)
    keyslot = cluster.nodes[0].execute_command
    for p in PARTITIONS:
        keys = (store.block_key(p, 0), store.block_key(p, 99), store.embedding_key(p, 0), store.watermark_key(p))
        assert len({keyslot("CLUSTER", "KEYSLOT", key) for key in (*keys, store.epoch_key(p))}) == 1
    assert {cluster.owner(slot_of(cluster, store, p)) for p in PARTITIONS} == {0, 1, 2}
    for p, found in store.fetch_many(dict.fromkeys(PARTITIONS, range(4))).items():
        assert found == (3, [*(block(p, offset) for offset in range(3)), None])
    for p, pairs in store.fetch_pairs(dict.fromkeys(PARTITIONS, range(1, 2))).items():
        assert pairs == (3, [block(p, 1)], [b"e" + block(p, 1)])


def test_a_poll_costs_one_round_trip_a_node(cluster: Cluster, store: LogitStore) -> None:
    fill(store)
    wanted = dict.fromkeys(PARTITIONS, range(3))
    store.fetch_many(wanted)

    def reads() -> list[int]:
        return [int(node.info("stats")["total_reads_processed"]) for node in cluster.nodes]

    before = reads()
    calm = [after - earlier for after, earlier in zip(reads(), before, strict=True)]  # what looking costs
    before = reads()
    store.fetch_many(wanted)
    assert [after - earlier for after, earlier in zip(reads(), before, strict=True)] == [n + 1 for n in calm]


def test_a_zombie_is_fenced_on_every_node(cluster: Cluster, store: LogitStore, prefix: str) -> None:
    fill(store)
    successor = store_on(cluster, prefix)
    for partition in PARTITIONS:
        successor.acquire(partition)
        with pytest.raises(Fatal, match="fenced"):
            store.put(partition, {9: b"late"}, 10)
    successor.close()


def test_a_store_follows_slots_that_moved_while_it_was_connected(cluster: Cluster, store: LogitStore) -> None:
    fill(store)
    moved = {}
    for partition in list(PARTITIONS)[:3]:
        slot = slot_of(cluster, store, partition)
        to = (cluster.owner(slot) + 1) % 3
        source = cluster.begin_move(slot, to)
        cluster.move_keys(slot, source, to)
        cluster.end_move(slot, to)
        moved[partition] = (slot, to)
    before = moved_answers(cluster)
    found = store.fetch_many(dict.fromkeys(PARTITIONS, range(3)))
    assert moved_answers(cluster) > before  # the client's map was old
    assert found == {p: (3, [block(p, offset) for offset in range(3)]) for p in PARTITIONS}
    for partition, (slot, to) in moved.items():
        assert cluster.owner(slot) == to
        assert store.put(partition, {3: block(partition, 3)}, 4).written == 1  # fenced by the same epoch as before
        assert store.fetch(partition, [3]) == (4, [block(partition, 3)])


def test_a_put_in_the_middle_of_a_move_is_retryable_and_complete_after_it(cluster: Cluster, store: LogitStore) -> None:
    fill(store)
    slot = slot_of(cluster, store, 5)
    to = (cluster.owner(slot) + 1) % 3
    source = cluster.begin_move(slot, to)
    cluster.move_keys(slot, source, to, count=3)  # some here, some there: neither node can run the script
    with pytest.raises(Retryable, match="cannot take this now"):
        store.put(5, {offset: block(5, offset) for offset in range(6)}, 6)
    cluster.move_keys(slot, source, to)
    cluster.end_move(slot, to)
    assert store.put(5, {offset: block(5, offset) for offset in range(6)}, 6) == PutResult(3, 3, 0)
    assert store.fetch(5, range(6)) == (6, [block(5, offset) for offset in range(6)])


def test_a_student_finds_the_logits_of_all_partitions_while_slots_move(cluster: Cluster, store: LogitStore) -> None:
    messages = [message(offset, partition) for partition in PARTITIONS for offset in range(3)]
    telemetry = RecordingTelemetry()
    lookup = LogitLookup(store, SCHEMA, telemetry, LookupConfig(wait_ms=2_000))
    for partition in PARTITIONS:
        own = {m.offset: block_of(m) for m in messages if m.partition == partition}
        assert store.put(partition, own, 3).written == 3
    slot = slot_of(cluster, store, 7)
    to = (cluster.owner(slot) + 1) % 3
    source = cluster.begin_move(slot, to)
    cluster.move_keys(slot, source, to)
    cluster.end_move(slot, to)
    for m, found in zip(messages, lookup.attach(messages), strict=True):
        assert found is not None
        np.testing.assert_array_equal(found.logits, logits_of(m))
    assert telemetry.total("exfm_logit_rows_total", outcome="hit") == ROWS * len(messages)


def test_every_primary_is_checked(cluster: Cluster, store: LogitStore) -> None:
    assert store.check() == []
    node = cluster.nodes[2]
    node.config_set("maxmemory", 100_000_000)
    node.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ConfigError, match=f"{cluster.ports[2]}: maxmemory-policy allkeys-lru drops logits"):
            store.check()
    finally:
        node.config_set("maxmemory-policy", "noeviction")
        node.config_set("maxmemory", 0)


def test_a_dead_node_is_retryable_and_the_others_go_on(cluster: Cluster, store: LogitStore) -> None:
    fill(store)
    owners = {p: cluster.owner(slot_of(cluster, store, p)) for p in PARTITIONS}
    cluster.kill(2)  # the last test of the module
    for node in cluster.nodes[:2]:
        node.config_set("cluster-require-full-coverage", "no")
    alive, dead = (next(p for p in PARTITIONS if (owners[p] == 2) == gone) for gone in (False, True))
    with pytest.raises(Retryable):
        store.fetch(dead, [0])
    assert store.fetch(alive, [0]).blocks == [block(alive, 0)]
