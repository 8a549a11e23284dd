"""Passwords and tokens, given in every way there is, are in nothing that a pipeline or a command writes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import redis
from pipeline import settings

from das.broker import TopicsConfig
from das.stream import KafkaConfig, create_topics
from services import check, status_command
from services.doctor import examine
from services.embedded import Server

SECRETS = {name: f"{name}-5ecret-w0rd" for name in ("redis", "inline", "file", "token")}


@pytest.fixture
def guarded(tmp_path: Path, kafka_bootstrap: str, prefix: str, own_redis: Server, admin: redis.Redis) -> dict[str, Any]:
    """Sections of settings with a secret each; the Redis asks for its one, the broker for none of them."""
    admin.config_set("requirepass", SECRETS["redis"])
    for name in ("redis", "token"):
        (tmp_path / f"{name}.secret").write_text(SECRETS[name])
    (tmp_path / "kafka.yaml").write_text(f"ssl_password: {SECRETS['file']}\n")
    names = {name: f"{prefix}-{name}" for name in TopicsConfig.model_fields}
    create_topics(KafkaConfig(bootstrap=kafka_bootstrap, topics=TopicsConfig(**names)))
    return {
        "embedded": {},
        "kafka": {
            "bootstrap": kafka_bootstrap,
            "topics": names,
            "options": {"sasl_plain_username": "exfm", "sasl_plain_password": SECRETS["inline"]},
            "options_file": str(tmp_path / "kafka.yaml"),
        },
        "redis": {"url": f"redis://{own_redis.address}/0", "password_file": str(tmp_path / "redis.secret")},
        "serve": {"port": 0, "token_file": str(tmp_path / "token.secret")},
        "students": [],
    }


def test_no_secret_is_logged_printed_or_saved(
    tmp_path: Path, guarded: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = settings(tmp_path, rows=1, **guarded)
    log, ports = tmp_path / "das.log", tmp_path / "run" / "ports" / "das.json"
    argv = [sys.executable, "-m", "services.cli", "das", "--settings", str(file)]
    with log.open("wb") as out:
        das = subprocess.Popen(argv, stdout=out, stderr=out)
    try:
        end_s = time.monotonic() + 30
        while not ports.exists():
            assert time.monotonic() < end_s, log.read_text()
            time.sleep(0.05)
        assert status_command.run(file, once=True, as_json=True) == 0
        said = {"status": capsys.readouterr().out}
    finally:
        das.terminate()
        assert das.wait(30) == 0, log.read_text()
    assert check.run(file) == 0
    said["check"] = capsys.readouterr().out
    assert "FIX" not in [line.level for line in examine(file)]
    (tmp_path / "redis.secret").write_text(SECRETS["redis"] + "x")
    said["doctor"] = repr(list(examine(file)))
    assert "set username and password_file" in said["doctor"]
    files = [log, *(path for path in (tmp_path / "run").rglob("*") if path.is_file())]
    said |= {str(path): path.read_text(errors="replace") for path in files}
    for text in (said["check"], said[str(log)]):
        assert "sasl_plain_password" in text  # the settings that hold them were written, with masks
    assert [(name, secret) for name, text in said.items() for secret in SECRETS.values() if secret in text] == []
