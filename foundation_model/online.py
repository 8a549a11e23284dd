"""The teacher's life on the stream: score a message, store its logits, only then learn from it.

A snapshot holds the weights after exactly the messages before its positions, and a restart reads the stream from
there; what the broker stores as committed is for lag displays only. On a CPU the rewritten blocks are byte-identical.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from das import fault
from das.deadline import Deadline
from das.embedding_block import encode_embeddings
from das.errors import ConfigError, Fatal, Retryable
from das.example_source import ExampleMessage, ExampleReader
from das.logit_block import encode_block
from das.logit_store import PutResult
from das.position import Position, Positions
from das.telemetry import NullTelemetry, Telemetry
from foundation_model.batch import Batch
from foundation_model.poll import encode_messages
from foundation_model.results import Ages, write_results
from foundation_model.snapshot_folder import SnapshotFolder
from foundation_model.trainer import TeacherTrainer, publish_metrics

logger = logging.getLogger(__name__)

T = TypeVar("T")
POLL_S = 1.0
POLL_MESSAGES = 32
BACKOFF_FIRST_S, BACKOFF_LAST_S = 0.05, 2.0
GAUGES_EVERY_STEPS = 20
AGES_PER_STEP = 4


class Store(Protocol):
    """What the loop writes to: `das.logit_store.LogitStore`."""

    def acquire(self, partition: int) -> int:
        """Become the only writer of a partition."""

    def put(
        self, partition: int, blocks: Mapping[int, bytes], watermark: int, embeddings: Mapping[int, bytes] | None
    ) -> PutResult:
        """Store blocks and raise the watermark in one atomic step."""


@dataclass(slots=True)
class _Put:
    """What one step stores of one partition."""

    blocks: dict[int, bytes]
    watermark: int
    embeddings: dict[int, bytes] | None


class TeacherLoop:
    """Runs the teacher until the stream ends or it is asked to stop. One thread."""

    def __init__(
        self,
        source: ExampleReader,
        store: Store,
        trainer: TeacherTrainer,
        positions: Positions,
        snapshots: SnapshotFolder,
        *,
        topic: str,
        results: Path,
        telemetry: Telemetry | None = None,
        stop_at_end: bool = True,
    ) -> None:
        """`source` starts at `positions`, which name every partition; see `resume`.

        `results`: the JSON file written when the stream ends.
        """
        self._source = source
        self._store = store
        self._trainer = trainer
        self._positions = dict(positions)
        self._snapshots = snapshots
        self._topic = topic
        self._results = results
        self._telemetry = telemetry or NullTelemetry()
        self._stop_at_end = stop_at_end
        self._queue: deque[tuple[ExampleMessage, Batch]] = deque()
        self._since_snapshot = 0
        self._saved_version = trainer.version
        self._blocks = {"written": 0, "identical": 0, "refused": 0, "withheld": 0}
        self._event_to_trained = Ages()
        self._rows_here = 0
        self._busy_s = 0.0
        self._first_s = self._last_s = time.monotonic()

    @property
    def positions(self) -> Positions:
        """The next message to score and train, per partition."""
        return dict(self._positions)

    def run(self, stop: threading.Event) -> None:
        """Score and train until the stream ends (if `stop_at_end`) or `stop` is set; the last thing is a snapshot.

        Raises Retryable when broker, store or disk stay away past their deadline, Fatal when going on would break a
        promise: another teacher owns a partition, or the source went back.
        """
        for partition in self._positions:
            self._patiently(lambda p=partition: self._store.acquire(p), stop)  # type: ignore[misc]
        while not stop.is_set():
            messages = self._next_messages(stop)
            if messages and not self._step(messages, stop):
                break
            if self._source.ended and not self._queue and not stop.is_set():
                self._finish()
                if self._stop_at_end:
                    return
                stop.wait(POLL_S)
        self._save_if_new()

    def _next_messages(self, stop: threading.Event) -> list[tuple[ExampleMessage, Batch]]:
        """Exactly `messages_per_step` messages, or what is left at an end of stream: cut by position, never by time."""
        wanted = self._trainer.config.messages_per_step
        while len(self._queue) < wanted and not stop.is_set():
            polled = self._patiently(lambda: self._source.poll(POLL_S, max(wanted, POLL_MESSAGES)), stop)
            encoded = encode_messages(self._trainer.encoder, [message.rows for message in polled or ()])
            self._queue.extend(zip(polled or (), encoded, strict=True))
            if self._source.ended:
                break
        if stop.is_set():
            return []
        return [self._queue.popleft() for _ in range(min(wanted, len(self._queue)))]

    def _step(self, encoded: Sequence[tuple[ExampleMessage, Batch]], stop: threading.Event) -> bool:
        """Score, store, train, save: the durable order. False if asked to stop before anything was stored."""
        began_s = time.monotonic()
        messages = [message for message, _ in encoded]
        self._check_order(messages)
        fault.point("teacher.after_poll")
        batch = Batch.concat([part for _, part in encoded])
        on_device = batch.to(self._trainer.device)
        scored_BK, embedded_BE = self._trainer.score_and_embed(on_device)  # 1. with weights that never saw these rows
        logits_BK = scored_BK.detach().cpu().numpy()
        embeddings_BE = None if embedded_BE is None else embedded_BE.cpu().numpy()
        fault.point("teacher.before_put")
        if not self._store_logits(messages, logits_BK, embeddings_BE, stop):  # 2. blocks and watermark are durable
            return False
        fault.point("teacher.after_put")
        self._trainer.evaluate(logits_BK, batch)  # 3. count the predictions
        self._trainer.step(scored_BK, on_device)  # 4. only then learn from the same forward
        for message in messages:
            self._positions[message.partition] = Position(message.offset + 1)
        fault.point("teacher.after_train")
        self._observe(batch, began_s)
        self._since_snapshot += len(messages)
        if self._since_snapshot >= self._trainer.config.snapshot_every_messages:
            self._save()  # 5. weights and positions are durable, 6. only then tell the broker
        return True

    def _check_order(self, messages: Sequence[ExampleMessage]) -> None:
        """No peek: the weights have trained on nothing at or after any of these offsets."""
        for message in messages:
            reached = self._positions[message.partition].offset
            if message.offset < reached:
                self._telemetry.count("exfm_invariant_violations_total", invariant="no_peek")
                raise Fatal(
                    f"{self._topic}[{message.partition}] offset {message.offset} came again, after {reached - 1} was "
                    "trained; its logits would be those of a teacher that knows its labels"
                )

    def _store_logits(
        self,
        messages: Sequence[ExampleMessage],
        logits_BK: np.ndarray,
        embeddings_BE: np.ndarray | None,
        stop: threading.Event,
    ) -> bool:
        """One atomic put per partition. A message with a value that is not finite gets no block.

        Its watermark moves on all the same: students find nothing and train on its labels alone at once.
        """
        puts: dict[int, _Put] = {}
        first = 0
        for message in messages:
            rows = slice(first, first := first + message.rows.num_rows)
            own = puts.setdefault(message.partition, _Put({}, 0, None if embeddings_BE is None else {}))
            own.watermark = message.offset + 1
            if np.isfinite(logits_BK[rows]).all() and (embeddings_BE is None or np.isfinite(embeddings_BE[rows]).all()):
                header = self._header(message)
                dtype = self._trainer.config.logit_dtype
                own.blocks[message.offset] = encode_block(logits_BK[rows], **header, dtype=dtype)
                if own.embeddings is not None and embeddings_BE is not None:
                    own.embeddings[message.offset] = encode_embeddings(embeddings_BE[rows], **header)
            else:
                self._blocks["withheld"] += 1
                self._telemetry.count("exfm_logit_blocks_total", outcome="withheld")
                logger.error("%s[%d] offset %d: a logit is not finite", self._topic, message.partition, message.offset)
        for partition, own in puts.items():
            arguments = own.blocks, own.watermark, own.embeddings
            result = self._patiently(lambda p=partition, a=arguments: self._store.put(p, *a), stop)  # type: ignore[misc]
            if result is None:
                return False
            self._count_blocks(partition, result)
        return True

    def _header(self, message: ExampleMessage) -> dict[str, int]:
        """What the blocks of a message say of where they come from."""
        return {
            "teacher_version": self._trainer.version,
            "trained_offset": self._positions[message.partition].offset,
            "trained_through_ms": self._trainer.trained_through_ms,
            "schema_fingerprint": self._trainer.schema.fingerprint,
            "message_checksum": message.checksum,
        }

    def _count_blocks(self, partition: int, result: PutResult) -> None:
        for outcome, count in result._asdict().items():
            self._blocks[outcome] += count
            if count:
                self._telemetry.count("exfm_logit_blocks_total", count, outcome=outcome)
        if result.refused:
            logger.error(
                "%s[%d]: the store keeps %d blocks that differ from ours; expected only after a crash on hardware "
                "that is not deterministic", self._topic, partition, result.refused,
            )  # fmt: skip

    def _save(self) -> None:
        """Make what was trained durable; only then tell the broker."""
        trainer = self._trainer
        summaries = {key: vars(trainer.metrics.summary(key)) for key in trainer.metrics.keys}
        written = self._snapshots.write(  # 5. durable
            trainer.version,
            model=trainer.model.state_dict(),
            state=trainer.state_tensors(),
            config=trainer.config.model_dump(mode="json"),
            schema_fingerprint=trainer.schema.fingerprint,
            positions=self.positions,
            trained_through_ms=trainer.trained_through_ms,
            steps=trainer.optimizers.steps,
            rows=trainer.rows,
            metrics=summaries,
        )
        self._since_snapshot = 0
        if not written:
            return
        self._saved_version = trainer.version
        fault.point("teacher.after_snapshot")
        try:
            self._source.commit(self.positions)  # 6. for lag displays
        except Retryable as error:
            logger.warning("positions not committed; only lag displays notice: %s", error)
        fault.point("teacher.after_commit")

    def _save_if_new(self) -> None:
        if self._saved_version != self._trainer.version:
            self._save()

    def _finish(self) -> None:
        self._save_if_new()
        publish_metrics(self._trainer.metrics, self._telemetry)
        write_results(self._results, self.results())

    def _observe(self, batch: Batch, began_s: float) -> None:
        """Rates and ages; a few rows of each batch stand for all of them in the histogram."""
        self._last_s = time.monotonic()
        if not self._rows_here:
            self._first_s = began_s
        self._rows_here += batch.num_rows
        self._busy_s += self._last_s - began_s
        self._telemetry.observe("exfm_step_seconds", self._last_s - began_s)
        age_s = time.time() - batch.ingest_time_ms_B / 1000
        self._event_to_trained.add(age_s[self._trainer.metrics.evaluated(batch.event_time_ms_B)])
        for age in np.quantile(age_s, np.linspace(0, 1, AGES_PER_STEP)):
            self._telemetry.observe("exfm_event_to_trained_seconds", max(0.0, float(age)))
        if self._trainer.version % GAUGES_EVERY_STEPS == 0:
            publish_metrics(self._trainer.metrics, self._telemetry)

    def _patiently(self, action: Callable[[], T], stop: threading.Event) -> T | None:
        """`action`, repeated while its dependency is away; None if asked to stop meanwhile."""
        patience = Deadline.after(self._trainer.config.put_timeout_s)
        pause_s = BACKOFF_FIRST_S
        while True:
            try:
                result = action()
            except Retryable as error:
                if patience.passed:
                    raise
                self._telemetry.gauge("exfm_ready", 0)
                logger.warning("waiting, %.0f s left: %s", patience.left_s, error)
                if stop.wait(min(pause_s, patience.left_s)):
                    return None
                pause_s = min(2 * pause_s, BACKOFF_LAST_S)
            else:
                if pause_s != BACKOFF_FIRST_S:
                    self._telemetry.gauge("exfm_ready", 1)
                return result

    def results(self) -> dict[str, Any]:
        """The results of everything trained so far, JSON-ready. Rates, ages and blocks are of this life."""
        trainer = self._trainer
        span_s = self._last_s - self._first_s
        return {
            "name": trainer.config.name,
            "kind": "teacher",
            "arm": "teacher",
            "rows": trainer.rows,
            "rows_per_s": self._rows_here / span_s if span_s > 0 else None,
            "busy_share": self._busy_s / span_s if span_s > 0 else None,
            "hit_rate": None,
            "steps": trainer.optimizers.steps,
            "steps_nonfinite": trainer.version - trainer.optimizers.steps,
            "device": str(trainer.device),
            "event_to_trained_s": self._event_to_trained.summary(),
            "logit_blocks": dict(self._blocks),
            "snapshot_version": self._snapshots.last_version,
            "portfolios": trainer.metrics.results(),
        }


def resume(trainer: TeacherTrainer, snapshots: SnapshotFolder, start: Positions) -> Positions:
    """Load the newest valid snapshot, if there is one, and return where to read on.

    `start` names every partition and where one without a saved position begins (see
    `das.example_source.start_positions`). Raises ConfigError if the snapshot is of another schema, model or topic.
    """
    snapshot = snapshots.latest()
    if snapshot is None:
        return dict(start)
    saved = snapshot.manifest.positions
    if gone := set(saved) - set(start):
        raise ConfigError(f"{snapshot.path} has positions of the partitions {sorted(gone)}, which the topic lacks")
    trainer.load(snapshot)
    logger.info("resumed version %d at %s", trainer.version, saved)
    return {**start, **saved}
