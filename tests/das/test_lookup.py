"""The logit lookup on a real Redis: right rows or none; a bounded wait, then labels only, then logits again.

Waits run on a simulated clock: each pause of the lookup advances it and lets a scripted teacher act.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from das.errors import ConfigError, Fatal
from das.example_source import ExampleMessage
from das.logit_block import encode_block
from das.logit_store import LogitStore, RedisConfig
from das.lookup import LogitLookup, LookupConfig
from das.schema import FeatureSchema
from das.telemetry import RecordingTelemetry
from services.embedded import HOST, Server, start_redis

ROWS = 4
SCHEMA = FeatureSchema.parse(
    {
        "name": "tiny",
        "domains": ["1"],
        "objectives": [{"name": "click", "window_s": 60}, {"name": "like", "window_s": 60}],
        "features": [{"kind": "categorical", "name": "user_id"}],
    }
)


def message(offset: int, partition: int = 0, rows: int = ROWS) -> ExampleMessage:
    batch = pa.record_batch({"user_id": pa.array(range(rows), pa.int64())})
    checksum = 1_000_000 * partition + offset + 7
    return ExampleMessage(partition=partition, offset=offset, seq=offset, batch=batch, checksum=checksum, appended_ms=0)


def logits_of(m: ExampleMessage) -> np.ndarray:
    """What our teacher says of a message: a function of the message alone, so that a misplaced block shows."""
    return np.full((m.batch.num_rows, 2), m.checksum % 251, np.float32) + np.arange(m.batch.num_rows)[:, None]


def block_of(m: ExampleMessage, **changed: int) -> bytes:
    fields = {
        "teacher_version": 1,
        "trained_offset": m.offset,
        "trained_through_ms": 0,
        "schema_fingerprint": SCHEMA.fingerprint,
        "message_checksum": m.checksum,
    }
    return encode_block(logits_of(m), **fields | changed)


class Simulation(threading.Event):
    """A clock, and the stop event whose waits move it: what was scheduled up to then happens before it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.waits: list[float] = []
        self._due: list[tuple[float, Callable[[], object]]] = []

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        self._due.append((self.now_s + seconds, action))

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None, "a wait without a deadline"
        self.waits.append(timeout)
        self.now_s += timeout
        due = [a for at, a in self._due if at <= self.now_s]
        self._due = [(at, a) for at, a in self._due if at > self.now_s]
        for action in due:
            action()
        return self.is_set()


class Rig:
    """A lookup and its teacher over one Redis, in simulated time."""

    def __init__(self, url: str, topic: str, **config: int) -> None:
        self.sim = Simulation()
        self.telemetry = RecordingTelemetry()
        self.store = LogitStore(RedisConfig(url=url, socket_timeout_s=0.5), topic=topic, teacher="kunlun", ttl_s=60)
        parsed = LookupConfig.parse({"wait_ms": 10_000, "stall_ms": 2_000, "retry_ms": 500, **config})
        self.lookup = LogitLookup(
            self.store, SCHEMA, self.telemetry, parsed, stop=self.sim, clock=lambda: self.sim.now_s
        )

    def score(self, *messages: ExampleMessage, watermark: int | None = None) -> None:
        """The teacher scores messages of one partition."""
        blocks = {m.offset: block_of(m) for m in messages}
        self.store.put(messages[0].partition, blocks, max(blocks) + 1 if watermark is None else watermark)

    def advance(self, watermark: int, partition: int = 0) -> None:
        """The teacher gets on with other messages."""
        self.store.put(partition, {}, watermark)

    def attach(self, *messages: ExampleMessage) -> tuple[list[bool], float]:
        """Which messages got their logits, every one checked, and the simulated seconds it took."""
        began_s = self.sim.now_s
        blocks = self.lookup.attach(messages)
        for m, block in zip(messages, blocks, strict=True):
            if block is not None:
                np.testing.assert_array_equal(block.logits, logits_of(m))
        return [b is not None for b in blocks], self.sim.now_s - began_s

    def rows(self, outcome: str) -> float:
        return self.telemetry.total("exfm_logit_rows_total", outcome=outcome)

    def misses(self) -> dict[str, float]:
        """Missed rows by reason, and every row counted once."""
        name = "exfm_logit_misses_total"
        found = {dict(labels)["reason"]: n for (n_, labels), n in self.telemetry.counters.items() if n_ == name}
        assert sum(found.values()) == self.rows("miss")
        return found

    @property
    def degraded(self) -> bool:
        gauge = self.telemetry.gauges["exfm_lookup_degraded", ()]
        assert gauge == self.lookup.degraded
        return bool(gauge)


