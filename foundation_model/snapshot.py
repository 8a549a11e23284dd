"""Snapshots: one immutable directory per version, written so that a crash leaves the previous one loadable.

    <root>/<version>/model.safetensors   weights
                     state.safetensors   optimizer, random generators, progressive metrics
                     config.json         the resolved config
                     manifest.json       what the snapshot is, where in the stream it stands, sha256 of the others

Written under a temporary name: files -> fsync -> manifest -> fsync -> rename -> fsync of the root -> prune.
Nothing is pickled: loading parses JSON and safetensors whose bytes match the manifest, and never runs code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from das import fault
from das.config import Config
from das.errors import ExfmError, Retryable
from das.position import Position, Positions

logger = logging.getLogger(__name__)

FORMAT = 1
MODEL, STATE, CONFIG, MANIFEST = "model.safetensors", "state.safetensors", "config.json", "manifest.json"
FILES = frozenset({MODEL, STATE, CONFIG})
MAX_JSON_BYTES = 8 << 20
MAX_TENSORS_BYTES = 64 << 30

_VERSION = re.compile(r"0|[1-9][0-9]{0,18}")


class SnapshotError(ExfmError):
    """A snapshot directory cannot be trusted; `reason` is a bounded word, the message names the file."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{detail} ({reason}); restore the directory from a copy or remove it to use an older version")
        self.reason = reason


class FileEntry(Config):
    """Size and hash of one file of a snapshot."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(Config):
    """What a snapshot is and where in the stream its weights stand.

    `version`: names the directory; a teacher's logit blocks carry it. `positions`: the next row to read, per partition.
    `trained_through_ms`: the latest event time trained on. `steps`: optimizer steps taken. `rows`: rows trained on.
    """

    format: int = FORMAT
    version: int = Field(ge=0)
    parent: int | None = None
    created_ms: int
    schema_fingerprint: str = Field(pattern=r"^[0-9a-f]{16}$")
    positions: dict[int, Position]
    trained_through_ms: int
    steps: int = Field(ge=0)
    rows: int = Field(0, ge=0)
    metrics: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    config_hash: str
    files: dict[str, FileEntry] = Field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A verified snapshot in memory, tensors on the CPU. `state` is empty when it was not asked for."""

    path: Path
    manifest: Manifest
    config: dict[str, Any]
    model: dict[str, Tensor]
    state: dict[str, Tensor]


