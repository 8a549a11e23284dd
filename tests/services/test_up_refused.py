"""What `exfm up` refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from pipeline import Up, settings

from das.config import read_yaml
from das.errors import ConfigError
from services.embedded import start_redis
from services.servers import refuse_an_earlier_run
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
    text = refusal(settings(tmp_path, rows=500))
    assert f"error: run_dir {tmp_path / 'run'} holds models of an earlier stream" in text


def test_logits_of_an_earlier_run_are_refused_and_an_empty_redis_is_not(tmp_path: Path) -> None:
    found = load(settings(tmp_path, rows=500))
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


def test_a_folder_as_settings_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)
