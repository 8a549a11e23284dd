"""Run the first student of the settings that no other container runs: what `--scale student=N` starts N times.

The claim is a lock on a file of the shared run folder. It is kept by the student process itself and ends with it,
however it ends, so that a replica beyond the number of students is a stand-by that takes over at its next restart.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
from pathlib import Path

from services.settings import load

EXIT_NONE_FREE = 3


def claim(folder: Path, names: list[str]) -> str | None:
    """The first free name, locked for this process and what it turns into; None when all are taken."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        lock = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        os.set_inheritable(lock, True)
        return name
    return None


def main() -> int:
    """Claim a student, then become `exfm student NAME`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=Path, required=True)
    settings_file = parser.parse_args().settings
    settings = load(settings_file, os.environ)
    names = [student["name"] for student in settings.students]
    name = claim(settings.run_dir / "claims", names)
    if name is None:
        sys.stderr.write(f"all {len(names)} students run already; scale to {len(names)}, or add one to the settings\n")
        return EXIT_NONE_FREE
    os.execvp("exfm", ["exfm", "student", name, "--settings", str(settings_file)])  # noqa: S606


if __name__ == "__main__":
    sys.exit(main())