def write_snapshot(
    root: Path,
    version: int,
    *,
    model: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    schema_fingerprint: int,
    positions: Positions,
    trained_through_ms: int,
    steps: int,
    rows: int = 0,
    metrics: Mapping[str, Mapping[str, float | None]] | None = None,
    parent: int | None = None,
    keep: int = 3,
) -> Path:
    """Write version `version` durably and prune older ones down to `keep`. Returns its directory.

    A directory that already has the name (one that was found invalid, or left by an abandoned run) is moved aside to
    `.replaced-<version>`. Raises Retryable on a disk error; earlier versions are untouched then.
    """
    target = root / str(version)
    temporary = root / f".tmp-{version}-{os.getpid()}"
    config_bytes = _json_bytes(dict(config))
    contents = {CONFIG: config_bytes, MODEL: _tensor_bytes(model), STATE: _tensor_bytes(state)}
    manifest = Manifest(
        version=version,
        parent=parent,
        created_ms=time.time_ns() // 1_000_000,
        schema_fingerprint=f"{schema_fingerprint:016x}",
        positions=positions,
        trained_through_ms=trained_through_ms,
        steps=steps,
        rows=rows,
        metrics={key: dict(values) for key, values in (metrics or {}).items()},
        config_hash=hashlib.sha256(config_bytes).hexdigest(),
        files={n: FileEntry(bytes=len(b), sha256=hashlib.sha256(b).hexdigest()) for n, b in contents.items()},
    )
    contents[MANIFEST] = seal(manifest.model_dump(mode="json"))
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, data in contents.items():
            _write_file(temporary / name, data)
        _fsync_directory(temporary)
        fault.point("snapshot.before_rename")
        if target.exists():
            _move_aside(target)
        temporary.rename(target)
        _fsync_directory(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise Retryable(f"snapshot {target}: {error}; free space or fix the directory, the previous stays") from error
    prune(root, keep, newest=version)
    return target


def read_snapshot(path: Path, *, with_state: bool = True) -> Snapshot:
    """Load and verify one snapshot directory. Raises SnapshotError: missing, manifest, size, hash or tensors."""
    manifest = _read_manifest(path)
    names = FILES if with_state else FILES - {STATE}
    data = {name: _read_verified(path, name, manifest) for name in names}
    try:
        model = safetensors.torch.load(data[MODEL])
        state = safetensors.torch.load(data[STATE]) if with_state else {}
    except SafetensorError as error:
        raise SnapshotError("tensors", f"{path}: not safetensors: {error}") from None
    return Snapshot(path, manifest, _parse_json(data[CONFIG], path / CONFIG), model, state)


def latest_snapshot(root: Path, *, with_state: bool = True) -> Path | None:
    """The newest version whose files all match their manifest; invalid ones are skipped with a warning."""
    for version in reversed(versions(root)):
        path = root / str(version)
        try:
            manifest = _read_manifest(path)
            for name in FILES if with_state else FILES - {STATE}:
                _read_verified(path, name, manifest)
        except SnapshotError as error:
            logger.warning("snapshot skipped: %s", error)
        else:
            return path
    return None


def versions(root: Path) -> list[int]:
    """Versions in `root`, ascending, valid or not; cheap enough to poll."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if _VERSION.fullmatch(name))


def clean(root: Path) -> None:
    """Remove what a killed writer left under temporary names. Only for the process that owns `root`."""
    for path in root.glob(".tmp-*"):
        logger.warning("removing the unfinished snapshot %s", path)
        shutil.rmtree(path, ignore_errors=True)


def prune(root: Path, keep: int, *, newest: int) -> None:
    """Remove all but the `keep` newest versions up to `newest`; versions above it are not counted."""
    for version in [v for v in versions(root) if v <= newest][: -max(1, keep)]:
        doomed = root / f".tmp-pruned-{version}"  # renamed first: a half-removed version is never seen
        with contextlib.suppress(OSError):
            (root / str(version)).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def seal(manifest: dict[str, Any]) -> bytes:
    """The bytes of manifest.json: the manifest and, as `manifest_hash`, the sha256 of its JSON."""
    digest = hashlib.sha256(_json_bytes(manifest)).hexdigest()
    return _json_bytes({**manifest, "manifest_hash": digest})


def pack(**groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One flat dict of several: group `optimizer` becomes `optimizer:<name>`."""
    return {f"{group}:{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def unpack(state: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """The tensors that `pack` stored under `group`."""
    prefix = f"{group}:"
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """State of torch's random generators: the CPU's, and the device's when that is a GPU."""
    out = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        out["cuda"] = torch.cuda.get_rng_state(device)
    return out


def load_rng_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore what `rng_tensors` gave; a GPU's state is left as it is when the snapshot has none."""
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def _json_bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def _write_file(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_aside(target: Path) -> None:
    aside = target.with_name(f".replaced-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    target.rename(aside)


def _read_manifest(path: Path) -> Manifest:
    content = _parse_json(_read_file(path / MANIFEST, MAX_JSON_BYTES), path / MANIFEST)
    if content.pop("manifest_hash", None) != hashlib.sha256(_json_bytes(content)).hexdigest():
        raise SnapshotError("hash", f"{path / MANIFEST}: its own sha256 differs")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise SnapshotError("manifest", f"{path / MANIFEST}: {error.errors(include_url=False)[0]['msg']}") from None
    if manifest.format != FORMAT or set(manifest.files) != FILES or str(manifest.version) != path.name:
        detail = f"format {manifest.format}, version {manifest.version}, files {sorted(manifest.files)}"
        raise SnapshotError("manifest", f"{path / MANIFEST} does not describe this directory: {detail}")
    return manifest


def _read_verified(path: Path, name: str, manifest: Manifest) -> bytes:
    entry = manifest.files[name]
    limit = MAX_JSON_BYTES if name == CONFIG else MAX_TENSORS_BYTES
    data = _read_file(path / name, limit, expected=entry.bytes)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise SnapshotError("hash", f"{path / name}: sha256 differs from the manifest")
    return data


def _read_file(path: Path, limit: int, expected: int | None = None) -> bytes:
    """The bytes of a regular file (no symbolic link) of the expected size, at most `limit`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            if not stat.S_ISREG(status.st_mode) or size > limit or size != (size if expected is None else expected):
                raise SnapshotError("size", f"{path}: {size} bytes, expected {expected or f'at most {limit}'}")
            return file.read(size)
    except OSError as error:
        raise SnapshotError("missing", f"{path}: {error.strerror}") from None


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are not UTF-8
        raise SnapshotError("manifest", f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise SnapshotError("manifest", f"{path}: not a JSON object")
    return value
