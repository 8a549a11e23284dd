"""Zipper in the teacher: a head per objective and window, labels at the row's own head, served heads in the metrics."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from teacher_case import SCHEMA, rows, teacher_config

from das.examples import JoinedRow, decode_examples, encode_examples
from das.schema import FeatureSchema
from foundation_model.batch import Batch
from foundation_model.features import FeatureEncoder
from foundation_model.trainer import TeacherTrainer

WINDOWS = [{"window_s": 10, "share": 0.5}, {"window_s": 30, "share": 0.3}, {"window_s": 60, "share": 0.2}]
ZIPPED = FeatureSchema.parse(
    SCHEMA.model_dump(mode="json", exclude={"zipper"})
    | {"objectives": [{"name": "click", "window_s": 60}, {"name": "like", "window_s": 30, "domains": ["1"]}]}
    | {"zipper": {"salt": "s", "windows": WINDOWS}}
)
NAMES = ["click@10000ms", "click@30000ms", "click", "like@10000ms", "like"]
OWN = {"click": [0, 1, 2], "like": [3, 4, 4]}
"""The head that the rows of each window train."""


def _rows(count: int, *windows: int) -> list[JoinedRow]:
    """Rows of these windows in turn."""
    return [msgspec.structs.replace(row, window=windows[i % len(windows)]) for i, row in enumerate(rows(count))]


def _encode(joined: list[JoinedRow], encoder: FeatureEncoder) -> Batch:
    return encoder.encode(decode_examples(encode_examples(joined, ZIPPED), ZIPPED, encoder.columns))


@pytest.mark.parametrize("objectives", [None, ("like", "click"), ("like",)])
def test_a_label_stands_at_the_head_of_its_rows_window_and_nowhere_else(objectives: tuple[str, ...] | None) -> None:
    encoder, joined = FeatureEncoder(ZIPPED, objectives=objectives), _rows(60, 0, 1, 2)
    batch, names = _encode(joined, encoder), [head.name for head in encoder.spec.heads]
    assert sorted(names) == sorted(n for n in NAMES if n.partition("@")[0] in (objectives or ("click", "like")))
    assert [names[k] for k in encoder.spec.served] == list(encoder.spec.objectives)
    for row, labels, mask in zip(joined, batch.labels_BK.tolist(), batch.label_mask_BK.tolist(), strict=True):
        known = {
            NAMES[OWN[name][row.window]]: float(label)
            for name, label in zip(("click", "like"), row.labels, strict=True)
            if label is not None and name in encoder.spec.objectives
        }
        assert {names[k] for k, there in enumerate(mask) if there} == set(known)
        assert {names[k]: label for k, label in enumerate(labels) if mask[k]} == known
        assert all(label == 0 for label, there in zip(labels, mask, strict=True) if not there)


def test_the_window_is_read_only_where_windows_have_heads_of_their_own() -> None:
    assert "window" in FeatureEncoder(ZIPPED).columns
    assert "window" not in FeatureEncoder(SCHEMA).columns
    short = {"objectives": [{"name": "click", "window_s": 60}, {"name": "like", "window_s": 10}]}
    schema = FeatureSchema.parse(ZIPPED.model_dump(mode="json") | short)
    assert "window" not in FeatureEncoder(schema, objectives=("like",)).columns


@pytest.mark.parametrize(("oracle", "served"), [(True, {2: 1 / 0.2, 4: 1 / 0.5}), (False, {})])
def test_a_served_heads_label_counts_as_often_as_the_impressions_it_stands_for(
    oracle: bool, served: dict[int, float]
) -> None:
    config = teacher_config(objective_weights={"like": 3.0}, oracle_weighting=oracle)
    trainer = TeacherTrainer(config, ZIPPED)
    batch = _encode(_rows(60, 0, 1, 2), trainer.encoder)
    logits_BK = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    total, count = 0.0, 0
    for row, z_K in zip(_rows(60, 0, 1, 2), logits_BK.tolist(), strict=True):
        for name, label in zip(("click", "like"), row.labels, strict=True):
            if label is not None:
                head = OWN[name][row.window]
                weight = served.get(head, 1.0) * (3.0 if name == "like" else 1.0)
                total += weight * np.log1p(np.exp(-z_K[head] if label else z_K[head]))
                count += 1
    assert trainer.loss(logits_BK, batch).item() == pytest.approx(total / count, rel=1e-5)


def test_a_row_trains_the_backbone_and_its_own_windows_heads_only() -> None:
    trainer = TeacherTrainer(teacher_config(), ZIPPED)
    batch = _encode(_rows(32, 1), trainer.encoder)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    assert trainer.step(trainer.score(batch), batch)
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    heads = {name.split(".")[2] for name in moved if name.startswith(("heads.out.", "heads.trunks."))}
    assert heads == {"1", "4"}
    assert "embeddings.embedding.weight" in moved


def test_metrics_are_of_the_served_heads_on_labels_of_the_full_window() -> None:
    trainer, joined = TeacherTrainer(teacher_config(), ZIPPED), _rows(60, 0, 1, 2)
    batch = _encode(joined, trainer.encoder)
    logits_BK = np.full((60, 5), np.nan, np.float32)
    logits_BK[:, [2, 4]] = np.log([0.25 / 0.75, 0.5 / 0.5])
    trainer.evaluate(logits_BK, batch)
    full = {"click": [r.labels[0] for r in joined if r.window == 2]}
    full["like"] = [r.labels[1] for r in joined if r.window > 0 and r.labels[1] is not None]
    for name, predicted in (("click", 0.25), ("like", 0.5)):
        summary = trainer.metrics.summary(f"all/{name}")
        assert (summary.rows, summary.positives) == (len(full[name]), sum(label or 0 for label in full[name]))
        assert summary.predicted_sum == pytest.approx(predicted * len(full[name]))
    assert {result["objective"] for result in trainer.metrics.results()} == {"click", "like"}
