"""Export of a student's serving graph, for runtimes that know nothing of this project.

    <target>/model.pt2             torch.export program with its weights
             model.onnx            the same as ONNX
             weights.safetensors   the weights alone
             manifest.json         inputs in order, how to encode a row, sha256 of the files

Both graphs are run against the student before the directory is moved into place. A .pt2 archive may hold pickles, which
`torch.export.load` unpickles: the ones written here hold none, and `load_program` refuses those that do.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from das.errors import ConfigError, Fatal
from vertical_models.export_manifest import ExportManifest, FileEntry, encoding_of, input_specs
from vertical_models.serving import ServingModel
from vertical_models.student import Student
from vertical_models.trainer import StudentTrainer

PROGRAM, ONNX, WEIGHTS, MANIFEST = "model.pt2", "model.onnx", "weights.safetensors", "manifest.json"
TOLERANCE = 1e-5
CHECKED_ROWS = (1, 2, 257)
MAX_BATCH = 65_536
_SAMPLE_INPUTS = "/data/sample_inputs/"
_PLAIN = re.compile(
    r"data/(weights/weight_\d+|weights/model_weights_config\.json|constants/model_constants_config\.json"
    r"|sample_inputs/model\.pt)|models/model\.json|archive_format|archive_version|byteorder|\.data/\w+"
)


def export_student(trainer: StudentTrainer, target: Path) -> ExportManifest:
    """Export `trainer.student` as it stands (`checkpoint.load_trained` reads one from a snapshot).

    Raises ConfigError if the ONNX packages are missing or `target` is in use, Fatal if a graph differs from the student
    by more than TOLERANCE or holds anything that is not the serving graph's.
    """
    onnxruntime = _onnxruntime()
    if target.exists():
        raise ConfigError(f"{target} exists; name a directory that does not, exports are never overwritten")
    model = _detached(trainer)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        program = export_program(model)
        _save_program(program, temporary / PROGRAM)
        _save_onnx(program, model, temporary / ONNX)
        safetensors.torch.save_file(_weights(model), temporary / WEIGHTS)
        check_clean(load_program(temporary / PROGRAM), trainer.student)
        check_parity(load_program(temporary / PROGRAM), trainer.student.serving)
        _check_onnx(onnxruntime, temporary / ONNX, trainer.student.serving)
        manifest = _manifest(trainer, model, temporary)
        (temporary / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def export_program(model: ServingModel) -> ExportedProgram:
    """The serving graph with a dynamic batch size; sequences have the student's full history length."""
    example = example_inputs(model, rows=3)
    batch = Dim("batch", min=1, max=MAX_BATCH)
    with _quiet():
        return torch.export.export(model, (example,), dynamic_shapes=({name: {0: batch} for name in example},))


def load_program(path: Path) -> ExportedProgram:
    """Read a .pt2 archive of ours. Raises ConfigError if it holds pickles. A graph is a program all the same: check the
    file against the manifest's sha256, and load none of an origin that you do not trust (weights.safetensors is data).
    """
    _refuse_pickles(path)
    return torch.export.load(path)


