"""What is exported: the serving graph alone, equal to the student, and a manifest good enough to feed it."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
import xxhash
from student_case import SCHEMA, rows, student_config, train

from das.errors import ConfigError, Fatal
from das.examples import JoinedRow, example_batch
from vertical_models import export
from vertical_models.export import TOLERANCE, check_clean, check_parity, export_program, export_student, load_program
from vertical_models.serving import ServingModel
from vertical_models.trainer import StudentTrainer

MASK = 2**64 - 1


@pytest.fixture(scope="module")
def trained() -> StudentTrainer:
    """A student that was distilled into."""
    trainer = StudentTrainer(student_config(inputs={"history": 5, "init_std": 0.5}), SCHEMA)
    train(trainer, steps=20)
    return trainer


@pytest.fixture(scope="module")
def exported(trained: StudentTrainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export."""
    target = tmp_path_factory.mktemp("export") / "vm"
    export_student(trained, target)
    return target


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def _xxh64(text: str) -> int:
    return int(xxhash.xxh64_intdigest(text.encode()))


class PlainEncoder:
    """What a serving team would write from manifest.json alone, one row at a time, in plain Python."""

    def __init__(self, manifest: dict[str, Any]) -> None:
        self.encoding = manifest["encoding"]
        self.tables = {table["name"]: table for table in self.encoding["tables"]}

    def id(self, column: dict[str, Any], value: Any) -> int:
        table = self.tables[column["table"]]
        if value is None:
            return int(table["offset"])
        number = _xxh64(value) if column["dtype"] == "string" else value & MASK
        bucket = _splitmix64(number ^ _xxh64(table["name"])) % (table["size"] - 1) + 1
        return int(table["offset"]) + bucket

    def number(self, spec: dict[str, Any], value: float | None) -> float:
        if spec["transform"] == "missing":
            return float(value is None)
        if value is None:
            return 0.0
        scaled = np.log1p(max(value, 0)) if spec["transform"] == "log1p" else value
        limit = self.encoding["numeric_limit"]
        return float(np.clip((scaled - spec["mean"]) / spec["std"], -limit, limit))

    def row(self, row: JoinedRow) -> dict[str, Any]:
        features = row.impression.features
        out = {
            "categorical": [self.id(c, getattr(features, c["name"])) for c in self.encoding["categorical"]],
            "numeric": [self.number(n, getattr(features, n["name"])) for n in self.encoding["numeric"]],
            "domain": self.encoding["domains"].index(row.impression.domain),
        }
        for sequence in self.encoding["sequences"]:
            events = getattr(features, sequence["name"])
            length = sequence["length"]
            times = events.time_ms[-length:]
            pad = length - len(times)
            columns = [(f, getattr(events, f["name"])[-length:]) for f in sequence["fields"]]
            ids = [[self.id(field, values[i]) for field, values in columns] for i in range(len(times))]
            ages = [(row.impression.event_time - t) / 1000 for t in times]
            out[f"{sequence['name']}.ids"] = ids + [[0] * len(columns)] * pad
            out[f"{sequence['name']}.age_s"] = ages + [0.0] * pad
            out[f"{sequence['name']}.length"] = len(times)
        return out


def _plain_inputs(folder: Path, some: list[JoinedRow]) -> dict[str, np.ndarray]:
    manifest = json.loads((folder / "manifest.json").read_text())
    encoded = [PlainEncoder(manifest).row(row) for row in some]
    return {i["name"]: np.array([row[i["name"]] for row in encoded], i["dtype"]) for i in manifest["inputs"]}


def _expected(trainer: StudentTrainer, some: list[JoinedRow]) -> np.ndarray:
    """Logits of the student itself, through its own encoder."""
    with torch.no_grad():
        logits: np.ndarray = trainer.student(trainer.encoder.encode(example_batch(some, SCHEMA))).logits_BK.numpy()
    return logits


@pytest.mark.parametrize("count", [1, 2, 50])
def test_both_graphs_fed_from_the_manifest_alone_equal_the_student(
    trained: StudentTrainer, exported: Path, count: int
) -> None:
    some = rows(count, seed=77)
    expected, inputs = _expected(trained, some), _plain_inputs(exported, some)
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    np.testing.assert_allclose(session.run(["logits"], inputs)[0], expected, atol=TOLERANCE, rtol=0)
    program = load_program(exported / "model.pt2").module()
    found = program({name: torch.from_numpy(value) for name, value in inputs.items()})
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=TOLERANCE, rtol=0)
    assert np.ptp(expected) > 0.1 or count == 1


