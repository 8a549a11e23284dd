"""The snapshot folder of one running trainer: owned by one process, tolerant of a disk that is full for a while."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path
from typing import Any

from das.errors import Fatal, Retryable
from das.telemetry import Telemetry
from foundation_model.snapshot import Snapshot, clean, latest_snapshot, read_snapshot, write_snapshot

logger = logging.getLogger(__name__)

LOCK = ".lock"
MAX_FAILURES = 3


class SnapshotFolder:
    """Writes and finds the snapshots below `root`, and keeps every other trainer out of it until `close`.

    Raises Fatal if another process owns the folder or it cannot be written.
    """

    def __init__(self, root: Path, keep: int, telemetry: Telemetry) -> None:
        self.root = root
        self.last_version: int | None = None
        self._keep = keep
        self._telemetry = telemetry
        self._failures = 0
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise Fatal(
                f"{root}: another trainer is writing its snapshots here; stop it or use another run_dir"
            ) from None
        except OSError as error:
            raise Fatal(f"{root}: {error}; snapshots need a directory that can be written") from None
        clean(root)

    def latest(self) -> Snapshot | None:
        """The newest valid snapshot, loaded."""
        path = latest_snapshot(self.root)
        if path is None:
            return None
        snapshot = read_snapshot(path)
        self.last_version = snapshot.manifest.version
        self._telemetry.gauge("exfm_snapshot_version", self.last_version)
        return snapshot

    def write(self, version: int, **content: Any) -> bool:
        """`write_snapshot` below the root. False when the disk refused: the stream goes on, nothing may be committed.

        Raises Retryable when it refused MAX_FAILURES times in a row.
        """
        began_s = time.monotonic()
        try:
            write_snapshot(self.root, version, parent=self.last_version, keep=self._keep, **content)
        except Retryable as error:
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                raise
            logger.error("going on without a snapshot, failure %d of %d: %s", self._failures, MAX_FAILURES, error)
            return False
        self._failures = 0
        self.last_version = version
        self._telemetry.observe("exfm_snapshot_seconds", time.monotonic() - began_s)
        self._telemetry.gauge("exfm_snapshot_version", version)
        return True

    def close(self) -> None:
        """Let another trainer in."""
        os.close(self._lock)
