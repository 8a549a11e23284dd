"""`exfm quarantine`: see what the pipeline could not use, and send it back once its cause is gone.

What was sent back is remembered as committed offsets of consumer groups: one of its own per reason, one for all.
"""

from __future__ import annotations

import datetime
import fcntl
import itertools
import json
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from das import fault
from das.broker import KafkaConfig, wait_for_broker
from das.deadline import Deadline
from das.errors import ConfigError, Fatal, Retryable
from das.quarantine import HEADER_DETAIL, HEADER_OFFSET, HEADER_PARTITION, HEADER_REASON, HEADER_TOPIC, ORIGINAL
from das.stream import KafkaSink, KafkaSource, Record, TopicPartition
from services.process import EXIT_OK, stop_event
from services.servers import attached
from services.settings import Settings, load
from services.topics import describe_topics

GROUP = "exfm-quarantine-replay"
TIMEOUT_S = 15.0
BATCH = 100
WIDTH = 140


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a quarantined record was read."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One quarantined record. `origin` is None where its headers do not say."""

    record: Record
    reason: str
    detail: str
    origin: Origin | None

    @classmethod
    def of(cls, record: Record) -> Entry:
        """Read the headers that the quarantine added."""
        headers = record.headers
        try:
            numbers = int(headers[HEADER_PARTITION]), int(headers[HEADER_OFFSET])
            origin = Origin(headers[HEADER_TOPIC].decode(), *numbers)
        except (KeyError, ValueError):
            origin = None
        reason, detail = (headers.get(name, b"").decode(errors="replace") for name in (HEADER_REASON, HEADER_DETAIL))
        return cls(record, reason, detail, origin)

    @property
    def headers(self) -> dict[str, bytes]:
        """The headers that the record had."""
        return {k.removeprefix(ORIGINAL): v for k, v in self.record.headers.items() if k.startswith(ORIGINAL)}


def show(settings_file: Path, *, limit: int, reason: str | None = None, as_json: bool = False) -> int:
    """Print the newest `limit` records, oldest first; returns the exit code. Raises Retryable or Fatal."""
    kafka = _kafka(attached(load(settings_file, os.environ)))
    newest: deque[Entry] = deque(maxlen=limit)
    seen = 0
    for entry in map(Entry.of, scan(kafka, 0)):
        if reason is None or entry.reason == reason:
            newest.append(entry)
            seen += 1
    with closing(Marks(kafka)) as marks:
        rows = [_row(entry, replayed=entry.record.offset < marks.reached(entry.reason)) for entry in newest]
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return EXIT_OK
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(_table(rows))
    console.print(f"{len(rows)} of {seen} record(s)", highlight=False)
    return EXIT_OK


def replay(settings_file: Path, *, reason: str | None = None, dry_run: bool = False) -> int:
    """Send records back to where they were read, each once; returns the exit code. Raises Retryable or Fatal."""
    settings = attached(load(settings_file, os.environ))
    fault.arm(os.environ.get("EXFM_FAULTS"))
    kafka = _kafka(settings)
    with _alone(settings.run_dir), ExitStack() as stack:
        marks = stack.enter_context(closing(Marks(kafka)))
        sink = None if dry_run else stack.enter_context(closing(KafkaSink(kafka)))
        job = Replay(kafka, marks, sink, reason)
        try:
            job.run(stop_event())
        finally:
            print(job.summary(), flush=True)
    return EXIT_OK


class Marks:
    """How far records were sent back: all of them, and those of one reason."""

    def __init__(self, kafka: KafkaConfig) -> None:
        self._kafka = kafka
        self._tp = TopicPartition(kafka.topics.quarantine, 0)
        self._sources: dict[str, KafkaSource] = {}
        self._reached: dict[str, int] = {}

    def reached(self, reason: str | None) -> int:
        """Records of `reason` below this offset were dealt with; of any reason for None."""
        groups = {GROUP, _group(reason)}
        for group in groups - self._reached.keys():
            self._reached[group] = self._source(group).committed([self._tp])[self._tp] or 0
        return max(self._reached[group] for group in groups)

    def remember(self, reason: str | None, offset: int) -> None:
        """Records of `reason` (None: of any) below `offset` are dealt with. Raises Retryable or Fatal."""
        group = _group(reason)
        if not self._source(group).commit({self._tp: offset}):
            raise Retryable(f"the broker refused to commit {offset} for group {group}; is another client in it?")

    def close(self) -> None:
        """Close the connections."""
        for source in self._sources.values():
            source.close()

    def _source(self, group: str) -> KafkaSource:
        if group not in self._sources:
            self._sources[group] = KafkaSource(self._kafka, group=group)
        return self._sources[group]


