"""The student on a real stream and a real store: exactly once through kills, bounded waits, logits used when there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from student_case import SCHEMA, messages
from student_process import MAX_MESSAGES, ROWS, Spec, Stream, WitnessTrainer, student

from das import fault
from das.deadline import Deadline
from das.examples import decode_examples
from das.position import Position
from das.stream import KafkaSource, TopicPartition
from das.telemetry import RecordingTelemetry
from foundation_model.snapshot import Snapshot, latest_snapshot, read_snapshot
from services.embedded import start_redis

COUNTS = (14, 9)
CHANGES = {"snapshot_every_steps": 3}
NO_WAIT = {"wait_ms": 300, "stall_ms": 200}


@pytest.fixture
def make_spec(kafka_bootstrap: str, redis_url: str, prefix: str, tmp_path: Path) -> Iterator[Callable[..., Spec]]:
    """Makes specs over one stream; `folder` tells run folders apart."""

    def make(folder: str = "run", *, stop_at_end: bool = True, url: str = redis_url, **changes: Any) -> Spec:
        return Spec(kafka_bootstrap, url, prefix, str(tmp_path / folder), CHANGES | changes, stop_at_end=stop_at_end)

    yield make
    fault.arm(None)


@contextmanager
def _stream(spec: Spec, counts: tuple[int, ...] = COUNTS, *, score: bool = True, end: bool = True) -> Iterator[Stream]:
    stream = Stream(spec)
    for partition, count in enumerate(counts):
        stream.put(partition, count)
        if score and count:
            stream.score(partition, range(count))
    if end:
        stream.end()
    yield stream
    stream.close()


def _run(spec: Spec, telemetry: RecordingTelemetry | None = None) -> WitnessTrainer:
    with student(spec, telemetry) as (loop, trainer):
        loop.run(threading.Event())
    return trainer


def _process(spec: Spec, faults: str = "") -> subprocess.Popen[str]:
    script = str(Path(__file__).with_name("student_process.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EXFM_FAULTS": faults}
    command = [sys.executable, script, msgspec.json.encode(spec).decode()]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def _snapshot(spec: Spec) -> Snapshot:
    path = latest_snapshot(Path(spec.folder) / "snapshots")
    assert path is not None
    return read_snapshot(path)


def _results(spec: Spec) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(spec.folder) / "results" / "vm.json").read_text())
    return found


def _assert_same(a: Snapshot, b: Snapshot) -> None:
    assert a.manifest.positions == b.manifest.positions
    assert a.manifest.metrics == b.manifest.metrics
    for x, y in ((a.model, b.model), (a.state, b.state)):
        assert x.keys() == y.keys()
        assert [name for name in x if not torch.equal(x[name], y[name])] == []


def _assert_seen_once(snapshot: Snapshot, counts: tuple[int, ...] = COUNTS) -> None:
    seen = snapshot.state["witness:seen"]
    for partition, count in enumerate(counts):
        assert (seen[partition, :count] == 1).all()
        assert (seen[partition, count:] == 0).all()
    assert snapshot.state["witness:wrong"].item() == 0


@pytest.mark.faults
@pytest.mark.parametrize(
    "faults",
    [
        ["student.after_lookup:1:kill", "student.after_step:4:kill", "student.after_poll:2:kill"],
        ["snapshot.before_rename:2:kill", "student.after_snapshot:1:kill", "student.after_commit:1:kill"],
    ],
    ids=["reading", "saving"],
)
def test_killed_anywhere_a_student_ends_with_the_same_bits(make_spec: Callable[..., Spec], faults: list[str]) -> None:
    golden, killed = make_spec("golden"), make_spec("killed")
    with _stream(golden):
        _run(golden)
        for plan in faults:
            process = _process(killed, plan)
            assert process.wait(30) == -signal.SIGKILL, plan
        _run(killed)
    _assert_seen_once(_snapshot(golden))
    _assert_same(_snapshot(golden), _snapshot(killed))
    total = sum(COUNTS) * ROWS
    assert _snapshot(golden).state["witness:hit"].sum() == total
    assert _results(killed)["rows"] == total
    assert _results(killed)["portfolios"] == _results(golden)["portfolios"]
    assert not list((Path(killed.folder) / "snapshots").glob(".tmp-*"))


@pytest.mark.faults
def test_sigterm_saves_and_the_next_life_goes_on_to_the_same_bits(make_spec: Callable[..., Spec]) -> None:
    golden, stopped = make_spec("golden"), make_spec("stopped", snapshot_every_steps=100_000)
    with _stream(golden):
        process = _process(stopped, "student.after_step:5:stop")
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 0
        assert _snapshot(stopped).manifest.steps == 5
        golden = make_spec("golden", snapshot_every_steps=100_000)
        _run(golden)
        _run(stopped)
    _assert_same(_snapshot(golden), _snapshot(stopped))


def test_the_end_of_the_stream_trains_the_last_smaller_batch_and_reports(make_spec: Callable[..., Spec]) -> None:
    spec, telemetry = make_spec(), RecordingTelemetry()
    with _stream(spec):
        trainer = _run(spec, telemetry)
    total = sum(COUNTS) * ROWS
    assert total % trainer.config.batch_rows
    assert _snapshot(spec).manifest.positions == {p: Position(count) for p, count in enumerate(COUNTS)}
    assert telemetry.total("exfm_rows_trained_total") == total
    results = _results(spec)
    assert (results["rows"], results["hit_rate"], results["kind"], results["arm"]) == (
        total,
        1.0,
        "student",
        "auxiliary",
    )
    rows = {(p["domain"], p["objective"]): p["rows"] for p in results["portfolios"]}
    assert rows["all", "click"] == total
    assert sum(count for (domain, name), count in rows.items() if name == "click" and domain != "all") == total
    assert rows["feed", "like"] == rows["all", "like"] < total
    assert results["event_to_trained_s"]["p50"] > 0
    source = KafkaSource(spec.kafka(), group=f"{spec.prefix}-student")
    wanted = [TopicPartition(spec.kafka().topics.examples, p) for p in range(2)]
    assert list(source.committed(wanted).values()) == list(COUNTS)
    source.close()


def test_a_second_life_after_the_end_trains_nothing_again(make_spec: Callable[..., Spec]) -> None:
    spec = make_spec()
    with _stream(spec):
        _run(spec)
        before = _snapshot(spec)
        _run(spec)
    assert _snapshot(spec).path == before.path
    _assert_seen_once(_snapshot(spec))


def test_rows_of_other_domains_are_passed_over(make_spec: Callable[..., Spec]) -> None:
    spec, telemetry = make_spec(domains=["mail"], objectives=["click"], batch_rows=4), RecordingTelemetry()
    with _stream(spec):
        trainer = _run(spec, telemetry)
    assert telemetry.total("exfm_logit_rows_total", outcome="hit") == trainer.counts.rows_with_logits
    assert trainer.counts.rows.tolist()[:2] == [0, 0]
    assert int(trainer.counts.rows[2]) == int(trainer.seen.sum()) > 0
    assert _snapshot(spec).manifest.positions == {p: Position(count) for p, count in enumerate(COUNTS)}
    assert [(p["domain"], p["objective"]) for p in _results(spec)["portfolios"]] == [("mail", "click")]
    assert int(trainer.wrong) == 0
    assert torch.equal(trainer.seen, trainer.hit)


def test_logits_of_messages_without_its_rows_are_not_waited_for(make_spec: Callable[..., Spec]) -> None:
    lookup = {"wait_ms": 60_000, "stall_ms": 60_000}
    spec = make_spec(domains=["mail"], objectives=["click"], batch_rows=1, lookup=lookup)
    with _stream(spec, score=False) as stream:
        mail = {(p, o): "mail" in _domains(p, o) for p, count in enumerate(COUNTS) for o in range(count)}
        assert not all(mail.values())
        for partition, count in enumerate(COUNTS):
            stream.score(partition, [o for o in range(count) if mail[partition, o]], watermark=0)
        trainer = _run(spec)
    assert trainer.counts.rows_total == trainer.counts.rows_with_logits > 0


def _domains(partition: int, offset: int) -> list[str]:
    value = messages(MAX_MESSAGES, ROWS, seed=partition)[offset]
    return list(decode_examples(value, SCHEMA, ["domain"]).column("domain").to_pylist())


def test_a_student_without_distillation_needs_no_store(make_spec: Callable[..., Spec]) -> None:
    spec = make_spec(distillation={"mode": "none"}, url="redis://127.0.0.1:1/0")
    with _stream(make_spec(), score=False):
        _run(spec)
    assert _results(spec)["hit_rate"] is None
    _assert_seen_once(_snapshot(spec))


class _Live:
    """A student in a thread."""

    def __init__(self, spec: Spec) -> None:
        self.stop = threading.Event()
        self.telemetry = RecordingTelemetry()
        self._manager = student(spec, self.telemetry, self.stop)
        self.loop, self.trainer = self._manager.__enter__()
        self._thread = threading.Thread(target=self.loop.run, args=(self.stop,))
        self._thread.start()

    def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait for a condition."""
        deadline = Deadline.after(timeout_s)
        while not condition():
            assert not deadline.passed, f"{self.trainer.counts}"
            assert self._thread.is_alive()
            time.sleep(0.02)

    def rows(self, count: int) -> None:
        """Wait until `count` rows are trained."""
        self.until(lambda: self.trainer.counts.rows_total >= count)

    def close(self) -> None:
        """Ask it to stop, and wait."""
        self.stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._manager.__exit__(None, None, None)


