"""The joiner on a real broker: labels, order, poison, late and repeated records."""

from __future__ import annotations

import json
from collections import Counter

import joiner_rig as rig
import pytest

from das.errors import Fatal, Retryable
from das.join_state import JoinState, ReleaseKey, encode_state, last_state
from das.quarantine import Quarantine, QuarantineLimit
from das.stream import KafkaSink, Record
from das.telemetry import RecordingTelemetry


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


def test_poison_is_quarantined_with_its_reason_and_its_neighbors_are_joined(sent) -> None:
    config, sink = sent
    stream = rig.Stream(120)
    good = {"impression_id": "p", "event_time": rig.T0_MS, "domain": "0", "features": {"item": 1, "price": 1.0}}
    far = {**good, "event_time": 4_000_000_000_000}
    cases = [
        ("impressions", b"{not json", b"json"),
        ("impressions", json.dumps({**good, "domain": "mars"}).encode(), b"domain"),
        ("impressions", json.dumps({**good, "features": {"item": 1}}).encode(), b"missing"),
        ("impressions", json.dumps(far).encode(), b"future"),
        ("impressions", b"", b"json"),
        ("feedback", b'{"impression_id": "p", "objective": "smile", "event_time": 1}', b"objective"),
        ("feedback", b"\xff\xfe", b"json"),
        ("feedback", b'{"impression_id": "p", "objective": "buy", "event_time": 4000000000000}', b"future"),
    ]
    stream.send(config, sink, end=False)
    places = []
    for topic, value, _ in cases:
        sink.send(getattr(config.topics, topic), 0, b"key", value, {"trace": b"abc"})
    more = rig.Stream(120, seed=2, start_ms=rig.T0_MS + 60_000)
    more.send(config, sink)
    telemetry = rig.run_here(config)
    bad = rig.read_topic(config, config.topics.quarantine, 0)
    assert sorted((r.headers["exfm-topic"], r.value or b"", r.headers["exfm-reason"]) for r in bad) == sorted(
        (getattr(config.topics, topic).encode(), value, reason) for topic, value, reason in cases
    )
    for record in bad:
        topic, offset = record.headers["exfm-topic"].decode(), int(record.headers["exfm-offset"])
        original = rig.read_topic(config, topic, int(record.headers["exfm-partition"]))[offset]
        assert (original.value, original.key) == (record.value, record.key)
        assert record.headers["exfm-original-trace"] == b"abc"
        places.append((topic, offset))
    assert len(set(places)) == len(cases)
    assert b"price" in next(r for r in bad if r.headers["exfm-reason"] == b"missing").headers["exfm-detail"]
    examples = rig.Examples(config)
    assert examples.times_seen == Counter([*stream.labels, *more.labels])
    assert examples.labels == {**stream.labels, **more.labels}
    assert telemetry.total("exfm_quarantined_total") == len(cases)


def test_a_stream_of_poison_stops_the_joiner_and_nothing_moves_on(sent) -> None:
    config, sink = sent
    for i in range(40):
        rig.send_json(config, sink, "impressions", str(i), b"garbage")
    sink.flush(10)
    with pytest.raises(Fatal, match=r"40 of the last 40|went to quarantine, more than the limit of 50%"):
        rig.run_here(config, limit=QuarantineLimit(min_seen=20))
    assert len(rig.read_topic(config, config.topics.quarantine, 0)) >= 20
    assert [rig.read_topic(config, config.topics.examples, p) for p in range(2)] == [[], []]


def test_repeated_and_late_impressions_are_counted_and_leave_no_second_example(sent) -> None:
    config, sink = sent
    stream = rig.Stream(600)
    stream.send(config, sink, end=False)
    stream.send(config, sink, end=False)  # all of it again: a producer that lost its acknowledgements
    old = {"impression_id": "old", "event_time": rig.T0_MS - 90_000, "domain": "0", "features": {"item": 1, "price": 1}}
    rig.send_json(config, sink, "impressions", "old", old)
    rig.send_json(config, sink, "impressions", "older", {**old, "impression_id": "older", "event_time": 1})
    rig.send_end(config, sink)
    sink.flush(10)
    telemetry = rig.run_here(config, dedup_ms=3_600_000)
    examples = rig.Examples(config)
    assert examples.times_seen == Counter(stream.labels.keys())
    assert examples.labels == stream.labels
    counted = {o: telemetry.total("exfm_impressions_total", outcome=o) for o in ("accepted", "duplicate", "late")}
    assert counted == {"accepted": 600, "duplicate": 600, "late": 2}
    late = rig.read_topic(config, config.topics.quarantine, 0)
    assert sorted((r.headers["exfm-reason"], r.key) for r in late) == [(b"late", b"old"), (b"late", b"older")]


