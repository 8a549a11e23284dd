"""A pipeline that has little to do: what it costs, what it shows, how it heals and how it stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import outside
import psutil
import pytest
from pipeline import EMBEDDED, Up, settings

NO_MODELS: dict[str, Any] = {"teacher": None, "students": []}
PROCESSES = {"das", "teacher", "plain", "distilled", "replay", "serve"} | outside.EMBEDDED


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A replay in real time: a few events per second."""
    folder = tmp_path_factory.mktemp("running")
    run = Up(settings(folder, rows=100_000, speed="realtime", stop_at_end=False, serve={"port": 0}))
    ready = {"das", "teacher", "plain", "distilled", "replay"}
    try:
        run.until(
            "all processes are ready",
            lambda: ready <= {p["name"] for p in run.status()["processes"] if p["ready"]},
        )
        yield run
    finally:
        run.close()


def test_status_knows_every_process(up: Up) -> None:
    rows = {p["name"]: p for p in up.status()["processes"]}
    assert set(rows) == PROCESSES
    assert {p["state"] for p in rows.values()} == {"running"}
    assert all(p["rss_bytes"] > 1 << 20 for p in rows.values())


def test_live_page_is_one_self_contained_document(up: Up) -> None:
    page = up.get("live", "/")
    assert "<svg" in page
    assert "http://www.w3.org/2000/svg" in page
    assert page.count("http") == page.count("http://www.w3.org/2000/svg")
    assert "prefers-color-scheme: dark" in page


def test_idle_processes_use_less_than_5_percent_of_a_core(up: Up) -> None:
    pids = {p["name"]: p["pid"] for p in up.status()["processes"]} | {"up": up.process.pid}
    time.sleep(2)
    before = {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in pids.items()}
    span_s = 6.0
    time.sleep(span_s)
    used = {name: (sum(psutil.Process(pid).cpu_times()[:2]) - before[name]) / span_s for name, pid in pids.items()}
    assert {name: share for name, share in used.items() if share > 0.05} == {}


@pytest.mark.faults
def test_a_killed_process_and_a_killed_redis_come_back_and_it_is_said(up: Up) -> None:
    rows = {p["name"]: p["pid"] for p in up.status()["processes"]}
    victims = {"das", "redis"} & PROCESSES
    for name in victims:
        os.kill(rows[name], signal.SIGKILL)

    def back() -> bool:
        now = {p["name"]: p for p in up.status()["processes"]}
        return all(now[n]["state"] == "running" and now[n]["pid"] != rows[n] for n in victims)

    up.until("das and redis run again", back)
    restarts = {p["name"]: p["restarts"] for p in up.status()["processes"]}
    assert restarts == dict.fromkeys(PROCESSES, 0) | dict.fromkeys(victims, 1)


def test_sigterm_drains_from_source_to_sink_and_exits_zero(up: Up) -> None:
    up.process.send_signal(signal.SIGTERM)
    assert up.finish(60) == 0, up.stderr[-3000:]
    events = [json.loads(line) for line in up.stderr.splitlines() if line.startswith("{")]
    drained = [event["child"] for event in events if event["event"] == "process drained"]
    assert drained[:3] == ["replay", "das", "teacher"]
    assert set(drained) == PROCESSES - outside.EMBEDDED
    assert drained[-1] == "serve"
    assert "das crashed (killed by SIGKILL)" in up.stdout
    assert ("redis ended and was started again" in up.stdout) == ("redis" in PROCESSES)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(up.run_dir) in " ".join(p.info["cmdline"] or [])]
    assert left == []


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Up]:
    """Replay and joiner alone, in real time."""
    run = Up(settings(tmp_path, rows=100_000, speed="realtime", stop_at_end=False, embedded=EMBEDDED, **NO_MODELS))
    try:
        run.until("all are ready", lambda: all(p["ready"] for p in run.status()["processes"] if p["kind"] != "server"))
        yield run
    finally:
        run.close()


@pytest.mark.faults
def test_a_lost_broker_log_ends_the_pipeline_and_says_why(small: Up) -> None:
    os.kill(next(p["pid"] for p in small.status()["processes"] if p["name"] == "broker"), signal.SIGKILL)
    assert small.finish(60) == 3
    assert "the stream is lost" in small.stdout


@pytest.mark.faults
def test_processes_and_servers_do_not_outlive_a_killed_supervisor(small: Up) -> None:
    pids = [p["pid"] for p in small.status()["processes"]]
    small.process.kill()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids], timeout=20)
    assert alive == []


def test_a_refused_configuration_stops_the_pipeline_with_its_message(tmp_path: Path) -> None:
    run = Up(settings(tmp_path, rows=500, teacher={"modle": "small"}))
    try:
        assert run.finish(60) == 2
    finally:
        run.close()
    assert "configuration refused: settings: teacher" in run.stderr
    assert "did you mean 'model'" in run.stderr


def test_a_taken_live_port_is_refused_with_the_fix(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = Up(settings(tmp_path, rows=500, teacher=None, students=[], supervisor={"live_port": port}))
        try:
            assert run.finish(30) == 2
        finally:
            run.close()
    assert f"supervisor.live_port: cannot listen on {port}" in run.stderr