class Replay:
    """One pass over what is in quarantine now; without a sink it only counts."""

    def __init__(self, kafka: KafkaConfig, marks: Marks, sink: KafkaSink | None, reason: str | None) -> None:
        self.counts: Counter[str] = Counter()
        self._kafka = kafka
        self._marks = marks
        self._sink = sink
        self._reason = reason
        self._places = {kafka.topics.impressions, kafka.topics.feedback}
        self._seen: set[Origin] = set()

    def run(self, stop: threading.Event) -> None:
        """Go through the topic up to its present end, or until `stop`; records that come back in are left alone."""
        records = scan(self._kafka, self._marks.reached(self._reason))
        while batch := list(itertools.islice(records, BATCH)):
            for entry in map(Entry.of, batch):  # 1. queued
                if self._reason in (None, entry.reason):
                    self.counts[self._take(entry)] += 1
            if self._sink is not None:
                self._sink.flush(self._kafka.produce_timeout_s)  # 2. acknowledged
                fault.point("quarantine.after_replay")
                self._marks.remember(self._reason, batch[-1].offset + 1)  # 3. only then remembered
            if stop.is_set():
                return

    def _take(self, entry: Entry) -> str:
        """Queue one record for where it came from; returns what to count it as."""
        origin = entry.origin
        if entry.record.offset < self._marks.reached(entry.reason):
            return "already replayed"
        if origin is None or origin.topic not in self._places or not 0 <= origin.partition < self._kafka.partitions:
            return "not replayable"
        if origin in self._seen:  # a process that was killed put it there twice
            return "repeated"
        self._seen.add(origin)
        if self._sink is not None:
            record = entry.record
            self._sink.send(origin.topic, origin.partition, record.key, record.value, entry.headers)
        return origin.topic

    def summary(self) -> str:
        """One line of counts."""
        sent = {topic: self.counts[topic] for topic in sorted(self._places)}
        others = {name: self.counts[name] for name in sorted(self.counts.keys() - self._places)}
        verb = "replayed" if self._sink is not None else "would replay"
        parts = [f"{verb} {sum(sent.values())}", *(f"{topic} {count}" for topic, count in sent.items())]
        return ", ".join([*parts, *(f"{name} {count}" for name, count in others.items())])


def scan(kafka: KafkaConfig, start: int) -> Iterator[Record]:
    """The quarantine topic from `start` (or its oldest record) to where its end was at the first answer.

    Raises Retryable when the broker falls silent, Fatal when the topic ends before `start`.
    """
    source, tp, end = KafkaSource(kafka), TopicPartition(kafka.topics.quarantine, 0), None
    with closing(source):
        begin = max(start, source.beginning_offsets([tp])[tp])
        source.assign({tp: begin})
        patience = Deadline.after(TIMEOUT_S)
        while not patience.passed:
            records = source.poll(0.25, 500)
            end = source.highwater(tp) if end is None else end
            if records:
                yield from (record for record in records if end is None or record.offset < end)
                patience = Deadline.after(TIMEOUT_S)
            if end is not None and begin > end:
                raise Fatal(f"topic '{tp.topic}' ends at {end}, before {begin}: it was made anew; delete group {GROUP}")
            if end is not None and source.position(tp) >= end:
                return
    raise Retryable(f"broker {kafka.bootstrap}: nothing more of '{tp.topic}' within {TIMEOUT_S:.0f} s")


def _kafka(settings: Settings) -> KafkaConfig:
    """The broker's settings with a person's patience, once it answers. Raises Retryable, or ConfigError: no topic."""
    kafka = settings.kafka.model_copy(update={"request_timeout_s": min(TIMEOUT_S, settings.kafka.request_timeout_s)})
    wait_for_broker(kafka, Deadline.after(TIMEOUT_S))
    name = kafka.topics.quarantine
    if describe_topics(kafka)[name] is None:
        raise ConfigError(f"kafka.topics.quarantine: no topic '{name}' on {kafka.bootstrap}; run: exfm topics create")
    return kafka


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Hold off a second replay on this machine. Raises Retryable while another one runs."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".quarantine-replay.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Retryable(f"another replay of the quarantine runs in {run_dir}; wait for its end") from None
        yield


def _group(reason: str | None) -> str:
    if reason is None:
        return GROUP
    return f"{GROUP}.{re.sub(r'[^A-Za-z0-9_-]', lambda match: f'.{ord(match[0]):x}', reason)[:180]}"


def _row(entry: Entry, *, replayed: bool) -> dict[str, Any]:
    record, origin = entry.record, entry.origin
    return {
        "time_ms": record.timestamp_ms,
        "reason": entry.reason,
        "detail": entry.detail,
        "topic": origin.topic if origin else None,
        "partition": origin.partition if origin else None,
        "offset": origin.offset if origin else None,
        "replayed": replayed,
        "quarantine_offset": record.offset,
        "value_bytes": len(record.value or b""),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("time (UTC)", "reason", "topic", "partition", "offset", "replayed", "detail")
    for row in rows:
        when = datetime.datetime.fromtimestamp(row["time_ms"] / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        place = ["?" if row[key] is None else str(row[key]) for key in ("topic", "partition", "offset")]
        words = [when, row["reason"], *place, "yes" if row["replayed"] else "", row["detail"]]
        table.add_row(*(Text(_printable(word)) for word in words))
    return table


def _printable(text: str) -> str:
    """Without characters that could steer a terminal: the text quotes what a stranger sent."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
