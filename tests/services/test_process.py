"""What every process of ours does around its work, shown on real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

PROLOGUE = """
import sys, threading, time
from pathlib import Path
from das.errors import ConfigError, Fatal, Retryable
from services.process import run

def work(context):
{body}

sys.exit(run("probe", Path(sys.argv[1]), work))
"""
UNTIL_STOPPED = "    context.set_ready(); context.stop.wait()"
DEAF = "    context.set_ready(); [time.sleep(0.05) for _ in range(400)]"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    options = "kafka: {options: {sasl_plain_password: hunter2hunter2}}"
    path.write_text(f"run_dir: {tmp_path / 'run'}\nschema_file: schema.yaml\n{options}\n", encoding="utf-8")
    return path


@pytest.fixture
def start(settings_file: Path) -> Iterator[Start]:
    """Starts a process of ours whose work is `body`; killed at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def start_one(body: str, **environ: str) -> subprocess.Popen[str]:
        code = PROLOGUE.format(body=body)
        command = [sys.executable, "-c", code, str(settings_file)]
        environ = {**os.environ, **environ}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def health(settings_file: Path, timeout_s: float = 20.0) -> str:
    """Address of the probe's health port, once it is announced."""
    path = settings_file.parent / "run" / "ports" / "probe.json"
    end_s = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < end_s, "no port was announced"
        time.sleep(0.02)
    address: str = json.loads(path.read_text(encoding="utf-8"))["health"]
    return address


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def events(stderr: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]


def test_start_line_names_version_config_and_ports_but_no_secret(start: Start, settings_file: Path) -> None:
    process = start(UNTIL_STOPPED)
    address = health(settings_file)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    first = events(stderr)[0]
    assert first["event"] == "started"
    assert first["version"]
    assert len(str(first["config"])) == 16
    assert first["ports"] == {"health": address}
    assert "hunter2" not in stderr


def test_health_pages_and_metrics(start: Start, settings_file: Path) -> None:
    process = start("    context.stop.wait(); context.set_ready(); time.sleep(3)")
    address = health(settings_file)
    assert get(address, "/v2/health/live") == (200, '{"live": true}')
    assert get(address, "/v2/health/ready") == (503, '{"ready": false}')
    assert get(address, "/nothing")[0] == 404
    process.send_signal(signal.SIGTERM)
    until(lambda: get(address, "/v2/health/ready")[0] == 200)
    text = get(address, "/metrics")[1]
    assert "exfm_ready 1.0" in text
    assert 'process="probe"' in text
    assert "process_resident_memory_bytes" in text


def test_first_signal_drains_and_exits_zero(start: Start, settings_file: Path) -> None:
    body = (
        "    context.set_ready(); context.stop.wait(); time.sleep(0.3); Path(sys.argv[1]).with_name('drained').touch()"
    )
    process = start(body)
    health(settings_file)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 0
    assert (settings_file.parent / "drained").exists()
    assert [e["event"] for e in events(stderr)] == ["started", "stopping", "finished"]


def test_second_signal_aborts_a_deaf_process_at_once(start: Start, settings_file: Path) -> None:
    process = start(DEAF)
    address = health(settings_file)
    until(lambda: get(address, "/v2/health/ready")[0] == 200)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("body", "code", "event"),
    [
        ("    raise ConfigError('teacher.depth: set 1 or more')", 2, "configuration refused"),
        ("    raise Fatal('two writers')", 3, "cannot go on without losing or corrupting data"),
        ("    raise Retryable('broker a:1 is away')", 1, "gave up on a dependency; restart me"),
        ("    raise KeyError('a bug')", 1, "crashed"),
    ],
)
def test_errors_become_exit_codes_and_one_log_line(start: Start, body: str, code: int, event: str) -> None:
    process = start(body)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code
    assert events(stderr)[-1]["event"] == event
    if code == 2:
        assert stderr.splitlines()[-1] == "error: teacher.depth: set 1 or more"


def test_bad_settings_are_a_clear_message_without_a_traceback(start: Start, settings_file: Path) -> None:
    settings_file.write_text("schema_file: s\nkafak: {}\n", encoding="utf-8")
    process = start(UNTIL_STOPPED)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "did you mean 'kafka'" in stderr
    assert "Traceback" not in stderr


def test_an_unknown_fault_point_is_refused(start: Start) -> None:
    process = start(UNTIL_STOPPED, EXFM_FAULTS="teacher.nowhere:1:kill")
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "teacher.nowhere" in stderr


def test_a_taken_health_port_is_said(start: Start, settings_file: Path) -> None:
    start(UNTIL_STOPPED)
    port = health(settings_file).rpartition(":")[2]
    second = start(UNTIL_STOPPED, EXFM_HEALTH__PORT=port)
    _, stderr = second.communicate(timeout=20)
    assert second.returncode == 1
    assert "health port refused" in stderr
    assert port in stderr


def test_processes_of_one_name_in_one_run_folder_announce_themselves_apart(start: Start, settings_file: Path) -> None:
    ports = settings_file.parent / "run" / "ports"
    first = start(UNTIL_STOPPED)
    health(settings_file)
    second = start(UNTIL_STOPPED)
    until(lambda: (ports / "probe-2.json").exists())
    found = {name: json.loads((ports / f"{name}.json").read_text()) for name in ("probe", "probe-2")}
    assert {name: one["pid"] for name, one in found.items()} == {"probe": first.pid, "probe-2": second.pid}
    for name, one in found.items():
        assert f'process="{name}"' in get(one["health"], "/metrics")[1]
    first.kill()
    first.wait()
    third = start(UNTIL_STOPPED)
    until(lambda: json.loads((ports / "probe.json").read_text())["pid"] == third.pid)  # the name was free again


def test_clients_that_hang_or_leave_neither_block_health_nor_disturb_the_log(start: Start, settings_file: Path) -> None:
    process = start(UNTIL_STOPPED)
    host, _, port = health(settings_file).rpartition(":")
    hanging = [socket.create_connection((host, int(port)), timeout=5) for _ in range(20)]
    for client in hanging[:10]:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    assert get(f"{host}:{port}", "/v2/health/live")[0] == 200
    more = [socket.create_connection((host, int(port)), timeout=5) for _ in range(40)]
    time.sleep(0.3)
    assert psutil.Process(process.pid).num_threads() < 50
    for client in hanging[10:] + more:
        client.close()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert [e["event"] for e in events(stderr)] == ["started", "stopping", "finished"]
    assert all(line.startswith("{") for line in stderr.splitlines())


def test_waiting_costs_no_processor_time(start: Start, settings_file: Path) -> None:
    process = start(UNTIL_STOPPED)
    address = health(settings_file)
    until(lambda: get(address, "/v2/health/ready")[0] == 200)
    probe = psutil.Process(process.pid)
    before = sum(probe.cpu_times()[:2])
    time.sleep(3)
    assert sum(probe.cpu_times()[:2]) - before < 0.05 * 3