def example_inputs(model: ServingModel, rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Random valid inputs; among their sequences are empty and full ones."""
    spec, generator = model.spec, torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(0, spec.tables.total, shape, generator=generator)

    inputs: dict[str, Tensor] = {}
    if spec.categorical:
        inputs["categorical"] = ids(rows, len(spec.categorical))
    if spec.numeric:
        inputs["numeric"] = torch.randn(rows, len(spec.numeric), generator=generator)
    if model.domain is not None:
        inputs["domain"] = torch.randint(0, len(spec.domains), (rows,), generator=generator)
    for sequence in spec.sequences:
        length = min(model.history, sequence.max_length)
        counts = torch.randint(0, length + 1, (rows,), generator=generator)
        counts[0], counts[-1] = 0, length
        ages = torch.rand(rows, length, generator=generator) * 1e6
        inputs[f"{sequence.name}.ids"] = ids(rows, length, len(sequence.fields))
        inputs[f"{sequence.name}.age_s"] = ages
        inputs[f"{sequence.name}.length"] = counts
    return inputs


def check_clean(program: ExportedProgram, student: Student) -> None:
    """Invariant 7: the graph's weights are the serving graph's, by name and value, and its inputs the features' alone.

    Raises Fatal.
    """
    weights, found = student.serving.state_dict(), program.state_dict
    if set(found) - set(weights) or program.constants:
        extra = sorted(set(found) - set(weights)) + sorted(program.constants)
        raise Fatal(f"the exported graph holds {extra}, which are not of the serving graph")
    different = [name for name, value in found.items() if not torch.equal(value.cpu(), weights[name].detach().cpu())]
    if different:
        raise Fatal(f"the exported graph's weights {different} differ from the student's")
    inputs, expected = list(program.graph_signature.user_inputs), list(example_inputs(student.serving, 2))
    if len(inputs) != len(expected):
        raise Fatal(f"the exported graph reads {inputs}, the serving graph {expected}")


def check_parity(program: ExportedProgram, model: ServingModel) -> float:
    """The largest difference between the program's logits and the model's. Raises Fatal above TOLERANCE."""
    run = program.module()
    return _parity("the torch program", model, lambda inputs: run(inputs).detach().numpy())


def _check_onnx(onnxruntime: Any, path: Path, model: ServingModel) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names, expected = [i.name for i in session.get_inputs()], list(example_inputs(model, 2))
    if set(names) - set(expected):
        raise Fatal(f"the ONNX graph reads {names}, the serving graph {expected}")
    _parity("the ONNX graph", model, lambda x: session.run(None, {name: x[name].numpy() for name in names})[0])


def _parity(what: str, model: ServingModel, run: Callable[[dict[str, Tensor]], np.ndarray]) -> float:
    worst = 0.0
    for rows in CHECKED_ROWS:
        inputs = example_inputs(model, rows, seed=rows)
        with torch.no_grad():
            expected = model({name: value.to(_device(model)) for name, value in inputs.items()}).cpu().numpy()
        worst = max(worst, float(np.abs(run(inputs) - expected).max()))
    if not worst <= TOLERANCE:
        raise Fatal(f"{what} differs from the student by {worst:.2e}, more than {TOLERANCE}; nothing was exported")
    return worst


def _detached(trainer: StudentTrainer) -> ServingModel:
    """A copy of the serving graph on the CPU, with dense embedding gradients (sparse ones do not concern a server)."""
    live, config = trainer.student.serving, trainer.config
    copy = ServingModel(config.inputs, config.backbone, live.spec, live.domains)
    copy.load_state_dict({name: value.detach().cpu() for name, value in live.state_dict().items()})
    return copy.requires_grad_(False).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about its own internals and about a torchvision that nobody needs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _weights(model: ServingModel) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def _device(model: ServingModel) -> torch.device:
    return next(model.parameters()).device


def _save_program(program: ExportedProgram, path: Path) -> None:
    """Write the archive with its sample inputs left empty: they are all that torch would pickle."""
    whole = io.BytesIO()
    torch.export.save(program, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            target.writestr(entry, b"" if _SAMPLE_INPUTS in entry.filename else source.read(entry))


def _refuse_pickles(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.split("/", 1)[-1]
            if not _PLAIN.fullmatch(name) or (_SAMPLE_INPUTS in entry.filename and entry.file_size):
                raise ConfigError(f"{path}: {name} may be unpickled, which can run code; not loaded")
            if name.endswith("_config.json"):
                payloads = json.loads(archive.read(entry))["config"]
                if any(payload.get("use_pickle", True) for payload in payloads.values()):
                    raise ConfigError(f"{path}: {name} declares pickles, which can run code; not loaded")


def _save_onnx(program: ExportedProgram, model: ServingModel, path: Path) -> None:
    names = list(example_inputs(model, 2))
    with _quiet():
        exported = torch.onnx.export(
            program, dynamo=True, input_names=names, output_names=["logits"], external_data=False, verbose=False
        )
    assert exported is not None
    exported.save(path, external_data=False)


def _manifest(trainer: StudentTrainer, model: ServingModel, folder: Path) -> ExportManifest:
    files = {name: (folder / name).read_bytes() for name in (PROGRAM, ONNX, WEIGHTS)}
    return ExportManifest(
        student=trainer.config.name,
        version=trainer.counts.steps,
        schema_name=trainer.schema.name,
        schema_version=trainer.schema.version,
        schema_fingerprint=f"{trainer.schema.fingerprint:016x}",
        trained_through_ms=trainer.counts.trained_through_ms,
        domains=model.domains,
        objectives=model.spec.objectives,
        inputs=input_specs(example_inputs(model, 2)),
        encoding=encoding_of(trainer.schema, model),
        files={n: FileEntry(bytes=len(b), sha256=hashlib.sha256(b).hexdigest()) for n, b in files.items()},
    )


def _onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"export needs {error.name}: pip install 'exfm[export]'") from None
    return onnxruntime
