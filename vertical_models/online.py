"""A student's life on the stream: read, attach logits, predict, train, save; exactly once in effect.

A snapshot holds the model after exactly the rows before its positions, and on start the stream is read from there.
What the broker stores as committed is for lag displays only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from das import fault
from das.deadline import Deadline
from das.errors import Fatal, Retryable
from das.example_source import ExampleMessage, ExampleReader
from das.logit_block import LogitBlock
from das.lookup import LogitLookup
from das.position import Position, Positions
from das.telemetry import NullTelemetry, Telemetry
from foundation_model.batch import Batch
from foundation_model.poll import encode_messages
from foundation_model.results import Ages, write_results
from foundation_model.snapshot_folder import SnapshotFolder
from vertical_models import checkpoint
from vertical_models.checkpoint import Resumed
from vertical_models.row_buffer import RowBuffer, Segment, TrainingBatch, start_row
from vertical_models.trainer import StudentTrainer

logger = logging.getLogger(__name__)

POLL_S = 1.0
POLL_MESSAGES = 32
"""Decoded and encoded together, and asked for their logits in one round trip."""
WAIT_MESSAGES = 4
"""Few: their logits are waited for together. Later ones are taken with them if theirs are there."""
RETRY_S = 1.0
GAUGES_EVERY_STEPS = 20
AGES_PER_STEP = 4


@dataclass(frozen=True, slots=True)
class _Read:
    """A message, the indices of the student's rows in it, and those rows encoded; None if there are none."""

    message: ExampleMessage
    rows: np.ndarray
    batch: Batch | None


