"""A small threaded HTTP server of a process: liveness, readiness, metrics, and extra read-only pages."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import Field

from das.config import Config

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
MAX_INSTANCES = 1000

Page = Callable[[], tuple[str, bytes]]
"""Makes one page: content type and body."""

CSP = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class HealthConfig(Config):
    """Where a process answers health and metrics."""

    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65_535)
    """0 = let the system choose; the address is written to `<run_dir>/ports/<instance>.json`."""


class HealthServer:
    """Serves `/v2/health/live`, `/v2/health/ready`, `/metrics` and `pages` from daemon threads."""

    def __init__(
        self,
        config: HealthConfig,
        registry: CollectorRegistry,
        ready: Callable[[], bool],
        pages: Mapping[str, Page] | None = None,
    ) -> None:
        routes: dict[str, Callable[[], tuple[int, str, bytes]]] = {
            "/v2/health/live": lambda: _flag("live", True),
            "/v2/health/ready": lambda: _flag("ready", ready()),
            "/metrics": lambda: (200, CONTENT_TYPE_LATEST, generate_latest(registry)),
        }
        for path, page in (pages or {}).items():
            routes[path] = lambda page=page: (200, *page())  # type: ignore[misc]
        handler = type("Handler", (_Handler,), {"routes": routes})
        self._server = _Server((config.host, config.port), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    @property
    def address(self) -> str:
        """`host:port` that a neighbor on this machine can connect to."""
        host, port = self._server.server_address[:2]
        return f"{'127.0.0.1' if host == '0.0.0.0' else str(host)}:{port}"  # noqa: S104

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the port."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


@contextmanager
def instance_name(run_dir: Path, process: str) -> Iterator[str]:
    """A name that no other live process in `run_dir` has: `process`, else `process-2`, `process-3` and so on.

    It is held by a lock on `<run_dir>/ports/<name>.lock`, which ends with the process, however that ends.
    Raises OSError when the folder cannot be written to, or MAX_INSTANCES of one name run.
    """
    folder = run_dir / "ports"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, MAX_INSTANCES + 1):
        name = process if number == 1 else f"{process}-{number}"
        with (folder / f"{name}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield name
            return
    raise OSError(f"{MAX_INSTANCES} processes named {process} run in {run_dir}")


def write_address(run_dir: Path, instance: str, address: str) -> Path:
    """Announce where `instance` answers: `<run_dir>/ports/<instance>.json`, replaced atomically."""
    path = run_dir / "ports" / f"{instance}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"process": instance, "pid": os.getpid(), "health": address}), encoding="utf-8")
    temporary.replace(path)
    return path


def _flag(name: str, value: bool) -> tuple[int, str, bytes]:
    return 200 if value else 503, "application/json", json.dumps({name: value}).encode()


class _Server(ThreadingHTTPServer):
    """One daemon thread per connection, at most MAX_CONNECTIONS; further ones are closed at once."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, if one is free."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, then free the slot."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no event; anything else is a bug in a page."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            logger.error("a health page failed", exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET from `routes`; everything else is 404 or 501."""

    routes: Mapping[str, Callable[[], tuple[int, str, bytes]]] = {}
    timeout = 5
    protocol_version = "HTTP/1.1"
    server_version = "exfm"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one request."""
        route = self.routes.get(self.path.partition("?")[0])
        code, kind, body = route() if route else (404, "text/plain", b"not found\n")
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", CSP)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Health checks are not logged."""
