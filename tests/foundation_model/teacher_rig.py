"""What the tests of the teacher loop share: running it here or as a process, and looking at what it left."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from teacher_process import Spec, ledger, main, teacher

from das.logit_block import LogitBlock, decode_block
from das.stream import KafkaSource, TopicPartition
from das.telemetry import RecordingTelemetry
from foundation_model.online import TeacherLoop
from foundation_model.snapshot import Snapshot, latest_snapshot, read_snapshot

COUNTS = [14, 10]
SpecMaker = Callable[..., Spec]


def run_teacher(spec: Spec, **parts: Any) -> tuple[TeacherLoop, RecordingTelemetry]:
    """Run to the end of the stream in this thread."""
    telemetry = RecordingTelemetry()
    with teacher(spec, telemetry, **parts) as loop:
        loop.run(threading.Event())
    return loop, telemetry


def start_process(spec: Spec, faults: str | None = None) -> BaseProcess:
    """The teacher as a process of its own. Its parent is a server that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["teacher_process"])
    process = context.Process(target=main, args=(spec, faults))
    process.start()
    return process


@contextmanager
def running(loop: TeacherLoop, stop: threading.Event | None = None) -> Iterator[threading.Thread]:
    """The loop in a thread, which does not outlive the block even if the test fails."""
    stop = stop or threading.Event()
    thread = threading.Thread(target=loop.run, args=(stop,), daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join(10)


def ledger_lines(spec: Spec) -> list[str]:
    """What the processes of a spec told about their blocks."""
    return ledger(spec).read_text().splitlines() if ledger(spec).exists() else []


def raw_blocks(spec: Spec) -> dict[tuple[int, int], bytes | None]:
    """Every block by (partition, offset); the watermarks must be past the last message."""
    store = spec.store()
    out = {}
    for partition, count in enumerate(COUNTS):
        fetched = store.fetch(partition, range(count))
        assert fetched.watermark == count
        out |= {(partition, offset): raw for offset, raw in enumerate(fetched.blocks)}
    store.close()
    return out


def read_blocks(spec: Spec) -> dict[tuple[int, int], LogitBlock | None]:
    """The same, decoded."""
    return {at: None if raw is None else decode_block(raw) for at, raw in raw_blocks(spec).items()}


def last_snapshot(spec: Spec) -> Snapshot:
    """The newest valid snapshot."""
    path = latest_snapshot(Path(spec.folder) / "snapshots")
    assert path is not None
    return read_snapshot(path)


def assert_equal(a: Snapshot, b: Snapshot) -> None:
    """Weights, optimizers, metrics and positions are the same to the bit."""
    assert a.manifest.positions == b.manifest.positions
    assert a.manifest.metrics == b.manifest.metrics
    for x, y in ((a.model, b.model), (a.state, b.state)):
        assert x.keys() == y.keys()
        assert [name for name in x if not torch.equal(x[name], y[name])] == []


def committed_offsets(spec: Spec) -> dict[int, int | None]:
    """What the broker was told."""
    source = KafkaSource(spec.kafka(), group=f"{spec.prefix}-teacher")
    found = source.committed([TopicPartition(spec.kafka().topics.examples, p) for p in range(spec.partitions)])
    source.close()
    return {tp.partition: offset for tp, offset in found.items()}


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for a condition."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "never happened"
        time.sleep(0.01)
