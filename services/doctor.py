"""`exfm doctor`: everything a pipeline needs, looked at once; each line is `ok` or says what to do."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Literal, NamedTuple

from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError

from das.broker import KafkaConfig, open_client, translate
from das.deadline import Deadline
from das.errors import ConfigError, ExfmError, Poison
from das.examples import HEADER_CONTROL, HEADER_SCHEMA, decode_examples
from das.logit_store import LogitStore
from das.schema import FeatureSchema
from das.stream import Record, TopicPartition, age_s, read_tail
from services.check import check_table, validate
from services.embedded import broker_binary, redis_binary
from services.logs import redact
from services.process import EXIT_CONFIG, EXIT_FAILED, EXIT_OK
from services.serve.config import load_tokens
from services.servers import attached
from services.settings import Settings, teacher_config
from services.topics import Topic, describe_topics, offsets, partition_counts
from services.wiring import logit_store, student_snapshots, teacher_snapshots

DEADLINE_S = 15.0
HASHING_S = 300.0
"""Verifying a snapshot reads all of it."""
ANSWER_S = 5.0
TAIL = 4
"""Messages at the end of a partition to look for examples in: the last may be an end-of-stream."""
MIN_FREE_BYTES = 256 << 20
LOW_FREE_BYTES = 2 << 30

REMEDIES = {
    "broker": ("start it, or set kafka.bootstrap and kafka.options",),
    "redis": ("start it, or set redis.url and redis.password_file",),
}

Level = Literal["ok", "warn", "FIX", "skip"]


class Line(NamedTuple):
    """One finding; `FIX` needs action."""

    level: Level
    what: str
    text: str


def run(settings_file: Path) -> int:
    """Print one line per finding; returns EXIT_OK only if none needs action."""
    for name in ("kafka", "foundation_model.snapshot"):  # their warnings say less than the lines do
        logging.getLogger(name).setLevel(logging.CRITICAL)
    to_fix = []
    for line in examine(settings_file):
        print(f"{line.level:<5}{line.what:<12} {' '.join(line.text.split())}", flush=True)
        to_fix += [line.what] if line.level == "FIX" else []
    return EXIT_CONFIG if "settings" in to_fix else EXIT_FAILED if to_fix else EXIT_OK


def examine(settings_file: Path) -> Iterator[Line]:
    """Every finding, in the order in which to fix them."""
    try:
        settings, schema = validate(settings_file, os.environ)
    except (ExfmError, OSError) as error:
        yield Line("FIX", "settings", str(redact(str(error))))
        return
    yield Line("ok", "settings", f"{settings_file}, hash {settings.hash}; schema '{schema.name}' {_hex(schema)}")
    yield from within(DEADLINE_S, "dataset", lambda: [Line("ok", "dataset", check_table(settings, schema))])
    patient = Patient(settings, schema)
    yield from patient.services()
    run_dir = within(DEADLINE_S, "run_dir", patient.run_dir)
    yield from run_dir
    if _fine(run_dir[:1]):
        yield from within(HASHING_S, "snapshots", patient.snapshots)
    yield from within(DEADLINE_S, "access", patient.access)


def within(limit_s: float, what: str, check: Callable[[], list[Line]]) -> list[Line]:
    """What `check` finds; one line instead when it fails, or does not end in time."""
    future: Future[list[Line]] = Future()

    def work() -> None:
        try:
            future.set_result(check())
        except BaseException as error:  # noqa: BLE001 - raised again by result()
            future.set_exception(error)

    threading.Thread(target=work, name=f"doctor-{what}", daemon=True).start()
    try:
        return future.result(limit_s)
    except TimeoutError:
        return [Line("FIX", what, f"no result within {limit_s:.0f} s; see whether it is overloaded or cut off")]
    except (ExfmError, OSError) as error:
        return [Line("FIX", what, "; ".join([str(redact(str(error))), *REMEDIES.get(what, ())]))]


class Patient:
    """What is looked at."""

    def __init__(self, settings: Settings, schema: FeatureSchema) -> None:
        self._schema = schema
        self._absent = []
        try:
            settings = attached(settings)
        except ExfmError:
            embedded = settings.embedded
            self._absent = [name for name, on in (("broker", embedded.kafka), ("redis", embedded.redis)) if on]
        brief_s = min(ANSWER_S, settings.kafka.request_timeout_s)
        self._settings = settings
        self._kafka = settings.kafka.model_copy(update={"request_timeout_s": brief_s})
        self._ends: dict[int, int] | None = None
        """Next offset of each partition of the examples, once known."""

    def services(self) -> Iterator[Line]:
        """Broker, topics, examples, Redis and the watermarks; what needs something that is down is skipped."""
        broker = within(DEADLINE_S, "broker", self.broker)
        yield from broker
        if self._up("broker", broker):
            topics = within(DEADLINE_S, "topics", self.topics)
            yield from topics
            if _fine(topics):
                yield from within(DEADLINE_S, "examples", self.examples)
            else:
                yield Line("skip", "examples", "needs the topics")
        else:
            yield Line("skip", "topics", "needs the broker, and so do the examples")
        if self._settings.teacher is None:
            yield Line("skip", "redis", "the settings have no teacher: nothing is stored")
            return
        redis = within(DEADLINE_S, "redis", self.redis)
        yield from redis
        if self._up("redis", redis) and self._ends is not None:
            yield from within(DEADLINE_S, "watermark", self.watermark)
        else:
            yield Line("skip", "watermark", "needs Redis and the examples")

    def _up(self, name: str, lines: list[Line]) -> bool:
        return name not in self._absent and _fine(lines)

    def broker(self) -> list[Line]:
        """Whether it answers, and how fast."""
        if "broker" in self._absent:
            return [Line("ok", "broker", f"embedded, {broker_binary()}; `exfm up` starts it")]
        admin = open_client(KafkaAdminClient, self._kafka, {})
        try:
            began_s = time.monotonic()
            admin.describe_cluster()
            took_s = time.monotonic() - began_s
        except KafkaError as error:
            raise translate(error, self._kafka) from error
        finally:
            admin.close()
        return [Line("ok", "broker", f"{self._kafka.bootstrap} answers in {took_s * 1000:.0f} ms")]

    def topics(self) -> list[Line]:
        """Whether they are there as configured."""
        wanted = partition_counts(self._kafka)
        found = describe_topics(self._kafka)
        lines = [topic_line(name, topic, wanted[name], self._kafka) for name, topic in found.items()]
        if self._settings.replay is None:  # a recording passes faster than the clock by which the broker forgets
            names, needed_ms = self._kafka.topics, self._settings.joiner.reread_ms(self._schema)
            for name in (names.impressions, names.feedback):
                lines += reread_lines(name, found[name], needed_ms)
        return lines

    def examples(self) -> list[Line]:
        """Whether the newest message can be read with the schema of the settings."""
        name, schema = self._kafka.topics.examples, self._schema
        self._ends = {p: end for p, (_, end) in offsets(self._kafka, name, self._kafka.partitions, ANSWER_S).items()}
        record = self._newest_example()
        if record is None:
            return [Line("ok", "examples", f"none in {name} yet")]
        where = f"{name}[{record.partition}] offset {record.offset}, {_span(age_s(record.timestamp_ms))} old"
        remedy = "restore the schema, or use new topics, a new run_dir and a new teacher.name"
        try:
            batch = decode_examples(record.value, schema)
        except Poison as poison:
            return [Line("FIX", "examples", f"{where}: {poison}; {remedy}")]
        written = record.headers.get(HEADER_SCHEMA, b"").decode(errors="replace")
        if written != _hex(schema):
            text = f"{where}: written with schema {written or '?'}, the settings have '{schema.name}' {_hex(schema)}"
            return [Line("FIX", "examples", f"{text}; {remedy}")]
        return [Line("ok", "examples", f"{where}: {batch.num_rows} rows of our schema")]

    def _newest_example(self) -> Record | None:
        parts = [TopicPartition(self._kafka.topics.examples, number) for number in range(self._kafka.partitions)]
        tails = [read_tail(self._kafka, tp, TAIL, Deadline.after(ANSWER_S)) for tp in parts]
        rows = (record for tail in tails for record in tail if HEADER_CONTROL not in record.headers)
        return max(rows, key=lambda record: record.timestamp_ms, default=None)

    def redis(self) -> list[Line]:
        """Whether it answers, how fast, and whether it keeps what it is given."""
        if "redis" in self._absent:
            return [Line("ok", "redis", f"embedded, {redis_binary()}; `exfm up` starts it")]
        with self._store() as store:
            store.watermark(0)
            began_s = time.monotonic()
            store.watermark(0)
            took_s = time.monotonic() - began_s
            warnings = store.check()
        keeps = "" if warnings else "; evicts nothing, its keys expire, its append-only file is on"
        lines = [Line("ok", "redis", f"{store.address} answers in {took_s * 1000:.0f} ms{keeps}")]
        return lines + [Line("warn", "redis", text) for text in warnings]

    def watermark(self) -> list[Line]:
        """How far the teacher's logits are from the end of the stream."""
        with self._store() as store:
            reached = {partition: store.watermark(partition) for partition in self._ends or {}}
        return watermark_lines(reached, self._ends or {}, self._kafka.topics.examples)

    def _store(self) -> contextlib.AbstractContextManager[LogitStore]:
        return logit_store(self._settings, teacher_config(self._settings).name)

    def snapshots(self) -> list[Line]:
        """Whether the newest of each trainer is intact and of our schema."""
        settings = self._settings
        roots = {} if settings.teacher is None else {"teacher": teacher_snapshots(settings)}
        roots |= {student["name"]: student_snapshots(settings, student["name"]) for student in settings.students}
        if settings.serve is not None and settings.serve.snapshots is not None:
            roots["serve"] = settings.serve.snapshots
        return [snapshot_line(name, root, self._schema) for name, root in roots.items()]

    def run_dir(self) -> list[Line]:
        """Whether it can be written to and has room."""
        run_dir = self._settings.run_dir.absolute()
        there = next(path for path in (run_dir, *run_dir.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(b"\0")
        except OSError as error:
            text = f"cannot write to {there}: {error.strerror}; make it writable, or set run_dir"
            return [Line("FIX", "run_dir", text)]
        snapshots = sum(path.stat().st_size for path in run_dir.glob("**/*.safetensors"))
        return [Line("ok", "run_dir", f"{there} is writable"), disk_line(shutil.disk_usage(there).free, snapshots)]

    def access(self) -> list[Line]:
        """Who may connect."""
        settings, lines = self._settings, []
        if settings.serve is not None:
            try:
                tokens = load_tokens(settings.serve)
                lines.append(Line("ok", "access", f"HTTP API on {settings.serve.host}, {len(tokens)} token(s)"))
            except ConfigError as error:  # names no token, but reads as if it did
                lines.append(Line("FIX", "access", str(error)))
        host = settings.health.host
        if host not in ("127.0.0.1", "localhost", "::1"):
            text = f"health.host {host}: health and metrics ask for no token; keep it inside your network"
            lines.append(Line("warn", "access", text))
        return lines or [Line("ok", "access", "on loopback only")]


def topic_line(name: str, topic: Topic | None, partitions: int, kafka: KafkaConfig) -> Line:
    """One topic against the settings."""
    if topic is None:
        return Line("FIX", "topics", f"{name} is not there; run: exfm topics create")
    if topic.partitions != partitions:
        text = f"{name} has {topic.partitions} partition(s), the settings say {partitions}"
        return Line("FIX", "topics", f"{text}; set kafka.partitions, or use other topic names")
    text, kept = f"{name}: {partitions} partition(s)", topic.retention_ms
    if kept is None:
        return Line("ok", "topics", f"{text}; the broker does not say how long it keeps them")
    if kept == kafka.retention_ms:
        return Line("ok", "topics", f"{text}, kept for {_span(kept / 1000)}")
    remedy = f"set kafka.retention_ms to {kept}, or the topic's retention.ms to {kafka.retention_ms}"
    if 0 <= kept < kafka.retention_ms:
        return Line("FIX", "topics", f"{text}, kept for {_span(kept / 1000)}, shorter than the settings say; {remedy}")
    return Line("warn", "topics", f"{text}, kept longer than logits ({_span(kafka.retention_ms / 1000)}); {remedy}")


def reread_lines(name: str, topic: Topic | None, needed_ms: int) -> list[Line]:
    """A warning where a restarted joiner would find a part of what it reads again gone."""
    if topic is None or topic.retention_ms is None or not 0 <= topic.retention_ms < needed_ms:
        return []
    text = f"{name} is kept for {_span(topic.retention_ms / 1000)}; a restarted joiner reads up to"
    why = "again (window, lateness and the longer of dedup and linger)"
    remedy = f"keep it for {needed_ms} ms and as long as the joiner may be down"
    return [Line("warn", "topics", f"{text} {_span(needed_ms / 1000)} {why}; {remedy}")]


def watermark_lines(reached: dict[int, int], ends: dict[int, int], topic: str) -> list[Line]:
    """The teacher's watermarks against the ends of the partitions."""
    lost = {p: mark for p, mark in reached.items() if mark > ends[p]}
    if lost:
        places = ", ".join(f"{topic}[{p}] ends at {ends[p]}, logits reach {mark}" for p, mark in sorted(lost.items()))
        return [Line("FIX", "watermark", f"{places}: the topic was made anew; restore it, or set a new teacher.name")]
    behind = {p: ends[p] - mark for p, mark in reached.items()}
    if not any(reached.values()) and any(ends.values()):
        return [Line("warn", "watermark", f"{sum(ends.values())} messages and no logits; start: exfm teacher")]
    text = ", ".join(f"{topic}[{p}] at {reached[p]}, {count} behind the end" for p, count in sorted(behind.items()))
    return [Line("ok", "watermark", text)]


def snapshot_line(name: str, root: Path, schema: FeatureSchema) -> Line:
    """The newest intact snapshot in `root`."""
    from foundation_model.snapshot import MANIFEST, latest_snapshot, versions

    found = versions(root)
    if not found:
        return Line("ok", "snapshots", f"{name}: none in {root} yet")
    newest = latest_snapshot(root)
    if newest is None:
        return Line("FIX", "snapshots", f"{name}: none of {len(found)} in {root} is intact; restore one or remove them")
    manifest = json.loads((newest / MANIFEST).read_text(encoding="utf-8"))
    if manifest["schema_fingerprint"] != _hex(schema):
        text = f"{name}: {newest} has schema {manifest['schema_fingerprint']}, the settings have {_hex(schema)}"
        return Line("FIX", "snapshots", f"{text}; restore the schema, or use a new run_dir")
    if int(newest.name) != found[-1]:
        text = f"{name}: {newest.name} is used, {found[-1]} is damaged; remove {root / str(found[-1])}"
        return Line("warn", "snapshots", text)
    return Line("ok", "snapshots", f"{name}: version {newest.name}, {_span(age_s(manifest['created_ms']))} old, intact")


def disk_line(free_bytes: int, snapshot_bytes: int) -> Line:
    """Room for as much again as all snapshots take now."""
    text = f"{free_bytes / 2**30:.1f} GiB free, snapshots take {snapshot_bytes / 2**30:.1f} GiB"
    if free_bytes < max(MIN_FREE_BYTES, snapshot_bytes):
        return Line("FIX", "disk", f"{text}; free some, or set run_dir on a larger disk")
    return Line("warn" if free_bytes < max(LOW_FREE_BYTES, 3 * snapshot_bytes) else "ok", "disk", text)


def _fine(lines: list[Line]) -> bool:
    return all(line.level != "FIX" for line in lines)


def _hex(schema: FeatureSchema) -> str:
    return f"{schema.fingerprint:016x}"


def _span(seconds: float) -> str:
    for limit_s, unit, size_s in ((120.0, "s", 1.0), (7200.0, "min", 60.0), (172_800.0, "h", 3600.0)):
        if seconds < limit_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"