def test_a_joiner_whose_schema_has_other_windows_than_its_waiting_rows_stops(sent) -> None:
    config, sink = sent
    rig.Stream(700).send(config, sink, end=False)
    telemetry = RecordingTelemetry()
    background = rig.Background(rig.make_joiner(config, telemetry, stop_at_end=False))
    rig.until(lambda: telemetry.total("exfm_examples_rows_total") > 0)
    background.stop.set()
    background.finish()
    with pytest.raises(Fatal, match=r"wait, hashed with salt 'rig'.* it let every impression wait 10000 ms"):
        rig.run_here(config, schema=rig.ZIPPER)


def test_a_window_that_does_not_fit_in_memory_says_what_to_set(sent) -> None:
    config, sink = sent
    rig.Stream(600).send(config, sink)
    with pytest.raises(Fatal, match=r"raise joiner\.max_pending"):
        rig.run_here(config, max_pending=100, batch_rows=32)


def test_a_small_bound_on_pending_impressions_only_slows_reading(sent) -> None:
    config, sink = sent
    stream = rig.Stream(600)
    stream.send(config, sink)
    bounds = {"max_pending": 400, "allowed_lateness_ms": 0, "linger_ms": 500, "poll_records": 100}
    rig.run_here(config, **bounds)
    examples = rig.Examples(config)
    assert examples.labels == stream.labels
    assert examples.times_seen == Counter(stream.labels.keys())


def test_a_failed_round_starts_over_and_ends_the_same(sent, monkeypatch: pytest.MonkeyPatch) -> None:
    config, sink = sent
    stream = rig.Stream(300)
    stream.send(config, sink)
    rig.fault.arm("joiner.before_produce:2:raise")
    try:
        telemetry = rig.run_here(config)
    finally:
        rig.fault.arm(None)
    examples = rig.Examples(config)
    assert examples.labels == stream.labels
    assert examples.times_seen == Counter(stream.labels.keys())
    assert telemetry.gauges["exfm_ready", ()] == 1


def test_nothing_moves_on_before_the_quarantine_is_acknowledged(sent, monkeypatch: pytest.MonkeyPatch) -> None:
    config, sink = sent
    rig.send_json(config, sink, "impressions", "x", b"garbage")
    rig.Stream(300).send(config, sink)

    def refuse(_: Quarantine) -> None:
        raise Retryable("the quarantine topic is away")

    monkeypatch.setattr(Quarantine, "flush", refuse)
    with pytest.raises(Fatal, match=r"gave up after .*joiner\.outage_timeout_s.*the quarantine topic is away"):
        rig.run_here(config, outage_timeout_s=2)
    assert [rig.read_topic(config, config.topics.examples, p) for p in range(2)] == [[], []]


def test_a_poison_record_of_the_greatest_size_still_fits_the_quarantine(kafka_bootstrap: str, prefix: str) -> None:
    config = rig.kafka_config(kafka_bootstrap, prefix, max_message_bytes=1 << 16)
    sink = KafkaSink(config)
    rig.send_json(config, sink, "impressions", "x", b"{" * ((1 << 16) - 100))
    rig.send_end(config, sink)
    sink.flush(10)
    sink.close()
    rig.run_here(config)
    (bad,) = rig.read_topic(config, config.topics.quarantine, 0)
    assert len(bad.value or b"") == (1 << 16) - 100


def test_the_newest_state_is_found_behind_older_messages_that_were_appended_again() -> None:
    def message(seq: int) -> Record:
        state = JoinState(
            seq=seq, key=ReleaseKey(seq, "x"), first_release_ms=0, last_release_ms=seq, next=(seq, seq),
            replay=(0, 0), replay_max_ms=(0, 0), ends=(0, 0), ended=(False, False),
        )  # fmt: skip
        return Record("examples", 0, 0, 0, None, b"", {"exfm-join": encode_state(state)})

    found = last_state([message(seq) for seq in (8, 9, 10, 4, 5)])
    assert found is not None
    assert found.key == ReleaseKey(10, "x")
    assert last_state([]) is None
    with pytest.raises(Fatal, match="only joiners may write"):
        last_state([Record("examples", 0, 7, 0, None, b"", {})])
