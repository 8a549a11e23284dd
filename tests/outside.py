"""Servers of your own to run the tests against, from the environment, and the names that keep our data apart there.

EXFM_TEST_KAFKA is host:port, EXFM_TEST_REDIS a redis:// URL. Every topic and key of a run begins with RUN; at the end
of the run they are deleted, and nothing else is touched.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

import kafka
import redis

from das.broker import TopicsConfig

KAFKA = os.environ.get("EXFM_TEST_KAFKA")
REDIS = os.environ.get("EXFM_TEST_REDIS")
EMBEDDED = {name for name, address in (("broker", KAFKA), ("redis", REDIS)) if address is None}
"""The servers that a pipeline of the tests starts itself."""
RUN = f"t{uuid.uuid4().hex[:8]}"


def new_prefix() -> str:
    """A name for topics, teachers and keys that nothing else has."""
    return f"{RUN}{uuid.uuid4().hex[:6]}"


def pipeline_servers() -> dict[str, Any]:
    """The sections of a settings file that name the servers: embedded ones where none of your own is given."""
    prefix = new_prefix()
    sections: dict[str, Any] = {"embedded": {"kafka": KAFKA is None, "redis": REDIS is None}}
    if KAFKA is not None:
        topics = {name: f"{prefix}-{name}" for name in TopicsConfig.model_fields}
        sections["kafka"] = {"bootstrap": KAFKA, "topics": topics}
    if REDIS is not None:
        sections["redis"] = {"url": REDIS}
    return sections


def forget_keys(client: redis.Redis, prefix: str) -> None:
    """Delete every key of the stores whose topic begins with `prefix`."""
    for key in client.scan_iter(f"exfm:{{{prefix}*", count=1000):
        client.delete(key)


def delete_topics(bootstrap: str) -> None:
    """Delete the topics of this run; the broker may take its time."""
    admin = kafka.KafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        ours = [name for name in admin.list_topics() if name.startswith(RUN)]
        if ours:
            admin.delete_topics(ours)
    finally:
        admin.close()
