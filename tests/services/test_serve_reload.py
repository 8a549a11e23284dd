"""The API follows the snapshot folder: newer ones are swapped in under load, bad ones are refused and counted."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serve_kit import SCHEMA, Running, expected_logits, make_model, make_rows, publish, serving

from foundation_model.snapshot import seal

ROWS = make_rows(6)


def served_version(server: Running) -> int:
    return int(server.client.get("/v2/models/teacher").json()["versions"][0])


def failures(server: Running) -> float:
    return server.metric("exfm_model_reloads_total", outcome="failed")


def test_snapshots_are_swapped_under_load_without_a_failed_or_mixed_answer(tmp_path: Path) -> None:
    models = {version: make_model(version) for version in range(1, 5)}
    expected = {version: expected_logits(model, ROWS) for version, model in models.items()}
    publish(tmp_path, 1, models[1])
    seen: dict[int, int] = {}
    wrong: list[Any] = []
    stop = threading.Event()

    def ask(url: str) -> None:
        with httpx.Client(base_url=url, timeout=10) as client:
            while not stop.is_set():
                answer = client.post("/v1/score", json={"rows": ROWS})
                if answer.status_code != 200:
                    wrong.append(answer.text)
                    continue
                body = answer.json()
                version = body["teacher_version"]
                logits = [[r["logits"][n] for n in SCHEMA.objective_names] for r in body["results"]]
                if not np.array_equal(np.array(logits, np.float32), expected[version]):
                    wrong.append((version, logits))
                seen[version] = seen.get(version, 0) + 1

    with serving(tmp_path) as server:
        clients = [threading.Thread(target=ask, args=(server.url,)) for _ in range(2)]
        for client in clients:
            client.start()
        try:
            for version in (2, 3, 4):
                server.wait_for(lambda v=version: seen.get(v - 1, 0) > 10)  # type: ignore[misc]
                publish(tmp_path, version, models[version])
            server.wait_for(lambda: seen.get(4, 0) > 10)
        finally:
            stop.set()
            for client in clients:
                client.join()
        assert not wrong
        assert sorted(seen) == [1, 2, 3, 4]
        assert failures(server) == 0
        assert server.metric("exfm_model_reloads_total", outcome="loaded") == 4
        assert server.metric("exfm_snapshot_version") == 4


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _flip(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "model.safetensors").write_bytes(data)


def _truncate(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-1])


def _replace(path: Path, name: str, data: bytes) -> None:
    """Put other bytes in place of a file, with a manifest that agrees."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / name).write_bytes(data)
    manifest["files"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    del manifest["manifest_hash"]
    (path / "manifest.json").write_bytes(seal(manifest))


def _pickle(path: Path) -> None:
    _replace(path, "model.safetensors", pickle.dumps(Payload(path.parent / "executed")))


def _other_config(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["model"]["width"] *= 2
    _replace(path, "config.json", json.dumps(config).encode())


def _foreign_config(path: Path) -> None:
    _replace(path, "config.json", b'{"surprise": 1}')


def _manifest_garbage(path: Path) -> None:
    (path / "manifest.json").write_text("{")


def _link(path: Path) -> None:
    target = path.parent / "elsewhere"
    shutil.copy(path / "model.safetensors", target)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(target)


BREAKS: list[Callable[[Path], None]] = [
    _flip,
    _truncate,
    _pickle,
    _other_config,
    _foreign_config,
    _manifest_garbage,
    _link,
    lambda path: (path / "model.safetensors").unlink(),
    lambda path: (path / "manifest.json").unlink(),
]


def test_a_bad_snapshot_is_refused_once_and_the_old_one_serves(tmp_path: Path) -> None:
    root, bench = tmp_path / "snapshots", tmp_path / "bench"
    publish(root, 1, make_model(1))
    with serving(root) as server:
        for number, damage in enumerate(BREAKS, start=1):
            path = publish(bench, number + 1, make_model(2))
            damage(path)
            path.rename(root / path.name)
            server.wait_for(lambda n=number: failures(server) >= n)  # type: ignore[misc]
            assert served_version(server) == 1
            assert server.client.post("/v1/score", json={"rows": ROWS}).status_code == 200
        time.sleep(0.3)
        assert failures(server) == len(BREAKS)
        assert not (bench / "executed").exists()
        assert not (root / "executed").exists()
        publish(root, 99, make_model(3))
        server.wait_for(lambda: served_version(server) == 99)


def test_a_snapshot_of_another_feature_schema_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, 1, make_model(1))
    with serving(tmp_path) as server:
        publish(tmp_path, 2, make_model(2), SCHEMA.model_copy(update={"version": 2}))
        server.wait_for(lambda: failures(server) == 1)
        assert served_version(server) == 1


def test_when_the_newest_is_bad_at_start_the_one_before_serves(tmp_path: Path) -> None:
    publish(tmp_path, 3, make_model(3))
    _flip(publish(tmp_path, 4, make_model(4)))
    (tmp_path / ".tmp-5-1").mkdir()
    with serving(tmp_path) as server:
        assert served_version(server) == 3


def test_moving_newer_snapshots_away_rolls_back(tmp_path: Path) -> None:
    for version in (1, 2):
        publish(tmp_path, version, make_model(version))
    with serving(tmp_path) as server:
        assert served_version(server) == 2
        (tmp_path / "2").rename(tmp_path / "bad-2")
        server.wait_for(lambda: served_version(server) == 1)


def test_a_snapshot_rewritten_under_its_number_is_loaded_again(tmp_path: Path) -> None:
    publish(tmp_path, 1, make_model(1))
    with serving(tmp_path) as server:
        publish(tmp_path, 1, make_model(5))
        server.wait_for(lambda: server.metric("exfm_model_reloads_total", outcome="loaded") == 2)
        answer = server.client.post("/v1/score", json={"rows": ROWS}).json()
        assert answer["results"][0]["logits"]["click"] == pytest.approx(expected_logits(make_model(5), ROWS)[0, 0])


def test_the_folder_may_vanish_and_come_back(tmp_path: Path) -> None:
    root = tmp_path / "snapshots"
    publish(root, 1, make_model(1))
    with serving(root) as server:
        root.rename(tmp_path / "away")
        time.sleep(0.2)
        assert server.client.post("/v1/score", json={"rows": ROWS}).status_code == 200
        root.write_text("not a folder")
        time.sleep(0.2)
        root.unlink()
        (tmp_path / "away").rename(root)
        publish(root, 2, make_model(2))
        server.wait_for(lambda: served_version(server) == 2)
