"""The teacher's training step, without the stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_case import SCHEMA, messages, teacher_config
from torch import Tensor, nn

from das.errors import ConfigError
from das.examples import decode_examples
from das.position import Position
from das.telemetry import RecordingTelemetry
from foundation_model.batch import Batch
from foundation_model.snapshot import Snapshot, read_snapshot, write_snapshot
from foundation_model.trainer import TeacherConfig, TeacherTrainer, publish_metrics


def _batches(trainer: TeacherTrainer, count: int) -> list[Batch]:
    return [
        trainer.encoder.encode(decode_examples(value, SCHEMA, trainer.encoder.columns)) for value in messages(count, 64)
    ]


def _train(trainer: TeacherTrainer, batches: list[Batch]) -> None:
    for batch in batches:
        logits_BK = trainer.score(batch)
        trainer.evaluate(logits_BK.detach().numpy(), batch)
        assert trainer.step(logits_BK, batch)


def _saved(trainer: TeacherTrainer, root: Path) -> Snapshot:
    path = write_snapshot(
        root,
        trainer.version,
        model=trainer.model.state_dict(),
        state=trainer.state_tensors(),
        config=trainer.config.model_dump(mode="json"),
        schema_fingerprint=trainer.schema.fingerprint,
        positions={0: Position(trainer.version)},
        trained_through_ms=trainer.trained_through_ms,
        steps=trainer.optimizers.steps,
    )
    return read_snapshot(path)


def _equal(a: TeacherTrainer, b: TeacherTrainer) -> None:
    for x, y in ((a.model.state_dict(), b.model.state_dict()), (a.state_tensors(), b.state_tensors())):
        assert x.keys() == y.keys()
        assert [name for name in x if not torch.equal(x[name], y[name])] == []


def test_the_teacher_learns_the_stream() -> None:
    trainer = TeacherTrainer(teacher_config(optimizer={"lr": 1e-3, "table_lr": 0.05}), SCHEMA)
    _train(trainer, _batches(trainer, 150))
    assert trainer.metrics.summary("all/click").rows == trainer.rows == 150 * 64
    assert trainer.version == trainer.optimizers.steps == 150
    recent_ne = trainer.metrics.recent_ne("all/click", 2)
    assert recent_ne is not None
    assert recent_ne < 0.85  # 1 is knowing the base rate only; the noise of the labels leaves 0.72


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    straight = TeacherTrainer(teacher_config(), SCHEMA)
    batches = _batches(straight, 12)
    _train(straight, batches)
    first = TeacherTrainer(teacher_config(), SCHEMA)
    _train(first, batches[:5])
    second = TeacherTrainer(teacher_config(), SCHEMA)
    second.load(_saved(first, tmp_path))
    assert (second.version, second.rows) == (5, 5 * 64)
    _train(second, batches[5:])
    _equal(second, straight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_teacher_tracks_the_cpu_one_and_resumes(tmp_path: Path) -> None:
    host, gpu = TeacherTrainer(teacher_config(), SCHEMA), TeacherTrainer(teacher_config(device="cuda"), SCHEMA)
    for batch in _batches(host, 4):
        on_gpu = batch.to(gpu.device)
        expected_BK, logits_BK = host.score(batch), gpu.score(on_gpu)
        torch.testing.assert_close(logits_BK.cpu(), expected_BK, rtol=1e-2, atol=1e-3)
        assert host.step(expected_BK, batch)
        assert gpu.step(logits_BK, on_gpu)
    second = TeacherTrainer(teacher_config(device="cuda"), SCHEMA)
    second.load(_saved(gpu, tmp_path))
    _equal(second, gpu)
    assert second.step(second.score(on_gpu), on_gpu)


def test_loss_is_the_weighted_mean_over_known_labels() -> None:
    trainer = TeacherTrainer(teacher_config(objective_weights={"like": 3.0}), SCHEMA)
    batch = _batches(trainer, 1)[0]
    logits_BK = torch.randn(batch.num_rows, 2)
    total, count = 0.0, 0
    for z, y, known in zip(logits_BK, batch.labels_BK, batch.label_mask_BK, strict=True):
        for k, weight in ((0, 1.0), (1, 3.0)):
            if known[k]:
                p = 1 / (1 + np.exp(-float(z[k])))
                total -= weight * (np.log(p) if y[k] else np.log(1 - p))
                count += 1
    assert 64 < count < 128
    assert trainer.loss(logits_BK, batch).item() == pytest.approx(total / count, rel=1e-5)


def test_a_batch_without_labels_leaves_the_weights_finite() -> None:
    trainer = TeacherTrainer(teacher_config(), SCHEMA)
    batch = _batches(trainer, 1)[0]
    batch.label_mask_BK.fill_(False)
    assert trainer.loss(trainer.score(batch), batch).item() == 0.0
    assert trainer.step(trainer.score(batch), batch)
    assert all(t.isfinite().all() for t in trainer.model.state_dict().values())


class _Broken(nn.Module):
    """Finite weights, one logit that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, batch: Batch) -> Tensor:
        logits_BK = self.weight * torch.ones(batch.num_rows, 2)
        return logits_BK + torch.tensor([0.0, float("nan")])


