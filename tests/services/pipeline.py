"""A small pipeline of real processes: settings on the first rows of the bundled stream, and `exfm up` around it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import outside

EMBEDDED = {"kafka": True, "redis": True}
ROOT = Path(__file__).parents[2]
KUAIRAND = ROOT / "services" / "demo" / "kuairand"
MODEL = {
    "preset": "small",
    "width": 16,
    "embedding_dim": 8,
    "num_layers": 1,
    "wukong_hidden": 16,
    "head_hidden": [16],
}


def settings(folder: Path, *, rows: int, speed: float | str = "max", **changes: Any) -> Path:
    """Write the settings of one teacher and one student in two arms; returns their file."""
    student = {
        "arm": "none",
        "domains": ["1"],
        "objectives": ["click", "long_view"],
        "distillation": {"mode": "none"},
        "batch_rows": 64,
        "snapshot_every_steps": 5,
        "lookup": {"wait_ms": 60_000, "stall_ms": 30_000},
    }
    data = {
        "run_dir": str(folder / "run"),
        "schema_file": str(KUAIRAND / "schema.yaml"),
        "stop_at_end": True,
        "examples_idle_s": None,
        **outside.pipeline_servers(),
        "supervisor": {"backoff_initial_s": 0.2},
        "replay": {"dataset": str(KUAIRAND / "dataset.yaml"), "speed": speed, "limit": rows},
        "joiner": {
            **{"batch_rows": 32, "linger_ms": 86_400_000, "idle_timeout_s": None, "session_timeout_s": 6},
            "group": outside.new_prefix(),
        },
        "teacher": {"device": "cpu", "model": MODEL, "snapshot_every_messages": 5},
        "students": [
            {**student, "name": "plain"},
            {**student, "name": "distilled", "arm": "distilled", "distillation": {"mode": "auxiliary"}},
        ],
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.yaml"
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return path


class Up:
    """One running `exfm up`."""

    def __init__(self, settings_file: Path) -> None:
        self.run_dir = Path(json.loads(settings_file.read_text(encoding="utf-8"))["run_dir"])
        command = [sys.executable, "-m", "services.cli", "up", "--settings", str(settings_file)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        self.stdout = self.stderr = ""

    def port(self, name: str) -> dict[str, Any]:
        """What a process announced: its `pid` and `health` address. Raises OSError before it did."""
        found: dict[str, Any] = json.loads((self.run_dir / "ports" / f"{name}.json").read_text(encoding="utf-8"))
        return found

    def get(self, name: str, path: str) -> str:
        """One page of a process. Raises OSError."""
        with urllib.request.urlopen(f"http://{self.port(name)['health']}{path}", timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    def status(self) -> dict[str, Any]:
        """The live page's newest picture; empty before the first."""
        picture: dict[str, Any] = json.loads(self.get("live", "/status.json"))["now"]
        return picture

    def until(self, what: str, condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
        """Wait for `condition`; a process that does not answer yet counts as no. Fails when `exfm up` ends first."""
        end_s = time.monotonic() + timeout_s
        while True:
            try:
                if condition():
                    return
            except (OSError, KeyError, ValueError):
                pass
            if self.process.poll() is not None:
                self.finish(5)
                raise AssertionError(f"exfm up ended before {what}:\n{self.stdout}\n{self.stderr[-3000:]}")
            assert time.monotonic() < end_s, f"not within {timeout_s} s: {what}\n{self.logs()}"
            time.sleep(0.05)

    def finish(self, timeout_s: float = 120.0) -> int:
        """Wait for the end; returns the exit code."""
        self.stdout, self.stderr = self.process.communicate(timeout=timeout_s)
        return self.process.returncode

    def close(self) -> None:
        """Stop whatever still runs."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.finish(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()

    def results(self, name: str) -> dict[str, Any]:
        """What a trainer wrote at the end of the stream."""
        found: dict[str, Any] = json.loads((self.run_dir / "results" / f"{name}.json").read_text(encoding="utf-8"))
        return found

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in (self.run_dir / "logs").glob("*.log"))


def metric(text: str, name: str) -> float:
    """Sum of one metric over its labels."""
    lines = (line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{")))
    return sum(float(line.rpartition(" ")[2]) for line in lines)