@contextmanager
def _live(spec: Spec) -> Iterator[_Live]:
    live = _Live(spec)
    try:
        yield live
    finally:
        live.close()


def _one_partition(spec: Spec) -> Spec:
    return msgspec.structs.replace(spec, partitions=1)


def test_without_the_teacher_labels_alone_are_trained_and_logits_come_back_with_it(
    make_spec: Callable[..., Spec],
) -> None:
    spec = _one_partition(make_spec(stop_at_end=False, batch_rows=ROWS, lookup=NO_WAIT))
    with _stream(spec, (3,), end=False) as stream, _live(spec) as live:
        counts = live.trainer.counts
        live.rows(3 * ROWS)
        assert counts.rows_with_logits == 3 * ROWS
        stream.put(0, 4)  # the teacher is stopped
        live.rows(7 * ROWS)
        assert counts.rows_with_logits == 3 * ROWS
        assert live.telemetry.gauges["exfm_lookup_degraded", ()] == 1
        stream.score(0, range(7, 9), watermark=9)  # it is back, and ahead
        stream.put(0, 2)
        live.rows(9 * ROWS)
        assert counts.rows_with_logits == 5 * ROWS
        assert live.telemetry.gauges["exfm_lookup_degraded", ()] == 0
    assert (live.trainer.hit[0, :9].sum(1) == torch.tensor([ROWS] * 3 + [0] * 4 + [ROWS] * 2)).all()
    _assert_seen_once(_snapshot(spec), (9,))


