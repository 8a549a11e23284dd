"""Zipper in a student: windows learn from labels and logits of their own, and only the full one leaves the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from student_case import SCHEMA, rows, student_config, teacher_of

from das.errors import Fatal
from das.examples import JoinedRow, example_batch
from das.logit_block import LogitBlock
from das.schema import FeatureSchema
from foundation_model.batch import Batch
from vertical_models.export import TOLERANCE, check_clean, example_inputs, export_program, export_student, load_program
from vertical_models.row_buffer import TrainingBatch
from vertical_models.serving import ServingModel
from vertical_models.trainer import StudentTrainer

WINDOWS = [{"window_s": 10, "share": 0.5}, {"window_s": 30, "share": 0.3}, {"window_s": 60, "share": 0.2}]
ZIPPED = FeatureSchema.parse(
    SCHEMA.model_dump(mode="json", exclude={"zipper"})
    | {"objectives": [{"name": "click", "window_s": 60}, {"name": "like", "window_s": 30, "domains": ["feed"]}]}
    | {"zipper": {"salt": "s", "windows": WINDOWS}}
)
NAMES = ["click@10000ms", "click@30000ms", "click", "like@10000ms", "like"]
SHARE = dict(zip(NAMES, [0.5, 0.3, 0.2, 0.5, 0.5], strict=True))
WEIGHT, ALPHA = {"click": 3.0, "like": 0.5}, {"click": 1.0, "like": 4.0}


def _trainer(schema: FeatureSchema = ZIPPED, **changes: Any) -> StudentTrainer:
    return StudentTrainer(student_config(**changes), schema)


def _rows(count: int) -> list[JoinedRow]:
    return [msgspec.structs.replace(row, window=i % 3) for i, row in enumerate(rows(count))]


def _batch(trainer: StudentTrainer, count: int = 60) -> Batch:
    return trainer.encoder.encode(example_batch(_rows(count), ZIPPED))


def _train(trainer: StudentTrainer, steps: int) -> None:
    whole = _batch(trainer, 32 * steps)
    for step in range(steps):
        batch = whole.slice(32 * step, 32 * (step + 1))
        trainer.train(TrainingBatch(batch, teacher_of(batch, seed=step), []))


def _bce(z_B: torch.Tensor, y_B: torch.Tensor, mask_B: torch.Tensor) -> float:
    return (F.binary_cross_entropy_with_logits(z_B, y_B, reduction="none") * mask_B).mean().item()


@pytest.mark.parametrize("mode", ["auxiliary", "shared"])
@pytest.mark.parametrize("oracle", [True, False])
def test_every_head_learns_from_the_logit_of_its_window_and_the_labels_of_its_rows(mode: str, oracle: bool) -> None:
    settings = {"mode": mode, "weight": WEIGHT} | ({"alpha": ALPHA} if mode == "auxiliary" else {})
    trainer = _trainer(distillation=settings, oracle_weighting=oracle)
    batch, spec = _batch(trainer), trainer.encoder.spec
    assert [head.name for head in spec.heads] == NAMES
    teacher, output = teacher_of(batch), trainer.student(batch)
    expected = 0.0
    for k, head in enumerate(spec.heads):
        objective = spec.objectives[head.objective]
        label_weight = 1 / SHARE[head.name] if head.served and oracle else 1.0
        own = _bce(output.logits_BK[:, k], batch.labels_BK[:, k], batch.label_mask_BK[:, k])
        alpha = ALPHA[objective] if mode == "auxiliary" else 1.0
        target_B = (alpha * torch.sigmoid(teacher.logits_BK[:, k])).clamp(max=1.0)
        learner_BK = output.distilled_BK if mode == "auxiliary" else output.logits_BK
        taught = _bce(learner_BK[:, k], target_B, torch.ones(60))
        expected += label_weight * (own + WEIGHT[objective] * SHARE[head.name] * taught)
    parts = (output.logits_BK, output.distilled_BK, batch.labels_BK, batch.label_mask_BK, teacher)
    assert trainer._objective(*parts).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objectives", [["click", "like"], ["like", "click"], ["like"]])
def test_logits_are_taken_by_head_and_masked_only_where_the_objective_does_not_apply(objectives: list[str]) -> None:
    trainer = _trainer(objectives=objectives)
    batch, taken = _batch(trainer), np.arange(60)
    logits = np.tile(np.arange(5, dtype=np.float32), (60, 1)) + 1
    block = LogitBlock(0, 0, 0, 0, 0, logits)
    targets = trainer.targets(block, taken, batch)
    assert targets is not None
    feed_B = (batch.domain_B == 0).tolist()
    assert 10 < sum(feed_B) < 50
    for k, head in enumerate(trainer.encoder.spec.heads):
        applies = feed_B if head.name.startswith("like") else [True] * 60
        assert targets.mask_BK[:, k].tolist() == applies
        assert targets.logits_BK[:, k].tolist() == [(NAMES.index(head.name) + 1.0) * there for there in applies]
    assert targets.mask_BK.sum() > batch.label_mask_BK.sum()


def test_a_windows_labels_leave_the_other_windows_heads_alone() -> None:
    trainer = _trainer(distillation={"mode": "none"})
    student, batch = trainer.student, _batch(trainer)
    assert student.windows is not None
    for window, moved in (
        (0, {"click@10000ms", "like@10000ms"}),
        (1, {"click@30000ms", "like"}),
        (2, {"click", "like"}),
    ):
        own_B = torch.arange(60) % 3 == window
        logits_BK = student(batch).logits_BK
        mask_BK = batch.label_mask_BK & own_B[:, None]
        loss = trainer._objective(logits_BK, None, batch.labels_BK, mask_BK, None)
        served, windows = torch.autograd.grad(loss, [student.serving.head.weight, student.windows.weight])
        gradients = dict(zip(["click", "like"], served, strict=True))
        gradients |= dict(zip(["click@10000ms", "click@30000ms", "like@10000ms"], windows, strict=True))
        assert {name for name, gradient in gradients.items() if gradient.abs().max() > 0} == moved


def test_progressive_metrics_count_served_logits_on_labels_of_the_full_window() -> None:
    trainer, joined = _trainer(), _rows(60)
    batch = _batch(trainer)
    served_BO = trainer.student.serving(trainer.student.serving.inputs(batch)).detach().double()
    trainer.train(TrainingBatch(batch, None, []))
    full = {
        "click": [r.window == 2 for r in joined],
        "like": [r.window > 0 and r.labels[1] is not None for r in joined],
    }
    for k, (name, counted) in enumerate(full.items()):
        summary = trainer.metrics.summary(f"all/{name}")
        assert summary.rows == sum(counted)
        assert summary.predicted_sum == pytest.approx(float(torch.sigmoid(served_BO[counted, k]).sum()), rel=1e-5)
    assert {portfolio["objective"] for portfolio in trainer.portfolios()} == {"click", "like"}


def test_the_same_seed_starts_the_same_serving_graph_with_and_without_zipper() -> None:
    zipped, plain = _trainer().student, _trainer(SCHEMA).student
    assert plain.windows is None
    weights = plain.serving.state_dict()
    assert zipped.serving.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in zipped.serving.state_dict().items())


def test_only_the_full_windows_heads_are_exported(tmp_path: Path) -> None:
    trainer = _trainer(inputs={"history": 5, "init_std": 0.5})
    _train(trainer, 10)
    manifest = export_student(trainer, tmp_path / "out")
    assert manifest.objectives == ("click", "like")
    serving = trainer.student.serving.state_dict()
    assert {name.partition(".")[0] for name in trainer.student.state_dict()} == {"serving", "windows", "distill"}
    assert set(load_program(tmp_path / "out" / "model.pt2").state_dict) == set(serving)
    weights = safetensors.torch.load_file(tmp_path / "out" / "weights.safetensors")
    assert {name: value.shape for name, value in weights.items()} == {n: v.shape for n, v in serving.items()}
    assert weights["head.weight"].shape[0] == 2
    batch = _batch(trainer)
    with torch.no_grad():
        logits_BK = trainer.student(batch).logits_BK
        inputs = trainer.student.serving.inputs(batch)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    found_BO = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0]
    served = [NAMES.index("click"), NAMES.index("like")]
    np.testing.assert_allclose(found_BO, logits_BK[:, served].numpy(), atol=TOLERANCE, rtol=0)
    assert (logits_BK[:, 2] - logits_BK[:, 0]).abs().max() > 1e-2


class _AllWindows(ServingModel):
    """A serving graph that still answers for a window of its training."""

    def __init__(self, trainer: StudentTrainer) -> None:
        serving = trainer.student.serving
        super().__init__(trainer.config.inputs, trainer.config.backbone, serving.spec, serving.domains)
        assert trainer.student.windows is not None
        self.load_state_dict(serving.state_dict())
        self.windows = trainer.student.windows

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        x_BH = self.represent(inputs)
        return torch.cat([self.head(x_BH), self.windows(x_BH)], dim=1)


def test_a_graph_with_the_weights_of_another_window_is_refused() -> None:
    trainer = _trainer()
    model = _AllWindows(trainer)
    assert model(example_inputs(model, 2)).shape == (2, 5)
    with pytest.raises(Fatal, match=r"holds \['windows.bias', 'windows.weight'\]"):
        check_clean(export_program(model), trainer.student)
