"""Sends records: acknowledged by all replicas, without duplicates, with a bound on what is in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import kafka
from kafka import errors as kafka_errors

from das.broker import ENVELOPE_BYTES, KafkaConfig, open_client, translate
from das.deadline import Deadline
from das.errors import Fatal


class KafkaSink:
    """Sends records with all acknowledgements and no duplicates; unacknowledged bytes are bounded."""

    def __init__(self, config: KafkaConfig) -> None:
        timeout_ms = int(config.produce_timeout_s * 1000)
        options = {
            "acks": "all",
            "compression_type": config.compression,
            "linger_ms": 5,
            "batch_size": 256 << 10,
            "max_request_size": config.max_message_bytes + ENVELOPE_BYTES,
            "delivery_timeout_ms": timeout_ms + 1000,
            "request_timeout_ms": timeout_ms,
            "max_block_ms": timeout_ms,
            "allow_auto_create_topics": False,
        }
        self._config = config
        self._producer = open_client(kafka.KafkaProducer, config, options)
        self._in_flight: deque[tuple[Any, int]] = deque()
        self._in_flight_bytes = 0

    def send(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        headers: Mapping[str, bytes] | None = None,
        timestamp_ms: int | None = None,
    ) -> None:
        """Queue one record; waits for acknowledgements when too many bytes are in flight.

        Raises Retryable or Fatal, perhaps for an earlier record.
        """
        value = b"" if value is None and key is None else value
        size = len(value or b"") + len(key or b"")
        if size > self._config.max_message_bytes:
            raise Fatal(
                f"a record of {size} bytes for topic '{topic}' is more than kafka.max_message_bytes = "
                f"{self._config.max_message_bytes}; raise that and the topic's max.message.bytes, or send less at once"
            )
        try:
            future = self._producer.send(
                topic, value, key=key, headers=list((headers or {}).items()), partition=partition,
                timestamp_ms=timestamp_ms,
            )  # fmt: skip
        except kafka_errors.KafkaError as error:
            raise translate(error, self._config) from error
        self._in_flight.append((future, size))
        self._in_flight_bytes += size
        deadline = Deadline.after(self._config.produce_timeout_s)
        while self._in_flight and (
            self._in_flight[0][0].is_done or self._in_flight_bytes > self._config.max_in_flight_bytes
        ):
            self._settle(deadline)

    def flush(self, timeout_s: float) -> None:
        """Wait until everything sent is acknowledged. Raises Retryable or Fatal if anything was not."""
        deadline = Deadline.after(timeout_s)
        try:
            self._producer.flush(timeout=timeout_s)
        except kafka_errors.KafkaError as error:
            raise translate(error, self._config) from error
        while self._in_flight:
            self._settle(deadline)

    def _settle(self, deadline: Deadline) -> None:
        future, size = self._in_flight.popleft()
        self._in_flight_bytes -= size
        try:
            future.get(timeout=deadline.left_s)
        except kafka_errors.KafkaError as error:
            raise translate(error, self._config) from error

    def close(self) -> None:
        """Close the connections; records not flushed may be lost."""
        self._producer.close(timeout=5)
