"""A student's step and its state: predict first, refuse what is not finite, restore to the bit, refuse early."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from student_case import SCHEMA, record_batch, student_config, teacher_of, train

from das.errors import ConfigError
from das.logit_block import LogitBlock
from das.position import Position
from das.telemetry import NullTelemetry, RecordingTelemetry
from foundation_model.metrics import ProgressiveMetrics
from foundation_model.snapshot import SnapshotError, latest_snapshot
from foundation_model.snapshot_folder import SnapshotFolder
from vertical_models.checkpoint import load_trained, resume, save
from vertical_models.config import StudentConfig
from vertical_models.row_buffer import RowBuffer, TrainingBatch
from vertical_models.trainer import StudentTrainer


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[SnapshotFolder]:
    """A snapshot folder of the test's own."""
    made = SnapshotFolder(tmp_path / "vm", 2, NullTelemetry())
    yield made
    made.close()


def _same(a: StudentTrainer, b: StudentTrainer) -> bool:
    pairs = ((a.model_tensors(), b.model_tensors()), (a.state_tensors(), b.state_tensors()))
    return all(x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in pairs)


def test_predictions_are_made_with_the_weights_from_before_the_batch() -> None:
    trainer = StudentTrainer(student_config(), SCHEMA)
    train(trainer, steps=3)
    batch = trainer.encoder.encode(record_batch(32, seed=9))
    with torch.no_grad():
        before = trainer.student(batch).logits_BK.numpy()
    trainer.metrics = ProgressiveMetrics(SCHEMA.domains, trainer.config.objectives)
    trainer.train(TrainingBatch(batch, teacher_of(batch), []))
    expected = ProgressiveMetrics(SCHEMA.domains, trainer.config.objectives)
    labels = batch.labels_BK.numpy(), batch.label_mask_BK.numpy()
    expected.update(before, *labels, batch.domain_B.numpy(), batch.event_time_ms_B)
    assert trainer.metrics.results() == expected.results()
    assert expected.summary("all/click").rows == 32


def test_a_student_learns() -> None:
    trainer = StudentTrainer(student_config(distillation={"mode": "none"}, batch_rows=64), SCHEMA)
    train(trainer, steps=60)
    auc = trainer.metrics.summary("all/click").auc
    assert auc is not None
    assert auc > 0.65


def test_the_teachers_columns_are_picked_by_objective_and_masked_where_one_does_not_apply() -> None:
    trainer = StudentTrainer(student_config(objectives=["like", "click"]), SCHEMA)
    message = record_batch(12)
    rows = np.array([1, 4, 5, 10])
    batch = trainer.encoder.encode(message, rows)
    logits = np.arange(24, dtype=np.float32).reshape(12, 2)  # columns in schema order: click, like
    targets = trainer.targets(LogitBlock(1, 0, 0, 0, 0, logits), rows, batch)
    assert targets is not None
    feed = [name == "feed" for name in message.column("domain").to_pylist()]
    assert targets.mask_BK.tolist() == [[feed[row], True] for row in rows]
    assert targets.logits_BK[:, 1].tolist() == [2.0 * row for row in rows]
    assert targets.logits_BK[:, 0].tolist() == [2.0 * row + 1 if feed[row] else 0.0 for row in rows]
    assert targets.found_B.all()
    assert 0 < sum(feed[row] for row in rows) < 4


def test_rows_without_a_block_are_masked_and_not_counted_as_hits() -> None:
    trainer = StudentTrainer(student_config(), SCHEMA)
    batch = trainer.encoder.encode(record_batch(32))
    targets = trainer.targets(None, np.arange(32), batch)
    assert targets is not None
    assert not targets.mask_BK.any()
    trainer.train(TrainingBatch(batch, targets, []))
    trainer.train(TrainingBatch(batch, teacher_of(batch), []))
    assert (trainer.counts.rows_total, trainer.counts.rows_with_logits) == (64, 32)


def test_rows_are_counted_by_domain() -> None:
    trainer = StudentTrainer(student_config(), SCHEMA)
    train(trainer, steps=5)
    domains = record_batch(5 * 32).column("domain").to_pylist()
    assert trainer.counts.rows.tolist() == [domains.count(name) for name in SCHEMA.domains]


def test_a_step_that_is_not_finite_leaves_the_model_and_is_counted() -> None:
    telemetry = RecordingTelemetry()
    trainer = StudentTrainer(student_config(), SCHEMA, telemetry=telemetry)
    batch = trainer.encoder.encode(record_batch(32))
    before = {name: value.clone() for name, value in trainer.model_tensors().items()}
    bad = teacher_of(batch)
    bad.logits_BK[3, 0] = float("nan")
    assert not trainer.train(TrainingBatch(batch, bad, []))
    assert all(torch.equal(value, before[name]) for name, value in trainer.model_tensors().items())
    assert telemetry.total("exfm_train_steps_total", outcome="nonfinite") == 1
    assert trainer.train(TrainingBatch(batch, teacher_of(batch), []))
    assert (trainer.counts.steps, trainer.counts.steps_nonfinite) == (2, 1)


