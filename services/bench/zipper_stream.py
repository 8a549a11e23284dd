"""The bundled hotel bookings as each arm of `exfm bench zipper` receives them: day by day, through the real join.

What an arm may learn from is decided by the join's state machine alone. Times have the resolution of a day: a day's
bookings come first, then the feedback of that day, then what the join releases.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from das.examples import JoinedRow, decode_examples, encode_examples, example_batch
from das.join import JoinConfig, PartitionJoin
from das.joiner_lane import joined_rows
from das.messages import Feedback, Impression, MessageCodec
from das.schema import FeatureSchema
from foundation_model.batch import Batch
from foundation_model.features import FeatureEncoder
from services.replay.config import ServingLogConfig
from services.replay.dataset import DatasetConfig
from services.replay.reader import RowReader
from services.replay.serving_log import ServingLog

FOLDER = Path(str(importlib.resources.files("services.demo"))) / "hotel"
OBJECTIVE = "cancel"
BATCH_ROWS = 64
JOIN = JoinConfig(allowed_lateness_ms=0, idle_timeout_s=None, batch_rows=BATCH_ROWS, linger_ms=0)


@dataclass(slots=True)
class Events:
    """What happened on one day."""

    time_ms: int
    impressions: list[Impression] = field(default_factory=list)
    feedback: list[Feedback] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Recording:
    """The whole stream. `labels` are matured: positive if feedback came within the objective's full window."""

    days: list[Events]
    labels: dict[str, int]

    def immediate(self) -> Recording:
        """The same with every matured outcome known on the day of its booking: what no stream can have."""
        days = []
        for day in self.days:
            positive = [i for i in day.impressions if self.labels[i.impression_id]]
            known = [Feedback(i.impression_id, OBJECTIVE, day.time_ms) for i in positive]
            days.append(replace(day, feedback=known))
        return Recording(days, self.labels)

    def shuffled(self, seed: int) -> Recording:
        """The same with each outcome, and its delay, given to another booking at random: nothing can be learned."""
        booked = [i for day in self.days for i in day.impressions]
        order = np.random.default_rng(seed).permutation(len(booked))
        taker = {booked[n].impression_id: booked[m] for n, m in enumerate(order.tolist())}
        giver_ms = {i.impression_id: i.event_time for i in booked}
        by_day = {day.time_ms: replace(day, feedback=[]) for day in self.days}
        for day in self.days:
            for given in day.feedback:
                to = taker[given.impression_id]
                known_ms = to.event_time + given.event_time - giver_ms[given.impression_id]
                moved = Feedback(to.impression_id, given.objective, known_ms)
                by_day.setdefault(known_ms, Events(known_ms)).feedback.append(moved)
        labels = {to.impression_id: self.labels[giver] for giver, to in taker.items()}
        return Recording([by_day[time_ms] for time_ms in sorted(by_day)], labels)


class Message(NamedTuple):
    """One message of the examples stream, which is one training step."""

    ids: tuple[str, ...]
    batch: Batch


class Day(NamedTuple):
    """One day of an arm: `impressions` are scored, and only then `released` is learned from.

    `labels`: matured, float32 (B,), for the evaluation in hindsight only.
    """

    time_ms: int
    ids: tuple[str, ...]
    impressions: Batch
    labels: np.ndarray
    released: list[Message]


def read(schema: FeatureSchema, rows: int | None = None) -> Recording:
    """The bundled stream, its first `rows` bookings, with the windows of `schema`."""
    dataset = DatasetConfig.load(FOLDER / "dataset.yaml", schema)
    assert dataset.data is not None
    reader = RowReader(dataset.data, dataset, schema)
    days: dict[int, Events] = {}
    booked_ms: dict[str, int] = {}
    labels: dict[str, int] = {}
    for event in ServingLog(schema, dataset, ServingLogConfig()).events(islice(reader.rows(), rows)):
        day = days.setdefault(event.event_time, Events(event.event_time))
        if isinstance(event, Impression):
            day.impressions.append(event)
            booked_ms[event.impression_id], labels[event.impression_id] = event.event_time, 0
        else:
            day.feedback.append(event)
            if event.event_time - booked_ms[event.impression_id] <= schema.max_window_ms:
                labels[event.impression_id] = 1
    return Recording(list(days.values()), labels)


def join(recording: Recording, schema: FeatureSchema, encoder: FeatureEncoder) -> list[Day]:
    """The days with bookings, each with what the join released at its end; nothing is flushed at the stream's end."""
    source = _Examples(schema, encoder)
    days = []
    for events in recording.days:
        released = list(source.take(events))
        ids = tuple(i.impression_id for i in events.impressions)
        if ids:
            labels = np.array([recording.labels[name] for name in ids], np.float32)
            days.append(Day(events.time_ms, ids, source.served(events.impressions), labels, released))
        elif days:
            days[-1].released.extend(released)
    return days


class _Examples:
    """Bookings and feedback in, encoded messages of examples out, by the parts that the joiner and a trainer use."""

    def __init__(self, schema: FeatureSchema, encoder: FeatureEncoder) -> None:
        self._schema = schema
        self._encoder = encoder
        self._codec = MessageCodec(schema)
        self._join = PartitionJoin(schema, JOIN)

    def take(self, events: Events) -> Iterator[Message]:
        """The messages that are complete after one day's events."""
        joined = self._join
        for booking in events.impressions:
            name, time_ms, value = booking.impression_id, booking.event_time, self._codec.encode_impression(booking)
            outcome = joined.impression(joined.next[0], name, time_ms, booking.domain, time_ms, value)
            assert outcome == "accepted", f"{name} is {outcome}: the stream is not in event-time order"
        for given in events.feedback:
            joined.feedback(joined.next[1], given.impression_id, given.objective, given.event_time, given.value)
        while (cut := joined.cut(0.0)) is not None:
            rows = joined_rows(cut, self._codec)
            ids = tuple(row.impression.impression_id for row in rows)
            value = encode_examples(rows, self._schema)
            columns = decode_examples(value, self._schema, self._encoder.columns)
            yield Message(ids, self._encoder.encode(columns))

    def served(self, bookings: Sequence[Impression]) -> Batch:
        """Bookings as a server encodes them: without labels."""
        unknown = (None,) * len(self._schema.objectives)
        rows = [JoinedRow(booking, booking.event_time, unknown) for booking in bookings]
        return self._encoder.encode(example_batch(rows, self._schema))
