"""Joiner workers, each a process of its own, over a broker that holds the whole stream before they start.

The clocks run from the moment a worker has its partitions to its last published example, so that the start of Python
and the group's first assignment do not count, and everything else does.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

from kafka.admin import KafkaAdminClient

from das.broker import open_client
from das.deadline import Deadline
from das.errors import Fatal
from das.examples import END_OF_STREAM, HEADER_CONTROL, HEADER_ROWS
from das.messages import MessageCodec
from das.stream import KafkaConfig, KafkaSink, TopicPartition, TopicsConfig, create_topics, partition_for, read_tail
from services.bench import das_events
from services.bench.document import Row

TIMEOUT_S = 600.0
JOINER = {"idle_timeout_s": None, "allowed_lateness_ms": 1000}


def measure(bootstrap: str, folder: Path, *, impressions: int, repeats: int) -> list[Row]:
    """`joiner.rate` and `joiner.two_workers`. Raises Fatal when a worker fails or an impression is missing."""
    rows = []
    for partitions, row in ((1, _rate), (4, _two_workers)):
        with closing(Stream(bootstrap, folder, impressions, partitions)) as stream:
            rows.append(row(stream, repeats))
    return rows


class Stream:
    """Impressions and feedback in topics of their own, ended, ready to be joined again and again by other groups."""

    def __init__(self, bootstrap: str, folder: Path, impressions: int, partitions: int) -> None:
        self.impressions, self.folder = impressions, folder
        self.records = 2 * partitions
        self.message_rows, self.bytes_per_row = 0, 0.0
        self._prefix = f"bench-{uuid.uuid4().hex[:8]}"
        topics = TopicsConfig(**{name: f"{self._prefix}-{name}" for name in TopicsConfig.model_fields})
        self.kafka = KafkaConfig(bootstrap=bootstrap, partitions=partitions, topics=topics)
        create_topics(self.kafka)
        self._produce()

    def close(self) -> None:
        """Delete its topics; the broker may be yours."""
        admin = open_client(KafkaAdminClient, self.kafka, {})
        try:
            admin.delete_topics([name for name in admin.list_topics() if name.startswith(self._prefix)])
        finally:
            admin.close()

    def _produce(self) -> None:
        sink, codec = KafkaSink(self.kafka), MessageCodec(das_events.schema(sequence=False))
        topics, partitions = self.kafka.topics, self.kafka.partitions
        for impression in das_events.impressions(self.impressions, sequence=False):
            name = impression["impression_id"]
            value = codec.encode_impression(impression)
            sink.send(topics.impressions, partition_for(name, partitions), name.encode(), value)
        for feedback in das_events.feedback(self.impressions):
            name = feedback["impression_id"]
            value = codec.encode_feedback(feedback)
            sink.send(topics.feedback, partition_for(name, partitions), name.encode(), value)
            self.records += 1
        self.records += self.impressions
        for topic in (topics.impressions, topics.feedback):
            for partition in range(partitions):
                sink.send(topic, partition, None, b"", {HEADER_CONTROL: END_OF_STREAM})
        sink.flush(TIMEOUT_S)
        sink.close()

    def run(self, workers: int = 1, **changes: Any) -> list[dict[str, Any]]:
        """What each worker measured; every run joins the whole stream into an `examples` topic of its own."""
        topics = self.kafka.topics.model_copy(update={"examples": f"{self._prefix}-{uuid.uuid4().hex[:8]}"})
        kafka = self.kafka.model_copy(update={"topics": topics})
        create_topics(kafka)
        settings = {"mode": "join", "profile": False, "records": self.records, **changes}
        settings |= {"kafka": kafka.model_dump(mode="json"), "joiner": {**JOINER, "group": topics.examples}}
        file = self.folder / "worker.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        found = _run_workers(file, workers)
        if settings["mode"] == "join":
            self._check(kafka)
        return found

    def _check(self, kafka: KafkaConfig) -> None:
        rows = [0]
        size = 0
        for partition in range(kafka.partitions):
            output = TopicPartition(kafka.topics.examples, partition)
            for record in read_tail(kafka, output, 1_000_000, Deadline.after(TIMEOUT_S)):
                rows.append(int(record.headers[HEADER_ROWS]))
                size += len(record.value or b"")
        if sum(rows) != self.impressions:
            raise Fatal(f"{sum(rows)} examples of {self.impressions} impressions")
        self.message_rows, self.bytes_per_row = max(rows), size / self.impressions


def _run_workers(file: Path, workers: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "services.bench.das_worker", str(file)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
        for _ in range(workers)
    ]
    try:
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        deadline = Deadline.after(TIMEOUT_S)
        found = []
        for process in running:
            answer = process.communicate(timeout=deadline.left_s)[0]
            if process.returncode != 0:
                raise Fatal(f"a joiner worker failed with exit code {process.returncode}")
            found.append(json.loads(answer))
        return found
    finally:
        for process in running:
            process.kill()
            process.wait(10)


def _rates(found: list[dict[str, Any]]) -> tuple[float, float]:
    """Impressions per wall second of all workers together, and CPU microseconds per impression."""
    working = [worker["points"] for worker in found if len(worker["points"]) > 1]
    began_s, ended_s = min(p[0][0] for p in working), max(p[-1][0] for p in working)
    joined = sum(p[-1][2] - p[0][2] for p in working)
    cpu_s = sum(p[-1][1] - p[0][1] for p in working)
    return joined / max(ended_s - began_s, 1e-9), 1e6 * cpu_s / joined


def _median(runs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)


def _rate(stream: Stream, repeats: int) -> Row:
    impressions = stream.impressions
    ours, client = [], []
    for _ in range(repeats):
        ours.append(_rates(stream.run()))
        size = int(stream.message_rows * stream.bytes_per_row)
        client.append(_rates(stream.run(mode="client", message_rows=stream.message_rows, message_bytes=size)))
    rate, cpu_us = _median(ours)
    base_rate, base_us = _median(client)
    extra = {
        "impressions": impressions,
        "columns": das_events.NUM_IDS + das_events.NUM_WORDS + das_events.NUM_NUMBERS + 3,
        "feedback_per_impression": round((stream.records - impressions) / impressions, 3),
        "cpu_us_per_impression": cpu_us,
        "impressions_per_cpu_s": 1e6 / cpu_us,
        "client_cpu_us_per_impression": base_us,
        "client_share": base_us / cpu_us,
        "rows_per_message": stream.message_rows,
        "message_bytes_per_row": stream.bytes_per_row,
        "profile": stream.run(profile=True)[0]["shares"],
    }
    return Row("joiner.rate", rate, "impressions/s", "the broker client alone", base_rate, extra=extra)


def _two_workers(stream: Stream, repeats: int) -> Row:
    one, two, idle = [], [], 0
    for _ in range(repeats):
        one.append(_rates(stream.run(1)))
        found = stream.run(2)
        idle += sum(not worker["points"] for worker in found)
        two.append(_rates(found))
    (base_rate, base_us), (rate, cpu_us) = _median(one), _median(two)
    extra = {
        "impressions": stream.impressions,
        "partitions": stream.kafka.partitions,
        "cpu_us_per_impression": cpu_us,
        "baseline_cpu_us_per_impression": base_us,
        "workers_without_partitions": idle,
    }
    return Row("joiner.two_workers", rate, "impressions/s", "one worker", base_rate, extra=extra)