@pytest.fixture
def rig(redis_url: str, prefix: str) -> Iterator[Rig]:
    rig = Rig(redis_url, prefix)
    yield rig
    rig.store.close()


def test_every_message_gets_its_own_logits_in_one_round_trip(own_redis: Server, admin: redis.Redis) -> None:
    rig = Rig(f"redis://{own_redis.address}/0", "examples")
    messages = [message(o, p) for o in range(5) for p in (1, 0)]
    rig.score(*messages[0::2])
    rig.score(*messages[1::2])
    before = admin.info("stats")["total_reads_processed"]
    assert rig.attach(*messages[::-1]) == ([True] * 10, 0.0)
    assert admin.info("stats")["total_reads_processed"] - before == 2  # ours, and this INFO
    assert (rig.rows("hit"), rig.misses(), rig.degraded) == (10 * ROWS, {}, False)


def test_no_messages_ask_for_nothing(rig: Rig) -> None:
    assert rig.attach() == ([], 0.0)


def test_a_message_that_the_teacher_has_not_reached_is_waited_for(rig: Rig) -> None:
    rig.score(message(0))
    rig.sim.after(1.5, lambda: rig.score(message(1), message(2)))
    hits, took_s = rig.attach(message(0), message(1), message(2))
    assert hits == [True] * 3
    assert 1.5 <= took_s <= 1.7
    assert rig.telemetry.total("exfm_lookup_wait_seconds") == 1
    assert not rig.degraded


def test_pauses_grow_from_poll_ms_to_a_fifth_of_a_second_and_start_over_when_the_teacher_moves(rig: Rig) -> None:
    rig.sim.after(1.0, lambda: rig.advance(1))
    rig.attach(message(5))
    first, fastest = rig.sim.waits.index(max(rig.sim.waits)), min(rig.sim.waits[1:-1])
    assert rig.sim.waits[:first] == sorted(rig.sim.waits[:first])
    assert max(rig.sim.waits) == 0.2
    assert fastest == 0.02
    assert rig.sim.waits[first:].count(0.02) == 1


def test_a_teacher_that_stalls_is_waited_for_no_longer_than_stall_ms(rig: Rig) -> None:
    hits, took_s = rig.attach(message(0), message(1))
    assert hits == [False, False]
    assert 2.0 <= took_s <= 2.2
    assert rig.misses() == {"timeout": 2 * ROWS}
    assert rig.degraded


def test_a_teacher_that_moves_but_is_far_behind_is_waited_for_no_longer_than_wait_ms(rig: Rig) -> None:
    for second in range(40):
        rig.sim.after(second, lambda w=second + 1: rig.advance(w))
    hits, took_s = rig.attach(message(1000))
    assert hits == [False]
    assert took_s == pytest.approx(10.0)
    assert rig.misses() == {"timeout": ROWS}


def test_a_slow_teacher_that_moves_is_waited_for_past_stall_ms(rig: Rig) -> None:
    for step in range(1, 6):
        rig.sim.after(1.7 * step, lambda offset=step: rig.score(message(offset)))
    hits, took_s = rig.attach(message(5))
    assert hits == [True]
    assert took_s == pytest.approx(8.5, abs=0.25)


