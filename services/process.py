"""What every process does around its work: settings, logs, metrics, health port, signals, exit code.

The first SIGTERM or SIGINT asks the work to drain; the second aborts at once.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from das import fault
from das.errors import ConfigError, Fatal, Retryable
from services import logs
from services.health import HealthServer, instance_name, write_address
from services.metrics import PrometheusTelemetry
from services.settings import Settings, load

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_FATAL = 3
EXIT_ABORTED = 130


@dataclass
class Context:
    """What `run` hands to the work of one process."""

    name: str
    settings: Settings
    telemetry: PrometheusTelemetry
    stop: threading.Event
    log: structlog.stdlib.BoundLogger

    def path(self, *parts: str) -> Path:
        """A path in the run folder."""
        return self.settings.run_dir.joinpath(*parts)

    def set_ready(self) -> None:
        """Answer 200 on the readiness page from now on, until someone sets the gauge back."""
        self.telemetry.gauge("exfm_ready", 1)


def version() -> str:
    """The installed version of the distribution; "source" for a tree that was not installed."""
    try:
        return importlib.metadata.version("exfm")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def run(name: str, settings_file: Path, work: Callable[[Context], None]) -> int:
    """Run `work` as the process `name` until it returns or is asked to stop; returns the exit code."""
    try:
        settings = load(settings_file, os.environ)
        fault.arm(os.environ.get("EXFM_FAULTS"))
    except ConfigError as error:
        return _refuse(error)
    logs.configure(name, settings.log)
    context = Context(name, settings, PrometheusTelemetry(CollectorRegistry()), stop_event(), logs.get_logger(name))
    follow_parent()
    with ExitStack() as stack:
        try:
            instance = stack.enter_context(instance_name(settings.run_dir, name))
            stack.enter_context(closing(_open_health(context, instance)))
        except OSError as error:
            where = {"host": settings.health.host, "port": settings.health.port, "run_dir": str(settings.run_dir)}
            context.log.error("health port refused", **where, error=str(error))
            return EXIT_FAILED
        return _guarded(context, work)


def stop_event() -> threading.Event:
    """An event set by the first SIGTERM or SIGINT; the second ends the process with EXIT_ABORTED.

    A thread reads the wake-up descriptor, so that a signal is heard at once even while the main thread is inside a
    long native call, and no lock is taken inside a handler.
    """
    stop = threading.Event()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        with receiver, sender:
            while received := receiver.recv(1):
                if received[0] not in (signal.SIGTERM, signal.SIGINT):
                    continue
                if stop.is_set():
                    os._exit(EXIT_ABORTED)
                logs.get_logger(__name__).info("stopping", signal=signal.Signals(received[0]).name)
                stop.set()

    threading.Thread(target=watch, name="signals", daemon=True).start()
    return stop


def follow_parent() -> None:
    """Under a supervisor: get SIGTERM when it dies, however it dies (Linux)."""
    if not os.environ.get("EXFM_SUPERVISED") or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(os.environ["EXFM_SUPERVISED"]):
        os.kill(os.getpid(), signal.SIGTERM)


def _open_health(context: Context, instance: str) -> HealthServer:
    settings, registry = context.settings, context.telemetry.registry
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    context.telemetry.gauge("exfm_ready", 0)
    context.telemetry.gauge("exfm_build_info", 1, version=version(), process=instance, config=settings.hash)
    health = HealthServer(settings.health, registry, context.telemetry.is_ready)
    health.start()
    context.log.info(
        "started",
        version=version(),
        config=settings.hash,
        instance=instance,
        ports={"health": health.address},
        pid=os.getpid(),
        settings=settings.redacted(),
    )
    write_address(settings.run_dir, instance, health.address)  # who finds it may stop us at once
    return health


def _guarded(context: Context, work: Callable[[Context], None]) -> int:
    """Turn the errors that name their remedy into exit codes and one log line."""
    log = context.log
    try:
        work(context)
    except ConfigError as error:
        log.error("configuration refused", error=str(error))
        return _refuse(error)
    except Retryable as error:
        log.error("gave up on a dependency; restart me", error=str(error))
        _say(error)
        return EXIT_FAILED
    except Fatal as error:
        log.error("cannot go on without losing or corrupting data", error=str(error), exc_info=True)
        _say(error)
        return EXIT_FATAL
    except Exception:
        log.exception("crashed")
        return EXIT_FAILED
    log.info("finished", stopped=context.stop.is_set())
    return EXIT_OK


def _refuse(error: ConfigError) -> int:
    _say(error)
    return EXIT_CONFIG


def _say(error: Exception) -> None:
    sys.stderr.write(f"error: {logs.redact(str(error))}\n")
