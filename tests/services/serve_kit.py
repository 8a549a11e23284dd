"""What the tests of the HTTP API share: a small schema, teacher snapshots of it, and a server on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from prometheus_client import CollectorRegistry

from das.deadline import Deadline
from das.examples import JoinedRow, example_batch
from das.messages import MessageCodec
from das.position import Position
from das.schema import FeatureSchema
from foundation_model.features import FeatureEncoder
from foundation_model.kunlun import Kunlun
from foundation_model.snapshot import write_snapshot
from foundation_model.trainer import TeacherConfig
from services.embedded import free_port
from services.metrics import PrometheusTelemetry
from services.serve import ServeConfig
from services.serve.server import run_server

NOW_MS = 1_650_812_741_436
TRAINED_THROUGH_MS = 1_650_812_000_000

SCHEMA = FeatureSchema.parse(
    {
        "name": "tiny",
        "domains": ["0", "1"],
        "objectives": [{"name": "click", "window_s": 10}, {"name": "like", "window_s": 10, "domains": ["1"]}],
        "features": [
            {"kind": "categorical", "name": "user_id"},
            {"kind": "categorical", "name": "tag", "dtype": "string", "nullable": True},
            {"kind": "numeric", "name": "price", "nullable": True},
            {
                "kind": "sequence",
                "name": "clicks",
                "event": "click",
                "max_length": 8,
                "fields": [{"name": "item_id"}, {"name": "past_tag", "dtype": "string", "table": "tag"}],
            },
        ],
    }
)
CODEC = MessageCodec(SCHEMA)
CONFIG = TeacherConfig.parse({"model": {"preset": "small"}, "tables": {"default_buckets": 64}})


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Valid rows of the schema: with and without a tag, a price, past clicks."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        past = int(rng.integers(0, 5))
        features: dict[str, Any] = {
            "user_id": int(rng.integers(-(2**62), 2**62)),
            "clicks": {
                "item_id": [int(x) for x in rng.integers(0, 1000, past)],
                "past_tag": [f"t{x}" for x in rng.integers(0, 9, past)],
                "time_ms": sorted(NOW_MS - int(x) for x in rng.integers(0, 10**7, past)),
            },
        }
        if i % 3:
            features |= {"tag": f"t{int(rng.integers(0, 9))}", "price": round(float(rng.normal()), 3)}
        rows.append({"domain": str(i % 2), "event_time": NOW_MS, "features": features})
    return rows


def make_model(seed: int, schema: FeatureSchema = SCHEMA) -> Kunlun:
    """A Kunlun with weights from `seed`, far enough from zero that versions differ in every logit."""
    torch.manual_seed(seed)
    model = Kunlun(CONFIG.model, FeatureEncoder(schema, tables=CONFIG.tables).spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def expected_logits(model: Kunlun, rows: list[dict[str, Any]]) -> np.ndarray:
    """What the trainer's forward gives for the same rows, (rows, heads)."""
    impressions = [CODEC.impression({"impression_id": f"x{i}", **row}) for i, row in enumerate(rows)]
    batch = example_batch([JoinedRow(i, NOW_MS, (None, None)) for i in impressions], SCHEMA)
    logits: np.ndarray = model(FeatureEncoder(SCHEMA, tables=CONFIG.tables).encode(batch)).detach().numpy()
    return logits


def publish(root: Path, version: int, model: Kunlun, schema: FeatureSchema = SCHEMA) -> Path:
    """Write a snapshot as the teacher does."""
    return write_snapshot(
        root,
        version,
        model=model.state_dict(),
        state={},
        config=CONFIG.model_dump(mode="json"),
        schema_fingerprint=schema.fingerprint,
        positions={0: Position(version)},
        trained_through_ms=TRAINED_THROUGH_MS + version,
        steps=version,
        keep=100,
    )


class Running:
    """A server in a thread of this process, and a client of it."""

    def __init__(self, snapshots: Path, schema: FeatureSchema = SCHEMA, **settings: Any) -> None:
        self.config = ServeConfig.parse({"port": free_port(), "reload_s": 0.05, **settings})
        self.telemetry = PrometheusTelemetry(CollectorRegistry())
        self.stop = threading.Event()
        self.ready = threading.Event()
        self.url = f"http://127.0.0.1:{self.config.port}"
        self.client = httpx.Client(base_url=self.url, timeout=20)
        args = (self.config, schema, snapshots, self.telemetry, self.stop, self.ready.set)
        self.thread = threading.Thread(target=run_server, args=args)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one metric, 0 when there is none yet."""
        return self.telemetry.registry.get_sample_value(name, labels) or 0.0

    def wait_for(self, check: Any, timeout_s: float = 10.0) -> None:
        """Wait until `check()` holds."""
        deadline = Deadline.after(timeout_s)
        while not check():
            assert not deadline.passed, "not so within the time"
            time.sleep(0.02)


@contextmanager
def serving(
    snapshots: Path, *, ready: bool = True, schema: FeatureSchema = SCHEMA, **settings: Any
) -> Iterator[Running]:
    """Run a server; waits until it answers, and until it has a teacher if `ready`."""
    running = Running(snapshots, schema, **settings)
    running.thread.start()
    try:
        running.wait_for(lambda: _answers(running.client))
        if ready:
            assert running.ready.wait(10)
        yield running
    finally:
        running.client.close()
        running.stop.set()
        running.thread.join(20)
        assert not running.thread.is_alive()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/v2/health/live").status_code == 200
    except httpx.ConnectError:
        return False
