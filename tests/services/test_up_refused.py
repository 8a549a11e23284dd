"""What `exfm up` refuses before it starts anything."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import redis
from pipeline import EMBEDDED, KUAIRAND, Up, settings

from das.config import read_yaml
from das.errors import ConfigError, Retryable
from services.embedded import Server, free_port, start_redis
from services.servers import Servers, refuse_an_earlier_run
from services.settings import load


def refusal(settings_file: Path, code: int = 2) -> str:
    """What `exfm up` says on stderr; it must end by itself with `code` and have started nothing."""
    run = Up(settings_file)
    try:
        assert run.finish(60) == code, run.stderr[-2000:]
    finally:
        run.close()
    assert not (run.run_dir / "logs").exists()
    assert "Traceback" not in run.stderr
    return run.stderr


@pytest.mark.parametrize("kept", ["teacher/12", "students/plain/3"])
def test_snapshots_of_an_earlier_run_under_a_new_embedded_log(tmp_path: Path, kept: str) -> None:
    (tmp_path / "run" / kept).mkdir(parents=True)
    text = refusal(settings(tmp_path, rows=500, embedded=EMBEDDED))
    assert f"error: run_dir {tmp_path / 'run'} holds models of an earlier stream" in text


def test_logits_of_an_earlier_run_are_refused_and_an_empty_redis_is_not(tmp_path: Path) -> None:
    found = load(settings(tmp_path, rows=500, embedded=EMBEDDED))
    server = start_redis(tmp_path / "run" / "servers" / "redis")
    try:
        refuse_an_earlier_run(found)
        client = redis.Redis.from_url(f"redis://{server.address}")
        client.set("logits", "x")
        client.close()
    finally:
        server.stop()
    with pytest.raises(ConfigError, match="name a new run_dir"):
        refuse_an_earlier_run(found)
    refuse_an_earlier_run(found.model_copy(update={"embedded": found.embedded.model_copy(update={"kafka": False})}))


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"schema_file": "absent.yaml"}, "absent.yaml: no such file"),
        ({"replay": {"dataset": "absent.yaml"}}, "absent.yaml: no such file"),
        ({"replay": {"dataset": str(KUAIRAND / "dataset.yaml"), "data": "absent.parquet"}}, "absent.parquet"),
    ],
)
def test_a_schema_a_mapping_or_a_table_that_is_not_there(tmp_path: Path, changes: dict[str, Any], fix: str) -> None:
    text = refusal(settings(tmp_path, rows=500, **changes))
    assert fix in text.splitlines()[-1]
    assert not (tmp_path / "run" / "servers").exists()


def outside(folder: Path, bootstrap: str, url: str, **redis: Any) -> Servers:
    """The servers of a pipeline that embeds none."""
    file = settings(folder, rows=500, embedded={}, kafka={"bootstrap": bootstrap}, redis={"url": url, **redis})
    return Servers(load(file))


def test_outside_servers_are_asked_before_anything_starts(
    tmp_path: Path, kafka_bootstrap: str, own_redis: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.servers.PING_S", 0.3)
    stop, url, nowhere = threading.Event(), f"redis://{own_redis.address}/0", f"127.0.0.1:{free_port()}"
    assert outside(tmp_path, kafka_bootstrap, url).check_outside(stop) == []
    with pytest.raises(Retryable, match=f"broker {nowhere} is not reachable.*set kafka.bootstrap"):
        outside(tmp_path, nowhere, url).check_outside(stop)
    with pytest.raises(Retryable, match=f"redis at {nowhere} is away.*set redis.url"):
        outside(tmp_path, kafka_bootstrap, f"redis://{nowhere}/0").check_outside(stop)
    with redis.Redis.from_url(url) as admin:
        admin.config_set("maxmemory", "100mb")
        admin.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(ConfigError, match="allkeys-lru drops logits silently"):
            outside(tmp_path, kafka_bootstrap, url).check_outside(stop)
        admin.config_set("requirepass", "secret-word")
    with pytest.raises(ConfigError, match="set username and password_file"):
        outside(tmp_path, kafka_bootstrap, url).check_outside(stop)


def test_a_folder_as_settings_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)