@pytest.mark.faults
def test_a_store_that_is_killed_costs_logits_only(make_spec: Callable[..., Spec], tmp_path: Path) -> None:
    server = start_redis(tmp_path / "redis")
    url = f"redis://{server.address}/0"
    lookup = NO_WAIT | {"retry_ms": 50}
    spec = _one_partition(make_spec(stop_at_end=False, url=url, batch_rows=ROWS, lookup=lookup))
    try:
        with _stream(spec, (3,), end=False) as stream, _live(spec) as live:
            live.rows(3 * ROWS)
            server.process.kill()
            server.process.wait(5)
            stream.put(0, 3)
            live.rows(6 * ROWS)
            assert live.trainer.counts.rows_with_logits == 3 * ROWS
            server = start_redis(tmp_path / "redis", int(server.address.rsplit(":", 1)[1]))
            stream.score(0, range(6, 8))
            stream.put(0, 2)
            live.rows(8 * ROWS)
            assert live.trainer.counts.rows_with_logits == 5 * ROWS
        _assert_seen_once(_snapshot(spec), (8,))
    finally:
        server.stop()


def test_asked_to_stop_while_waiting_for_logits_nothing_is_decided(make_spec: Callable[..., Spec]) -> None:
    lookup = {"wait_ms": 60_000, "stall_ms": 60_000}
    spec = _one_partition(make_spec(stop_at_end=False, batch_rows=16, lookup=lookup))
    with _stream(spec, (1,), end=False) as stream:
        began_s = time.monotonic()
        with _live(spec) as live:
            live.rows(16)
            stream.put(0, 3)
            live.until(lambda: live.loop._next == {0: Position(4)})  # read, and now waited for
        assert time.monotonic() - began_s < 8
        assert live.trainer.counts.rows_total == 16
        stream.score(0, range(1, 4))
        stream.end()
        trainer = _run(msgspec.structs.replace(spec, stop_at_end=True))
    assert trainer.counts.rows_with_logits == trainer.counts.rows_total == 4 * ROWS
    _assert_seen_once(_snapshot(spec), (4,))


def test_whether_a_message_had_logits_is_decided_once(make_spec: Callable[..., Spec]) -> None:
    """The teacher comes back between two lives, in the middle of a message that was found to have no logits."""
    changes = {"lookup": {"wait_ms": 0}, "batch_rows": 16, "snapshot_every_steps": 1}
    spec = _one_partition(make_spec(stop_at_end=False, **changes))
    with _stream(spec, (1,), score=False, end=False) as stream:
        with _live(spec) as live:
            live.rows(16)
        assert _snapshot(spec).manifest.positions == {0: Position(0, 16)}
        stream.score(0, [0])
        stream.put(0, 1)
        stream.score(0, [1])
        stream.end()
        trainer = _run(msgspec.structs.replace(spec, stop_at_end=True))
    assert trainer.hit[0, :2].sum(1).tolist() == [0, ROWS]
    _assert_seen_once(_snapshot(spec), (2,))
