"""Runs the HTTP API until it is asked to stop, then lets the requests under way finish."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import uvicorn

from das.errors import ConfigError
from das.messages import MessageCodec
from das.schema import FeatureSchema
from services.logs import get_logger
from services.metrics import PrometheusTelemetry
from services.process import version
from services.serve.app import create_app
from services.serve.config import ServeConfig, load_tokens
from services.serve.gate import Gate
from services.serve.reload import TeacherSlot
from services.serve.scoring import Scorer
from services.serve.teacher import choose_device

STOP_POLL_S = 0.2

logger = get_logger(__name__)


def run_server(
    config: ServeConfig,
    schema: FeatureSchema,
    snapshots: Path,
    telemetry: PrometheusTelemetry,
    stop: threading.Event,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve the newest snapshot of `snapshots`, or of `config.snapshots` if that is set, until `stop` is set.

    `on_ready` is called once, when the first snapshot is loaded. Raises ConfigError when the address cannot be
    listened on, or is not a loopback address and there is no token.
    """
    tokens = load_tokens(config)
    device = choose_device(config.device)
    listener = _listen(config)
    torch.set_num_threads(config.threads)
    slot = TeacherSlot(config.snapshots or snapshots, schema, telemetry, device)
    codec = MessageCodec(schema)
    scorer = Scorer(slot, codec, config)

    def is_ready() -> bool:
        return slot.current is not None and not stop.is_set()

    app = create_app(scorer, codec, telemetry, is_ready, version())
    server = _Server(
        uvicorn.Config(
            Gate(app, config, tokens, telemetry),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(config.grace_s)),
        )
    )
    host, port = listener.getsockname()[:2]
    logger.info("listening", address=f"{host}:{port}", token=bool(tokens), snapshots=str(config.snapshots or snapshots))
    try:
        asyncio.run(_serve(server, listener, slot, config, stop, on_ready))
    finally:
        scorer.close()
        listener.close()


async def _serve(
    server: uvicorn.Server,
    listener: socket.socket,
    slot: TeacherSlot,
    config: ServeConfig,
    stop: threading.Event,
    on_ready: Callable[[], None],
) -> None:
    """Serve until `stop`, or until following the snapshots fails; that error is raised after the drain."""
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    following = asyncio.create_task(slot.follow(config.reload_s))
    announced = False
    while not (stop.is_set() or serving.done() or following.done()):
        if not announced and slot.current is not None:
            announced = True
            on_ready()
        await asyncio.wait({serving, following}, timeout=STOP_POLL_S, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise ConfigError(f"serve.host, serve.port: cannot listen on {config.host}:{config.port}: {error}") from None


class _Server(uvicorn.Server):
    """Leaves the signals to the process's own handlers, which set the stop event."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
