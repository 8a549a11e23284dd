"""One joiner worker of `exfm bench das`, as a process of its own: `python -m services.bench.das_worker FILE`.

FILE is JSON: {"kafka": .., "joiner": .., "mode": "join" | "client", "profile": bool}. It joins to the end of the stream
and prints one JSON object. Mode client does what the broker's client alone costs: it polls the same records and sends
messages of the same sizes.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import sys
import threading
import time
from pathlib import Path
from typing import Any

from das.joiner import Joiner, JoinerConfig
from das.stream import KafkaConfig, KafkaSink, KafkaSource, TopicPartition
from das.telemetry import NullTelemetry
from services.bench import das_events

GROUPS = {
    "broker client": ("/kafka/", "/das/stream.py", "/das/sink.py", "/das/broker.py", "/crc32c", "/lz4"),
    "sockets and waiting": ("socket", "select", "threading.py", "poll", "lock"),
    "JSON": ("/das/messages.py", "/msgspec/"),
    "Arrow": ("/das/examples.py", "/pyarrow/"),
    "join": ("/das/join.py", "/das/join_state.py", "/das/watermark.py", "/das/joiner.py", "/das/joiner_lane.py"),
}
BUILT_IN = {
    "sockets and waiting": ("socket", "select", "epoll", "lock", "time.sleep"),
    "JSON": ("msgspec",),
    "Arrow": ("pyarrow",),
    "broker client": ("lz4", "crc32c", "struct", "memoryview"),
}


class Timeline(NullTelemetry):
    """(wall s, CPU s, rows published so far) after every round; of the rounds before the first row only the last."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float, float]] = []
        self._total = 0.0
        self._idle = True

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add up the published rows."""
        self._total += amount if name == "exfm_examples_rows_total" else 0

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """A round is over: `value` impressions wait now."""
        if name != "exfm_joiner_pending":
            return
        point = (time.time(), time.process_time(), self._total)
        self._idle = self._idle and not self._total and not value
        if self._idle:
            self.points.clear()
        if not self.points or self._total > self.points[-1][2]:
            self.points.append(point)


def main(path: str) -> None:
    """Run the worker of one settings file."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    kafka = KafkaConfig.model_validate(data["kafka"])
    timeline, profile = Timeline(), cProfile.Profile(time.process_time)
    sys.stdin.readline()  # all workers start together
    if data["profile"]:
        profile.enable()
    if data["mode"] == "join":
        config = JoinerConfig.model_validate(data["joiner"])
        Joiner(kafka, das_events.schema(sequence=False), config, timeline, stop_at_end=True).run(threading.Event())
    else:
        _client(kafka, data, timeline)
    profile.disable()
    shares = _shares(profile) if data["profile"] else {}
    sys.stdout.write(json.dumps({"points": timeline.points, "shares": shares}) + "\n")


def _client(kafka: KafkaConfig, data: dict[str, Any], timeline: Timeline) -> None:
    source, sink = KafkaSource(kafka), KafkaSink(kafka)
    topics, left = (kafka.topics.impressions, kafka.topics.feedback), data["records"]
    source.assign({TopicPartition(topic, p): 0 for topic in topics for p in range(kafka.partitions)})
    timeline.gauge("exfm_joiner_pending", 0)
    value, rows = b"\0" * data["message_bytes"], 0
    while left > 0:
        records = source.poll(0.25, data["joiner"].get("poll_records", 2000))
        left -= len(records)
        found = sum(record.topic == topics[0] for record in records)
        rows += found
        while rows >= data["message_rows"]:
            rows -= data["message_rows"]
            sink.send(kafka.topics.quarantine, 0, None, value)
        timeline.count("exfm_examples_rows_total", found)
        timeline.gauge("exfm_joiner_pending", rows)
    sink.flush(kafka.produce_timeout_s)
    source.close()
    sink.close()


def _shares(profile: cProfile.Profile) -> dict[str, float]:
    """Share of the profiled CPU time by group of functions, from their own times."""
    times: dict[str, float] = {}
    stats: Any = pstats.Stats(profile)
    for (file, _, function), (_, _, own_s, _, _) in stats.stats.items():
        group = _group(function, BUILT_IN) if file == "~" else _group(file, GROUPS)
        times[group] = times.get(group, 0.0) + own_s
    total = sum(times.values()) or 1.0
    return {name: round(own / total, 3) for name, own in sorted(times.items(), key=lambda item: -item[1])}


def _group(text: str, groups: dict[str, tuple[str, ...]]) -> str:
    return next((name for name, parts in groups.items() if any(part in text for part in parts)), "other")


if __name__ == "__main__":
    main(sys.argv[1])
