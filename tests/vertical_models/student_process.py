"""A student as a process: `python student_process.py '<JSON of Spec>'`. Faults come from EXFM_FAULTS.

Two witnesses ride along: `seen` counts every row trained and is saved with the weights, so that all ones is the proof
of exactly once; `wrong` counts rows whose logits are not those that the stub teacher gave to exactly that row.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash
from student_case import SCHEMA, messages, student_config
from torch import Tensor

from das import fault
from das.deadline import Deadline
from das.example_source import ExampleSource, start_positions
from das.examples import HEADER_CONTROL, HEADER_FORMAT, HEADER_JOIN, HEADER_ROWS, HEADER_SEQ
from das.join_state import JoinState, ReleaseKey, encode_state
from das.logit_block import encode_block
from das.logit_store import LogitStore, RedisConfig
from das.lookup import LogitLookup
from das.quarantine import Quarantine, QuarantineLimit
from das.stream import KafkaConfig, KafkaSink, KafkaSource, TopicsConfig, create_topics, wait_for_broker
from das.telemetry import NullTelemetry, Telemetry
from foundation_model.snapshot import unpack
from foundation_model.snapshot_folder import SnapshotFolder
from vertical_models.checkpoint import resume
from vertical_models.online import StudentLoop
from vertical_models.row_buffer import TrainingBatch
from vertical_models.trainer import StudentTrainer

ROWS = 21
"""Rows of each message; neither a batch nor a poll ends where a message does."""
MAX_MESSAGES = 64


class Spec(msgspec.Struct, frozen=True):
    """Where the stream, the store and the run folder are, and how this student differs from the test one."""

    bootstrap: str
    redis_url: str
    prefix: str
    folder: str
    changes: dict[str, Any] = {}
    partitions: int = 2
    stop_at_end: bool = True

    def kafka(self) -> KafkaConfig:
        """The broker, with topics of this test only."""
        names = {name: f"{self.prefix}-{name}" for name in TopicsConfig.model_fields}
        return KafkaConfig(bootstrap=self.bootstrap, partitions=self.partitions, topics=TopicsConfig(**names))

    def store(self) -> LogitStore:
        """The stub teacher's part of the store."""
        redis = RedisConfig(url=self.redis_url, socket_timeout_s=0.5)
        return LogitStore(redis, topic=self.kafka().topics.examples, teacher="stub", ttl_s=600)


