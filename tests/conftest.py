"""Fixtures: a real Kafka-protocol broker and a real Redis, shared by the whole run.

Set EXFM_TEST_KAFKA (host:port) or EXFM_TEST_REDIS (redis://...) to run against servers of your own.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator

import pytest
import redis

from services.embedded import start_broker, start_redis

# Before anything imports torch: a result to the bit needs the number of threads that the processes use, which is one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def kafka_bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of a Kafka-protocol broker."""
    outside = os.environ.get("EXFM_TEST_KAFKA")
    if outside:
        yield outside
        return
    server = start_broker(tmp_path_factory.mktemp("broker"))
    yield server.address
    server.stop()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Redis server."""
    outside = os.environ.get("EXFM_TEST_REDIS")
    if outside:
        yield outside
        return
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield f"redis://{server.address}/0"
    server.stop()


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the test Redis, flushed before the test."""
    client = redis.Redis.from_url(redis_url)
    client.flushdb()
    yield client
    client.close()


@pytest.fixture
def prefix() -> str:
    """A name unique to the test, for its topics and teachers."""
    return f"t{uuid.uuid4().hex[:10]}"