class StudentLoop:
    """Runs one student until the stream ends or it is asked to stop. One thread."""

    def __init__(
        self,
        source: ExampleReader,
        lookup: LogitLookup | None,
        trainer: StudentTrainer,
        resumed: Resumed,
        snapshots: SnapshotFolder,
        *,
        results: Path,
        telemetry: Telemetry | None = None,
        stop_at_end: bool = True,
    ) -> None:
        """`source` starts at `resumed.positions`; `lookup` is None exactly for students that do not read logits.

        `results`: the JSON file written when the stream ends.
        """
        assert (lookup is not None) == trainer.config.distillation.reads_logits
        self._source = source
        self._lookup = lookup
        self._trainer = trainer
        self._snapshots = snapshots
        self._results = results
        self._telemetry = telemetry or NullTelemetry()
        self._stop_at_end = stop_at_end
        self._buffer = RowBuffer(dict(resumed.positions))
        self._next = dict(resumed.positions)  # what is read, ahead of what is trained
        self._read: deque[_Read] = deque()  # what is read and not in the buffer
        self._misses = resumed.misses
        self._saved_steps = trainer.counts.steps
        self._finished_steps = -1
        self._allowed = set(trainer.student.serving.domains)
        self._event_to_trained = Ages()
        self._freshness_gap = Ages()
        self._rows_here = 0
        self._first_s = self._last_s = time.monotonic()

    @property
    def positions(self) -> Positions:
        """The next row to train, per partition."""
        return dict(self._buffer.positions)

    def run(self, stop: threading.Event) -> None:
        """Train until the stream ends (if `stop_at_end`) or `stop` is set; the last thing is a snapshot.

        Raises Retryable when broker or disk stay away past their deadline, Fatal when the source went back.
        """
        batch_rows = self._trainer.config.batch_rows
        while not stop.is_set():
            self._fill(stop)
            while len(self._buffer) >= batch_rows and not stop.is_set():
                self._step(batch_rows)
            if self._source.ended and not self._read and not stop.is_set():
                self._finish()
                if self._stop_at_end:
                    return
                stop.wait(POLL_S)
        self._save_if_new()

    def _fill(self, stop: threading.Event) -> None:
        """Read messages and decide, once, which of the next have logits."""
        if not self._read:
            self._encode(self._poll(stop))  # 1. read
        fault.point("student.after_poll")
        read = self._with_logits()  # 2. a bounded wait
        if stop.is_set():
            return  # the wait may have been cut short: nothing is decided, and nothing of this is trained
        fault.point("student.after_lookup")
        for one, block in read:
            self._read.popleft()
            self._buffer.add(self._segment(one, block))

    def _encode(self, messages: Sequence[ExampleMessage]) -> None:
        """Queue messages with their own rows encoded, all in one pass."""
        rows = [self._own_rows(message) for message in messages]
        mine = [(message.rows, own) for message, own in zip(messages, rows, strict=True) if len(own)]
        batches = iter(encode_messages(self._trainer.encoder, *zip(*mine, strict=True)) if mine else ())
        for message, own in zip(messages, rows, strict=True):
            self._read.append(_Read(message, own, next(batches) if len(own) else None))

    def _step(self, rows: int) -> None:
        """Train on the next rows, and save when it is time."""
        began_s = time.monotonic()
        item = self._buffer.cut(rows)
        self._trainer.train(item)  # 3. predict, count, learn
        fault.point("student.after_step")
        self._observe(item, began_s)
        if self._trainer.counts.steps % self._trainer.config.snapshot_every_steps == 0:
            self._save()

    def _save(self) -> None:
        """Make what was trained durable; only then tell the broker."""
        positions = self.positions
        if not checkpoint.save(self._trainer, self._snapshots, positions, self._buffer.decisions()):  # 4. durable
            return
        self._saved_steps = self._trainer.counts.steps
        fault.point("student.after_snapshot")
        try:
            self._source.commit(positions)  # 5. for lag displays
        except Retryable as error:
            logger.warning("positions not committed; only lag displays notice: %s", error)
        fault.point("student.after_commit")

    def _save_if_new(self) -> None:
        if self._saved_steps != self._trainer.counts.steps:
            self._save()

    def _finish(self) -> None:
        """End of stream: what is left is one last, smaller batch."""
        if len(self._buffer):
            self._step(len(self._buffer))
        self._save_if_new()
        if self._finished_steps != self._trainer.counts.steps:
            self._finished_steps = self._trainer.counts.steps
            self._gauges()
            write_results(self._results, self.results())

    def _poll(self, stop: threading.Event) -> list[ExampleMessage]:
        """The next messages; patient while the broker is away."""
        patience = Deadline.after(self._trainer.config.poll_timeout_s)
        while not stop.is_set():
            try:
                return self._source.poll(POLL_S, POLL_MESSAGES)
            except Retryable as error:
                if patience.passed:
                    raise
                logger.warning("waiting for the broker, %.0f s left: %s", patience.left_s, error)
                stop.wait(RETRY_S)
        return []

    def _with_logits(self) -> list[tuple[_Read, LogitBlock | None]]:
        """The next messages that are decided, with their blocks, where there are any.

        A message without rows of the student needs none; a miss of an earlier life stays one.
        """
        if self._lookup is None:
            return [(read, None) for read in self._read]
        wanted = [read for read in self._read if len(read.rows)]
        messages, rows = [read.message for read in wanted], [len(read.rows) for read in wanted]
        blocks = self._lookup.attach(messages, rows, wait_for=WAIT_MESSAGES) if wanted else []
        found = {id(read): block for read, block in zip(wanted, blocks, strict=False)}
        decided = takewhile(lambda read: not len(read.rows) or id(read) in found, self._read)
        return [(read, self._unless_missed(read.message, found.get(id(read)))) for read in decided]

    def _unless_missed(self, message: ExampleMessage, block: LogitBlock | None) -> LogitBlock | None:
        return None if (message.partition, message.offset) in self._misses else block

    def _own_rows(self, message: ExampleMessage) -> np.ndarray:
        """Indices of the rows that are of the student's domains and were not trained before."""
        first = start_row(self._next, message.partition, message.offset)
        if first < 0:
            self._telemetry.count("exfm_invariant_violations_total", invariant="once")
            raise Fatal(
                f"partition {message.partition} delivered offset {message.offset} again, before "
                f"{self._next[message.partition]}; its rows were trained already"
            )
        self._next[message.partition] = Position(message.offset + 1)
        column = message.rows.batch.column("domain")
        mine = np.array([name in self._allowed for name in column.dictionary.to_pylist()], bool)
        keep = mine[column.indices.to_numpy()] if len(mine) else np.zeros(message.rows.num_rows, bool)
        keep[:first] = False
        return np.flatnonzero(keep)

    def _segment(self, read: _Read, block: LogitBlock | None) -> Segment:
        """The student's rows of one message with what the teacher says of them."""
        message, rows, batch = read.message, read.rows, read.batch
        if batch is None:
            return Segment(message.partition, message.offset, [], None, None, False)
        if block is not None:
            gap_s = (batch.event_time_ms_B - block.trained_through_ms) / 1000
            self._freshness_gap.add(gap_s)
            self._telemetry.observe("exfm_freshness_gap_seconds", max(0.0, float(gap_s.mean())))
        teacher = self._trainer.targets(block, rows, batch)
        return Segment(message.partition, message.offset, rows.tolist(), batch, teacher, block is not None)

    def _observe(self, item: TrainingBatch, began_s: float) -> None:
        """Rates and ages; a few rows of each batch stand for all of them in the histogram."""
        self._last_s = time.monotonic()
        if not self._rows_here:
            self._first_s = began_s
        self._rows_here += item.batch.num_rows
        self._telemetry.observe("exfm_step_seconds", self._last_s - began_s)
        age_s = time.time() - item.batch.ingest_time_ms_B / 1000
        self._event_to_trained.add(age_s[self._trainer.metrics.evaluated(item.batch.event_time_ms_B)])
        for age in np.quantile(age_s, np.linspace(0, 1, AGES_PER_STEP)):
            self._telemetry.observe("exfm_event_to_trained_seconds", max(0.0, float(age)))
        if self._trainer.counts.steps % GAUGES_EVERY_STEPS == 0:
            self._gauges()

    def _gauges(self) -> None:
        for key, portfolio in self._trainer.summaries().items():
            recent = {"ne": self._trainer.metrics.recent_ne(key)}
            for name, value in (portfolio | recent).items():
                if name != "rows" and value is not None:
                    self._telemetry.gauge(f"exfm_{name}", value, portfolio=key)

    def results(self) -> dict[str, Any]:
        """The results of everything trained so far, JSON-ready. Rates and ages are of this life of the process."""
        trainer, counts = self._trainer, self._trainer.counts
        rows = counts.rows_total
        span_s = self._last_s - self._first_s
        reads = trainer.config.distillation.reads_logits
        return {
            "name": trainer.config.name,
            "kind": "student",
            "arm": trainer.config.arm_name,
            "rows": rows,
            "rows_by_domain": dict(zip(trainer.schema.domains, counts.rows.tolist(), strict=True)),
            "rows_per_s": self._rows_here / span_s if span_s > 0 else None,
            "steps": counts.steps,
            "steps_nonfinite": counts.steps_nonfinite,
            "hit_rate": counts.rows_with_logits / rows if reads and rows else None,
            "event_to_trained_s": self._event_to_trained.summary(),
            "freshness_gap_s": self._freshness_gap.summary(),
            "snapshot_version": self._snapshots.last_version,
            "portfolios": trainer.portfolios(),
        }
