"""The teacher when things around it break: bounded waits, nothing dropped uncounted, one owner."""

from __future__ import annotations

import json
import resource
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from teacher_case import SCHEMA, messages
from teacher_process import publish, teacher
from teacher_rig import (
    COUNTS,
    SpecMaker,
    committed_offsets,
    last_snapshot,
    read_blocks,
    run_teacher,
    running,
    until,
)
from torch import Tensor, nn

from das import fault
from das.errors import Fatal, Retryable
from das.examples import decode_examples
from das.position import Position
from das.telemetry import RecordingTelemetry
from foundation_model.batch import Batch
from foundation_model.snapshot import versions
from foundation_model.snapshot_folder import SnapshotFolder
from services.embedded import start_redis


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
    loop, telemetry = run_teacher(spec, model=model)
    blocks = read_blocks(spec)  # the watermark passed every message
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
        with teacher(spec, telemetry) as loop, running(loop) as thread:
            until(lambda: loop._trainer.version == 5)
            server.process.kill()
            server.process.wait()
            until(lambda: telemetry.gauges.get(("exfm_ready", ())) == 0)
            time.sleep(0.5)
            assert loop._trainer.version == 5
            server = start_redis(tmp_path / "redis", port)
            thread.join(30)
            assert not thread.is_alive()
            assert loop._trainer.version == sum(COUNTS)
            assert telemetry.gauges["exfm_ready", ()] == 1
        assert all(block is not None for block in read_blocks(spec).values())
    finally:
        server.stop()


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
    with teacher(spec) as loop, running(loop, stop) as thread:
        until(lambda: loop._trainer.version == 5)
        server.stop()
        time.sleep(fault.DELAY_S + 0.5)
        stop.set()
        thread.join(5)
        assert not thread.is_alive()
    snapshot = last_snapshot(spec)
    assert snapshot.manifest.version == 5
    assert sum(at.offset for at in snapshot.manifest.positions.values()) == 5


def test_a_full_disk_commits_nothing_and_stops_the_teacher_in_the_end(make_spec: SpecMaker) -> None:
    spec = make_spec(snapshot_every_messages=4)
    publish(spec, COUNTS)
    run_teacher(make_spec("unrelated", name="warm"))  # so that nothing below needs to write a file for the first time
    before = committed_offsets(spec)
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
    assert committed_offsets(spec) == before
    _, telemetry = run_teacher(spec)
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
    until(lambda: fault._plan.passes.get("teacher.before_put", 0) == 3)
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
    run_teacher(make_spec("one"))
    _, telemetry = run_teacher(make_spec("other", seed=1))
    assert telemetry.total("exfm_logit_blocks_total", outcome="refused") == sum(COUNTS)
