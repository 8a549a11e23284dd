"""A Redis Cluster of real servers on this machine, with slots that can be moved."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import redis

from das.deadline import Deadline
from services.embedded import HOST, free_port, redis_binary

SLOTS = 16_384


class Cluster:
    """Nodes without replicas; each holds an equal run of slots to begin with."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        self.ports = [free_port() for _ in range(count)]
        self._buses = [free_port() for _ in range(count)]
        self.nodes = [redis.Redis(HOST, port, socket_timeout=2) for port in self.ports]
        self._processes = [
            _start(folder / str(port), port, bus) for port, bus in zip(self.ports, self._buses, strict=True)
        ]

    @property
    def url(self) -> str:
        """Of the first node."""
        return f"redis://{HOST}:{self.ports[0]}/0"

    def form(self) -> None:
        """Give every node its slots and make them know each other."""
        deadline = Deadline.after(30)
        for node in self.nodes:
            while not _answers(node):
                assert not deadline.passed, "a node did not start"
                time.sleep(0.05)
        for number, node in enumerate(self.nodes):
            first, end = (SLOTS * n // len(self.nodes) for n in (number, number + 1))
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        for port, bus in zip(self.ports[1:], self._buses[1:], strict=True):
            self.nodes[0].execute_command("CLUSTER", "MEET", HOST, port, bus)
        while not all(self._settled(node) for node in self.nodes):
            assert not deadline.passed, "the cluster did not form"
            time.sleep(0.1)

    def _settled(self, node: redis.Redis) -> bool:
        info = cast(dict[str, Any], node.cluster("info"))
        return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == len(self.nodes)

    def owner(self, slot: int) -> int:
        """The number of the node that serves `slot`."""
        for first, last, (_, port, *_), *_ in cast(list, self.nodes[0].execute_command("CLUSTER", "SLOTS")):
            if first <= slot <= last:
                return self.ports.index(port)
        raise AssertionError(f"nobody serves slot {slot}")

    def begin_move(self, slot: int, to: int) -> int:
        """Let `to` import `slot`, whose keys stay where they are for now; returns the number of its owner."""
        source = self.owner(slot)
        self.nodes[to].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self._id(source))
        self.nodes[source].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self._id(to))
        return source

    def move_keys(self, slot: int, source: int, to: int, count: int = 10_000) -> None:
        """Move up to `count` keys of `slot`."""
        keys = cast(list, self.nodes[source].execute_command("CLUSTER", "GETKEYSINSLOT", slot, count))
        if keys:
            self.nodes[source].execute_command("MIGRATE", HOST, self.ports[to], "", 0, 5000, "KEYS", *keys)

    def end_move(self, slot: int, to: int) -> None:
        """Make `to` the owner for everyone."""
        for node in (self.nodes[to], *self.nodes):
            node.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self._id(to))

    def _id(self, number: int) -> str:
        return cast(bytes, self.nodes[number].execute_command("CLUSTER", "MYID")).decode()

    def kill(self, number: int) -> None:
        """kill -9 of one node."""
        self._processes[number].kill()
        self._processes[number].wait()

    def close(self) -> None:
        """Stop all nodes."""
        for node in self.nodes:
            node.close()
        for number in range(len(self._processes)):
            self.kill(number)


@contextmanager
def cluster_of(folder: Path, count: int = 3) -> Iterator[Cluster]:
    """A formed cluster, stopped on the way out."""
    cluster = Cluster(folder, count)
    try:
        cluster.form()
        yield cluster
    finally:
        cluster.close()


def _start(folder: Path, port: int, bus: int) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True)
    command = [redis_binary(), "--bind", HOST, "--port", str(port), "--dir", str(folder), "--save", ""]
    command += ["--appendonly", "yes", "--cluster-enabled", "yes", "--cluster-port", str(bus)]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _answers(node: redis.Redis) -> bool:
    try:
        return bool(node.ping())
    except redis.ConnectionError:
        return False
