"""Zipper from the replay to the export, on a real broker and a real Redis: windows, blocks, metrics, served heads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import torch
import yaml
from pipeline import KUAIRAND, MODEL, settings
from prometheus_client import CollectorRegistry

from das.deadline import Deadline
from das.examples import decode_examples
from das.logit_block import decode_block
from das.schema import FeatureSchema
from das.stream import TopicPartition, TopicsConfig, create_topics, read_tail
from foundation_model.snapshot import latest_snapshot
from services import das_main, logs, replay_main, student_main, teacher_main
from services.metrics import PrometheusTelemetry
from services.process import Context
from services.settings import Settings, load
from services.wiring import logit_store, student_snapshots
from vertical_models.checkpoint import load_trained
from vertical_models.export import TOLERANCE, example_inputs

ROWS = 400
WINDOWS = [{"window_s": 30, "share": 0.4}, {"window_s": 600, "share": 0.3}, {"window_s": 1800, "share": 0.3}]
HEADS = ["click@30000ms", "click", "long_view@30000ms", "long_view@600000ms", "long_view"]
SERVED = {"click": 1, "long_view": 4}


def _settings(folder: Path, kafka_bootstrap: str, redis_url: str, prefix: str) -> Path:
    """The first rows of the bundled stream under a schema with Zipper; one teacher, one distilled student."""
    folder.mkdir()
    schema = yaml.safe_load((KUAIRAND / "schema.yaml").read_text()) | {"zipper": {"salt": "s", "windows": WINDOWS}}
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    topics = {name: f"{prefix}-{name}" for name in TopicsConfig.model_fields}
    return settings(
        folder,
        rows=ROWS,
        schema_file=str(folder / "schema.yaml"),
        embedded={},
        kafka={"bootstrap": kafka_bootstrap, "partitions": 2, "topics": topics},
        redis={"url": redis_url},
        teacher={"device": "cpu", "model": MODEL, "logit_dtype": "float32", "snapshot_every_messages": 5},
        students=[{"name": "vm", "objectives": ["long_view", "click"], "batch_rows": 64}],
    )


def _run(name: str, work: Callable[[Context], None], found: Settings) -> None:
    """One process's work, in this thread."""
    telemetry = PrometheusTelemetry(CollectorRegistry())
    work(Context(name, found, telemetry, threading.Event(), logs.get_logger(name)))


def _examples(found: Settings, schema: FeatureSchema) -> dict[tuple[int, int], pa.RecordBatch]:
    """Every message of the topic by (partition, offset)."""
    places = (TopicPartition(found.kafka.topics.examples, number) for number in range(found.kafka.partitions))
    records = (record for place in places for record in read_tail(found.kafka, place, 10_000, Deadline.after(20)))
    return {(r.partition, r.offset): decode_examples(r.value, schema) for r in records if r.value}


def _results(found: Settings, name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((found.run_dir / "results" / f"{name}.json").read_text())
    return {p["objective"]: p for p in results["portfolios"] if p["domain"] == "all"} | {"whole": results}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, kafka_bootstrap: str, redis_url: str) -> Settings:
    """Everything has run to the end of the stream."""
    folder = tmp_path_factory.mktemp("zipper")
    path = _settings(folder / "run", kafka_bootstrap, redis_url, f"zip{folder.name[-4:]}{id(folder)}")
    found = load(path, {})
    create_topics(found.kafka)
    _run("replay", lambda context: replay_main.replay(context, {}), found)
    for name, work in (("das", das_main.join), ("teacher", teacher_main.train), ("vm", student_main.train)):
        _run(name, work, found)
    assert student_main.export("vm", path, folder / "export") == 0
    return found


@pytest.fixture(scope="module")
def schema(finished: Settings) -> FeatureSchema:
    """The schema with Zipper."""
    return FeatureSchema.load(finished.schema_file)


def test_every_impression_is_one_example_in_the_window_it_is_hashed_into(
    finished: Settings, schema: FeatureSchema
) -> None:
    assert schema.zipper is not None
    rows = [row for batch in _examples(finished, schema).values() for row in batch.to_pylist()]
    assert len({row["impression_id"] for row in rows}) == len(rows) == ROWS
    assert all(row["window"] == schema.zipper.assign(row["impression_id"]) for row in rows)
    assert {row["window"] for row in rows} == {0, 1, 2}


def test_a_block_has_a_column_per_head_and_the_metrics_are_of_its_served_ones(
    finished: Settings, schema: FeatureSchema
) -> None:
    assert [head.name for head in schema.heads] == HEADS
    examples = _examples(finished, schema)
    with logit_store(finished, "kunlun") as store:
        blocks = {at: decode_block(store.fetch(at[0], [at[1]]).blocks[0] or b"") for at in examples}
    assert {block.logits.shape[1] for block in blocks.values()} == {len(HEADS)}
    for first_full, (name, head) in enumerate(SERVED.items(), start=1):
        logits, labels = [], []
        for at, batch in examples.items():
            full_B = np.array(batch.column("window")) >= first_full
            logits.append(blocks[at].logits[full_B, head].astype(np.float64))
            labels.append(np.array(batch.column(name))[full_B])
        found = _results(finished, "teacher")[name]
        assert 0 < found["rows"] < ROWS
        assert (found["rows"], found["positives"]) == (sum(map(len, labels)), int(np.concatenate(labels).sum()))
        predicted = 1 / (1 + np.exp(-np.concatenate(logits)))
        assert found["predicted_sum"] == pytest.approx(predicted.sum(), rel=1e-9)
        assert _results(finished, "vm")[name]["rows"] == found["rows"]


def test_the_student_finds_every_logit_and_exports_one_output_per_objective(
    finished: Settings, schema: FeatureSchema
) -> None:
    whole = _results(finished, "vm")["whole"]
    assert (whole["rows"], whole["hit_rate"]) == (ROWS, 1.0)
    newest = latest_snapshot(student_snapshots(finished, "vm"))
    assert newest is not None
    trainer = load_trained(newest, schema)
    student, names = trainer.student, [head.name for head in trainer.encoder.spec.heads]
    batch = trainer.encoder.encode(next(iter(_examples(finished, schema).values())))
    inputs = example_inputs(student.serving, 50)
    with torch.no_grad():
        served_BO = student(batch).logits_BK[:, [names.index("long_view"), names.index("click")]]
        assert torch.equal(served_BO, student.serving(student.serving.inputs(batch)))
        expected_BO = student.serving(inputs).numpy()
    folder = finished.run_dir.parents[1] / "export"
    assert json.loads((folder / "manifest.json").read_text())["objectives"] == ["long_view", "click"]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (found_BO,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    assert found_BO.shape == (50, 2)
    np.testing.assert_allclose(found_BO, expected_BO, atol=TOLERANCE, rtol=0)