def test_an_idle_stream_does_not_count_as_a_stalled_teacher(rig: Rig) -> None:
    rig.score(message(0))
    rig.attach(message(0))
    rig.sim.now_s += 3600
    rig.sim.after(1.0, lambda: rig.score(message(1)))
    assert rig.attach(message(1))[0] == [True]


def test_a_degraded_lookup_does_not_wait_and_still_takes_what_is_there(rig: Rig) -> None:
    rig.attach(message(3))
    assert rig.degraded
    rig.store.put(0, {4: block_of(message(4))}, 0)
    assert rig.attach(message(4), message(5)) == ([True, False], 0.0)
    assert rig.degraded


def test_distillation_resumes_when_the_teacher_moves_again(rig: Rig) -> None:
    rig.score(message(0))
    rig.attach(message(0), message(3))
    assert rig.degraded
    for offset in range(4, 40):
        assert rig.attach(message(offset)) == ([False], 0.0)
    rig.advance(2)
    rig.sim.after(1.0, lambda: rig.score(message(40)))
    hits, took_s = rig.attach(message(40))
    assert hits == [True], "once the teacher moves it is waited for again"
    assert took_s >= 1.0
    assert not rig.degraded


def test_one_dead_teacher_degrades_its_own_partition_only(rig: Rig) -> None:
    rig.attach(message(0, 1))
    assert rig.degraded
    rig.sim.after(1.0, lambda: rig.score(message(0, 0)))
    hits, took_s = rig.attach(message(0, 0), message(1, 1))
    assert hits == [True, False]
    assert 1.0 <= took_s <= 1.2
    assert rig.degraded


def test_a_block_that_is_gone_is_missed_at_once(rig: Rig, redis_client: redis.Redis) -> None:
    rig.score(message(0), message(1), message(2))
    redis_client.delete(rig.store.block_key(0, 0))
    redis_client.delete(rig.store.block_key(0, 2))
    redis_client.rpush(rig.store.block_key(0, 2), "another type")
    assert rig.attach(message(0), message(1), message(2)) == ([False, True, False], 0.0)
    assert (rig.rows("hit"), rig.misses(), rig.degraded) == (ROWS, {"absent": 2 * ROWS}, False)


