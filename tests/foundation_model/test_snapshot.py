"""Snapshots: durable in order, verified before use, never executing what they load."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from das.errors import Retryable
from das.position import Position
from foundation_model.snapshot import (
    SnapshotError,
    clean,
    latest_snapshot,
    load_rng_tensors,
    pack,
    read_snapshot,
    rng_tensors,
    seal,
    unpack,
    versions,
    write_snapshot,
)

FILES = ("model.safetensors", "state.safetensors", "config.json", "manifest.json")


def _write(root: Path, version: int, keep: int = 10) -> Path:
    generator = torch.Generator().manual_seed(version)
    return write_snapshot(
        root,
        version,
        model={"w": torch.randn(64, 8, generator=generator), "scalar": torch.tensor(float(version))},
        state={"seen": torch.arange(version, dtype=torch.int64), "rng:cpu": torch.get_rng_state()},
        config={"name": "kunlun", "seed": 7},
        schema_fingerprint=0xABC,
        positions={0: Position(version, 0), 1: Position(version + 1, 3)},
        trained_through_ms=1_650_000_000_000 + version,
        steps=version,
        rows=256 * version,
        metrics={"1/click": {"ne": 0.9, "auc": None}},
        parent=version - 1,
        keep=keep,
    )


class _Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, (str(self.marker),)  # type: ignore[return-value]


def test_a_snapshot_reads_back_bit_for_bit(tmp_path: Path) -> None:
    snapshot = read_snapshot(_write(tmp_path, 5))
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(snapshot.model["w"], torch.randn(64, 8, generator=generator))
    assert snapshot.model["scalar"].shape == ()
    assert snapshot.state["seen"].tolist() == [0, 1, 2, 3, 4]
    manifest = snapshot.manifest
    assert manifest.positions == {0: Position(5, 0), 1: Position(6, 3)}
    assert (manifest.version, manifest.parent, manifest.steps, manifest.rows) == (5, 4, 5, 1280)
    assert manifest.schema_fingerprint == "0000000000000abc"
    assert snapshot.config == {"name": "kunlun", "seed": 7}
    snapshot.model["w"].add_(1.0)  # loaded tensors are writable
    assert read_snapshot(snapshot.path, with_state=False).state == {}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def _link(path: Path) -> None:
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("damage", [_flip, _truncate, Path.unlink, _link])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_and_the_version_before_it_is_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = _write(tmp_path, 8), _write(tmp_path, 9)
    assert latest_snapshot(tmp_path) == bad
    damage(bad / name)
    with pytest.raises(SnapshotError, match=name.replace(".", r"\.")):
        read_snapshot(bad)
    assert latest_snapshot(tmp_path) == good
    assert name in caplog.text


@pytest.mark.parametrize("manifest_agrees", [False, True])
def test_a_pickle_named_safetensors_is_refused_and_never_run(tmp_path: Path, manifest_agrees: bool) -> None:
    path, marker = _write(tmp_path, 1), tmp_path / "executed"
    payload = pickle.dumps(_Exploit(marker))
    (path / "model.safetensors").write_bytes(payload)
    if manifest_agrees:
        manifest = json.loads((path / "manifest.json").read_text())
        entry = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
        manifest["files"]["model.safetensors"] = entry
        del manifest["manifest_hash"]
        (path / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(SnapshotError) as caught:
        read_snapshot(path)
    assert caught.value.reason == ("tensors" if manifest_agrees else "size")
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
        {"version": 2},
        {"format": 99},
        {"extra": 1},
        {"positions": {"0": "x"}},
    ],
)
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = _write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["manifest_hash"]
    (path / "manifest.json").write_bytes(seal(manifest | change))
    with pytest.raises(SnapshotError) as caught:
        read_snapshot(path)
    assert caught.value.reason == "manifest"


def test_one_changed_digit_in_the_manifest_is_noticed(tmp_path: Path) -> None:
    path = _write(tmp_path, 5) / "manifest.json"
    text = path.read_text()
    assert text.count('"rows": 1280') == 1
    path.write_text(text.replace('"rows": 1280', '"rows": 1281'))
    with pytest.raises(SnapshotError) as caught:
        read_snapshot(path.parent)
    assert caught.value.reason == "hash"


def test_files_are_durable_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(descriptor: int) -> None:
        events.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split("-")[0])
        fsync(descriptor)

    def recording_rename(self: Path, target: Path) -> Path:
        events.append(f"rename {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    _write(tmp_path, 3)
    assert set(events[:3]) == {f"fsync {name}" for name in FILES[:3]}
    assert events[3:] == ["fsync manifest.json", "fsync .tmp", "rename 3", f"fsync {tmp_path.name.split('-')[0]}"]


def test_kill_before_the_rename_leaves_the_previous_version(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from das import fault; from test_snapshot import _write\n"
        "fault.arm('snapshot.before_rename:1:kill'); _write(Path(sys.argv[1]), 2)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [p.name.split("-")[1] for p in tmp_path.glob(".tmp-*")] == ["2"]
    assert latest_snapshot(tmp_path) == tmp_path / "1"
    clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]
    _write(tmp_path, 2)
    assert latest_snapshot(tmp_path) == tmp_path / "2"


def test_a_full_disk_keeps_the_previous_version(tmp_path: Path) -> None:
    good = _write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # writes past 1000 bytes fail, as on a full disk
    try:
        with pytest.raises(Retryable, match="the previous stays"):
            _write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    assert latest_snapshot(tmp_path) == good


def test_an_fsync_error_keeps_the_previous_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = _write(tmp_path, 1)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Retryable, match="input/output error"):
        _write(tmp_path, 2)
    assert latest_snapshot(tmp_path) == good
    assert versions(tmp_path) == [1]


def test_a_root_that_cannot_be_written_is_retryable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Retryable, match="Not a directory"):
        _write(tmp_path / "file" / "snapshots", 1)


def test_prune_keeps_the_newest_and_never_the_abandoned_instead(tmp_path: Path) -> None:
    for version in (1, 2, 10, 9, 30):
        _write(tmp_path, version)
    (tmp_path / "30" / "manifest.json").unlink()
    _write(tmp_path, 11, keep=2)
    assert versions(tmp_path) == [10, 11, 30]
    assert latest_snapshot(tmp_path) == tmp_path / "11"


def test_a_rewritten_version_replaces_an_invalid_one(tmp_path: Path) -> None:
    path = _write(tmp_path, 4)
    (path / "config.json").unlink()
    assert latest_snapshot(tmp_path) is None
    _write(tmp_path, 4)
    assert latest_snapshot(tmp_path) == path


def test_random_generators_and_groups_round_trip() -> None:
    device = torch.device("cpu")
    state = pack(rng=rng_tensors(device), other={"a": torch.ones(1)})
    expected = torch.rand(4)
    load_rng_tensors(unpack(state, "rng"), device)
    assert torch.equal(torch.rand(4), expected)
    assert unpack(state, "other").keys() == {"a"}
