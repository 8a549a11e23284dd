"""A recorded stream with known labels on a real broker, and joiner workers that are processes of their own.

Run as a script it is one joiner worker: `python joiner_rig.py SETTINGS.json`, faults from EXFM_FAULTS.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from das import fault
from das.deadline import Deadline
from das.examples import END_OF_STREAM, HEADER_CONTROL, HEADER_SEQ, decode_examples
from das.joiner import Joiner, JoinerConfig
from das.quarantine import QuarantineLimit
from das.schema import FeatureSchema
from das.stream import (
    KafkaConfig,
    KafkaSink,
    Record,
    TopicPartition,
    TopicsConfig,
    create_topics,
    partition_for,
    read_tail,
)
from das.telemetry import RecordingTelemetry

T0_MS = 1_650_000_000_000
WINDOW_MS = {"click": 2_000, "buy": 10_000}
SCHEMA: dict[str, Any] = {
    "name": "rig",
    "domains": ["0", "1"],
    "features": [{"kind": "categorical", "name": "item"}, {"kind": "numeric", "name": "price"}],
    "objectives": [{"name": "click", "window_s": 2}, {"name": "buy", "window_s": 10, "domains": ["1"]}],
}

ZIPPER = {
    **SCHEMA,
    "zipper": {"salt": "rig", "windows": [{"window_s": 3, "share": 0.6}, {"window_s": 10, "share": 0.4}]},
}


def kafka_config(bootstrap: str, prefix: str, **changes: Any) -> KafkaConfig:
    topics = TopicsConfig(**{name: f"{prefix}-{name}" for name in TopicsConfig.model_fields})
    config = KafkaConfig(bootstrap=bootstrap, topics=topics, **changes)
    create_topics(config)
    return config


class Stream:
    """Impressions 20 ms apart, about half with a click and a third with a buy, some of both too late to count."""

    def __init__(self, count: int, seed: int = 1, start_ms: int = T0_MS, *, schema: dict[str, Any] = SCHEMA) -> None:
        rng, parsed = random.Random(seed), FeatureSchema.model_validate(schema)
        self.labels: dict[str, tuple[int, int | None]] = {}
        self.times: dict[str, int] = {}
        self.records: list[tuple[int, str, str, dict[str, Any]]] = []  # (time, topic, id, message)
        for n in range(count):
            name, t, domain = f"i{seed}-{n}", start_ms + 20 * n, str(n % 2)
            features = {"item": n, "price": n / 4}
            message = {"impression_id": name, "event_time": t, "domain": domain, "features": features}
            self.records.append((t, "impressions", name, message))
            self.times[name] = t
            found = []
            row_ms = parsed.windows_ms[parsed.zipper.assign(name) if parsed.zipper else 0]
            for objective, window_ms in WINDOW_MS.items():
                after_ms = rng.choice((None, 0, window_ms // 2, window_ms, window_ms + 1, window_ms + 500))
                if after_ms is not None:
                    given = {"impression_id": name, "objective": objective, "event_time": t + after_ms, "value": 1}
                    self.records.append((t + after_ms, "feedback", name, given))
                found.append(int(after_ms is not None and after_ms <= min(window_ms, row_ms)))
            self.labels[name] = (found[0], found[1] if domain == "1" else None)
        self.records.sort(key=lambda r: r[:3])

    def send(self, config: KafkaConfig, sink: KafkaSink, *, end: bool = True, shuffle: bool = False) -> None:
        """Produce in event-time order (or with neighbors swapped), to the partition of each id."""
        records = list(self.records)
        if shuffle:
            rng = random.Random(0)
            records.sort(key=lambda r: r[0] + rng.randrange(0, 400))
        for _, topic, name, message in records:
            send_json(config, sink, topic, name, message)
        if end:
            send_end(config, sink)
        sink.flush(20)


def send_json(config: KafkaConfig, sink: KafkaSink, topic: str, name: str, message: Any) -> None:
    value = message if isinstance(message, bytes) else json.dumps(message).encode()
    sink.send(getattr(config.topics, topic), partition_for(name, config.partitions), name.encode(), value)


def send_end(config: KafkaConfig, sink: KafkaSink) -> None:
    for topic in (config.topics.impressions, config.topics.feedback):
        for partition in range(config.partitions):
            sink.send(topic, partition, None, b"", {HEADER_CONTROL: END_OF_STREAM})


def read_topic(config: KafkaConfig, topic: str, partition: int) -> list[Record]:
    return read_tail(config, TopicPartition(topic, partition), 1_000_000, Deadline.after(20))


class Examples:
    """Everything in the examples topic. Messages whose seq was there before do not count, as for every reader."""

    def __init__(self, config: KafkaConfig) -> None:
        schema = FeatureSchema.model_validate(ZIPPER)
        self.times_seen: Counter[str] = Counter()
        self.labels: dict[str, tuple[int, int | None]] = {}
        self.windows: dict[str, int] = {}
        self.order: dict[int, list[tuple[int, str]]] = {}
        self.ends: Counter[int] = Counter()
        self.rows_per_message: list[int] = []
        self.values: dict[int, list[bytes]] = {}
        self.repeated_messages = 0
        for partition in range(config.partitions):
            order = self.order[partition] = []
            seen: set[bytes] = set()
            for record in read_topic(config, config.topics.examples, partition):
                if record.headers[HEADER_SEQ] in seen:
                    self.repeated_messages += 1
                    continue
                seen.add(record.headers[HEADER_SEQ])
                if HEADER_CONTROL in record.headers:
                    self.ends[partition] += 1
                    continue
                self.values.setdefault(partition, []).append(record.value or b"")
                batch = decode_examples(record.value, schema)
                self.rows_per_message.append(batch.num_rows)
                for row in batch.to_pylist():
                    name = row["impression_id"]
                    self.times_seen[name] += 1
                    self.labels[name] = (row["click"], row["buy"])
                    self.windows[name] = row["window"]
                    order.append((int(row["event_time"].timestamp() * 1000), name))


class Worker:
    """One joiner process."""

    def __init__(
        self,
        folder: Path,
        config: KafkaConfig,
        joiner: dict[str, Any],
        faults: str = "",
        *,
        schema: dict[str, Any] = SCHEMA,
        stop_at_end: bool = True,
    ) -> None:
        settings = folder / f"worker-{time.monotonic_ns()}.json"
        data = {"kafka": config.model_dump(mode="json"), "joiner": joiner, "schema": schema, "stop_at_end": stop_at_end}
        settings.write_text(json.dumps(data))
        self._log = settings.with_suffix(".log")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(settings)],
                env={**os.environ, "EXFM_FAULTS": faults, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def wait(self, timeout_s: float = 40) -> int:
        return self.process.wait(timeout_s)

    def partitions_begun(self) -> set[int]:
        """Partitions that this worker was the first to join."""
        found = re.findall(r"partition (\d+): from \[0, 0\] after None", self.log)
        return {int(number) for number in found}

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")


JOINER = {
    "allowed_lateness_ms": 500,
    "idle_timeout_s": None,
    "linger_ms": 3_600_000,
    "batch_rows": 32,
    "session_timeout_s": 6 if os.environ.get("EXFM_TEST_KAFKA") else 2,  # Apache Kafka takes no less than 6
    "dedup_ms": 5_000,
}


def make_joiner(
    config: KafkaConfig,
    telemetry: RecordingTelemetry,
    *,
    schema: dict[str, Any] = SCHEMA,
    limit: QuarantineLimit | None = None,
    stop_at_end: bool = True,
    **changes: Any,
) -> Joiner:
    settings = JoinerConfig.model_validate({**JOINER, "group": config.topics.examples, **changes})
    return Joiner(
        config, FeatureSchema.model_validate(schema), settings, telemetry, limit=limit, stop_at_end=stop_at_end
    )


class Background:
    """A joiner in a thread of this process."""

    def __init__(self, joiner: Joiner) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(joiner,))
        self._thread.start()

    def _run(self, joiner: Joiner) -> None:
        try:
            joiner.run(self.stop)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self.error = error

    def finish(self, timeout_s: float = 30) -> None:
        self._thread.join(timeout_s)
        self.stop.set()
        self._thread.join(10)
        if self.error is not None:
            raise self.error


def run_here(config: KafkaConfig, timeout_s: float = 60, **changes: Any) -> RecordingTelemetry:
    """Join in this process until the end of the stream; returns what was counted."""
    telemetry, stop = RecordingTelemetry(), threading.Event()
    limit = changes.pop("limit", QuarantineLimit())
    joiner = make_joiner(config, telemetry, limit=limit, **changes)
    timer = threading.Timer(timeout_s, stop.set)
    timer.start()
    try:
        joiner.run(stop)
    finally:
        timer.cancel()
    assert not stop.is_set(), f"no end of the stream within {timeout_s} s"
    return telemetry


def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def main(path: str) -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("kafka").setLevel(logging.WARNING)
    fault.arm(os.environ.get("EXFM_FAULTS"))
    data = json.loads(Path(path).read_text())
    config = KafkaConfig.model_validate(data["kafka"])
    settings = JoinerConfig.model_validate({**JOINER, "group": config.topics.examples, **data["joiner"]})
    schema = FeatureSchema.model_validate(data["schema"])
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    Joiner(config, schema, settings, RecordingTelemetry(), stop_at_end=data["stop_at_end"]).run(stop)


if __name__ == "__main__":
    main(sys.argv[1])