def test_a_flushed_store_is_waited_for_until_the_teacher_writes_again(rig: Rig, redis_client: redis.Redis) -> None:
    rig.score(*(message(o) for o in range(6)))
    rig.attach(message(0))
    redis_client.flushdb()
    rig.sim.after(1.0, lambda: rig.score(message(6)))
    assert rig.attach(message(5), message(6))[0] == [False, True]
    assert rig.misses() == {"absent": ROWS}
    assert not rig.degraded


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_corrupt_bytes_are_never_used(rig: Rig, redis_client: redis.Redis, data: st.DataObject) -> None:
    good = block_of(message(0))
    how = data.draw(st.sampled_from(["flip", "cut", "noise", "append"]))
    if how == "flip":
        flipped = bytearray(good)
        for bit in data.draw(st.sets(st.integers(0, 8 * len(good) - 1), min_size=1, max_size=8)):
            flipped[bit // 8] ^= 1 << bit % 8
        bad = bytes(flipped)
    elif how == "cut":
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        noise = data.draw(st.binary(min_size=1, max_size=100))
        bad = noise if how == "noise" else good + noise
    redis_client.set(rig.store.watermark_key(0), 1)
    redis_client.set(rig.store.block_key(0, 0), bad)
    assert rig.attach(message(0)) == ([False], 0.0)
    assert rig.misses().keys() <= {"corrupt", "format"}


@pytest.mark.parametrize(
    ("reason", "changed", "invariant"),
    [
        ("schema", {"schema_fingerprint": SCHEMA.fingerprint ^ 1}, None),
        ("message", {"message_checksum": message(1).checksum}, "right_row"),
        ("peek", {"trained_offset": 1}, "no_peek"),
    ],
)
def test_a_block_of_something_else_is_never_used(
    rig: Rig, reason: str, changed: dict[str, int], invariant: str | None
) -> None:
    rig.store.put(0, {0: block_of(message(0), **changed)}, 1)
    assert rig.attach(message(0)) == ([False], 0.0)
    assert rig.misses() == {reason: ROWS}
    assert rig.telemetry.total("exfm_invariant_violations_total") == (invariant is not None)
    if invariant:
        assert rig.telemetry.total("exfm_invariant_violations_total", invariant=invariant) == 1


def test_a_block_of_other_rows_is_never_used(rig: Rig) -> None:
    rig.store.put(0, {0: block_of(message(0, rows=ROWS + 1))}, 1)
    assert rig.attach(message(0)) == ([False], 0.0)
    assert rig.misses() == {"rows": ROWS}
    assert rig.telemetry.total("exfm_invariant_violations_total", invariant="right_row") == 1


def test_a_block_of_other_objectives_is_never_used(rig: Rig) -> None:
    fields = {"schema_fingerprint": SCHEMA.fingerprint, "message_checksum": message(0).checksum}
    one = encode_block(np.zeros((ROWS, 1)), teacher_version=1, trained_offset=0, trained_through_ms=0, **fields)
    rig.store.put(0, {0: one}, 1)
    assert rig.attach(message(0)) == ([False], 0.0)
    assert rig.misses() == {"schema": ROWS}


def test_blocks_swapped_in_the_store_are_never_used(rig: Rig, redis_client: redis.Redis) -> None:
    rig.store.put(0, {0: block_of(message(1), trained_offset=0), 1: block_of(message(0))}, 2)
    assert rig.attach(message(0), message(1)) == ([False, False], 0.0)
    assert rig.misses() == {"message": 2 * ROWS}
    assert rig.telemetry.total("exfm_invariant_violations_total", invariant="right_row") == 2


def test_stopping_ends_the_wait_and_counts_nothing_undecided(rig: Rig) -> None:
    rig.score(message(0))
    rig.sim.after(0.5, rig.sim.set)
    hits, took_s = rig.attach(message(0), message(1))
    assert hits == [True, False]
    assert took_s <= 0.7
    assert (rig.rows("hit"), rig.misses(), rig.degraded) == (ROWS, {}, False)


def test_without_a_wait_labels_are_used_at_once(redis_url: str, prefix: str) -> None:
    rig = Rig(redis_url, prefix, wait_ms=0)
    assert rig.attach(message(0)) == ([False], 0.0)
    rig.score(message(1))
    assert rig.attach(message(1), message(2)) == ([True, False], 0.0)


def test_a_killed_store_is_waited_for_briefly_and_used_again_when_it_is_back(own_redis: Server, tmp_path: Path) -> None:
    rig = Rig(f"redis://{own_redis.address}/0", "examples")
    rig.score(message(0))
    assert rig.attach(message(0))[0] == [True]
    own_redis.process.kill()
    own_redis.process.wait()
    hits, took_s = rig.attach(message(0))
    assert hits == [False]
    assert 2.0 <= took_s <= 2.2
    assert rig.degraded
    for _ in range(50):
        assert rig.attach(message(0)) == ([False], 0.0)
    assert rig.misses() == {"store": 51 * ROWS}
    again = start_redis(tmp_path / "redis", int(own_redis.address.rpartition(":")[2]))
    try:
        assert rig.attach(message(0)) == ([False], 0.0), "not asked again before retry_ms"
        rig.sim.now_s += 0.5
        rig.sim.after(1.0, lambda: rig.score(message(1)))
        assert rig.attach(message(0), message(1))[0] == [True, True]
        assert not rig.degraded
    finally:
        again.stop()


def test_a_store_restarted_during_the_wait_costs_no_logits(own_redis: Server, tmp_path: Path) -> None:
    rig = Rig(f"redis://{own_redis.address}/0", "examples")
    rig.score(message(0))
    own_redis.process.kill()
    own_redis.process.wait()
    started: list[Server] = []
    port = int(own_redis.address.rpartition(":")[2])
    rig.sim.after(1.0, lambda: started.append(start_redis(tmp_path / "redis", port)))
    try:
        assert rig.attach(message(0))[0] == [True]
        assert not rig.degraded
    finally:
        started[0].stop()


def test_a_store_that_is_away_is_tried_once_per_retry_ms() -> None:
    accepted: list[float] = []
    with socket.create_server((HOST, 0)) as listener:

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    listener.accept()[0].close()
                    accepted.append(rig.sim.now_s)

        rig = Rig(f"redis://{HOST}:{listener.getsockname()[1]}/0", "examples", retry_ms=1000)
        threading.Thread(target=hang_up, daemon=True).start()
        began_s = rig.sim.now_s
        while rig.sim.now_s < began_s + 20:
            rig.attach(message(0))
            rig.sim.now_s += 0.05
        listener.shutdown(socket.SHUT_RDWR)
    assert 15 <= len(accepted) <= 21
    assert rig.misses().keys() == {"store"}


def test_a_stalled_store_holds_a_student_no_longer_than_its_deadline(own_redis: Server) -> None:
    """On the real clock: the bound includes the socket's own timeout."""
    config = LookupConfig(wait_ms=400, stall_ms=300, retry_ms=100)
    store = LogitStore(
        RedisConfig(url=f"redis://{own_redis.address}/0", socket_timeout_s=0.3), topic="t", teacher="m", ttl_s=60
    )
    telemetry = RecordingTelemetry()
    lookup = LogitLookup(store, SCHEMA, telemetry, config)
    store.put(0, {0: block_of(message(0))}, 1)
    own_redis.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert lookup.attach([message(0)]) == [None]
        assert time.monotonic() - began < 0.4 + 2 * 0.3 + 0.5
    finally:
        own_redis.process.send_signal(signal.SIGCONT)
    time.sleep(0.15)
    (block,) = lookup.attach([message(0)])
    assert block is not None
    assert not lookup.degraded
    assert telemetry.total("exfm_logit_misses_total", reason="store") == ROWS


def test_students_follow_a_real_teacher_that_stops_and_comes_back(redis_url: str, prefix: str) -> None:
    """Threads and the real clock: the teacher writes 20 messages, pauses past the stall limit, and writes on."""
    config = LookupConfig(wait_ms=5_000, stall_ms=300, poll_ms=5)
    store = LogitStore(RedisConfig(url=redis_url), topic=prefix, teacher="kunlun", ttl_s=60)
    telemetry, proceed = RecordingTelemetry(), threading.Event()

    def teach() -> None:
        for offset in range(40):
            if offset == 20:
                proceed.wait(30)
            store.put(0, {offset: block_of(message(offset))}, offset + 1)
            time.sleep(0.01)

    teacher = threading.Thread(target=teach)
    teacher.start()
    lookup = LogitLookup(store, SCHEMA, telemetry, config)
    hits = [lookup.attach([message(o)])[0] is not None for o in range(25)]
    assert hits == [True] * 20 + [False] * 5
    assert lookup.degraded
    proceed.set()
    time.sleep(0.05)
    hits = [lookup.attach([message(o)])[0] is not None for o in range(25, 40)]
    teacher.join()
    assert hits == [True] * 15
    assert not lookup.degraded


def test_wrong_credentials_are_fatal(own_redis: Server, admin: redis.Redis) -> None:
    admin.config_set("requirepass", "x")
    rig = Rig(f"redis://{own_redis.address}/0", "examples")
    with pytest.raises(Fatal, match="password_file"):
        rig.attach(message(0))


@pytest.mark.parametrize("bad", [{"wait_ms": -1}, {"poll_ms": 0}, {"poll_ms": 500}, {"retry_ms": 0}, {"wait_s": 1}])
def test_a_wait_without_a_bound_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        LookupConfig.parse(bad)
