"""One picture of a running pipeline: every process's `/metrics`, read on a schedule and turned into rates."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from services.logs import get_logger

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
Status = dict[str, Any]
HISTORY = 900
SELF = "supervisor"
SCRAPE_TIMEOUT_S = 1.0
PIPELINE = ("replay", "das", "teacher", "student")
FINISHED = "finished"
LOG_TAIL_BYTES = 16_384
ROW_COUNTERS = {"replay": "exfm_replayed_total", "das": "exfm_examples_rows_total"}


def scrape(address: str, timeout_s: float = SCRAPE_TIMEOUT_S) -> Samples:
    """All samples of `http://<address>/metrics`. Raises OSError when the process does not answer."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=timeout_s) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def quantile(samples: Samples, name: str, q: float) -> float | None:
    """The q-quantile of the histogram `name` since the process began, linear inside a bucket; None if it is empty.

    Values past the last finite bound count as that bound.
    """
    bounds = sorted(
        (float(dict(labels)["le"]), count) for (have, labels), count in samples.items() if have == f"{name}_bucket"
    )
    if not bounds or not bounds[-1][1]:
        return None
    rank, below, low = q * bounds[-1][1], 0.0, 0.0
    for high, count in bounds:
        if count >= rank and count > below:
            return low + (high - low) * (rank - below) / (count - below) if math.isfinite(high) else low
        below, low = count, high
    return low


def total(samples: Samples, name: str, **labels: str) -> float:
    """Sum of `name` over all label sets that contain `labels`."""
    want = set(labels.items())
    return sum(value for (have, its), value in samples.items() if have == name and want <= set(its))


