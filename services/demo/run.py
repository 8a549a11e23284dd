"""`exfm demo`: build settings, run the pipeline to the end of the stream, prove the counts, print the table."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from rich.console import Console

from das.errors import ConfigError, ExfmError
from das.schema import FeatureSchema
from services import logs, machine
from services.demo.plot import draw
from services.demo.progress import Progress
from services.demo.report import make_rows, print_table, read_results
from services.demo.settings import build, expected_rows
from services.demo.verify import ExactlyOnce, count_impressions, read_examples
from services.metrics import PrometheusTelemetry
from services.process import EXIT_CONFIG, EXIT_FAILED, EXIT_OK, Context, stop_event
from services.settings import Settings, load
from services.status import Collector
from services.supervisor import Supervisor
from services.up import open_live_page

SETTINGS = "settings.yaml"
ADDRESSES = ("EXFM_KAFKA__BOOTSTRAP", "EXFM_REDIS__URL")
MIN_HIT_RATE = 0.999
PLAIN_WIDTH = 100


def run(out: Path, *, device: str = "cpu", speed: str = "max", seed: int = 1, rows: int | None = None) -> int:
    """Run the demo in the folder `out`; returns 0 only if every promise held."""
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    started_s = time.monotonic()
    for name in ADDRESSES:
        if os.environ.pop(name, None) is not None:
            console.print(f"{name} is not used: the demo brings its own servers; exfm up takes yours", highlight=False)
    try:
        out = prepare_folder(out)
        keep_inside(out)
        settings_file = out / SETTINGS
        settings_file.write_text(build(out, device=device, speed=speed, seed=seed, rows=rows), encoding="utf-8")
        settings = load(settings_file, os.environ)
    except ConfigError as error:
        sys.stderr.write(f"error: {logs.redact(str(error))}\n")
        return EXIT_CONFIG
    logs.configure("demo", settings.log.model_copy(update={"file": out / "logs" / "demo.log"}), stderr=False)
    registry = CollectorRegistry()
    context = Context("demo", settings, PrometheusTelemetry(registry), stop_event(), logs.get_logger("demo"))
    console.print(f"run folder: {out}", markup=False, highlight=False, soft_wrap=True)
    return _Demo(context, settings_file, console, started_s).run()


def prepare_folder(out: Path) -> Path:
    """An empty run folder; an earlier demo's is cleared. Raises ConfigError if it holds anything else."""
    out = out.resolve()
    if out.exists() and any(out.iterdir()):
        if not (out / SETTINGS).is_file() or not (out / "logs").is_dir():
            raise ConfigError(f"--out {out}: not empty and not a demo's run folder; name another one")
        shutil.rmtree(out)
    (out / "tmp").mkdir(parents=True, exist_ok=True)
    return out


