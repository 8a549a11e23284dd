"""What a serving system would have logged: each impression with histories and counters of strictly past events.

An event is past if it was known strictly before the impression's millisecond: an impression from its own time on, an
outcome from the time of its feedback on. One heap orders everything, so that nothing can be seen early.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

from das.errors import ConfigError
from das.messages import Feedback, Impression, MessageCodec
from das.schema import FeatureSchema
from services.replay.bounded import BoundedTable
from services.replay.config import ServingLogConfig
from services.replay.dataset import DOMAIN, IMPRESSION, RATES, CounterConfig, DatasetConfig

_Histories = tuple[deque[tuple[Any, ...]], ...]


class Row(NamedTuple):
    """One recorded impression. `values` are in `DatasetConfig.feature_columns` order."""

    impression_id: str
    time_ms: int
    domain: str
    values: tuple[Any, ...]
    outcomes: tuple[tuple[int, int], ...]
    """(objective index, time it became known) of each outcome that happened."""


class _Event(NamedTuple):
    """Something that becomes visible at `time_ms`; ties go by row, then impression before outcomes."""

    time_ms: int
    number: int
    event: int  # 0 is the impression, 1 + k the outcome of objective k
    row: Row
    states: list[list[Any]]
    histories: _Histories


class _Rate(NamedTuple):
    group: int
    event: int
    prior: float
    toward: int  # group 0: all events
    log_odds: bool


class ServingLog:
    """Histories and counters over one recorded stream, in memory bounded by the config."""

    def __init__(self, schema: FeatureSchema, dataset: DatasetConfig, config: ServingLogConfig) -> None:
        self._schema = schema
        self._config = config
        self._events = (IMPRESSION, *schema.objective_names)
        self._columns = tuple(dataset.feature_columns(schema))
        codec = MessageCodec(schema)
        self._type = codec.impression_type
        self._features_type = codec.features_type
        self._pending: list[_Event] = []
        self._plan_counters(dataset.counters)
        self._plan_histories(dataset.user)
        self._plan_features(dataset.counters)

    def events(self, rows: Iterable[Row]) -> Iterator[Impression | Feedback]:
        """Impressions and feedback in event-time order; at equal times impressions first, rows in their order.

        Rows come in time order. Raises ConfigError if more outcomes are pending than the config allows.
        """
        for number, row in enumerate(rows):
            yield from self._advance(row.time_ms)
            values = (*row.values, row.domain)
            states = [table.get(key(values)) for table, key in self._groups]
            histories = self._users.get(row.values[self._user]) if self._sequences else ()
            flat = [*row.values, *self._counted(row.time_ms, states), *self._sequences_of(histories)]
            features = self._features_type(*self._pick(flat))
            yield self._type(
                impression_id=row.impression_id, event_time=row.time_ms, domain=row.domain, features=features
            )
            self._remember(number, row, states, histories)
        yield from self._advance(None)

    def _counted(self, now_ms: int, states: list[list[Any]]) -> list[float | None]:
        """The counters' values: counts, ages, rates. A state holds a count per event, then a last time per event."""
        found: list[float | None] = [float(states[group][event]) for group, event in self._counts]
        for group, place in self._ages:
            last = states[group][place]
            found.append(None if last is None else (now_ms - last) / 1000)
        total = states[0]
        base = [(seen + 0.5) / (max(total[0], seen) + 1) for seen in total[: len(self._events)]]
        for group, event, prior, toward, log_odds in self._rates:
            rate = base[event]
            if toward:
                state = states[toward]
                rate = (state[event] + prior * rate) / (max(state[0], state[event]) + prior)
            state = states[group]
            seen = state[event]
            shown = state[0] if state[0] > seen else seen  # an outcome may outlive a forgotten impression
            rate = (seen + prior * rate) / (shown + prior)
            found.append(math.log(rate / (1 - rate)) if log_odds else rate)
        return found

    def _sequences_of(self, histories: _Histories) -> list[Any]:
        """The user's past events as sequence features, in the schema's order."""
        return [
            make(*map(list, zip(*past, strict=True))) if past else empty
            for past, make, empty in zip(histories, self._sequence_types, self._no_history, strict=True)
        ]

    def _remember(self, number: int, row: Row, states: list[list[Any]], histories: _Histories) -> None:
        """Queue the row's impression and outcomes until the time each is known."""
        heapq.heappush(self._pending, _Event(row.time_ms, number, 0, row, states, histories))
        for objective, known_ms in row.outcomes:
            heapq.heappush(self._pending, _Event(known_ms, number, 1 + objective, row, states, histories))
        if len(self._pending) > self._config.max_pending:
            raise ConfigError(
                f"{len(self._pending)} events wait to become known at impression {row.impression_id}; "
                "raise replay.log.max_pending, or check the unit of the delay column"
            )

    def _advance(self, now_ms: int | None) -> Iterator[Feedback]:
        """Make everything known before `now_ms` (None: everything) visible, and send its feedback."""
        pending = self._pending
        num_events = len(self._events)
        while pending and (now_ms is None or pending[0].time_ms < now_ms):
            time_ms, _, event, row, states, histories = heapq.heappop(pending)
            for state in states:
                state[event] += 1
                state[num_events + event] = time_ms
            for history, (kind, item) in zip(histories, self._sequences, strict=True):
                if kind == event:
                    history.append((*item(row.values), time_ms))
            if event:
                yield Feedback(row.impression_id, self._events[event], time_ms)

    def _plan_counters(self, counters: tuple[CounterConfig, ...]) -> None:
        """Group 0 counts all events; the others are the distinct keys of the counters."""
        groups: list[tuple[str, ...]] = [()]
        for counter in counters:
            groups += [keys for keys in dict.fromkeys((counter.keys, counter.toward)) if keys not in groups]
        columns = (*self._columns, DOMAIN)
        empty = [0] * len(self._events) + [None] * len(self._events)
        self._groups = [
            (BoundedTable[list[Any]](self._config.max_keys, empty.copy), _getter([columns.index(key) for key in keys]))
            for keys in groups
        ]
        planned = [(c, groups.index(c.keys), self._events.index(c.event)) for c in counters]
        self._counts = [(group, event) for c, group, event in planned if c.kind == "count"]
        self._ages = [(group, len(self._events) + event) for c, group, event in planned if c.kind == "age"]
        self._rates = [
            _Rate(group, event, c.prior, groups.index(c.toward), c.kind == "log_odds")
            for c, group, event in planned
            if c.kind in RATES
        ]

    def _plan_histories(self, user: str | None) -> None:
        self._user = self._columns.index(user) if user else 0
        lengths = [s.max_length for s in self._schema.sequences]
        self._users = BoundedTable[_Histories](
            self._config.max_users, lambda: tuple(deque[tuple[Any, ...]](maxlen=n) for n in lengths)
        )
        self._sequences = [
            (self._events.index(s.event), _tuple_getter([self._columns.index(f.name) for f in s.fields]))
            for s in self._schema.sequences
        ]

    def _plan_features(self, counters: tuple[CounterConfig, ...]) -> None:
        """Where each field of the features struct comes from: table columns, then counters, then histories."""
        hints = self._features_type.__annotations__
        self._sequence_types = [hints[s.name] for s in self._schema.sequences]
        self._no_history = [make(*([] for _ in make.__struct_fields__)) for make in self._sequence_types]
        by_kind = sorted(counters, key=lambda c: ("count", "age").index(c.kind) if c.kind not in RATES else 2)
        sources = [*self._columns, *(c.name for c in by_kind), *(s.name for s in self._schema.sequences)]
        self._pick = _tuple_getter([sources.index(name) for name in self._features_type.__struct_fields__])


def _getter(places: list[int]) -> Callable[[tuple[Any, ...]], Any]:
    """One place gives its value, more a tuple, none a constant."""
    return itemgetter(*places) if places else lambda values: None


def _tuple_getter(places: list[int]) -> Callable[[Any], tuple[Any, ...]]:
    """Always a tuple."""
    if len(places) == 1:
        return lambda values: (values[places[0]],)
    return itemgetter(*places)
