"""The servers of a pipeline on one machine: embedded ones where the settings ask for them, topics on either."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from das.broker import create_topics, wait_for_broker
from das.deadline import Deadline
from das.errors import ConfigError, Fatal, Retryable
from das.redis_check import check_server
from das.redis_client import RedisConfig
from services.embedded import Server, start_broker, start_redis
from services.settings import Settings

BROKER = "broker"
REDIS = "redis"
ADDRESSES = "addresses.json"
PING_S = 10.0
RETRY_S = 0.5


def attached(settings: Settings) -> Settings:
    """The settings with the addresses of the servers that a running `exfm up` embeds, for other commands.

    Raises ConfigError when the settings embed a server and no `exfm up` runs.
    """
    wanted = [name for name, on in ((BROKER, settings.embedded.kafka), (REDIS, settings.embedded.redis)) if on]
    if not wanted:
        return settings
    try:
        found = json.loads((settings.run_dir / "servers" / ADDRESSES).read_text(encoding="utf-8"))
        return _with_addresses(settings, {name: found[name] for name in wanted})
    except (OSError, ValueError, KeyError, TypeError):
        message = f"embedded: no `exfm up` runs in {settings.run_dir}, and its {' and '.join(wanted)} with it"
        raise ConfigError(f"{message}; start it, or set kafka.bootstrap and redis.url and turn embedded off") from None


def refuse_an_earlier_run(settings: Settings) -> None:
    """Raises ConfigError where an embedded broker would begin a new log under models or logits of an old one.

    Their positions would lie past the end of the new log, or rows before them would be skipped in silence.
    """
    if not settings.embedded.kafka:
        return
    run_dir = settings.run_dir
    kept = [p for pattern in ("teacher/*", "students/*/*") for p in run_dir.glob(pattern) if p.name.isdecimal()]
    logits = (run_dir / "servers" / REDIS / "appendonlydir").glob("*.aof.*.*")  # Redis begins with an empty 1.base.rdb
    if kept or any(p.stat().st_size for p in logits if not p.name.endswith(".1.base.rdb")):
        raise ConfigError(
            f"run_dir {run_dir} holds models of an earlier stream, and the embedded broker keeps its log in memory: "
            "name a new run_dir, delete it, or use a Kafka of your own"
        )


def _with_addresses(settings: Settings, addresses: Mapping[str, str]) -> Settings:
    kafka, redis = settings.kafka, settings.redis
    if BROKER in addresses:
        kafka = kafka.model_copy(update={"bootstrap": addresses[BROKER]})
    if REDIS in addresses:
        redis = redis.model_copy(update={"url": f"redis://{addresses[REDIS]}/0"})
    return settings.model_copy(update={"kafka": kafka, "redis": redis})


def _patiently_checked(config: RedisConfig, stop: threading.Event) -> list[str]:
    patience = Deadline.after(PING_S)
    while True:
        try:
            return check_server(config)
        except Retryable as error:
            if patience.passed or stop.wait(min(RETRY_S, patience.left_s)):
                raise Retryable(f"{error}; start it or set redis.url") from error


class Servers:
    """Starts and stops the embedded servers; `environ` points the other processes at them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.run_dir / "servers"
        self._running: dict[str, Server] = {}
        self._restarts: dict[str, int] = {}
        self._stopping = False
        self._ended: Callable[[str], None] = lambda _: None

    def check_outside(self, stop: threading.Event) -> list[str]:
        """Ask the servers that are not embedded for an answer; returns warnings about Redis.

        Raises Retryable when one does not answer within PING_S or `stop` is set, ConfigError when one refuses us or
        would drop logits.
        """
        settings = self._settings
        try:
            if not settings.embedded.kafka:
                wait_for_broker(settings.kafka, Deadline.after(PING_S))
            if settings.embedded.redis or settings.teacher is None:
                return []
            return _patiently_checked(settings.redis, stop)
        except Fatal as error:
            raise ConfigError(str(error)) from error

    def start(self, ended: Callable[[str], None]) -> None:
        """Start what the settings embed; `ended(name)` is called from a thread when one ends unasked."""
        self._ended = ended
        if self._settings.embedded.kafka:
            self._adopt(start_broker(self._folder / BROKER))
        if self._settings.embedded.redis:
            self._adopt(start_redis(self._folder / REDIS))
        if self._running:
            addresses = {name: server.address for name, server in self._running.items()}
            (self._folder / ADDRESSES).write_text(json.dumps(addresses), encoding="utf-8")

    @property
    def environ(self) -> dict[str, str]:
        """Overrides of the settings for every other process."""
        found = {}
        if BROKER in self._running:
            found["EXFM_KAFKA__BOOTSTRAP"] = self._running[BROKER].address
        if REDIS in self._running:
            found["EXFM_REDIS__URL"] = f"redis://{self._running[REDIS].address}/0"
        return found

    @property
    def settings(self) -> Settings:
        """The settings with the addresses of the embedded servers."""
        return _with_addresses(self._settings, {name: server.address for name, server in self._running.items()})

    def create_topics(self, timeout_s: float = 30.0) -> None:
        """Create the topics that are missing. Raises Retryable when the broker does not answer in time."""
        kafka = self.settings.kafka
        wait_for_broker(kafka, Deadline.after(timeout_s))
        create_topics(kafka)

    def recover(self, name: str) -> str | None:
        """Start a server again that ended; returns why that is impossible, or None."""
        if name == BROKER:
            return f"the embedded broker ended and its log was in memory: the stream is lost; see {self._folder / name}"
        old = self._running.pop(name)
        self._restarts[name] = self._restarts.get(name, 0) + 1
        if self._restarts[name] > self._settings.supervisor.max_restarts:
            return f"{name} ended {self._restarts[name]} times; see {self._folder / name}"
        self._adopt(start_redis(self._folder / REDIS, int(old.address.rpartition(":")[2])))
        return None

    def status(self) -> list[dict[str, Any]]:
        """One row per server, shaped like a process of the supervisor."""
        return [
            {
                "name": name,
                "kind": "server",
                "state": "running" if server.process.poll() is None else "stopped",
                "pid": server.process.pid,
                "restarts": self._restarts.get(name, 0),
                "exit_code": server.process.poll(),
            }
            for name, server in list(self._running.items())
        ]

    def stop(self) -> None:
        """Stop the servers, Redis first so that its append-only file is flushed."""
        self._stopping = True
        (self._folder / ADDRESSES).unlink(missing_ok=True)
        for server in reversed(list(self._running.values())):
            server.stop()

    def _adopt(self, server: Server) -> None:
        self._running[server.name] = server

        def watch() -> None:
            server.process.wait()
            if not self._stopping:
                self._ended(server.name)

        threading.Thread(target=watch, name=f"watch-{server.name}", daemon=True).start()
