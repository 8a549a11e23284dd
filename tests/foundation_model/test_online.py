"""The teacher on a real stream: no peek, exact resume, steps cut by position."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from teacher_case import SCHEMA, messages, teacher_config
from teacher_process import Spec, publish, teacher
from teacher_rig import (
    COUNTS,
    SpecMaker,
    assert_equal,
    committed_offsets,
    last_snapshot,
    ledger_lines,
    raw_blocks,
    read_blocks,
    run_teacher,
    running,
    start_process,
    until,
)

from das import fault
from das.errors import Retryable
from das.examples import decode_examples
from das.logit_block import LogitBlock
from das.position import Position
from foundation_model.batch import Batch
from foundation_model.trainer import TeacherTrainer


@pytest.mark.parametrize("per_step", [1, 3])
def test_no_block_was_scored_by_weights_that_knew_its_rows(make_spec: SpecMaker, per_step: int) -> None:
    spec = make_spec(messages_per_step=per_step)
    publish(spec, COUNTS)
    loop, telemetry = run_teacher(spec)
    assert loop.positions == {p: Position(count) for p, count in enumerate(COUNTS)}
    assert telemetry.total("exfm_logit_blocks_total", outcome="written") == sum(COUNTS)
    assert telemetry.total("exfm_logit_blocks_total") == sum(COUNTS)
    blocks = read_blocks(spec)
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
    run_teacher(golden)
    points = [p for p in fault.POINTS if p.startswith(("teacher.", "snapshot."))]
    assert len(points) == 7
    for life, point in enumerate(points):
        nth = 1 if "snapshot" in point or "commit" in point else 2 + life % 3
        process = start_process(spec, f"{point}:{nth}:kill")
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, point
    process = start_process(spec)
    process.join(60)
    assert process.exitcode == 0
    outcomes = ledger_lines(spec)
    assert "refused 1" not in outcomes
    assert "identical 1" in outcomes
    assert raw_blocks(spec) == raw_blocks(golden)
    assert_equal(last_snapshot(spec), last_snapshot(golden))
    assert last_snapshot(spec).manifest.version == sum(COUNTS)


def test_steps_of_several_messages_are_cut_alike_after_a_crash(make_spec: SpecMaker) -> None:
    golden = make_spec("golden", name="golden", messages_per_step=5)
    spec = make_spec("crashed", messages_per_step=5)
    publish(golden, COUNTS)
    run_teacher(golden)
    for point in ("teacher.after_put:2:raise", "teacher.after_train:2:raise", "teacher.after_train:1:raise"):
        fault.arm(point)
        with pytest.raises(Retryable):
            run_teacher(spec)
    fault.arm(None)
    _, telemetry = run_teacher(spec)
    assert telemetry.total("exfm_logit_blocks_total", outcome="refused") == 0
    assert_equal(last_snapshot(spec), last_snapshot(golden))


def test_a_step_is_cut_by_position_however_slowly_messages_come(make_spec: SpecMaker) -> None:
    slow, golden = make_spec("slow", messages_per_step=5), make_spec("golden", name="golden", messages_per_step=5)
    publish(slow, [7, 7], end=False)
    with teacher(slow) as loop, running(loop) as thread:
        until(lambda: loop._trainer.version == 2)
        time.sleep(0.5)
        assert loop._trainer.version == 2  # four messages are left, and wait for a fifth
        publish(slow, [7, 3], starts=[7, 7])
        thread.join(30)
        assert not thread.is_alive()
        assert loop._trainer.version == 5
    run_teacher(golden)
    assert_equal(last_snapshot(slow), last_snapshot(golden))


def test_sigterm_leaves_nothing_to_repeat(make_spec: SpecMaker) -> None:
    spec = msgspec.structs.replace(make_spec(snapshot_every_messages=1000), stop_at_end=False)
    publish(spec, COUNTS, end=False)
    process = start_process(spec)
    until(lambda: len(ledger_lines(spec)) >= 7)
    process.terminate()
    process.join(30)
    assert process.exitcode == 0
    written = ledger_lines(spec).count("written 1")
    assert 7 <= written < sum(COUNTS)
    snapshot = last_snapshot(spec)
    offsets = {p: at.offset for p, at in snapshot.manifest.positions.items()}
    assert sum(offsets.values()) == written
    assert committed_offsets(spec) == offsets
    publish(spec, [0, 0], starts=COUNTS)
    _, telemetry = run_teacher(msgspec.structs.replace(spec, stop_at_end=True))
    assert telemetry.total("exfm_logit_blocks_total", outcome="written") == sum(COUNTS) - written
    assert telemetry.total("exfm_logit_blocks_total", outcome="identical") == 0


def test_a_finished_teacher_goes_on_when_the_stream_does(make_spec: SpecMaker) -> None:
    spec = make_spec()
    publish(spec, COUNTS)
    loop, _ = run_teacher(spec)
    again, telemetry = run_teacher(spec)
    assert telemetry.total("exfm_logit_blocks_total") == 0
    results = json.loads((Path(spec.folder) / "results" / "teacher.json").read_text())
    assert results["rows"] == 16 * sum(COUNTS)
    assert again._trainer.version == loop._trainer.version


def test_results_describe_every_portfolio(make_spec: SpecMaker) -> None:
    spec = make_spec()
    publish(spec, COUNTS)
    loop, telemetry = run_teacher(spec)
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