class Collector:
    """Reads every process of `states` each `interval_s` into `latest` and a bounded `history`."""

    def __init__(
        self,
        run_dir: Path,
        states: Callable[[], list[dict[str, Any]]],
        interval_s: float = 2.0,
        *,
        rows_expected: int = 0,
    ) -> None:
        """`rows_expected`: impressions of the whole replay, where they are known before it says so."""
        self._rows_expected = rows_expected
        self.latest: Status = {}
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self.peak_rss: dict[str, int] = {}
        """Resident memory per process at the moment of the greatest sum."""
        self._run_dir = run_dir
        self._states = states
        self._interval_s = interval_s
        self._started_s = time.monotonic()
        self._started_wall_s = time.time()
        self._increase = _Increase()
        self._previous: tuple[float, dict[str, float]] = (self._started_s, {})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="status", daemon=True)

    def start(self) -> None:
        """Begin to collect."""
        self._thread.start()

    def close(self) -> None:
        """Stop collecting."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _loop(self) -> None:
        log = get_logger(__name__)
        while not self._stop.wait(self._interval_s):
            try:
                self.collect()
            except (OSError, ValueError, KeyError) as error:
                log.warning("status not collected", error=str(error))

    def collect(self) -> Status:
        """Read everything once and return the picture."""
        now_s = time.monotonic()
        rows = [self._process(state) for state in self._states()]
        self._settle(rows)
        done = {row["name"]: row["rows"] for row in rows if "rows" in row}
        before_s, before = self._previous
        span_s = max(now_s - before_s, 1e-9)
        for row in rows:
            if "rows" in row and row["ready"] is not None:
                row["rows_per_s"] = (row["rows"] - before.get(row["name"], row["rows"])) / span_s
        self._previous = (now_s, done)
        self.latest = self._picture(rows, now_s)
        self.history.append(_point(self.latest))
        if self.latest["rss_bytes"] > sum(self.peak_rss.values()):
            self.peak_rss = {row["name"]: row["rss_bytes"] for row in rows if "rss_bytes" in row}
            self.peak_rss[SELF] = self.latest["rss_bytes"] - sum(self.peak_rss.values())
        return self.latest

    def _picture(self, rows: list[dict[str, Any]], now_s: float) -> Status:
        by_kind = {kind: [r for r in rows if r["kind"] == kind] for kind in PIPELINE}
        hits = sum(r.get("hits", 0.0) for r in by_kind["student"])
        misses = sum(r.get("misses", 0.0) for r in by_kind["student"])
        head = by_kind["teacher"] or by_kind["student"] or by_kind["das"]
        trainers = by_kind["teacher"] + by_kind["student"]
        return {
            "pipeline": self._run_dir.resolve().name,
            "phase": _phase(by_kind),
            "ready": [sum(_is_up(r) for r in rows if r["kind"] in PIPELINE), sum(map(len, by_kind.values()))],
            "when_ms": int(time.time() * 1000),
            "uptime_s": round(now_s - self._started_s, 1),
            "rows_expected": max([self._rows_expected, *(r.get("rows_expected", 0.0) for r in by_kind["replay"])]),
            "rows_replayed": sum(r.get("rows", 0.0) for r in by_kind["replay"]),
            "rows_joined": sum(r.get("rows", 0.0) for r in by_kind["das"]),
            "rows_trained": sum(r.get("rows", 0.0) for r in by_kind["teacher"]),
            "events_per_s": sum(r.get("rows_per_s", 0.0) for r in head),
            "lags": {kind: _largest_lag(by_kind[kind]) for kind in ("das", "teacher", "student")},
            "hit_rate": hits / (hits + misses) if hits + misses else None,
            "ne": {r["name"]: r["ne"] for r in trainers if r.get("ne")},
            "processes": rows,
            "restarts": sum(r["restarts"] for r in rows),
            "rss_bytes": sum(r.get("rss_bytes", 0) for r in rows) + psutil.Process().memory_info().rss,
        }

    def _process(self, state: dict[str, Any]) -> dict[str, Any]:
        """One process: its state, memory and the numbers it publishes; the last ones known when it is not answering."""
        name, kind = state["name"], state["kind"]
        known: dict[str, Any] = next((r for r in self.latest.get("processes", []) if r["name"] == name), {})
        gone = ("rss_bytes", "ready", "lag", "rows_per_s")
        row = {**{k: v for k, v in known.items() if k not in gone}, **state, "ready": None}
        if state["pid"] is None:
            return row
        with contextlib.suppress(psutil.Error):  # it ended, or its number is of another container
            row["rss_bytes"] = psutil.Process(state["pid"]).memory_info().rss
        samples = self._samples(name, state["pid"])
        if samples is not None and kind != "server":
            row.update(self._numbers(name, kind, samples))
        return row

    def _settle(self, rows: list[dict[str, Any]]) -> None:
        """Replace the last scrape of processes that ended by what they counted in all; no number where none is known.

        The rows of joiners that ended are those that the teacher trained, once it has ended too.
        """
        for row in rows:
            if row["state"] == FINISHED and row["kind"] in ("replay", "teacher", "student"):
                final = self._sent(row) if row["kind"] == "replay" else self._results(row)
                row.pop("rows", None)
                row.update(final)
        joiners = [row for row in rows if row["kind"] == "das" and row["state"] == FINISHED]
        teachers = [row for row in rows if row["kind"] == "teacher" and row["state"] == FINISHED]
        for row in joiners:
            row.pop("rows", None)
            if len(joiners) == 1 and teachers and "rows" in teachers[0]:
                row["rows"] = teachers[0]["rows"]

    def _results(self, row: dict[str, Any]) -> dict[str, Any]:
        """Final counts of a trainer, from the results it wrote; empty without, or if they are of an earlier run."""
        path = self._run_dir / "results" / f"{row['name']}.json"
        try:
            if path.stat().st_mtime < self._started_wall_s:
                return {}
            results = json.loads(path.read_text(encoding="utf-8"))
            rows, hit_rate = float(results["rows"]), results.get("hit_rate")
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        if hit_rate is None:
            return {"rows": rows}
        return {"rows": rows, "hits": hit_rate * rows, "misses": rows - hit_rate * rows}

    def _sent(self, row: dict[str, Any]) -> dict[str, Any]:
        """Impressions that a replay sent in all, from the last line of its log that says so; else those of its table.

        Only a complete replay ends with `finished`, unless someone else told it to stop.
        """
        for line in reversed(_tail(self._run_dir / "logs" / f"{row['name']}.log")):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                if event["event"] == "replayed":
                    sent = float(event["impressions"])
                    return {"rows": sent, "rows_expected": sent} if event["complete"] else {"rows": sent}
        expected = row.get("rows_expected") or self._rows_expected
        return {"rows": float(expected)} if expected else {}

    def _samples(self, name: str, pid: int) -> Samples | None:
        try:
            port = json.loads((self._run_dir / "ports" / f"{name}.json").read_text(encoding="utf-8"))
            samples = scrape(port["health"]) if port["pid"] == pid else {}
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
            return None
        # an old port may be someone else's by now
        return samples if total(samples, "exfm_build_info", process=name) else None

    def _numbers(self, name: str, kind: str, samples: Samples) -> dict[str, Any]:
        if kind == "serve":
            requests = self._increase(name, "requests", total(samples, "exfm_http_requests_total"))
            return {"ready": bool(total(samples, "exfm_ready")), "requests": requests}
        counter = ROW_COUNTERS.get(kind, "exfm_rows_trained_total")
        labels = {"topic": "impressions"} if kind == "replay" else {}
        numbers: dict[str, Any] = {
            "ready": bool(total(samples, "exfm_ready")),
            "rows": self._increase(name, counter, total(samples, counter, **labels)),
            "lag": total(samples, "exfm_lag_records"),
            "lags": _lags(samples),
            "snapshot": total(samples, "exfm_snapshot_version"),
            "quarantined": self._increase(name, "quarantined", total(samples, "exfm_quarantined_total")),
            "violations": self._increase(name, "violations", total(samples, "exfm_invariant_violations_total")),
        }
        if kind == "replay":
            numbers["rows_expected"] = total(samples, "exfm_replay_rows")
        if kind == "student":
            for key, outcome in (("hits", "hit"), ("misses", "miss")):
                value = total(samples, "exfm_logit_rows_total", outcome=outcome)
                numbers[key] = self._increase(name, key, value)
            gaps = {f"p{q}": quantile(samples, "exfm_freshness_gap_seconds", q / 100) for q in (50, 95)}
            numbers["freshness_s"] = gaps if gaps["p50"] is not None else None
            numbers["degraded"] = bool(total(samples, "exfm_lookup_degraded"))
        if kind in ("teacher", "student"):
            numbers["ne"] = _by_portfolio(samples, "exfm_ne")
            numbers["auc"] = _by_portfolio(samples, "exfm_auc")
        return numbers


class _Increase:
    """Counters that go on rising when a restarted process begins again at zero."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[float, float]] = {}

    def __call__(self, process: str, name: str, value: float) -> float:
        """The sum of all increases of one counter."""
        last, accumulated = self._seen.get((process, name), (0.0, 0.0))
        accumulated += value - last if value >= last else value
        self._seen[process, name] = (value, accumulated)
        return accumulated


