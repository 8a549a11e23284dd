"""Keeps the newest verified snapshot loaded: builds the next model beside the current one, then swaps.

The served version follows the snapshot folder: a newer snapshot is taken over, and when newer ones are moved away the
server rolls back to the newest that is left. A snapshot that does not verify or does not fit is tried once, counted,
and the current model goes on serving.
"""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from das.errors import ExfmError
from das.schema import FeatureSchema
from das.telemetry import Telemetry
from foundation_model import snapshot
from services.logs import get_logger
from services.serve.teacher import LoadedTeacher, load_teacher

Identity = tuple[int, str]
"""Version, and a hash of the manifest: a snapshot rewritten under its old number is another one."""

logger = get_logger(__name__)


class TeacherSlot:
    """Holds the loaded teacher; `current` is replaced as a whole, so a request sees one version only."""

    def __init__(self, root: Path, schema: FeatureSchema, telemetry: Telemetry, device: torch.device) -> None:
        self.current: LoadedTeacher | None = None
        self._root = root
        self._schema = schema
        self._telemetry = telemetry
        self._device = device
        self._identity: Identity | None = None
        self._refused: set[Identity] = set()

    async def follow(self, every_s: float) -> None:
        """Poll the folder until cancelled. Loading runs in a thread of its own, beside scoring."""
        with ThreadPoolExecutor(1, thread_name_prefix="reload") as loader:
            loop = asyncio.get_running_loop()
            while True:
                await loop.run_in_executor(loader, self.refresh)
                await asyncio.sleep(every_s)

    def refresh(self) -> None:
        """Load the newest usable snapshot if it is not the one being served. Never raises for a bad snapshot."""
        found = self._candidates()
        self._refused.intersection_update(identity for identity, _ in found)
        for identity, path in found:
            if identity == self._identity:
                return
            if identity not in self._refused and self._load(identity, path):
                return

    def _candidates(self) -> list[tuple[Identity, Path]]:
        """Snapshots of the folder, newest first."""
        try:
            numbers = snapshot.versions(self._root)
        except OSError as error:  # away for now: the current model goes on serving
            logger.warning("snapshot folder not readable", path=str(self._root), error=str(error))
            return []
        found = []
        for version in reversed(numbers):
            path = self._root / str(version)
            try:
                digest = hashlib.sha256((path / snapshot.MANIFEST).read_bytes()).hexdigest()
            except OSError as error:  # pruned just now, or torn: loading it says which
                digest = type(error).__name__
            found.append(((version, digest), path))
        return found

    def _load(self, identity: Identity, path: Path) -> bool:
        try:
            loaded = load_teacher(path, self._schema, self._device)
        except (ExfmError, OSError, ValueError, KeyError, RuntimeError) as error:
            if not path.exists():
                return False  # pruned while it was read
            self._refused.add(identity)
            self._telemetry.count("exfm_model_reloads_total", outcome="failed")
            logger.error("snapshot refused", path=str(path), error=f"{type(error).__name__}: {error}")
            return False
        self.current, self._identity = loaded, identity
        self._telemetry.count("exfm_model_reloads_total", outcome="loaded")
        self._telemetry.gauge("exfm_snapshot_version", loaded.version)
        self._telemetry.gauge("exfm_ready", 1)
        logger.info("snapshot loaded", version=loaded.version, trained_through_ms=loaded.trained_through_ms)
        return True
