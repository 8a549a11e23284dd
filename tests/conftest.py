"""Fixtures: a real Kafka-protocol broker and a real Redis, shared by the whole run.

Set EXFM_TEST_KAFKA (host:port) or EXFM_TEST_REDIS (redis://...) to run against servers of your own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import outside
import pytest
import redis

from services.embedded import Server, start_broker, start_redis

# Before anything imports torch: a result to the bit needs the number of threads that the processes use, which is one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# of the tests that ask for the profile's number of cases (tests/das/test_join_property.py)
hypothesis.settings.register_profile("ten-thousand", max_examples=10_000)


@pytest.fixture(scope="session")
def kafka_bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of a Kafka-protocol broker."""
    if outside.KAFKA:
        yield outside.KAFKA
        outside.delete_topics(outside.KAFKA)
        return
    server = start_broker(tmp_path_factory.mktemp("broker"))
    yield server.address
    server.stop()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Redis server."""
    if outside.REDIS:
        yield outside.REDIS
        with redis.Redis.from_url(outside.REDIS) as client:
            outside.forget_keys(client, outside.RUN)
        return
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield f"redis://{server.address}/0"
    server.stop()


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the test Redis, which other tests and others' keys share."""
    client = redis.Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.fixture
def forget(redis_client: redis.Redis, prefix: str) -> Callable[[], None]:
    """Makes the test Redis lose all that the test stored, as a flush would."""
    return lambda: outside.forget_keys(redis_client, prefix)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Server]:
    """A Redis that no other test uses, to be filled, stopped and killed, with its files in `tmp_path/redis`."""
    server = start_redis(tmp_path / "redis")
    yield server
    server.stop()


@pytest.fixture
def admin(own_redis: Server) -> Iterator[redis.Redis]:
    """A client of `own_redis`."""
    client = redis.Redis.from_url(f"redis://{own_redis.address}/0")
    yield client
    client.close()


@pytest.fixture
def prefix() -> str:
    """A name unique to the test, for its topics and teachers."""
    return outside.new_prefix()
