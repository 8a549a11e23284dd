"""Log lines are JSON objects, and secrets never reach them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from services.logs import MASK, redact

SECRET = "hunter2-very-secret"


@pytest.mark.parametrize(
    "value",
    [
        {"sasl_plain_password": SECRET},
        {"options": {"ssl_password": SECRET}},
        {"token": SECRET, "tokens": [{"api_key": SECRET}]},
        f"redis://user:{SECRET}@host:6379/0",
        f"Authorization: Bearer {SECRET}",
        f"KafkaError: sasl_plain_password='{SECRET}' was refused",
        [{"url": f"rediss://:{SECRET}@host"}],
    ],
)
def test_secrets_are_masked_at_any_depth(value: object) -> None:
    masked = json.dumps(redact(value))
    assert SECRET not in masked
    assert MASK in masked


def test_plain_values_are_left_alone() -> None:
    plain = {"partition": 3, "path": "runs/x", "key": "exfm:{examples:0}:logits:t:7", "password_file": "/run/secrets/x"}
    assert redact(plain) == plain


def test_records_of_both_libraries_are_one_json_object_per_line_without_secrets() -> None:
    code = f"""
import logging
from services.logs import LogConfig, configure, get_logger
configure("probe", LogConfig())
get_logger("a").info("hello", rows=3, password="{SECRET}")
logging.getLogger("das.x").warning("cannot reach %s", "redis://u:{SECRET}@h/0")
try:
    raise ValueError("token={SECRET}")
except ValueError:
    get_logger("b").exception("crashed")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert SECRET not in run.stderr
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["hello", f"cannot reach redis://{MASK}@h/0", "crashed"]
    assert lines[0]["rows"] == 3
    assert "ValueError" in lines[2]["exception"]
    assert all(line["process"] == "probe" and line["timestamp"] and line["level"] for line in lines)


def test_importing_configures_nothing() -> None:
    code = "import logging, services.logs, services.process; print(logging.getLogger().handlers)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert logging.getLogger("kafka").level == logging.NOTSET
