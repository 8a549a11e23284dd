"""The teacher on a real stream: no peek, exact resume, bounded waits, nothing dropped uncounted."""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from teacher_case import SCHEMA, messages, teacher_config
from teacher_process import Spec, ledger, main, publish, teacher
from torch import Tensor, nn

from das import fault
from das.errors import Fatal, Retryable
from das.examples import decode_examples
from das.logit_block import LogitBlock, decode_block
from das.position import Position
from das.stream import KafkaSource, TopicPartition
from das.telemetry import RecordingTelemetry
from foundation_model.batch import Batch
from foundation_model.online import TeacherLoop
from foundation_model.snapshot import Snapshot, latest_snapshot, read_snapshot, versions
from foundation_model.snapshot_folder import SnapshotFolder
from foundation_model.trainer import TeacherTrainer
from services.embedded import start_redis

COUNTS = [14, 10]
SpecMaker = Callable[..., Spec]


@pytest.fixture
def make_spec(
    kafka_bootstrap: str, redis_url: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SpecMaker]:
    """Makes specs over one stream of COUNTS messages; `folder` tells run folders apart."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for the server of `_process`

    def make(folder: str = "run", **changes: Any) -> Spec:
        return Spec(kafka_bootstrap, redis_url, prefix, str(tmp_path / folder), changes)

    yield make
    fault.arm(None)


def _run(spec: Spec, **parts: Any) -> tuple[TeacherLoop, RecordingTelemetry]:
    telemetry = RecordingTelemetry()
    with teacher(spec, telemetry, **parts) as loop:
        loop.run(threading.Event())
    return loop, telemetry


def _process(spec: Spec, faults: str | None = None) -> BaseProcess:
    """The teacher as a process of its own. Its parent is a server that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["teacher_process"])
    process = context.Process(target=main, args=(spec, faults))
    process.start()
    return process


