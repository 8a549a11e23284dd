"""The broker: its configuration, its topics, and what its client's errors mean for us."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kafka
from kafka import errors as kafka_errors
from pydantic import Field, field_validator

from das.config import Config, read_yaml
from das.deadline import Deadline
from das.errors import ConfigError, ExfmError, Fatal, Retryable

log = logging.getLogger(__name__)

OWNED_OPTIONS = frozenset(
    {"bootstrap_servers", "group_id", "enable_auto_commit", "auto_offset_reset", "isolation_level", "acks"}
)
ENVELOPE_BYTES = 64 << 10
"""Room for headers beside a value of the greatest size: the quarantine adds some to what it is given."""
SMALLER = "raise kafka.max_message_bytes and the topic's max.message.bytes, or send less at once"
PERMANENT = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.MessageSizeTooLargeError,
    kafka_errors.RecordListTooLargeError,
    kafka_errors.UnsupportedVersionError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.InvalidTopicError,
    kafka_errors.InvalidConfigurationError,
    kafka_errors.PolicyViolationError,
    kafka_errors.InvalidSessionTimeoutError,
)
REMEDIES = {
    kafka_errors.MessageSizeTooLargeError: SMALLER,
    kafka_errors.RecordListTooLargeError: SMALLER,
    kafka_errors.InvalidReplicationFactorError: "set kafka.replication to no more than there are brokers",
    kafka_errors.InvalidSessionTimeoutError: "set the session timeout inside the broker's group.min.session.timeout.ms "
    "(6 s by default) and group.max.session.timeout.ms",
    kafka_errors.SaslAuthenticationFailedError: "set the user and password in kafka.options_file",
    kafka_errors.UnsupportedSaslMechanismError: "set sasl_mechanism in kafka.options to one that the broker offers",
    kafka_errors.TopicAuthorizationFailedError: "let our user create, describe, read and write the topics",
    kafka_errors.GroupAuthorizationFailedError: "let our user read the consumer groups",
}
"""What to do about errors that waiting does not heal, or not alone."""


class TopicsConfig(Config):
    """Names of the four topics."""

    impressions: str = "impressions"
    feedback: str = "feedback"
    examples: str = "examples"
    quarantine: str = "quarantine"


class KafkaConfig(Config):
    """The broker. `options` go to every client as they are (SASL, TLS); keep secrets in `options_file` (YAML)."""

    bootstrap: str = "127.0.0.1:9092"
    partitions: int = Field(2, ge=1, le=10_000)
    replication: int = Field(1, ge=1, le=10)
    topics: TopicsConfig = TopicsConfig()
    retention_ms: int = Field(7 * 86_400_000, ge=60_000)
    compression: str | None = Field("lz4", pattern="^(gzip|snappy|lz4|zstd)$")
    max_message_bytes: int = Field(8 << 20, ge=1 << 16, le=256 << 20)
    request_timeout_s: float = Field(30.0, ge=1, le=600)
    produce_timeout_s: float = Field(30.0, ge=1, le=600)
    max_in_flight_bytes: int = Field(64 << 20, ge=1 << 20)
    lost_log_s: float = Field(5.0, gt=0, le=600)  # how long a position may lie past the end before we stop
    options: dict[str, Any] = Field(default_factory=dict, repr=False)
    options_file: Path | None = None

    @field_validator("options")
    @classmethod
    def _no_owned_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        owned = OWNED_OPTIONS & set(options)
        if owned:
            raise ValueError(f"{sorted(owned)} are set by exfm itself; remove them")
        return options

    @property
    def guarded(self) -> bool:
        """Whether options of ours are given: TLS or a user, as a rule."""
        return bool(self.options) or self.options_file is not None

    def client_options(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a client that has options of its `own`; later wins: ours, its own, `options`, the file's."""
        timeout_ms = int(self.request_timeout_s * 1000)
        merged = {
            "bootstrap_servers": self.bootstrap,
            "request_timeout_ms": timeout_ms,
            "bootstrap_timeout_ms": timeout_ms,
            "reconnect_backoff_max_ms": 2000,
            **own,
            **self.options,
        }
        if self.options_file is not None:
            merged.update(self._no_owned_options(read_yaml(self.options_file) or {}))
        return merged


def open_client(cls: Any, config: KafkaConfig, options: Mapping[str, Any]) -> Any:
    """A kafka-python client. Raises ConfigError on an unknown option, Retryable if no broker answers."""
    try:
        return cls(**config.client_options(options))
    except (kafka_errors.KafkaConfigurationError, ValueError) as error:  # an unknown option is either, by client
        raise ConfigError(f"kafka.options: {error}") from None
    except kafka_errors.KafkaError as error:
        raise translate(error, config) from error


def translate(error: Exception, config: KafkaConfig) -> ExfmError:
    """The error of ours that says what to do about a client's error."""
    text = f"broker {config.bootstrap}: {type(error).__name__}: {error}"
    if remedy := next((remedy for kind, remedy in REMEDIES.items() if isinstance(error, kind)), None):
        text = f"{text}; {remedy}"
    permanent = isinstance(error, PERMANENT) or not isinstance(error, kafka_errors.KafkaError)
    return Fatal(text) if permanent else Retryable(text)


def wait_for_broker(config: KafkaConfig, deadline: Deadline) -> None:
    """Return once the broker answers. Raises Retryable naming its address when the deadline passes first."""
    problem = "no answer"
    while not deadline.passed:
        limit_s = max(1.0, min(5.0, deadline.left_s))
        brief = config.model_copy(update={"request_timeout_s": limit_s})
        try:
            open_client(kafka.KafkaAdminClient, brief, {}).close()
        except Retryable as error:
            problem = str(error)
        else:
            return
    hint = "; a refused user or certificate looks the same: see kafka.options" if config.guarded else ""
    raise Retryable(f"broker {config.bootstrap} is not reachable: {problem}; start it or set kafka.bootstrap{hint}")


def create_topics(config: KafkaConfig) -> None:
    """Create the four topics where they are missing; safe to call from several processes.

    Raises ConfigError when an existing topic has another number of partitions than configured.
    """
    names = config.topics
    wanted = dict.fromkeys((names.impressions, names.feedback, names.examples), config.partitions)
    wanted[names.quarantine] = 1
    most_bytes = config.max_message_bytes + ENVELOPE_BYTES
    settings = {"retention.ms": str(config.retention_ms), "max.message.bytes": str(most_bytes)}
    arrival = {"message.timestamp.type": "LogAppendTime"}  # by the broker's clock: a producer's may be the wrong one
    admin = open_client(kafka.KafkaAdminClient, config, {})
    try:
        for name, partitions in wanted.items():
            configs = settings | (arrival if name in (names.impressions, names.feedback) else {})
            topic = {"num_partitions": partitions, "replication_factor": config.replication, "configs": configs}
            try:
                admin.create_topics({name: topic}, wait_for_metadata=True)
                log.info("created topic %s with %d partitions", name, partitions)
            except kafka_errors.TopicAlreadyExistsError:
                admin.wait_for_topics([name])  # another process may have created it a moment ago
                _check_partitions(admin, name, partitions)
    except kafka_errors.KafkaError as error:
        raise translate(error, config) from error
    finally:
        admin.close()


def _check_partitions(admin: Any, name: str, partitions: int) -> None:
    found = len(admin.describe_topics([name])[0]["partitions"])
    if found != partitions:
        raise ConfigError(
            f"kafka.partitions: topic '{name}' has {found} partitions, the configuration says {partitions}; "
            "impressions, feedback and examples must agree: set kafka.partitions, or use other topic names"
        )
