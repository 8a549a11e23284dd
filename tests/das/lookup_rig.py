"""A lookup and a scripted teacher over one Redis, in simulated time."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from das.example_poll import PollRows
from das.example_source import ExampleMessage
from das.logit_block import encode_block
from das.logit_store import LogitStore, RedisConfig
from das.lookup import LogitLookup, LookupConfig
from das.schema import FeatureSchema
from das.telemetry import RecordingTelemetry

ROWS = 4
SCHEMA = FeatureSchema.parse(
    {
        "name": "tiny",
        "domains": ["1"],
        "objectives": [{"name": "click", "window_s": 60}, {"name": "like", "window_s": 60}],
        "features": [{"kind": "categorical", "name": "user_id"}],
    }
)


def message(offset: int, partition: int = 0, rows: int = ROWS) -> ExampleMessage:
    batch = pa.record_batch({"user_id": pa.array(range(rows), pa.int64())})
    checksum = 1_000_000 * partition + offset + 7
    return ExampleMessage(
        partition=partition, offset=offset, seq=offset, rows=PollRows(batch, 0, rows), checksum=checksum, appended_ms=0
    )


def logits_of(m: ExampleMessage) -> np.ndarray:
    """What our teacher says of a message: a function of the message alone, so that a misplaced block shows."""
    return np.full((m.rows.num_rows, 2), m.checksum % 251, np.float32) + np.arange(m.rows.num_rows)[:, None]


def block_of(m: ExampleMessage, **changed: int) -> bytes:
    fields = {
        "teacher_version": 1,
        "trained_offset": m.offset,
        "trained_through_ms": 0,
        "schema_fingerprint": SCHEMA.fingerprint,
        "message_checksum": m.checksum,
    }
    return encode_block(logits_of(m), **fields | changed)


class Simulation(threading.Event):
    """A clock, and the stop event whose waits move it: what was scheduled up to then happens before it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.waits: list[float] = []
        self._due: list[tuple[float, Callable[[], object]]] = []

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        self._due.append((self.now_s + seconds, action))

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None, "a wait without a deadline"
        self.waits.append(timeout)
        self.now_s += timeout
        due = [a for at, a in self._due if at <= self.now_s]
        self._due = [(at, a) for at, a in self._due if at > self.now_s]
        for action in due:
            action()
        return self.is_set()


class Rig:
    """A lookup and its teacher over one Redis, in simulated time."""

    def __init__(self, url: str, topic: str, **config: int) -> None:
        self.sim = Simulation()
        self.telemetry = RecordingTelemetry()
        self.store = LogitStore(RedisConfig(url=url, socket_timeout_s=2.0), topic=topic, teacher="kunlun", ttl_s=60)
        parsed = LookupConfig.parse({"wait_ms": 10_000, "stall_ms": 2_000, "retry_ms": 500, **config})
        self.lookup = LogitLookup(
            self.store, SCHEMA, self.telemetry, parsed, stop=self.sim, clock=lambda: self.sim.now_s
        )

    def score(self, *messages: ExampleMessage, watermark: int | None = None) -> None:
        """The teacher scores messages of one partition."""
        blocks = {m.offset: block_of(m) for m in messages}
        self.store.put(messages[0].partition, blocks, max(blocks) + 1 if watermark is None else watermark)

    def advance(self, watermark: int, partition: int = 0) -> None:
        """The teacher gets on with other messages."""
        self.store.put(partition, {}, watermark)

    def attach(self, *messages: ExampleMessage) -> tuple[list[bool], float]:
        """Which messages got their logits, every one checked, and the simulated seconds it took."""
        began_s = self.sim.now_s
        blocks = self.lookup.attach(messages)
        for m, block in zip(messages, blocks, strict=True):
            if block is not None:
                np.testing.assert_array_equal(block.logits, logits_of(m))
        return [b is not None for b in blocks], self.sim.now_s - began_s

    def rows(self, outcome: str) -> float:
        return self.telemetry.total("exfm_logit_rows_total", outcome=outcome)

    def misses(self) -> dict[str, float]:
        """Missed rows by reason, and every row counted once."""
        name = "exfm_logit_misses_total"
        found = {dict(labels)["reason"]: n for (n_, labels), n in self.telemetry.counters.items() if n_ == name}
        assert sum(found.values()) == self.rows("miss")
        return found

    @property
    def degraded(self) -> bool:
        gauge = self.telemetry.gauges["exfm_lookup_degraded", ()]
        assert gauge == self.lookup.degraded
        return bool(gauge)