@contextmanager
def _running(loop: TeacherLoop, stop: threading.Event | None = None) -> Iterator[threading.Thread]:
    """The loop in a thread, which does not outlive the block even if the test fails."""
    stop = stop or threading.Event()
    thread = threading.Thread(target=loop.run, args=(stop,), daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join(10)


def _lines(spec: Spec) -> list[str]:
    return ledger(spec).read_text().splitlines() if ledger(spec).exists() else []


def _raw_blocks(spec: Spec) -> dict[tuple[int, int], bytes | None]:
    store = spec.store()
    out = {}
    for partition, count in enumerate(COUNTS):
        fetched = store.fetch(partition, range(count))
        assert fetched.watermark == count
        out |= {(partition, offset): raw for offset, raw in enumerate(fetched.blocks)}
    store.close()
    return out


def _blocks(spec: Spec) -> dict[tuple[int, int], LogitBlock | None]:
    return {at: None if raw is None else decode_block(raw) for at, raw in _raw_blocks(spec).items()}


def _snapshot(spec: Spec) -> Snapshot:
    path = latest_snapshot(Path(spec.folder) / "snapshots")
    assert path is not None
    return read_snapshot(path)


def _equal(a: Snapshot, b: Snapshot) -> None:
    assert a.manifest.positions == b.manifest.positions
    assert a.manifest.metrics == b.manifest.metrics
    for x, y in ((a.model, b.model), (a.state, b.state)):
        assert x.keys() == y.keys()
        assert [name for name in x if not torch.equal(x[name], y[name])] == []


def _committed(spec: Spec) -> dict[int, int | None]:
    source = KafkaSource(spec.kafka(), group=f"{spec.prefix}-teacher")
    found = source.committed([TopicPartition(spec.kafka().topics.examples, p) for p in range(spec.partitions)])
    source.close()
    return {tp.partition: offset for tp, offset in found.items()}


@pytest.mark.parametrize("per_step", [1, 3])
def test_no_block_was_scored_by_weights_that_knew_its_rows(make_spec: SpecMaker, per_step: int) -> None:
    spec = make_spec(messages_per_step=per_step)
    publish(spec, COUNTS)
    loop, telemetry = _run(spec)
    assert loop.positions == {p: Position(count) for p, count in enumerate(COUNTS)}
    assert telemetry.total("exfm_logit_blocks_total", outcome="written") == sum(COUNTS)
    assert telemetry.total("exfm_logit_blocks_total") == sum(COUNTS)
    blocks = _blocks(spec)
    for (partition, offset), block in blocks.items():
        assert block is not None
        assert block.trained_offset <= offset
        assert offset - block.trained_offset < per_step
        assert block.logits.shape == (16, 2)
        if offset:
            before = blocks[partition, offset - 1]
            assert before is not None
            assert block.trained_offset >= before.trained_offset
            assert block.teacher_version >= before.teacher_version
            assert block.trained_through_ms >= before.trained_through_ms
    assert max(b.teacher_version for b in blocks.values() if b) == loop._trainer.version - 1
    _replay(spec, blocks, per_step)


def _replay(spec: Spec, blocks: dict[tuple[int, int], LogitBlock | None], per_step: int) -> None:
    """An independent teacher, fed message by message, scores each before it trains on it: the same logits."""
    trainer = TeacherTrainer(teacher_config(), SCHEMA)
    values = {(p, o): v for p, count in enumerate(COUNTS) for o, v in enumerate(messages(count, seed=p))}
    order = sorted(values, key=lambda at: (at[1], at[0]))  # release time grows with the offset; ties by partition
    for first in range(0, len(order), per_step):
        group = order[first : first + per_step]
        records = [decode_examples(values[at], SCHEMA, trainer.encoder.columns) for at in group]
        batch = Batch.concat([trainer.encoder.encode(record) for record in records])
        logits_BK = trainer.score(batch)
        for i, at in enumerate(group):
            expected = logits_BK[16 * i : 16 * (i + 1)].detach().numpy().astype(np.float16)
            block = blocks[at]
            assert block is not None
            np.testing.assert_array_equal(block.logits.astype(np.float16), expected)
        trainer.step(logits_BK, batch)


@pytest.mark.faults
def test_killed_at_every_point_it_ends_as_if_never_interrupted(make_spec: SpecMaker) -> None:
    golden, spec = make_spec("golden", name="golden"), make_spec("killed")
    publish(golden, COUNTS)
    _run(golden)
    points = [p for p in fault.POINTS if p.startswith(("teacher.", "snapshot."))]
    assert len(points) == 7
    for life, point in enumerate(points):
        nth = 1 if "snapshot" in point or "commit" in point else 2 + life % 3
        process = _process(spec, f"{point}:{nth}:kill")
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, point
    process = _process(spec)
    process.join(60)
    assert process.exitcode == 0
    outcomes = _lines(spec)
    assert "refused 1" not in outcomes
    assert "identical 1" in outcomes
    assert _raw_blocks(spec) == _raw_blocks(golden)
    _equal(_snapshot(spec), _snapshot(golden))
    assert _snapshot(spec).manifest.version == sum(COUNTS)


def test_steps_of_several_messages_are_cut_alike_after_a_crash(make_spec: SpecMaker) -> None:
    golden = make_spec("golden", name="golden", messages_per_step=5)
    spec = make_spec("crashed", messages_per_step=5)
    publish(golden, COUNTS)
    _run(golden)
    for point in ("teacher.after_put:2:raise", "teacher.after_train:2:raise", "teacher.after_train:1:raise"):
        fault.arm(point)
        with pytest.raises(Retryable):
            _run(spec)
    fault.arm(None)
    _, telemetry = _run(spec)
    assert telemetry.total("exfm_logit_blocks_total", outcome="refused") == 0
    _equal(_snapshot(spec), _snapshot(golden))


def test_a_step_is_cut_by_position_however_slowly_messages_come(make_spec: SpecMaker) -> None:
    slow, golden = make_spec("slow", messages_per_step=5), make_spec("golden", name="golden", messages_per_step=5)
    publish(slow, [7, 7], end=False)
    with teacher(slow) as loop, _running(loop) as thread:
        _until(lambda: loop._trainer.version == 2)
        time.sleep(0.5)
        assert loop._trainer.version == 2  # four messages are left, and wait for a fifth
        publish(slow, [7, 3], starts=[7, 7])
        thread.join(30)
        assert not thread.is_alive()
        assert loop._trainer.version == 5
    _run(golden)
    _equal(_snapshot(slow), _snapshot(golden))


def test_sigterm_leaves_nothing_to_repeat(make_spec: SpecMaker) -> None:
    spec = msgspec.structs.replace(make_spec(snapshot_every_messages=1000), stop_at_end=False)
    publish(spec, COUNTS, end=False)
    process = _process(spec)
    _until(lambda: len(_lines(spec)) >= 7)
    process.terminate()
    process.join(30)
    assert process.exitcode == 0
    written = _lines(spec).count("written 1")
    assert 7 <= written < sum(COUNTS)
    snapshot = _snapshot(spec)
    offsets = {p: at.offset for p, at in snapshot.manifest.positions.items()}
    assert sum(offsets.values()) == written
    assert _committed(spec) == offsets
    publish(spec, [0, 0], starts=COUNTS)
    _, telemetry = _run(msgspec.structs.replace(spec, stop_at_end=True))
    assert telemetry.total("exfm_logit_blocks_total", outcome="written") == sum(COUNTS) - written
    assert telemetry.total("exfm_logit_blocks_total", outcome="identical") == 0


def test_a_finished_teacher_goes_on_when_the_stream_does(make_spec: SpecMaker) -> None:
    spec = make_spec()
    publish(spec, COUNTS)
    loop, _ = _run(spec)
    again, telemetry = _run(spec)
    assert telemetry.total("exfm_logit_blocks_total") == 0
    results = json.loads((Path(spec.folder) / "results" / "teacher.json").read_text())
    assert results["rows"] == 16 * sum(COUNTS)
    assert again._trainer.version == loop._trainer.version


def test_results_describe_every_portfolio(make_spec: SpecMaker) -> None:
    spec = make_spec()
    publish(spec, COUNTS)
    loop, telemetry = _run(spec)
    results = json.loads((Path(spec.folder) / "results" / "teacher.json").read_text())
    assert (results["name"], results["kind"], results["rows"]) == ("kunlun", "teacher", 16 * sum(COUNTS))
    assert results["snapshot_version"] == sum(COUNTS)
    assert results["rows_per_s"] > 0
    assert results["event_to_trained_s"]["p50"] is not None
    by_key = {f"{p['domain']}/{p['objective']}": p for p in results["portfolios"]}
    assert set(by_key) == {"all/click", "all/like", "0/click", "1/click", "1/like"}
    assert by_key["all/click"]["rows"] == by_key["0/click"]["rows"] + by_key["1/click"]["rows"] == 16 * sum(COUNTS)
    assert by_key["1/like"]["logloss"] == loop._trainer.metrics.summary("1/like").logloss
    assert sum(rows for rows, _, _ in by_key["1/like"]["blocks"]) == by_key["1/like"]["rows"]
    assert telemetry.total("exfm_rows_trained_total") == results["rows"]
    assert telemetry.gauges["exfm_lag_records", (("partition", "0"), ("topic", spec.kafka().topics.examples))] <= 1


class _Sometimes(nn.Module):
    """A linear model whose logits are not finite for rows that come at certain times."""

    def __init__(self, bad: dict[int, float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self._bad = bad

    def forward(self, batch: Batch) -> Tensor:
        logits_BK = batch.num_BN[:, :1] * self.weight
        for time_ms, value in self._bad.items():
            hit_B = torch.from_numpy(batch.event_time_ms_B == time_ms)
            logits_BK = torch.where(hit_B[:, None], torch.tensor(value), logits_BK)
        return logits_BK


def test_logits_that_are_not_finite_are_withheld_and_huge_ones_saturated(make_spec: SpecMaker) -> None:
    spec = make_spec()
    publish(spec, COUNTS)
    at = [int(decode_examples(v, SCHEMA)["event_time"][3].value) for v in messages(5)]
    model = _Sometimes({at[1]: float("nan"), at[2]: float("-inf"), at[4]: 1e30})
    loop, telemetry = _run(spec, model=model)
    blocks = _blocks(spec)  # the watermark passed every message
    missing = {(p, o) for p in (0, 1) for o in (1, 2)}
    assert {key for key, block in blocks.items() if block is None} == missing
    assert telemetry.total("exfm_logit_blocks_total", outcome="withheld") == 4
    assert telemetry.total("exfm_train_steps_total", outcome="nonfinite") >= 4
    assert blocks[0, 4].logits[3].tolist() == [65504.0, 65504.0]  # type: ignore[union-attr]
    assert all(np.isfinite(block.logits).all() for block in blocks.values() if block)
    assert loop._trainer.model.state_dict()["weight"].isfinite().all()
    results = json.loads((Path(spec.folder) / "results" / "teacher.json").read_text())
    assert results["logit_blocks"] == {"written": 20, "identical": 0, "refused": 0, "withheld": 4}


def test_a_store_that_is_away_is_waited_for_and_nothing_is_trained_meanwhile(
    make_spec: SpecMaker, tmp_path: Path
) -> None:
    server = start_redis(tmp_path / "redis")
    port = int(server.address.rsplit(":", 1)[1])
    spec = msgspec.structs.replace(make_spec(), redis_url=f"redis://{server.address}/0")
    publish(spec, COUNTS)
    telemetry = RecordingTelemetry()
    fault.arm("teacher.after_train:5:delay")
    try:
        with teacher(spec, telemetry) as loop, _running(loop) as thread:
            _until(lambda: loop._trainer.version == 5)
            server.process.kill()
            server.process.wait()
            _until(lambda: telemetry.gauges.get(("exfm_ready", ())) == 0)
            time.sleep(0.5)
            assert loop._trainer.version == 5
            server = start_redis(tmp_path / "redis", port)
            thread.join(30)
            assert not thread.is_alive()
            assert loop._trainer.version == sum(COUNTS)
            assert telemetry.gauges["exfm_ready", ()] == 1
        assert all(block is not None for block in _blocks(spec).values())
    finally:
        server.stop()


def _until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "never happened"
        time.sleep(0.01)


def test_a_store_that_stays_away_ends_the_wait_with_its_address(make_spec: SpecMaker, tmp_path: Path) -> None:
    server = start_redis(tmp_path / "redis")
    spec = make_spec(put_timeout_s=1.0)
    spec = msgspec.structs.replace(spec, redis_url=f"redis://{server.address}/0")
    publish(spec, COUNTS)
    with teacher(spec) as loop:
        server.stop()
        with pytest.raises(Retryable, match=server.address):
            loop.run(threading.Event())
        assert loop._trainer.version == 0


def test_stop_during_an_outage_ends_at_once_without_the_step(make_spec: SpecMaker, tmp_path: Path) -> None:
    server, stop = start_redis(tmp_path / "redis"), threading.Event()
    spec = msgspec.structs.replace(make_spec(), redis_url=f"redis://{server.address}/0")
    publish(spec, COUNTS)
    fault.arm("teacher.after_train:5:delay")
    with teacher(spec) as loop, _running(loop, stop) as thread:
        _until(lambda: loop._trainer.version == 5)
        server.stop()
        time.sleep(fault.DELAY_S + 0.5)
        stop.set()
        thread.join(5)
        assert not thread.is_alive()
    snapshot = _snapshot(spec)
    assert snapshot.manifest.version == 5
    assert sum(at.offset for at in snapshot.manifest.positions.values()) == 5


def test_a_full_disk_commits_nothing_and_stops_the_teacher_in_the_end(make_spec: SpecMaker) -> None:
    spec = make_spec(snapshot_every_messages=4)
    publish(spec, COUNTS)
    _run(make_spec("unrelated", name="warm"))  # so that nothing below needs to write a file for the first time
    before = _committed(spec)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    telemetry = RecordingTelemetry()
    with teacher(spec, telemetry) as loop:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # no file may grow past this, as on a full disk
        try:
            with pytest.raises(Retryable, match="free space"):
                loop.run(threading.Event())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert loop._trainer.version == 12  # three snapshots were refused
    assert versions(Path(spec.folder) / "snapshots") == []
    assert _committed(spec) == before
    _, telemetry = _run(spec)
    assert telemetry.total("exfm_logit_blocks_total", outcome="identical") == 12
    assert telemetry.total("exfm_logit_blocks_total", outcome="refused") == 0


def test_a_second_teacher_takes_the_partitions_over(make_spec: SpecMaker) -> None:
    spec = make_spec()
    publish(spec, COUNTS)
    fault.arm("teacher.before_put:3:delay")
    errors: list[Fatal] = []

    def first() -> None:
        with teacher(spec) as loop:
            try:
                loop.run(threading.Event())
            except Fatal as error:
                errors.append(error)

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    _until(lambda: fault._plan.passes.get("teacher.before_put", 0) == 3)
    other = spec.store()
    for partition in range(2):
        other.acquire(partition)
    other.close()
    thread.join(30)
    assert "owns partition" in str(errors[0])


def test_one_folder_has_one_writer(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path, 3, RecordingTelemetry())
    with pytest.raises(Fatal, match="another trainer"):
        SnapshotFolder(tmp_path, 3, RecordingTelemetry())
    folder.close()
    SnapshotFolder(tmp_path, 3, RecordingTelemetry()).close()


def test_a_message_that_comes_again_is_refused(make_spec: SpecMaker) -> None:
    spec = make_spec()
    publish(spec, COUNTS)
    telemetry = RecordingTelemetry()
    positions = {0: Position(3), 1: Position(0)}
    with teacher(spec, telemetry, positions=positions) as loop, pytest.raises(Fatal, match="knows its labels"):
        loop.run(threading.Event())
    assert telemetry.total("exfm_invariant_violations_total", invariant="no_peek") == 1


def test_another_life_with_other_weights_is_refused_by_the_store(make_spec: SpecMaker) -> None:
    publish(make_spec(), COUNTS)
    _run(make_spec("one"))
    _, telemetry = _run(make_spec("other", seed=1))
    assert telemetry.total("exfm_logit_blocks_total", outcome="refused") == sum(COUNTS)
