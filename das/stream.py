"""A thin port over the Kafka client: explicit offsets, deadlines, and errors that name their remedy.

Nothing here trusts `end_offsets`: some brokers answer the last batch's base offset + 1. The high watermark of a
fetch response is right on every broker, so ends and lags are read from it after a poll.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import kafka
import msgspec
import xxhash
from kafka import errors as kafka_errors
from kafka.coordinator.assignors.range import RangePartitionAssignor

from das.broker import ENVELOPE_BYTES, KafkaConfig, TopicsConfig, create_topics, open_client, translate, wait_for_broker
from das.deadline import Deadline
from das.errors import ExfmError, Fatal, Retryable
from das.sink import KafkaSink

log = logging.getLogger(__name__)

__all__ = [
    "KafkaConfig",
    "KafkaSink",
    "KafkaSource",
    "Record",
    "RecordSource",
    "TopicPartition",
    "TopicsConfig",
    "age_s",
    "create_topics",
    "partition_for",
    "read_tail",
    "wait_for_broker",
]
GROUP_MOVED = (
    kafka_errors.CommitFailedError,
    kafka_errors.IllegalGenerationError,
    kafka_errors.UnknownMemberIdError,
    kafka_errors.RebalanceInProgressError,
    kafka_errors.FencedInstanceIdError,
)


class TopicPartition(NamedTuple):
    """One partition of a topic; a plain `(topic, partition)` pair is accepted wherever this is."""

    topic: str
    partition: int


class Record(msgspec.Struct, frozen=True, gc=False):
    """One Kafka record. `timestamp_ms` is the wall clock at which it was sent."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes]


