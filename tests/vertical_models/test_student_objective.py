"""The loss of a student: what reaches the backbone, what masks do, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from student_case import SCHEMA, record_batch, student_config, teacher_of
from torch import Tensor

from das.errors import ConfigError
from foundation_model.batch import Batch
from vertical_models.objective import (
    DistillationConfig,
    StudentObjective,
    TeacherTargets,
    masked_loss,
    scale_gradient,
    scale_labels,
)
from vertical_models.student import Student
from vertical_models.trainer import StudentTrainer

WEIGHT, BETA, ALPHA = {"click": 3.0, "like": 0.5}, {"click": 2.0, "like": 7.0}, {"click": 1.0, "like": 4.0}


def _gradient(student: Student, loss: Tensor) -> Tensor:
    """The gradient of the backbone's last layer."""
    weight = student.serving.backbone.deep[0].weight
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    return gradient


def _student(**distillation: object) -> tuple[Student, Batch, StudentObjective]:
    trainer = StudentTrainer(student_config(distillation=distillation), SCHEMA)
    return trainer.student, trainer.encoder.encode(record_batch(24)), trainer._objective


def _total(student: Student, batch: Batch, objective: StudentObjective, teacher: TeacherTargets | None) -> Tensor:
    output = student(batch)
    return objective(output.logits_BK, output.distilled_BK, batch.labels_BK, batch.label_mask_BK, teacher)


def test_backbone_gradient_is_served_plus_weight_times_beta_times_distilled() -> None:
    student, batch, objective = _student(mode="auxiliary", weight=WEIGHT, beta=BETA, alpha=ALPHA)
    teacher = teacher_of(batch)
    output = student(batch)
    served = _gradient(student, masked_loss(output.logits_BK, batch.labels_BK, batch.label_mask_BK))
    expected = served.clone()
    x_BH = student.serving.represent(student.serving.inputs(batch))
    assert student.distill is not None
    for k, name in enumerate(("click", "like")):
        target = (ALPHA[name] * torch.sigmoid(teacher.logits_BK[:, k])).clamp(max=1)
        plain = F.binary_cross_entropy_with_logits(student.distill.heads[k](x_BH)[:, 0], target)  # no GS
        expected += WEIGHT[name] * BETA[name] * _gradient(student, plain)
    torch.testing.assert_close(_gradient(student, _total(student, batch, objective, teacher)), expected)
    assert (expected - served).abs().max() > 1e-3


def test_the_auxiliary_heads_own_gradient_is_not_scaled_by_beta() -> None:
    for beta in (1.0, 10.0):
        student, batch, objective = _student(mode="auxiliary", weight=2.0, beta=beta)
        assert student.distill is not None
        weight = student.distill.heads[0][0].weight
        (found,) = torch.autograd.grad(_total(student, batch, objective, teacher_of(batch)), weight)
        x_BH = student.serving.represent(student.serving.inputs(batch)).detach()
        target = torch.sigmoid(teacher_of(batch).logits_BK[:, 0])
        plain = 2.0 * F.binary_cross_entropy_with_logits(student.distill.heads[0](x_BH)[:, 0], target)
        torch.testing.assert_close(found, torch.autograd.grad(plain, weight)[0])


def test_shared_mode_puts_the_teachers_target_on_the_served_head() -> None:
    student, batch, objective = _student(mode="shared", weight=4.0)
    teacher = teacher_of(batch)
    served_BK = student(batch).logits_BK
    expected = masked_loss(served_BK, batch.labels_BK, batch.label_mask_BK)
    expected = expected + 4.0 * masked_loss(served_BK, torch.sigmoid(teacher.logits_BK), teacher.mask_BK)
    torch.testing.assert_close(_total(student, batch, objective, teacher), expected)


def test_gradient_scaling_is_the_identity_forward() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = scale_gradient(x, 3.0)
    assert torch.equal(x, y)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 3.0))


def test_label_scaling_stops_at_one() -> None:
    assert scale_labels(torch.tensor([0.1, 0.3, 0.9]), 3.0).tolist() == pytest.approx([0.3, 0.9, 1.0])


def test_a_masked_label_or_logit_has_no_effect_whatever_its_value() -> None:
    student, batch, objective = _student(mode="auxiliary", weight=2.0)
    assert not batch.label_mask_BK.all()
    teacher = teacher_of(batch)
    mask = torch.rand(teacher.mask_BK.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    assert student.distill is not None
    weights = [student.serving.backbone.deep[0].weight, student.serving.head.weight, *student.distill.parameters()]
    found = []
    for value in (0.0, 1.0):
        labels = torch.where(batch.label_mask_BK, batch.labels_BK, value)
        logits = torch.where(mask, teacher.logits_BK, 1000 * value)
        output = student(batch)
        targets = TeacherTargets(logits, mask, mask.any(1))
        loss = objective(output.logits_BK, output.distilled_BK, labels, batch.label_mask_BK, targets)
        found.append((loss, *torch.autograd.grad(loss, weights)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_how_much_a_row_counts_does_not_depend_on_its_neighbors_masks() -> None:
    logits = torch.zeros(4, 1, requires_grad=True)
    gradients = []
    for mask in ([True, True, True, True], [True, False, False, False]):
        loss = masked_loss(logits, torch.ones(4, 1), torch.tensor(mask)[:, None])
        gradients.append(torch.autograd.grad(loss, logits)[0])
    assert gradients[0][0] == gradients[1][0] != 0
    assert gradients[1][1:].abs().max() == 0


def test_without_any_logits_only_hard_labels_count() -> None:
    student, batch, objective = _student(mode="auxiliary", weight=10.0)
    nothing = torch.zeros_like(batch.label_mask_BK)
    teacher = TeacherTargets(nothing.float(), nothing, nothing[:, 0])
    hard = masked_loss(student(batch).logits_BK, batch.labels_BK, batch.label_mask_BK)
    assert torch.equal(_gradient(student, _total(student, batch, objective, teacher)), _gradient(student, hard))


def test_settings_that_a_mode_does_not_read_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not read \['alpha', 'beta'\].*mode: auxiliary"):
        DistillationConfig.parse({"mode": "shared", "beta": 3, "alpha": 2})


@pytest.mark.parametrize("values", [{"weight": -1}, {"alpha": 0}, {"beta": {"click": 5000}}, {"weight": float("nan")}])
def test_values_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="is not in"):
        DistillationConfig.parse(values)


def test_values_per_objective_must_name_the_students_objectives() -> None:
    config = DistillationConfig.parse({"weight": {"click": 1.0, "lick": 2.0}})
    with pytest.raises(ConfigError, match=r"distillation.weight names \['click', 'lick'\].*\['click', 'like'\]"):
        config.per_objective("weight", ("click", "like"))
