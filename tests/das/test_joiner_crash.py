"""Joiner processes that are killed, stopped, or share the partitions: each impression leaves exactly once."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import joiner_rig as rig
import pytest

from das.stream import KafkaConfig, KafkaSink

pytestmark = pytest.mark.faults


def send(config: KafkaConfig, stream: rig.Stream) -> None:
    sink = KafkaSink(config)
    stream.send(config, sink, shuffle=True)
    sink.close()


def join_without_faults(config: KafkaConfig, **changes: Any) -> rig.Examples:
    """The same input into another examples topic."""
    topics = config.topics.model_copy(update={"examples": f"{config.topics.examples}-golden"})
    golden = config.model_copy(update={"topics": topics})
    rig.create_topics(golden)
    rig.run_here(golden, **changes)
    return rig.Examples(golden)


@pytest.mark.parametrize(
    ("faults", "schema", "early"),
    [
        ("joiner.after_poll:3:kill", rig.SCHEMA, False),
        ("joiner.before_produce:3:kill", rig.ZIPPER, False),
        ("joiner.after_produce:3:kill", rig.ZIPPER, True),
        ("joiner.after_commit:3:kill", rig.SCHEMA, True),
    ],
    ids=["after_poll", "before_produce-zipper", "after_produce-zipper-early", "after_commit-early"],
)
def test_kill_9_at_every_point_changes_no_message(
    kafka_bootstrap: str, prefix: str, tmp_path: Path, faults: str, schema: dict[str, Any], early: bool
) -> None:
    config = rig.kafka_config(kafka_bootstrap, prefix)
    stream = rig.Stream(1500, schema=schema)
    send(config, stream)
    small = {"poll_records": 300, "release_positives_early": early}
    killed = rig.Worker(tmp_path, config, small, faults, schema=schema)
    assert killed.wait() == -signal.SIGKILL, killed.log
    partial = rig.Examples(config)
    assert 0 <= sum(partial.times_seen.values()) < 1500
    second = rig.Worker(tmp_path, config, small, schema=schema)
    assert second.wait() == 0, second.log
    examples = rig.Examples(config)
    assert examples.times_seen == Counter(stream.labels.keys())
    assert examples.labels == stream.labels
    assert set(examples.windows.values()) == ({0, 1} if schema is rig.ZIPPER else {0})
    assert examples.ends == {0: 1, 1: 1}
    assert examples.repeated_messages == 0
    golden = join_without_faults(config, schema=schema, release_positives_early=early)
    assert examples.values == golden.values


def test_workers_share_the_partitions_and_one_takes_over_from_a_killed_one(
    kafka_bootstrap: str, prefix: str, tmp_path: Path
) -> None:
    config = rig.kafka_config(kafka_bootstrap, prefix, partitions=4)
    stream = rig.Stream(2000, schema=rig.ZIPPER)
    send(config, stream)
    slow = {"poll_records": 64}
    first = rig.Worker(tmp_path, config, slow, "joiner.after_produce:8:kill", schema=rig.ZIPPER)
    second = rig.Worker(tmp_path, config, slow, schema=rig.ZIPPER, stop_at_end=False)
    assert first.wait() == -signal.SIGKILL, first.log
    until_all_ended(config, second)
    second.process.terminate()
    assert second.wait() == 0, second.log
    examples = rig.Examples(config)
    assert examples.times_seen == Counter(stream.labels.keys())
    assert examples.labels == stream.labels
    assert examples.ends == dict.fromkeys(range(4), 1)
    assert first.partitions_begun()
    assert second.partitions_begun() >= set(range(4)) - first.partitions_begun() != set()


def test_a_stopped_worker_that_wakes_up_after_its_partitions_moved_adds_no_example(
    kafka_bootstrap: str, prefix: str, tmp_path: Path
) -> None:
    config = rig.kafka_config(kafka_bootstrap, prefix)
    stream = rig.Stream(1500)
    send(config, stream)
    first = rig.Worker(tmp_path, config, {"poll_records": 300}, "joiner.before_produce:3:stop")
    wait_until_stopped(first)
    second = rig.Worker(tmp_path, config, {})
    assert second.wait() == 0, second.log
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.wait() == 0, first.log
    examples = rig.Examples(config)
    assert examples.times_seen == Counter(stream.labels.keys())
    assert examples.labels == stream.labels
    assert examples.repeated_messages > 0  # what it had in hand was sent once more, and is told by its number


def wait_until_stopped(worker: rig.Worker, timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        stat = Path(f"/proc/{worker.process.pid}/stat").read_text()
        if stat.rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.05)
    raise AssertionError(f"not stopped:\n{worker.log}")


def until_all_ended(config: KafkaConfig, worker: rig.Worker, timeout_s: float = 30.0) -> None:
    end_s = time.monotonic() + timeout_s
    while set(rig.Examples(config).ends) != set(range(config.partitions)):
        assert worker.process.poll() is None, worker.log
        assert time.monotonic() < end_s, worker.log
        time.sleep(0.3)