def test_a_restored_student_goes_on_to_the_same_bits(folder: SnapshotFolder) -> None:
    golden, first = (StudentTrainer(student_config(), SCHEMA) for _ in range(2))
    train(golden, steps=6)
    train(first, steps=6)
    assert save(first, folder, {0: Position(3, 4)}, RowBuffer({}).decisions())
    second = StudentTrainer(student_config(), SCHEMA)
    resumed = resume(second, folder, {0: Position(1), 1: Position(2)})
    assert resumed.positions == {0: Position(3, 4), 1: Position(2)}
    for trainer in (golden, second):
        train(trainer, steps=6, seed=1)
    assert _same(golden, second)
    assert not _same(golden, first)


def test_without_a_snapshot_a_student_begins_at_the_start(folder: SnapshotFolder) -> None:
    trainer = StudentTrainer(student_config(), SCHEMA)
    assert resume(trainer, folder, {0: Position(5)}).positions == {0: Position(5)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_rows": 64}, "batch_rows"),
        ({"seed": 3}, "seed"),
        ({"features": ["item"]}, "features"),
        ({"distillation": {"mode": "shared"}}, "distillation.mode"),
    ],
)
def test_a_snapshot_of_another_config_is_refused(folder: SnapshotFolder, change: dict[str, object], named: str) -> None:
    save(StudentTrainer(student_config(), SCHEMA), folder, {0: Position(1)}, RowBuffer({}).decisions())
    with pytest.raises(ConfigError, match=rf"{named} changed since .*give the student another name"):
        resume(StudentTrainer(student_config(**change), SCHEMA), folder, {0: Position(0)})


def test_a_snapshot_of_another_schema_or_topic_is_refused(folder: SnapshotFolder) -> None:
    save(StudentTrainer(student_config(), SCHEMA), folder, {0: Position(1), 3: Position(1)}, RowBuffer({}).decisions())
    with pytest.raises(ConfigError, match=r"partitions \[3\], which the topic lacks"):
        resume(StudentTrainer(student_config(), SCHEMA), folder, {0: Position(0)})
    other = SCHEMA.model_copy(update={"version": 2})
    with pytest.raises(ConfigError, match="the feature schema changed"):
        resume(StudentTrainer(student_config(), other), folder, {0: Position(0), 3: Position(0)})


def test_other_settings_may_change_between_lives(folder: SnapshotFolder) -> None:
    save(StudentTrainer(student_config(), SCHEMA), folder, {0: Position(1)}, RowBuffer({}).decisions())
    tuned = student_config(snapshot_every_steps=7, distillation={"weight": 9.0}, lookup={"wait_ms": 0})
    assert resume(StudentTrainer(tuned, SCHEMA), folder, {0: Position(0)}).positions == {0: Position(1)}


def test_a_trained_student_is_read_from_its_snapshot_alone(folder: SnapshotFolder) -> None:
    trainer = StudentTrainer(student_config(features=["item", "price"], seed=4), SCHEMA)
    train(trainer, steps=3)
    save(trainer, folder, {0: Position(1)}, RowBuffer({}).decisions())
    path = latest_snapshot(folder.root)
    assert path is not None
    assert _same(load_trained(path, SCHEMA), trainer)
    (path / "config.json").write_text("{}")
    with pytest.raises(SnapshotError, match=r"config\.json"):
        load_trained(path, SCHEMA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domains": ["feeed"]}, r"domains: schema 'shop' has no \['feeed'\]; known: feed, search, mail"),
        ({"objectives": ["lick"]}, r"objectives: schema 'shop' has no \['lick'\]; known: click, like"),
        ({"features": ["prize", "item"]}, r"features: schema 'shop' has no \['prize'\]; known: user_id, item"),
        ({"domains": ["mail"]}, r"'like' applies to the domains \['feed'\] only, .*remove the objective"),
        ({"distillation": {"weight": {"click": 1.0}}}, r"distillation.weight names \['click'\]"),
        ({"tables": {"buckets": {"itm": 9}}}, r"tables.buckets: no table \['itm'\]"),
    ],
)
def test_a_config_that_does_not_fit_the_schema_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudentTrainer(student_config(**change), SCHEMA)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"batch_row": 3}, "did you mean 'batch_rows'"),
        ({"objectives": []}, "objectives"),
        ({"domains": ["feed", "feed"]}, "listed twice"),
        ({"name": "../up"}, "name"),
        ({"backbone": {"kind": "wukong"}}, "dcnv2"),
    ],
)
def test_a_config_that_is_not_one_is_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudentConfig.parse({"name": "vm", "objectives": ["click"]} | data)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no GPU"):
        student_config(device="cuda").torch_device()
    assert student_config(device="auto").torch_device().type == "cpu"
