"""One verified snapshot as a model that scores impressions."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from das.errors import ConfigError
from das.examples import JoinedRow, example_batch
from das.messages import Impression
from das.schema import FeatureSchema
from foundation_model.features import FeatureEncoder
from foundation_model.kunlun import Kunlun
from foundation_model.snapshot import SnapshotError, read_snapshot
from foundation_model.trainer import TeacherConfig


@dataclass(frozen=True)
class LoadedTeacher:
    """A model in memory, with what identifies its weights."""

    version: int
    trained_through_ms: int
    schema: FeatureSchema
    encoder: FeatureEncoder
    model: Kunlun
    device: torch.device

    def score(self, impressions: list[Impression]) -> np.ndarray:
        """Logits (rows, objectives) float32 of the served heads, in schema order. Rows do not affect each other."""
        no_labels = (None,) * len(self.schema.objectives)
        now_ms = time.time_ns() // 1_000_000
        full = len(self.schema.windows_ms) - 1
        rows = [JoinedRow(impression, now_ms, no_labels, full) for impression in impressions]
        batch = self.encoder.encode(example_batch(rows, self.schema)).to(self.device)
        with torch.inference_mode():
            logits_BK: np.ndarray = self.model(batch).float().cpu().numpy()
        return logits_BK[:, self.encoder.spec.served]


def choose_device(name: str) -> torch.device:
    """The device to score on. Raises ConfigError if a GPU was asked for and there is none."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("serve.device: cuda, but torch sees no GPU here; set cpu or auto")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def load_teacher(path: Path, schema: FeatureSchema, device: torch.device) -> LoadedTeacher:
    """Build the model of one snapshot directory from its own config, with the kernels that `device` has.

    Raises SnapshotError when a file does not match its manifest or the snapshot is of another feature schema,
    ConfigError when its config is not one of this version, RuntimeError when tensors do not fit the model.
    """
    snapshot = read_snapshot(path, with_state=False)
    manifest = snapshot.manifest
    if manifest.schema_fingerprint != f"{schema.fingerprint:016x}":
        detail = f"{path} was trained with schema {manifest.schema_fingerprint}, this server has "
        raise SnapshotError("schema", f"{detail}'{schema.name}' {schema.fingerprint:016x}")
    config = TeacherConfig.parse(snapshot.config, source=str(path))
    encoder = FeatureEncoder(schema, tables=config.tables)
    model = Kunlun(config.model.model_copy(update={"backend": "auto"}), encoder.spec)
    model.load_state_dict(snapshot.model)
    # Parameters keep requires_grad: without it torch takes paths whose last bits differ from the trainer's forward.
    model.eval().to(device)
    return LoadedTeacher(manifest.version, manifest.trained_through_ms, schema, encoder, model, device)
