"""`exfm serve` as its own process: it drains on SIGTERM and refuses to start where it would be open to all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from serve_kit import SCHEMA, make_model, make_rows, publish

from das.deadline import Deadline
from services.embedded import free_port


def write_settings(folder: Path, serve: dict[str, object]) -> Path:
    """A settings file for the tiny schema."""
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA.model_dump(mode="json")))
    path = folder / "exfm.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(folder / "run"), "schema_file": "schema.yaml", "serve": serve}))
    return path


def command(settings: Path) -> list[str]:
    """`exfm serve` with this interpreter."""
    return [sys.executable, "-m", "services.cli", "serve", "--settings", str(settings)]


@contextmanager
def process(settings: Path, check: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    """Run `exfm serve` and wait until `check()`."""
    with (settings.parent / "log").open("wb") as log:
        running = subprocess.Popen(
            command(settings), stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        deadline = Deadline.after(60)
        while not check():
            waits = running.poll() is None and not deadline.passed
            assert waits, (settings.parent / "log").read_text()
            time.sleep(0.1)
        yield running
    finally:
        running.kill()
        running.wait()


def test_sigterm_lets_the_request_under_way_finish_and_exits_0(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    settings = write_settings(tmp_path, {"port": port})
    publish(tmp_path / "run" / "teacher", 1, make_model(1))

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    body = json.dumps({"rows": make_rows(2)}).encode()
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with process(settings, ready) as running:
        ports = json.loads((tmp_path / "run" / "ports" / "serve.json").read_text())
        health = f"http://{ports['health']}/v2/health/ready"
        assert httpx.get(health).status_code == 200
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head + body[:20])
            time.sleep(0.3)
            running.send_signal(signal.SIGTERM)
            time.sleep(0.7)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/v2/health/live")
            connection.sendall(body[20:])
            answer = connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert running.wait(15) == 0


def test_without_a_token_it_does_not_listen_beyond_this_machine(tmp_path: Path) -> None:
    port = free_port()
    settings = write_settings(tmp_path, {"host": "0.0.0.0", "port": port})  # noqa: S104
    ended = subprocess.run(command(settings), capture_output=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert b"needs a bearer token" in ended.stderr
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