def test_a_non_finite_step_is_counted_and_not_taken() -> None:
    telemetry = RecordingTelemetry()
    trainer = TeacherTrainer(teacher_config(), SCHEMA, model=_Broken(), telemetry=telemetry)
    batch = _batches(trainer, 1)[0]
    logits_BK = trainer.score(batch)
    trainer.evaluate(logits_BK.detach().numpy(), batch)
    assert not trainer.step(logits_BK, batch)
    assert trainer.model.weight.tolist() == [1.0, 1.0]
    assert (trainer.version, trainer.optimizers.steps, trainer.rows, trainer.trained_through_ms) == (1, 0, 0, 0)
    assert telemetry.total("exfm_train_steps_total", outcome="nonfinite") == 1
    assert telemetry.total("exfm_rows_trained_total") == 0
    assert np.isfinite(trainer.metrics.summary("1/like").logloss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": {"default_buckets": 65}}, "tables changed"),
        ({"seed": 1}, "seed changed"),
        ({"eval_from": "2022-05-01T00:00:00Z"}, "eval_from changed"),
        ({"model": {"preset": "small", "width": 16}}, "model changed"),
    ],
)
def test_a_snapshot_of_another_config_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    snapshot = _saved(TeacherTrainer(teacher_config(), SCHEMA), tmp_path)
    with pytest.raises(ConfigError, match=message):
        TeacherTrainer(teacher_config(**changes), SCHEMA).load(snapshot)


def test_a_snapshot_of_another_schema_is_refused(tmp_path: Path) -> None:
    snapshot = _saved(TeacherTrainer(teacher_config(), SCHEMA), tmp_path)
    other = SCHEMA.model_copy(update={"version": 2})
    with pytest.raises(ConfigError, match="another feature schema"):
        TeacherTrainer(teacher_config(), other).load(snapshot)


def test_other_learning_rates_are_taken_over(tmp_path: Path) -> None:
    snapshot = _saved(TeacherTrainer(teacher_config(), SCHEMA), tmp_path)
    TeacherTrainer(teacher_config(optimizer={"lr": 1e-4}, keep_snapshots=9), SCHEMA).load(snapshot)


def test_config_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        TeacherConfig.parse({"sed": 1})
    with pytest.raises(ConfigError, match="timezone"):
        TeacherConfig.parse({"eval_from": "2022-05-01T00:00:00"})
    with pytest.raises(ConfigError, match=r"buy.*known: click, like"):
        TeacherTrainer(teacher_config(objective_weights={"buy": 1.0}), SCHEMA)
    assert teacher_config(eval_from="2022-05-01T00:00:00Z").eval_from_ms == 1_651_363_200_000
    assert teacher_config(eval_from=1_651_363_200_123).eval_from_ms == 1_651_363_200_123


def test_gauges_name_every_portfolio() -> None:
    telemetry = RecordingTelemetry()
    trainer = TeacherTrainer(teacher_config(), SCHEMA)
    _train(trainer, _batches(trainer, 2))
    publish_metrics(trainer.metrics, telemetry)
    assert telemetry.gauges["exfm_auc", (("portfolio", "1/like"),)] == trainer.metrics.summary("1/like").auc
    assert {dict(labels)["portfolio"] for _, labels in telemetry.gauges} == set(trainer.metrics.keys)