class Stream:
    """The examples topic of one spec, written as the joiner would; release times interleave the partitions."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        wait_for_broker(spec.kafka(), Deadline.after(20))
        create_topics(spec.kafka())
        self._sink = KafkaSink(spec.kafka())
        self._values: dict[int, list[bytes]] = {p: messages(MAX_MESSAGES, ROWS, seed=p) for p in range(spec.partitions)}
        self._sent = dict.fromkeys(range(spec.partitions), 0)

    def put(self, partition: int, count: int) -> None:
        """The next `count` messages of a partition."""
        for _ in range(count):
            self._send(partition, self._values[partition][self._sent[partition]])
        self._sink.flush(20)

    def end(self) -> None:
        """The end of the stream, on every partition."""
        for partition in self._sent:
            self._send(partition, b"")
        self._sink.flush(20)

    def score(self, partition: int, offsets: Iterable[int], watermark: int | None = None) -> None:
        """The stub teacher: blocks of these offsets, and a watermark past them."""
        offsets = list(offsets)
        store = self.spec.store()
        blocks = {o: _block(partition, o, self._values[partition][o]) for o in offsets}
        store.put(partition, blocks, max(offsets) + 1 if watermark is None else watermark)
        store.close()

    def close(self) -> None:
        """Close the producer."""
        self._sink.close()

    def _send(self, partition: int, value: bytes) -> None:
        seq = self._sent[partition]
        self._sent[partition] += 1
        release_ms = 1000 * seq + 300 * partition
        state = JoinState(
            seq=seq, key=ReleaseKey(release_ms, "x"), first_release_ms=release_ms, last_release_ms=release_ms,
            next=(0, 0), replay=(0, 0), replay_max_ms=(0, 0), ends=(0, 0), ended=(False, False),
        )  # fmt: skip
        headers = {HEADER_FORMAT: b"1", HEADER_SEQ: b"%d" % seq, HEADER_JOIN: encode_state(state)}
        headers[HEADER_ROWS] = b"%d" % ROWS if value else b"0"
        if not value:
            headers[HEADER_CONTROL] = b"end-of-stream"
        self._sink.send(self.spec.kafka().topics.examples, partition, b"", value, headers)


def stub_logits(partition: int, offset: int) -> np.ndarray:
    """(ROWS, 2) logits that name their row; exact in float16."""
    row, objective = np.mgrid[:ROWS, :2]
    code = (partition * MAX_MESSAGES + offset) * ROWS + row
    return ((code * 2 + objective) % 2039 / 256 - 4).astype(np.float32)


def _block(partition: int, offset: int, value: bytes) -> bytes:
    return encode_block(
        stub_logits(partition, offset),
        teacher_version=offset,
        trained_offset=offset,
        trained_through_ms=0,
        schema_fingerprint=SCHEMA.fingerprint,
        message_checksum=xxhash.xxh64_intdigest(value),
    )


class WitnessTrainer(StudentTrainer):
    """A student that also keeps the two witnesses."""

    def __init__(self, *parts: Any, **more: Any) -> None:
        super().__init__(*parts, **more)
        self.seen = torch.zeros(2, MAX_MESSAGES, ROWS, dtype=torch.int64)
        self.hit = torch.zeros(2, MAX_MESSAGES, ROWS, dtype=torch.int64)
        self.wrong = torch.zeros(1, dtype=torch.int64)

    def train(self, item: TrainingBatch) -> bool:
        """Note every row, then train."""
        columns = [SCHEMA.objective_names.index(name) for name in self.config.objectives]
        for i, (partition, offset, row) in enumerate(item.source):
            self.seen[partition, offset, row] += 1
            if item.teacher is not None and item.teacher.found_B[i]:
                self.hit[partition, offset, row] += 1
                true_K = torch.from_numpy(stub_logits(partition, offset)[row, columns])
                mask_K = item.teacher.mask_BK[i]
                self.wrong += not torch.equal(item.teacher.logits_BK[i][mask_K], true_K[mask_K])
        return super().train(item)

    def state_tensors(self) -> dict[str, Tensor]:
        """The witnesses beside the rest."""
        witness = {"witness:seen": self.seen, "witness:hit": self.hit, "witness:wrong": self.wrong}
        return super().state_tensors() | witness

    def load(self, model: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Restore the witnesses too."""
        super().load(model, state)
        witness = unpack(state, "witness")
        self.seen, self.hit, self.wrong = (witness[name].clone() for name in ("seen", "hit", "wrong"))


@contextmanager
def student(
    spec: Spec, telemetry: Telemetry | None = None, stop: threading.Event | None = None
) -> Iterator[tuple[StudentLoop, WitnessTrainer]]:
    """A student ready to run, resumed from its folder. `stop` also ends waits for logits."""
    telemetry = telemetry or NullTelemetry()
    config, kafka = student_config(**spec.changes), spec.kafka()
    trainer = WitnessTrainer(config, SCHEMA, telemetry=telemetry)
    folder = SnapshotFolder(Path(spec.folder) / "snapshots", config.keep_snapshots, telemetry)
    records, sink, store = KafkaSource(kafka, group=f"{spec.prefix}-student"), KafkaSink(kafka), spec.store()
    topic = kafka.topics.examples
    quarantine = Quarantine(sink, kafka.topics.quarantine, telemetry, QuarantineLimit())
    lookup = None
    if config.distillation.reads_logits:
        lookup = LogitLookup(store, SCHEMA, telemetry, config.lookup, stop=stop)
    try:
        resumed = resume(trainer, folder, start_positions(records, topic, range(kafka.partitions)))
        source = ExampleSource(
            records, topic, SCHEMA, trainer.columns, resumed.positions, quarantine, telemetry, idle_s=None
        )
        results = Path(spec.folder) / "results" / "vm.json"
        loop = StudentLoop(
            source, lookup, trainer, resumed, folder,
            results=results, telemetry=telemetry, stop_at_end=spec.stop_at_end,
        )  # fmt: skip
        yield loop, trainer
    finally:
        records.close()
        sink.close()
        store.close()
        folder.close()


def main() -> None:
    """Run until the end of the stream or SIGTERM."""
    spec, stop = msgspec.json.decode(sys.argv[1], type=Spec), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    fault.arm(os.environ.get("EXFM_FAULTS"))
    with student(spec, stop=stop) as (loop, _):
        print("ready", flush=True)
        loop.run(stop)


if __name__ == "__main__":
    main()
