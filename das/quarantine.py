"""The quarantine topic: what cannot be used goes there unchanged, with the reason and where it was read."""

from __future__ import annotations

import logging
from collections import deque

from pydantic import Field

from das.config import Config
from das.errors import Fatal, Poison
from das.stream import KafkaSink, Record
from das.telemetry import Telemetry

log = logging.getLogger(__name__)

HEADER_REASON = "exfm-reason"
HEADER_DETAIL = "exfm-detail"
HEADER_TOPIC = "exfm-topic"
HEADER_PARTITION = "exfm-partition"
HEADER_OFFSET = "exfm-offset"
HEADER_TIMESTAMP = "exfm-timestamp"
ORIGINAL = "exfm-original-"
MAX_DETAIL_BYTES = 1000


class QuarantineLimit(Config):
    """Stop when more than `max_share` of the last `window` records of a topic are bad (1.0 = never)."""

    max_share: float = Field(0.5, ge=0, le=1)
    window: int = Field(1000, ge=1, le=1_000_000)
    min_seen: int = Field(100, ge=1)
    flush_timeout_s: float = Field(30.0, gt=0, le=600)


class _Share:
    """Which of the last `window` records of one topic were bad."""

    def __init__(self, window: int) -> None:
        self.seen = 0
        self.bad: deque[int] = deque()
        self._window = window

    def add_bad(self) -> None:
        self.seen += 1
        self.bad.append(self.seen)
        while self.bad[0] <= self.seen - self._window:
            self.bad.popleft()

    @property
    def size(self) -> int:
        return min(self.seen, self._window)


class Quarantine:
    """Sends bad records to the quarantine topic (one partition) and counts them."""

    def __init__(self, sink: KafkaSink, topic: str, telemetry: Telemetry, limit: QuarantineLimit) -> None:
        self._sink = sink
        self._topic = topic
        self._telemetry = telemetry
        self._limit = limit
        self._shares: dict[str, _Share] = {}
        self._dirty = False

    def passed(self, topic: str, count: int) -> None:
        """Note `count` good records of `topic`; the share of bad ones is measured against them."""
        self._share(topic).seen += count

    def put(self, record: Record, poison: Poison, *, malformed: bool = True) -> None:
        """Send one bad record, unchanged. Raises Fatal past the limit, Retryable or Fatal when sending fails.

        Records that are well formed but too late are not `malformed`: they do not count towards the limit.
        """
        headers = {ORIGINAL + name: value for name, value in record.headers.items()}
        headers |= {
            HEADER_REASON: poison.reason.encode(),
            HEADER_DETAIL: poison.detail.encode(errors="replace")[:MAX_DETAIL_BYTES],
            HEADER_TOPIC: record.topic.encode(),
            HEADER_PARTITION: b"%d" % record.partition,
            HEADER_OFFSET: b"%d" % record.offset,
            HEADER_TIMESTAMP: b"%d" % record.timestamp_ms,
        }
        self._dirty = True
        self._sink.send(self._topic, 0, record.key, record.value, headers)
        self._telemetry.count("exfm_quarantined_total", topic=record.topic, reason=poison.reason)
        log.warning("quarantined %s[%d] offset %d: %s", record.topic, record.partition, record.offset, poison)
        if malformed:
            self._check_share(record.topic, poison)

    def _check_share(self, topic: str, poison: Poison) -> None:
        share = self._share(topic)
        share.add_bad()
        limit = self._limit
        if share.size >= min(limit.min_seen, limit.window) and len(share.bad) > limit.max_share * share.size:
            self.flush()
            raise Fatal(
                f"{len(share.bad)} of the last {share.size} records of '{topic}' went to quarantine, more than the "
                f"limit of {limit.max_share:.0%}; the last one: {poison}. Fix the producer or the feature schema, "
                "or raise quarantine.max_share"
            )

    def flush(self) -> None:
        """Wait until everything put is acknowledged; call before the input's offsets move on."""
        if self._dirty:
            self._sink.flush(self._limit.flush_timeout_s)
            self._dirty = False

    def _share(self, topic: str) -> _Share:
        return self._shares.setdefault(topic, _Share(self._limit.window))
