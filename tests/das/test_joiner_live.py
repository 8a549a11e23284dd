"""A joiner on a stream without an end, and on a broker that goes away for a while."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import joiner_rig as rig
import psutil
import pytest

from das.stream import KafkaSink, KafkaSource, TopicPartition
from das.telemetry import RecordingTelemetry
from services.embedded import start_broker

SHORT = {**rig.SCHEMA, "objectives": [{"name": "click", "window_s": 0.3}, {"name": "buy", "window_s": 0.4}]}


def test_a_live_stream_leaves_with_the_clock_when_both_inputs_fall_silent(kafka_bootstrap: str, prefix: str) -> None:
    config, telemetry = rig.kafka_config(kafka_bootstrap, prefix), RecordingTelemetry()
    joiner = rig.make_joiner(config, telemetry, schema=SHORT, stop_at_end=False, idle_timeout_s=0.7, linger_ms=50)
    background, sink = rig.Background(joiner), KafkaSink(config)
    rig.until(lambda: ("exfm_joiner_pending", ()) in telemetry.gauges)
    now_ms = int(time.time() * 1000)
    for n in range(40):
        features = {"item": n, "price": 0}
        message = {"impression_id": f"i{n}", "event_time": now_ms + n, "domain": "0", "features": features}
        rig.send_json(config, sink, "impressions", f"i{n}", message)
        if n % 2:
            click = {"impression_id": f"i{n}", "objective": "click", "event_time": now_ms + n + 100, "value": 1}
            rig.send_json(config, sink, "feedback", f"i{n}", click)
    sink.flush(10)
    rig.until(lambda: telemetry.total("exfm_examples_rows_total") == 40)
    background.stop.set()
    background.finish()
    sink.close()
    examples = rig.Examples(config)
    assert examples.labels == {f"i{n}": (n % 2, 0) for n in range(40)}
    assert telemetry.total("exfm_feedback_total", outcome="joined") == 20


def test_an_idle_joiner_uses_almost_no_cpu(kafka_bootstrap: str, prefix: str, tmp_path: Path) -> None:
    config = rig.kafka_config(kafka_bootstrap, prefix)
    worker = rig.Worker(tmp_path, config, {"idle_timeout_s": 1.0, "session_timeout_s": 10}, stop_at_end=False)
    rig.until(lambda: len(worker.partitions_begun()) == 2)
    process = psutil.Process(worker.process.pid)
    time.sleep(1.0)
    before, began_s = sum(process.cpu_times()[:2]), time.monotonic()
    time.sleep(4.0)
    share = (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began_s)
    worker.process.terminate()
    assert worker.wait() == 0, worker.log
    assert share < 0.05


@pytest.mark.faults
def test_a_broker_that_stalls_delays_examples_and_changes_none(tmp_path: Path, prefix: str) -> None:
    server = start_broker(tmp_path)
    config = rig.kafka_config(server.address, prefix, request_timeout_s=2, produce_timeout_s=1)
    stream, sink, telemetry = rig.Stream(1500), KafkaSink(config), RecordingTelemetry()
    stream.send(config, sink)
    background = rig.Background(rig.make_joiner(config, telemetry, poll_records=64, idle_timeout_s=1.0))
    rig.until(lambda: telemetry.total("exfm_examples_rows_total") > 100)
    os.kill(server.process.pid, signal.SIGSTOP)
    time.sleep(4.0)
    assert telemetry.gauges["exfm_ready", ()] == 0
    os.kill(server.process.pid, signal.SIGCONT)
    background.finish()
    examples = rig.Examples(config)
    assert examples.times_seen == Counter(stream.labels.keys())
    assert examples.labels == stream.labels
    assert telemetry.gauges["exfm_ready", ()] == 1
    sink.close()
    server.stop()


@pytest.mark.faults
def test_a_stalled_broker_does_not_close_windows(tmp_path: Path, prefix: str) -> None:
    server = start_broker(tmp_path)
    config, telemetry = rig.kafka_config(server.address, prefix), RecordingTelemetry()
    options = {"stop_at_end": False, "idle_timeout_s": 1.0, "session_timeout_s": 10, "linger_ms": 0}
    background = rig.Background(rig.make_joiner(config, telemetry, schema=SHORT, **options))
    sink = KafkaSink(config)
    rig.until(lambda: ("exfm_joiner_pending", ()) in telemetry.gauges)
    now_ms = int(time.time() * 1000)
    message = {"impression_id": "x", "event_time": now_ms, "domain": "0", "features": {"item": 1, "price": 0}}
    click = {"impression_id": "x", "objective": "click", "event_time": now_ms + 200, "value": 1}
    rig.send_json(config, sink, "impressions", "x", message)
    sink.flush(10)
    rig.until(lambda: telemetry.gauges["exfm_joiner_pending", ()] == 1)
    os.kill(server.process.pid, signal.SIGSTOP)
    time.sleep(4.0)
    os.kill(server.process.pid, signal.SIGCONT)
    rig.send_json(config, sink, "feedback", "x", click)
    sink.flush(10)
    rig.until(lambda: telemetry.total("exfm_examples_rows_total") == 1)
    background.stop.set()
    background.finish()
    assert rig.Examples(config).labels == {"x": (1, 0)}
    sink.close()
    server.stop()


@pytest.mark.faults
def test_silence_of_a_stalled_broker_is_told_from_silence_of_the_stream(tmp_path: Path, prefix: str) -> None:
    server = start_broker(tmp_path)
    config = rig.kafka_config(server.address, prefix)
    source = KafkaSource(config)
    source.assign({TopicPartition(config.topics.feedback, 0): 0})
    source.poll(0.2, 10)
    assert source.reachable(2.0)
    os.kill(server.process.pid, signal.SIGSTOP)
    rig.until(lambda: psutil.Process(server.process.pid).status() == psutil.STATUS_STOPPED)
    assert not source.reachable(0.5)
    os.kill(server.process.pid, signal.SIGCONT)
    assert source.reachable(5.0)
    source.close()
    server.stop()
