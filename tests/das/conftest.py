"""Fixtures: a Redis of the test's own, to be filled, stopped and killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from services.embedded import Server, start_redis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Server]:
    """A Redis that no other test uses, with its files in `tmp_path/redis`."""
    server = start_redis(tmp_path / "redis")
    yield server
    server.stop()


@pytest.fixture
def admin(own_redis: Server) -> Iterator[redis.Redis]:
    """A client of `own_redis`."""
    client = redis.Redis.from_url(f"redis://{own_redis.address}/0")
    yield client
    client.close()
