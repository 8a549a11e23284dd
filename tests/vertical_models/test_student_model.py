"""The student's parts against plain loops, and arms that differ in distillation only."""

from __future__ import annotations

import math

import pytest
import torch
from student_case import SCHEMA, record_batch, student_config, train
from torch import nn

from foundation_model.batch import Batch, JaggedSequence
from vertical_models.config import StudentConfig
from vertical_models.dcnv2 import DCNv2, DCNv2Config
from vertical_models.serving import ServingModel, pad_sequence
from vertical_models.student import Student
from vertical_models.trainer import StudentTrainer

MODES = ("none", "auxiliary", "shared")


def _trainer(mode: str, **more: object) -> StudentTrainer:
    return StudentTrainer(student_config(distillation={"mode": mode, **more}), SCHEMA)


def _student(mode: str, seed: int = 0) -> Student:
    config = student_config(distillation={"mode": mode}, seed=seed)
    return Student(config, config.encoder(SCHEMA).spec)


@pytest.mark.parametrize("mode", MODES[1:])
def test_every_arm_starts_with_the_same_serving_weights(mode: str) -> None:
    torch.manual_seed(123)  # the process's generator must not matter
    none, other = _student("none").serving.state_dict(), _student(mode).serving.state_dict()
    assert none.keys() == other.keys()
    assert all(torch.equal(none[name], other[name]) for name in none)


def test_another_seed_gives_other_weights_and_the_process_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, other = _student("auxiliary").serving.head.weight, _student("auxiliary", 1).serving.head.weight
    assert torch.rand(1) == expected
    assert not torch.equal(first, other)


@pytest.mark.parametrize("mode", MODES[1:])
def test_arms_are_bit_identical_when_the_weight_is_zero(mode: str) -> None:
    none, other = _trainer("none"), _trainer(mode, weight=0.0)
    for trainer in (none, other):
        train(trainer, steps=12)
    ours, theirs = none.student.serving.state_dict(), other.student.serving.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert none.portfolios() == other.portfolios()


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_teacher_with_weight_changes_the_served_model(mode: str) -> None:
    none, other = _trainer("none"), _trainer(mode, weight=3.0)
    for trainer in (none, other):
        train(trainer, steps=4)
    assert not torch.equal(none.student.serving.head.weight, other.student.serving.head.weight)


def test_only_mode_auxiliary_has_an_auxiliary_head() -> None:
    assert [_trainer(mode).student.distill is not None for mode in MODES] == [False, True, False]


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("structure", ["parallel", "stacked"])
def test_dcn_v2_is_its_formula(rank: int, structure: str) -> None:
    config = DCNv2Config.parse({"cross_layers": 3, "cross_rank": rank, "hidden": [5, 4], "structure": structure})
    torch.manual_seed(0)
    model, x0 = DCNv2(config, 7), torch.randn(6, 7)
    x = x0
    for layer in model.cross:
        rows = []
        for b in range(6):
            if rank:
                v, u = layer.weight[0].weight, layer.weight[1]
                wx = u.weight @ (v @ x[b]) + u.bias
            else:
                wx = layer.weight.weight @ x[b] + layer.weight.bias
            rows.append(x0[b] * wx + x[b])
        x = torch.stack(rows)
    deep = x0 if structure == "parallel" else x
    for layer in model.deep:
        deep = deep @ layer.weight.T + layer.bias if isinstance(layer, nn.Linear) else deep.clamp(min=0)
    expected = torch.cat([x, deep], 1) if structure == "parallel" else deep
    torch.testing.assert_close(model(x0), expected)
    assert model.output_width == expected.shape[1]


@pytest.mark.parametrize("length", [1, 3, 6])
def test_padding_keeps_the_latest_events_in_order(length: int) -> None:
    counts = [0, 2, 6, 1]
    total = sum(counts)
    offsets = torch.tensor([0, 0, 2, 8, 9], dtype=torch.int32)
    jagged = JaggedSequence(torch.arange(1, 2 * total + 1).reshape(total, 2), offsets, torch.arange(1.0, total + 1))
    ids, age, lengths = pad_sequence(jagged, length)
    for row, count in enumerate(counts):
        kept = range(int(offsets[row]) + max(0, count - length), int(offsets[row + 1]))
        assert lengths[row] == len(kept)
        for place in range(length):
            event = kept[place] if place < len(kept) else None
            assert ids[row, place].tolist() == ([0, 0] if event is None else jagged.ids_TF[event].tolist())
            assert age[row, place] == (0 if event is None else jagged.age_s[event])