def keep_inside(out: Path) -> None:
    """Point every cache and temporary folder of this process and its children into the run folder."""
    temporary = str(out / "tmp")
    os.environ.update(
        TMPDIR=temporary,
        MPLCONFIGDIR=temporary,
        XDG_CACHE_HOME=temporary,
        TRITON_CACHE_DIR=temporary,
        TORCHINDUCTOR_CACHE_DIR=temporary,
        CUDA_CACHE_PATH=temporary,
        PYTHONDONTWRITEBYTECODE="1",
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.dont_write_bytecode = True
    tempfile.tempdir = None


class _Demo:
    """One run: supervise with progress, verify, report."""

    def __init__(self, context: Context, settings_file: Path, console: Console, started_s: float) -> None:
        self._context = context
        self._console = console
        self._started_s = started_s
        self._out = context.settings.run_dir
        self._schema = FeatureSchema.load(context.settings.schema_file)
        self._once: ExactlyOnce | None = None
        self._sent = 0
        self._supervisor = Supervisor(context.settings, settings_file, context.telemetry, self._say)
        self._expected = expected_rows(context.settings)
        self._collector = Collector(self._out, self._supervisor.status, rows_expected=self._expected)
        self._progress = Progress(self._collector, console)

    def run(self) -> int:
        problems = self._supervise(self._context.stop)
        if self._once is None:
            problems = problems or ["stopped before the end of the stream"]
        results = read_results(self._out / "results")
        rows = make_rows(results)
        problems += self._promises(results)
        if rows:
            print_table(rows, self._console)
            draw(rows, self._out / "demo.png", "Progressive normalized entropy over the stream")
        self._write(rows, results, problems)
        return self._conclude(problems)

    def _supervise(self, stop: threading.Event) -> list[str]:
        live = open_live_page(self._context, self._collector)
        self._collector.start()
        self._context.set_ready()
        self._progress.start()
        try:
            self._supervisor.run(stop, tick=self._progress.tick, tick_s=self._progress.tick_s, at_end=self._verify)
        except ExfmError as error:
            self._context.log.error("demo failed", error=str(error))
            return [logs.redact(str(error))]
        finally:
            self._collector.close()
            self._progress.close()
            if live:
                live.close()
        return []

    def _verify(self, settings: Settings) -> None:
        self._say("stream ended; reading examples back to count every impression")
        self._sent = count_impressions(settings.kafka)
        self._once = read_examples(settings.kafka, self._schema)

    def _promises(self, results: list[dict[str, Any]]) -> list[str]:
        """What was promised and did not hold."""
        found = [] if self._once is None else self._once.problems(self._sent)
        if self._once is not None and self._sent != self._expected:
            found.append(f"{self._sent} impressions were sent, the data set has {self._expected}")
        students = {s["name"] for s in self._context.settings.students}
        missing = students - {result["name"] for result in results}
        if missing:
            found.append(f"no results of {sorted(missing)}")
        for result in results:
            rate = result.get("hit_rate")
            if result["kind"] == "student" and rate is not None and rate < MIN_HIT_RATE:
                found.append(f"{result['name']}: logit hit rate {rate:.3%} is below {MIN_HIT_RATE:.1%}")
            if result["kind"] == "teacher" and self._once and result["rows"] != self._once.distinct:
                found.append(f"the teacher trained {result['rows']} rows of {self._once.distinct}")
        for state in self._supervisor.status():
            if state["kind"] != "server" and state["exit_code"] != 0:
                found.append(f"{state['name']} ended with exit code {state['exit_code']}")
        return found

    def _write(self, rows: list[dict[str, Any]], results: list[dict[str, Any]], problems: list[str]) -> None:
        latest = self._collector.latest
        document: Mapping[str, Any] = {
            "demo": "kuairand",
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            "machine": machine.describe(),
            "versions": machine.versions(),
            "config": self._context.settings.redacted(),
            "config_hash": self._context.settings.hash,
            "ok": not problems,
            "problems": problems,
            "impressions_replayed": self._sent,
            "examples": {
                field: getattr(self._once, field) if self._once else None
                for field in ("messages", "rows", "distinct", "quarantined")
            },
            "wall_s": round(time.monotonic() - self._started_s, 1),
            "memory_peak_bytes": sum(self._collector.peak_rss.values()),
            "memory_peak": self._collector.peak_rss,
            "restarts": latest.get("restarts", 0),
            "models": [{k: v for k, v in result.items() if k != "portfolios"} for result in results],
            "table": rows,
        }
        text = json.dumps(document, indent=1, allow_nan=False, default=str)
        (self._out / "demo-results.json").write_text(text + "\n", encoding="utf-8")

    def _conclude(self, problems: list[str]) -> int:
        wall_s = time.monotonic() - self._started_s
        peak_gib = sum(self._collector.peak_rss.values()) / 2**30
        if self._once is not None:
            self._say(
                f"examples: {self._once.distinct:,} distinct of {self._sent:,} impressions replayed, "
                f"{self._once.rows - self._once.distinct} duplicates, {self._once.quarantined} in quarantine"
            )
        self._say(f"{wall_s:.0f} s, memory peak {peak_gib:.2f} GiB over all processes")
        self._say(f"{self._out / 'demo-results.json'}  {self._out / 'demo.png'}")
        for problem in problems:
            self._console.print(f"failed: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
        return EXIT_FAILED if problems else EXIT_OK

    def _say(self, text: str) -> None:
        self._progress.say(text)