class RecordSource(Protocol):
    """Reads records at offsets that the caller names; nothing is committed or skipped on its own."""

    def assign(self, starts: Mapping[TopicPartition, int]) -> None:
        """Read exactly these partitions, each from its offset. Raises Fatal if an offset is gone."""

    def subscribe(
        self,
        topics: Sequence[str],
        on_assign: Callable[[list[TopicPartition]], None],
        on_revoke: Callable[[list[TopicPartition]], None],
    ) -> None:
        """Join the group. Callbacks run inside `poll`, in its thread; assigned partitions wait for `start`."""

    def start(self, starts: Mapping[TopicPartition, int]) -> None:
        """Begin (or move) assigned partitions at these offsets. Raises Fatal if an offset is gone."""

    def poll(self, timeout_s: float, max_records: int) -> list[Record]:
        """Up to `max_records` records, in offset order within a partition; waits at most `timeout_s`."""

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        """Stop delivering these partitions; the group membership stays."""

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        """Deliver them again."""

    def commit(self, offsets: Mapping[TopicPartition, int]) -> bool:
        """Store next offsets in the group; False if the group moved the partitions away."""

    def committed(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int | None]:
        """Next offsets stored in the group."""

    def beginning_offsets(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """The oldest offset kept of each partition."""

    def highwater(self, partition: TopicPartition) -> int | None:
        """One past the newest offset, as of the last fetch; None before the first."""

    def position(self, partition: TopicPartition) -> int:
        """The next offset that `poll` will deliver."""

    def reachable(self, timeout_s: float) -> bool:
        """Whether the broker answers now."""

    def close(self) -> None:
        """Leave the group and close the connections."""


class _Rebalances(kafka.ConsumerRebalanceListener):
    """Notes rebalances on the client's thread; assigned partitions are parked until `start`."""

    def __init__(self, consumer: kafka.KafkaConsumer) -> None:
        self._consumer = consumer
        self.events: deque[tuple[str, list[TopicPartition]]] = deque()

    def on_partitions_revoked(self, revoked: Iterable[Any]) -> None:
        self.events.append(("revoked", sorted(TopicPartition(*tp) for tp in revoked)))

    def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
        for tp in assigned:
            self._consumer.pause(tp)
            self._consumer.seek(tp, 0)
        self.events.append(("assigned", sorted(TopicPartition(*tp) for tp in assigned)))


class KafkaSource:
    """`RecordSource` on kafka-python. One thread uses it."""

    def __init__(self, config: KafkaConfig, group: str | None = None, session_timeout_s: float = 10.0) -> None:
        options: dict[str, Any] = {
            "group_id": group,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",
            "allow_auto_create_topics": False,
            "partition_assignment_strategy": [RangePartitionAssignor],
            "session_timeout_ms": int(session_timeout_s * 1000),
            "heartbeat_interval_ms": int(session_timeout_s * 1000 / 5),
            "max_poll_interval_ms": 300_000,
            "fetch_max_wait_ms": 250,
            "max_partition_fetch_bytes": max(1 << 20, config.max_message_bytes + ENVELOPE_BYTES),
        }
        self._config = config
        self._consumer = open_client(kafka.KafkaConsumer, config, options)
        # With sessions a broker leaves out partitions that have nothing new, and `highwater` stays unknown after a
        # rebalance or seek; the client has no option for it.
        self._consumer._fetcher.config["enable_incremental_fetch_sessions"] = False
        self._next: dict[TopicPartition, int] = {}
        self._past_end_since: dict[TopicPartition, float] = {}
        self._listener = _Rebalances(self._consumer)
        self._on_assign: Callable[[list[TopicPartition]], None] = lambda _: None
        self._on_revoke: Callable[[list[TopicPartition]], None] = lambda _: None

    def assign(self, starts: Mapping[TopicPartition, int]) -> None:
        """See RecordSource."""
        self._next.clear()
        self._consumer.assign([kafka.TopicPartition(*tp) for tp in starts])
        self.start(starts)

    def subscribe(
        self,
        topics: Sequence[str],
        on_assign: Callable[[list[TopicPartition]], None],
        on_revoke: Callable[[list[TopicPartition]], None],
    ) -> None:
        """See RecordSource."""
        self._on_assign, self._on_revoke = on_assign, on_revoke
        self._consumer.subscribe(list(topics), listener=self._listener)

    def start(self, starts: Mapping[TopicPartition, int]) -> None:
        """See RecordSource."""
        oldest = self.beginning_offsets([TopicPartition(*tp) for tp in starts])
        for tp, offset in starts.items():
            partition = TopicPartition(*tp)
            if offset < oldest[partition]:
                raise self._out_of_range(partition, offset)
            self._consumer.seek(kafka.TopicPartition(*tp), offset)
            self._next[partition] = offset
            self._past_end_since.pop(partition, None)
        self.resume(starts)

    def poll(self, timeout_s: float, max_records: int) -> list[Record]:
        """See RecordSource."""
        self._release_parked()
        try:
            polled = self._consumer.poll(int(timeout_s * 1000), max_records=max_records)
        except kafka_errors.OffsetOutOfRangeError as error:
            tp, offset = next(iter(error.args[0].items()))
            raise self._out_of_range(TopicPartition(*tp), offset) from None
        except kafka_errors.LogTruncationError as error:  # an unclean election: what was read is not in the log now
            tp = TopicPartition(*next(iter(error.divergent_offsets)))
            raise self._out_of_range(tp, self._next[tp]) from None
        except kafka_errors.KafkaError as error:
            raise translate(error, self._config) from error
        if self._listener.events:
            moved = self._run_callbacks()  # what was read of these before they moved is read again
            polled = {tp: records for tp, records in polled.items() if TopicPartition(*tp) not in moved}
        out = []
        for tp, records in polled.items():
            self._next[TopicPartition(*tp)] = records[-1].offset + 1
            out += [
                Record(r.topic, r.partition, r.offset, r.timestamp, r.key, r.value, dict(r.headers)) for r in records
            ]
        self._check_log_kept()
        return out

    def _release_parked(self) -> None:
        """Records of a resumed partition wait in the client until its current batch is None, but it only gets empty.

        Without this, kafka-python 3.0 never delivers from a resumed partition again while another one has records.
        """
        fetcher = self._consumer._fetcher
        if fetcher._next_partition_records is not None and not fetcher._next_partition_records:
            fetcher._next_partition_records = None

    def _run_callbacks(self) -> set[TopicPartition]:
        """Tell the caller about rebalances; returns the partitions that came or went."""
        moved: set[TopicPartition] = set()
        while self._listener.events:
            kind, partitions = self._listener.events.popleft()
            for tp in partitions:
                self._next.pop(tp, None)
                self._past_end_since.pop(tp, None)
            moved.update(partitions)
            (self._on_assign if kind == "assigned" else self._on_revoke)(partitions)
        return moved

    def _check_log_kept(self) -> None:
        """A position past the end that stays there means that the broker lost its log."""
        for tp, offset in self._next.items():
            end = self.highwater(tp)
            if end is None or end >= offset:
                self._past_end_since.pop(tp, None)
            elif time.monotonic() - self._past_end_since.setdefault(tp, time.monotonic()) > self._config.lost_log_s:
                raise self._out_of_range(tp, offset)

    def _out_of_range(self, tp: TopicPartition, offset: int) -> Fatal:
        oldest = self.beginning_offsets([tp])[tp]
        end = self.highwater(tp)
        if end is None:  # no fetch was answered: the broker refused the first one
            with suppress(ExfmError):
                end = self.end_offset_hint(tp)
        return Fatal(
            f"{tp.topic}[{tp.partition}] at {self._config.bootstrap}: the saved offset is {offset}, available are "
            f"{oldest} to {'unknown' if end is None else end}; the log was lost, recreated or expired. Restore the "
            "topic (or raise kafka.retention_ms), or start from an empty run folder"
        )

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        """See RecordSource."""
        self._consumer.pause(*(kafka.TopicPartition(*tp) for tp in partitions))

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        """See RecordSource."""
        self._consumer.resume(*(kafka.TopicPartition(*tp) for tp in partitions))

    def commit(self, offsets: Mapping[TopicPartition, int]) -> bool:
        """See RecordSource."""
        wanted = {kafka.TopicPartition(*tp): kafka.OffsetAndMetadata(o, "", -1) for tp, o in offsets.items()}
        try:
            self._consumer.commit(wanted, timeout_ms=int(self._config.request_timeout_s * 1000))
        except GROUP_MOVED as error:
            log.warning("commit refused, the group moved on: %s", error)
            return False
        except kafka_errors.KafkaError as error:
            raise translate(error, self._config) from error
        return True

    def committed(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int | None]:
        """See RecordSource."""
        timeout_ms = int(self._config.request_timeout_s * 1000)
        try:
            return {tp: self._consumer.committed(kafka.TopicPartition(*tp), timeout_ms=timeout_ms) for tp in partitions}
        except kafka_errors.KafkaError as error:
            raise translate(error, self._config) from error

    def beginning_offsets(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """See RecordSource."""
        timeout_ms = int(self._config.request_timeout_s * 1000)
        wanted = [kafka.TopicPartition(*tp) for tp in partitions]
        try:
            found = self._consumer.beginning_offsets(wanted, timeout_ms=timeout_ms)
        except kafka_errors.KafkaError as error:
            raise translate(error, self._config) from error
        return {TopicPartition(*tp): offset for tp, offset in found.items()}

    def reachable(self, timeout_s: float) -> bool:
        """Whether the broker answers a request about what is being read."""
        wanted = [kafka.TopicPartition(*tp) for tp in list(self._next)[:1]]
        try:
            self._consumer.beginning_offsets(wanted, timeout_ms=int(timeout_s * 1000))
        except kafka_errors.KafkaError:
            return False
        return True

    def end_offset_hint(self, partition: TopicPartition) -> int:
        """The broker's answer to `end_offsets`: the end, or too low by less than one producer batch."""
        wanted = kafka.TopicPartition(*partition)
        try:
            return int(self._consumer.end_offsets([wanted])[wanted])
        except kafka_errors.KafkaError as error:
            raise translate(error, self._config) from error

    def highwater(self, partition: TopicPartition) -> int | None:
        """See RecordSource."""
        end: int | None = self._consumer.highwater(kafka.TopicPartition(*partition))
        return end

    def position(self, partition: TopicPartition) -> int:
        """See RecordSource."""
        return self._next[partition]

    def close(self) -> None:
        """See RecordSource."""
        try:
            self._consumer.close(autocommit=False, timeout_ms=5000)
        except kafka_errors.KafkaError as error:  # the broker is away; the group will notice by itself
            log.warning("closed without leaving the group: %s", error)


def read_tail(config: KafkaConfig, tp: TopicPartition, count: int, deadline: Deadline) -> list[Record]:
    """The last `count` records (fewer if there are fewer) of one partition. Raises Retryable at the deadline."""
    source = KafkaSource(config)
    try:
        return _read_tail(source, tp, count, deadline)
    finally:
        source.close()


def _read_tail(source: KafkaSource, tp: TopicPartition, count: int, deadline: Deadline) -> list[Record]:
    oldest = source.beginning_offsets([tp])[tp]
    # `end_offsets` may be too low (never too high), so the first read may begin earlier than needed
    start = max(oldest, source.end_offset_hint(tp) - count)
    tail: deque[Record] = deque(maxlen=count)
    source.assign({tp: start})
    while not deadline.passed:
        tail.extend(source.poll(min(0.05, deadline.left_s), 1000))
        end = source.highwater(tp)
        if end is not None and source.position(tp) >= end:
            return list(tail)
    raise Retryable(f"{tp.topic}[{tp.partition}]: the end of the partition was not reached in time")


def age_s(timestamp_ms: int) -> float:
    """Seconds since a record was appended, by the wall clock; never negative."""
    return max(0.0, time.time() - timestamp_ms / 1000)


def partition_for(impression_id: str, partitions: int) -> int:
    """The partition number of an impression, and of its feedback."""
    return int(xxhash.xxh64_intdigest(impression_id.encode()) % partitions)