def _is_up(row: dict[str, Any]) -> bool:
    return bool(row["ready"]) or row["state"] == FINISHED


def _largest_lag(rows: list[dict[str, Any]]) -> float | None:
    """In records of its inputs for a joiner, in messages of examples for a trainer; None when none of them runs."""
    return max((row["lag"] for row in rows if row.get("lag") is not None), default=None)


def _phase(by_kind: dict[str, list[dict[str, Any]]]) -> str:
    """`starting` until the first row is trained, `running`, `sent` when the replay has ended, `ended`."""
    trainers = by_kind["teacher"] + by_kind["student"] or by_kind["das"]
    sources = by_kind["replay"]
    if all(row["state"] == FINISHED for row in by_kind["das"] + trainers + sources):
        return "ended"
    if not any(row.get("rows") for row in trainers):
        return "starting"
    return "sent" if sources and all(row["state"] == FINISHED for row in sources) else "running"


def _tail(path: Path) -> list[bytes]:
    """The last lines of a log; none without one."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            return log.read().splitlines()
    except OSError:
        return []


def _lags(samples: Samples) -> list[dict[str, Any]]:
    """Per topic and partition: what is known but not processed, in records, and the age of the oldest in seconds."""
    found = []
    for (name, labels), records in samples.items():
        if name == "exfm_lag_records":
            where = dict(labels)
            found.append({**where, "records": records, "seconds": total(samples, "exfm_lag_seconds", **where)})
    return sorted(found, key=lambda lag: (lag["topic"], int(lag["partition"])))


def _by_portfolio(samples: Samples, name: str) -> dict[str, float]:
    return {
        dict(labels)["portfolio"]: value
        for (have, labels), value in samples.items()
        if have == name and math.isfinite(value)
    }


def _point(status: Status) -> dict[str, Any]:
    """What the charts of the live page keep of one picture."""
    return {key: status[key] for key in ("when_ms", "events_per_s", "lags", "hit_rate", "ne", "rss_bytes")}


def summary_line(status: Status) -> str:
    """One plain line for a log or a terminal without a cursor."""
    if not status:
        return "starting"
    memory = f"{status['rss_bytes'] / 2**30:.1f} GiB"
    if status["phase"] == "starting":
        ready, processes = status["ready"]
        starting = f"starting processes, {ready} of {processes} ready"
        what = "waiting for the first rows" if ready == processes else starting
        return f"{status['uptime_s']:.0f} s | {what} | {memory}"
    hit_rate = "-" if status["hit_rate"] is None else f"{status['hit_rate']:.2%}"
    nes = " ".join(f"{name}={_first(ne):.3f}" for name, ne in status["ne"].items())
    share = f" {status['rows_trained'] / status['rows_expected']:.0%}" if status["rows_expected"] else ""
    lag = max((lag for kind, lag in status["lags"].items() if kind != "das" and lag is not None), default=0.0)
    return (
        f"{status['uptime_s']:.0f} s{share} | {status['events_per_s']:.0f} events/s | lag {lag:.0f} messages | "
        f"hit {hit_rate} | {memory} | NE {nes or '-'}"
    )


def _first(values: dict[str, float]) -> float:
    return next(iter(values.values()), float("nan"))


def names(rows: Iterable[dict[str, Any]], state: str) -> list[str]:
    """Names of the processes in `state`."""
    return [row["name"] for row in rows if row["state"] == state]
