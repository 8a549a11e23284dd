"""`exfm up`: starts every process of the settings as an OS process and keeps it running.

A crashed process is restarted with exponential back-off, and said so; one that crashes too often, or whose
configuration is refused, stops the pipeline. A stop drains from the source to the sinks. The loop sleeps on a queue
that exits, signals and timers feed; it never polls.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from das.deadline import Deadline
from das.errors import ConfigError, Fatal
from das.telemetry import Telemetry
from services.logs import get_logger
from services.process import EXIT_CONFIG, EXIT_FATAL
from services.servers import Servers
from services.settings import Settings, SupervisorConfig

State = Literal["waiting", "running", "backoff", "finished", "stopped", "failed"]

DRAIN_ORDER = ("replay", "das", "teacher", "student", "serve")
START_ORDER = ("das", "teacher", "student", "serve", "replay")
TRAINERS = ("replay", "das", "teacher", "student")


@dataclass
class Child:
    """One process of the pipeline and what became of it."""

    name: str
    kind: str
    arguments: list[str]
    state: State = "waiting"
    process: subprocess.Popen[bytes] | None = None
    exit_code: int | None = None
    log_from: int = 0
    """Where in its log the newest start begins."""
    restarts: int = 0
    retry_at_s: float = 0.0
    crashes: deque[float] = field(default_factory=deque)

    def status(self) -> dict[str, Any]:
        """What the live page shows."""
        process = self.process
        return {
            "name": self.name,
            "kind": self.kind,
            "state": self.state,
            "pid": process.pid if process and self.state == "running" else None,
            "restarts": self.restarts,
            "exit_code": self.exit_code,
        }


def children_of(settings: Settings) -> list[Child]:
    """The processes that `settings` describe, in start order."""
    found = [Child("das", "das", ["das"])]
    if settings.teacher is not None:
        found.append(Child("teacher", "teacher", ["teacher"]))
    found += [Child(s["name"], "student", ["student", s["name"]]) for s in settings.students]
    if settings.serve is not None:
        found.append(Child("serve", "serve", ["serve"]))
    if settings.replay is not None:
        found.append(Child("replay", "replay", ["replay"]))
    return sorted(found, key=lambda child: START_ORDER.index(child.kind))


class Supervisor:
    """Starts, watches, restarts and drains. `say` receives one line per thing a person should know."""

    def __init__(
        self,
        settings: Settings,
        settings_file: Path,
        telemetry: Telemetry,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.children = children_of(settings)
        self.servers = Servers(settings)
        self._config: SupervisorConfig = settings.supervisor
        self._settings_file = settings_file
        self._telemetry = telemetry
        self._say = say
        self._log = get_logger(__name__)
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._problem: str | None = None
        self._refused = False

    def run(
        self,
        stop: threading.Event,
        *,
        tick: Callable[[], None] | None = None,
        tick_s: float = 5.0,
        at_end: Callable[[Settings], None] = lambda _: None,
    ) -> None:
        """Run until `stop`, or until the stream ends under `stop_at_end`.

        `tick` is called about every `tick_s`. `at_end` is called when the stream has ended, after all processes and
        before the servers stop, with the settings as the processes saw them.

        Must be called from the main thread: children are told to stop when the thread that started them ends.
        Raises Fatal when a process or a server could not be kept running or drained, ConfigError when a process or an
        outside server refused the configuration, Retryable when an outside server does not answer.
        """
        threading.Thread(target=self._forward_stop, args=(stop,), daemon=True).start()
        for warning in self.servers.check_outside(stop):
            self._tell(warning)
        try:
            self.servers.start(lambda name: self._events.put(("server", name)))
            self.servers.create_topics()
            for child in self.children:
                self._start(child)
            self._watch(stop, tick, tick_s)
            self._drain()
            if self._ended() and self._problem is None:
                at_end(self.servers.settings)
        finally:
            self._drain()
            self.servers.stop()
        if self._problem:
            raise ConfigError(self._problem) if self._refused else Fatal(self._problem)

    def _forward_stop(self, stop: threading.Event) -> None:
        stop.wait()
        self._events.put(("stop", None))

    def status(self) -> list[dict[str, Any]]:
        """State of every process and server, for other threads."""
        return [child.status() for child in self.children] + self.servers.status()

    def _watch(self, stop: threading.Event, tick: Callable[[], None] | None, tick_s: float) -> None:
        next_tick_s = time.monotonic() + tick_s
        while not stop.is_set() and self._problem is None and not self._ended():
            waits = [child.retry_at_s for child in self.children if child.state == "backoff"]
            waits += [next_tick_s] if tick else []
            try:
                kind, what = self._events.get(timeout=max(0.0, min(waits) - time.monotonic()) if waits else None)
                self._handle(kind, what)
            except queue.Empty:
                pass  # a timer is due
            now_s = time.monotonic()
            for child in self.children:
                if child.state == "backoff" and child.retry_at_s <= now_s:
                    self._start(child)
            if tick and next_tick_s <= now_s:
                tick()
                next_tick_s = time.monotonic() + tick_s

    def _ended(self) -> bool:
        trainers = [child for child in self.children if child.kind in TRAINERS]
        return self.settings.stop_at_end and all(child.state == "finished" for child in trainers)

    def _handle(self, kind: str, what: Any) -> None:
        if kind == "exit":
            self._exited(*what)
        elif kind == "server":
            self._problem = self.servers.recover(what)
            text = self._problem or f"{what} ended and was started again"
            self._tell(text, server=what)

    def _start(self, child: Child) -> None:
        argv = [sys.executable, "-m", "services.cli", *child.arguments, "--settings", str(self._settings_file)]
        environ = {**os.environ, **self.servers.environ, "EXFM_SUPERVISED": str(os.getpid())}
        log_path = self.log_path(child.name)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            child.log_from = log.tell()
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, start_new_session=True
            )
        child.process, child.state = process, "running"
        self._telemetry.gauge("exfm_process_up", 1, process=child.name)
        self._log.info("process started", child=child.name, pid=process.pid, log=str(log_path))
        threading.Thread(
            target=lambda: self._events.put(("exit", (child, process, process.wait()))), daemon=True
        ).start()

    def log_path(self, name: str) -> Path:
        """Where a process writes its log."""
        return self.settings.run_dir / "logs" / f"{name}.log"

    def _exited(self, child: Child, process: subprocess.Popen[bytes], code: int) -> None:
        if child.process is not process:
            return
        child.exit_code = code
        self._telemetry.gauge("exfm_process_up", 0, process=child.name)
        if code == 0:
            child.state = "finished"
            self._log.info("process finished", child=child.name)
            return
        now_s = time.monotonic()
        child.crashes.append(now_s)
        while child.crashes and child.crashes[0] < now_s - self._config.window_s:
            child.crashes.popleft()
        number = len(child.crashes)
        if code in (EXIT_CONFIG, EXIT_FATAL) or number > self._config.max_restarts:
            child.state = "failed"
            self._problem = self._give_up(child, code, number)
            self._tell(self._problem, child=child.name)
            return
        delay_s = min(self._config.backoff_max_s, self._config.backoff_initial_s * 2 ** (number - 1))
        child.state, child.retry_at_s, child.restarts = "backoff", now_s + delay_s, child.restarts + 1
        self._telemetry.count("exfm_process_restarts_total", process=child.name)
        why = _cause(self.log_path(child.name), child.log_from) if code > 0 else ""
        said = f"{_exit_text(code)}): {why}" if why else f"{_exit_text(code)})"
        self._tell(f"{child.name} crashed ({said}; restart {number} in {delay_s:.1f} s", child=child.name)

    def _give_up(self, child: Child, code: int, crashes: int) -> str:
        log_path = self.log_path(child.name)
        if code == EXIT_CONFIG:
            self._refused = True
            return f"{child.name}: configuration refused: {_last_words(log_path, after='error: ')}"
        why = _cause(log_path, child.log_from) if code > 0 else ""
        ending = "cannot go on" if code == EXIT_FATAL else f"gave up after {crashes} crashes"
        return f"{child.name}: {ending} ({_exit_text(code)}): {why + '; ' if why else ''}see {log_path}"

    def _drain(self) -> None:
        """Stop stage by stage, source first, so that what was read is finished before its sink goes away."""
        for kind in DRAIN_ORDER:
            stage = [
                child for child in self.children if child.kind == kind and child.process and child.state == "running"
            ]
            for child in stage:
                assert child.process
                child.process.send_signal(signal.SIGTERM)
            deadline = Deadline.after(self._config.drain_s)
            for child in stage:
                self._wait_drained(child, deadline)
        for child in self.children:
            child.state = "stopped" if child.state in ("waiting", "backoff") else child.state

    def _wait_drained(self, child: Child, deadline: Deadline) -> None:
        assert child.process
        try:
            code = child.process.wait(deadline.left_s)
        except subprocess.TimeoutExpired:
            child.process.kill()
            code = child.process.wait()
            problem = f"{child.name} did not drain within {self._config.drain_s:.0f} s and was killed"
        else:
            problem = f"{child.name} ended with {_exit_text(code)} while draining" if code else ""
        child.exit_code, child.state = code, "failed" if problem else "stopped"
        self._telemetry.gauge("exfm_process_up", 0, process=child.name)
        if problem:
            self._problem = self._problem or problem
            self._tell(problem, child=child.name)
        else:
            self._log.info("process drained", child=child.name)

    def _tell(self, text: str, **fields: str) -> None:
        self._log.warning(text, **fields)
        self._say(text)


def _exit_text(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"


def _cause(path: Path, begin: int, limit: int = 600) -> str:
    """The last error in a log after the byte `begin`, in one line; empty if there is none."""
    try:
        with path.open("rb") as log:
            log.seek(max(begin, path.stat().st_size - (256 << 10)))
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    plain = ""
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            plain = plain or line.strip().removeprefix("error: ")
            continue
        if isinstance(entry, dict) and entry.get("level") in ("error", "critical"):
            text = str(entry.get("error") or str(entry.get("exception", "")).strip().rpartition("\n")[2])
            return " ".join((text or str(entry.get("event", ""))).split())[:limit]
    return plain[:limit]


def _last_words(path: Path, *, after: str | None = None, limit: int = 600) -> str:
    """The end of a log, for a message that names the cause: what follows the last `after`, or the last line."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 8192))
            text = log.read().decode("utf-8", "replace").strip()
    except OSError:
        text = ""
    if after and after in text:
        return text.rpartition(after)[2][:limit]
    return f"see {path}: {text.splitlines()[-1][-limit:]}" if text else f"see {path}"
