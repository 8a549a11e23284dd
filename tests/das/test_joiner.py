"""The joiner on a real broker: labels, order, poison, late and repeated records."""

from __future__ import annotations

import json
from collections import Counter

import joiner_rig as rig
import pytest

from das.errors import Fatal
from das.quarantine import QuarantineLimit
from das.stream import KafkaSink


@pytest.fixture
def sent(kafka_bootstrap: str, prefix: str):
    """A config with its topics and a sink."""
    config = rig.kafka_config(kafka_bootstrap, prefix)
    sink = KafkaSink(config)
    yield config, sink
    sink.close()


def test_labels_order_and_messages_are_right(sent) -> None:
    config, sink = sent
    stream = rig.Stream(700)
    stream.send(config, sink, shuffle=True)
    telemetry = rig.run_here(config)
    examples = rig.Examples(config)
    assert examples.times_seen == Counter(stream.labels.keys())
    assert examples.labels == stream.labels
    assert all(order == sorted(order) for order in examples.order.values())
    assert examples.ends == {0: 1, 1: 1}
    assert max(examples.rows_per_message) == 32
    assert sum(n < 32 for n in examples.rows_per_message) <= 2  # the last message of each partition
    assert telemetry.total("exfm_impressions_total", outcome="accepted") == 700
    assert telemetry.total("exfm_examples_rows_total") == 700