def test_padding_a_batch_without_any_event() -> None:
    empty = JaggedSequence(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int32), torch.zeros(0))
    ids, age, lengths = pad_sequence(empty, 2)
    assert ids.shape == (3, 2, 2)
    assert not any(tensor.any() for tensor in (ids, age, lengths))


def _model_and_batch(**changes: object) -> tuple[ServingModel, Batch, StudentConfig]:
    config = student_config(**changes)
    encoder = config.encoder(SCHEMA)
    return Student(config, encoder.spec).serving, encoder.encode(record_batch(20)), config


def test_a_pooled_history_is_its_formula() -> None:
    model, batch, config = _model_and_batch()
    pool = model.pools[0]
    with torch.no_grad():
        pool.decay.fill_(0.7)
    jagged, inputs = batch.seqs["clicks"], model.inputs(batch)
    found = pool(inputs, model.embeddings(inputs["clicks.ids"]).flatten(2))
    candidate = {"item": 1, "tag": 2}
    for row in range(batch.num_rows):
        first, last = int(jagged.offsets[row]), int(jagged.offsets[row + 1])
        events = list(range(max(first, last - config.inputs.history), last))
        weights = [(1 + float(jagged.age_s[e]) / 3600) ** -0.7 for e in events]
        mean = torch.zeros(2 * config.inputs.dim)
        for weight, event in zip(weights, events, strict=True):
            mean += weight * model.embeddings(jagged.ids_TF[event]).flatten() / (sum(weights) + 1e-6)
        age = math.log1p(float(jagged.age_s[last - 1]) / 3600) if events else 0.0
        matches = [
            sum(int(jagged.ids_TF[e, f] == batch.cat_BC[row, c]) for e in events)
            for f, c in enumerate(candidate.values())
        ]
        extra = torch.tensor([math.log1p(len(events)), age, *(math.log1p(m) for m in matches)])
        torch.testing.assert_close(found[row], torch.cat([mean, extra]), atol=1e-5, rtol=1e-4)
    assert int(jagged.lengths.max()) > config.inputs.history


def test_padding_has_no_effect_on_logits() -> None:
    model, batch, _ = _model_and_batch()
    inputs = model.inputs(batch)
    expected = model(inputs)
    padded = dict(inputs)
    candidate_BF = inputs["categorical"][:, None, 1:3].expand(-1, 3, -1)  # an event in the padding that would match
    padded["clicks.ids"] = torch.cat([inputs["clicks.ids"], candidate_BF], 1)
    padded["clicks.age_s"] = torch.cat([inputs["clicks.age_s"], torch.zeros(batch.num_rows, 3)], 1)
    torch.testing.assert_close(model(padded), expected, atol=1e-6, rtol=1e-6)


def test_a_row_scores_the_same_alone_and_in_a_batch() -> None:
    model, batch, _ = _model_and_batch()
    together = model(model.inputs(batch))
    for row in range(batch.num_rows):
        torch.testing.assert_close(model(model.inputs(batch.slice(row, row + 1)))[0], together[row])


def test_a_student_of_several_domains_reads_the_domain_and_one_of_a_single_domain_does_not() -> None:
    several, batch, _ = _model_and_batch()
    single, _, _ = _model_and_batch(domains=["feed"])
    assert "domain" in several.inputs(batch)
    assert "domain" not in single.inputs(batch)
    inputs = several.inputs(batch)
    moved = inputs | {"domain": (inputs["domain"] + 1) % 3}
    assert not torch.equal(several(inputs), several(moved))


@pytest.mark.parametrize("features", [["user_id"], ["price"], ["clicks"], ["score", "clicks"]])
def test_any_subset_of_features_makes_a_model(features: list[str]) -> None:
    model, batch, _ = _model_and_batch(features=features)
    assert model(model.inputs(batch)).shape == (20, 2)


def test_absurd_numbers_stay_finite() -> None:
    model, batch, _ = _model_and_batch()
    inputs = model.inputs(batch)
    inputs["numeric"] = torch.full_like(inputs["numeric"], 1e30)
    assert torch.isfinite(model(inputs)).all()
