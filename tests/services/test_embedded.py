"""The embedded servers start wherever they are told to keep their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from services.embedded import start_redis


def test_redis_keeps_its_files_in_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    server = start_redis(Path("runs/redis"))
    host, _, port = server.address.partition(":")
    client = redis.Redis(host, int(port))
    client.set("k", "v")
    client.close()
    server.stop()
    assert (tmp_path / "runs" / "redis" / "appendonlydir").is_dir()