def test_the_graphs_hold_the_serving_weights_and_no_teacher_input(trained: StudentTrainer, exported: Path) -> None:
    serving = trained.student.serving.state_dict()
    auxiliary = {f"distill.{name}" for name in trained.student.distill.state_dict()}  # type: ignore[union-attr]
    assert set(trained.student.state_dict()) == {f"serving.{name}" for name in serving} | auxiliary
    assert set(load_program(exported / "model.pt2").state_dict) == set(serving)
    assert set(safetensors.torch.load_file(exported / "weights.safetensors")) == set(serving)
    graph = onnx.load(exported / "model.onnx").graph
    assert {i.name for i in graph.input} == {
        "categorical", "numeric", "domain", "clicks.ids", "clicks.age_s", "clicks.length"
    }  # fmt: skip
    held = sum(int(np.prod(i.dims)) for i in graph.initializer)
    own = sum(value.numel() for value in serving.values())
    assert own <= held < own + 64  # and a few constants, such as shapes
    assert b"distill" not in (exported / "model.onnx").read_bytes() + (exported / "model.pt2").read_bytes()


def test_a_distilled_students_graph_is_that_of_one_trained_without(trained: StudentTrainer) -> None:
    alone = StudentTrainer(student_config(inputs={"history": 5}, distillation={"mode": "none"}), SCHEMA)
    graphs = [[node.target for node in export_program(t.student.serving).graph.nodes] for t in (trained, alone)]
    assert graphs[0] == graphs[1]


def test_the_manifest_describes_its_files_and_its_origin(trained: StudentTrainer, exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in exported.iterdir()} - {"manifest.json"}
    for name, entry in manifest["files"].items():
        data = (exported / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest["version"] == trained.counts.steps == 20
    assert manifest["schema_fingerprint"] == f"{SCHEMA.fingerprint:016x}"
    assert manifest["objectives"] == ["click", "like"]


@pytest.mark.parametrize("features", [["item"], ["price"], ["clicks", "score"]])
def test_students_of_few_features_are_exported_too(tmp_path: Path, features: list[str]) -> None:
    trainer = StudentTrainer(student_config(features=features, domains=["feed"]), SCHEMA)
    export_student(trainer, tmp_path / "out")
    some = rows(5)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    inputs = _plain_inputs(tmp_path / "out", some)
    found = session.run(["logits"], {i.name: inputs[i.name] for i in session.get_inputs()})[0]
    np.testing.assert_allclose(found, _expected(trainer, some), atol=TOLERANCE, rtol=0)


class _Leaky(ServingModel):
    """A serving graph that somebody gave a teacher's input and weights of its own."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.distill = torch.nn.Linear(1, 2)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().forward(inputs) + self.distill(inputs["numeric"][:, :1])


def _other(trained: StudentTrainer, cls: type[ServingModel] = ServingModel) -> ServingModel:
    config, serving = trained.config, trained.student.serving
    model = cls(config.inputs, config.backbone, serving.spec, serving.domains)
    model.load_state_dict(serving.state_dict(), strict=False)
    return model


def test_a_graph_with_weights_that_are_not_the_serving_graphs_is_refused(trained: StudentTrainer) -> None:
    with pytest.raises(Fatal, match=r"holds \['distill.bias', 'distill.weight'\]"):
        check_clean(export_program(_other(trained, _Leaky)), trained.student)


def test_a_graph_with_other_values_is_refused(trained: StudentTrainer) -> None:
    model = _other(trained)
    with torch.no_grad():
        model.head.bias += 1e-3
    program = export_program(model)
    with pytest.raises(Fatal, match=r"weights \['head.bias'\] differ"):
        check_clean(program, trained.student)
    with pytest.raises(Fatal, match=r"differs from the student by 1\.00e-03"):
        check_parity(program, trained.student.serving)


def test_nothing_appears_at_the_target_when_a_check_fails(
    trained: StudentTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skewed(trainer: StudentTrainer) -> ServingModel:
        model = _other(trainer)
        torch.nn.init.constant_(model.head.bias, 3.0)
        return model

    monkeypatch.setattr(export, "_detached", skewed)
    with pytest.raises(Fatal):
        export_student(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_never_overwritten(trained: StudentTrainer, exported: Path) -> None:
    with pytest.raises(ConfigError, match="exists; name a directory that does not"):
        export_student(trained, exported)


def _add_pickled_inputs(name: str, data: bytes) -> bytes:
    return b"\x80\x04N." if "sample_inputs" in name else data


def _declare_pickles(name: str, data: bytes) -> bytes:
    return data.replace(b'"use_pickle": false', b'"use_pickle": true') if name.endswith("_config.json") else data


@pytest.mark.parametrize("change", [_add_pickled_inputs, _declare_pickles])
def test_a_program_that_would_be_unpickled_is_not_loaded(
    exported: Path, tmp_path: Path, change: Callable[[str, bytes], bytes]
) -> None:
    tampered = io.BytesIO()
    with zipfile.ZipFile(exported / "model.pt2") as source, zipfile.ZipFile(tampered, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, change(entry.filename, source.read(entry)))
    path = tmp_path / "model.pt2"
    path.write_bytes(tampered.getvalue())
    with pytest.raises(ConfigError, match="can run code; not loaded"):
        load_program(path)
    legacy = tmp_path / "legacy.pt2"
    with zipfile.ZipFile(legacy, "w") as target:
        target.writestr("archive/data/weights/model.pt", struct.pack("<I", 7))
    with pytest.raises(ConfigError, match="can run code; not loaded"):
        load_program(legacy)
