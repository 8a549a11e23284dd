"""The logit lookup while the store or the teacher is away: killed, stalled, refusing, restarted."""

from __future__ import annotations

import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from lookup_rig import ROWS, SCHEMA, Rig, block_of, message

from das.deadline import Deadline
from das.errors import Fatal
from das.logit_store import LogitStore, RedisConfig
from das.lookup import LogitLookup, LookupConfig
from das.telemetry import RecordingTelemetry
from services.embedded import HOST, Server, start_redis


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
        assert rig.attach(message(2))[1] >= 2.0
        assert rig.misses() == {"store": 52 * ROWS, "timeout": ROWS}, "it is the teacher that is away now"
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
    deadline = Deadline.after(20)
    while lookup.attach([message(0)]) == [None] and not deadline.passed:
        time.sleep(0.05)
    assert not lookup.degraded
    assert telemetry.total("exfm_logit_rows_total", outcome="hit") == ROWS
    assert telemetry.total("exfm_logit_misses_total") == telemetry.total("exfm_logit_misses_total", reason="store") > 0


def test_students_follow_a_real_teacher_that_stops_and_comes_back(redis_url: str, prefix: str) -> None:
    """Threads and the real clock: the teacher writes 20 messages, pauses past the stall limit, and writes on."""
    config = LookupConfig(wait_ms=5_000, stall_ms=1_000, poll_ms=5)
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
