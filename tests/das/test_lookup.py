"""The logit lookup on a real Redis: right rows or none; a bounded wait, then labels only, then logits again.

Waits run on a simulated clock: each pause of the lookup advances it and lets a scripted teacher act.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lookup_rig import ROWS, SCHEMA, Rig, block_of, message

from das.errors import ConfigError
from das.logit_block import encode_block
from das.lookup import LookupConfig
from services.embedded import HOST, Server


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


def test_no_messages_ask_for_nothing() -> None:
    assert Rig(f"redis://{HOST}:1/0", "nobody-listens").attach() == ([], 0.0)


def test_hits_and_misses_count_the_rows_that_the_caller_trains(rig: Rig) -> None:
    rig.score(message(0), watermark=2)
    rig.lookup.attach([message(0), message(1)], [3, 1])
    assert (rig.rows("hit"), rig.misses()) == (3, {"absent": 1})


def test_later_messages_are_taken_if_they_are_there_and_not_waited_for(rig: Rig) -> None:
    messages = [message(offset) for offset in range(10)]
    rig.score(*messages[:6])
    blocks = rig.lookup.attach(messages, wait_for=4)
    assert [block is not None for block in blocks] == [True] * 6
    assert not rig.sim.waits
    assert rig.rows("hit") == 6 * ROWS
    assert not rig.misses()


def test_what_is_not_waited_for_neither_degrades_nor_counts(rig: Rig) -> None:
    messages = [message(0), message(1), message(2), message(0, 1)]
    assert rig.lookup.attach(messages, wait_for=2) == [None, None]
    assert 2.0 <= sum(rig.sim.waits) < 2.2  # stall_ms
    assert rig.misses() == {"timeout": 2 * ROWS}
    rig.sim.waits.clear()
    rig.sim.after(0.5, lambda: rig.score(message(0, 1)))
    assert [b is not None for b in rig.lookup.attach(messages[3:], wait_for=2)] == [True]
    assert rig.sim.waits, "the other partition still waits"


def test_the_answer_ends_before_the_first_later_message_that_is_not_decided(rig: Rig) -> None:
    rig.score(message(0), message(2), watermark=3)
    rig.score(message(0, 1))
    messages = [message(0), message(1), message(2), message(3), message(0, 1)]
    blocks = rig.lookup.attach(messages, wait_for=1)
    assert [block is not None for block in blocks] == [True, False, True]
    assert rig.misses() == {"absent": ROWS}
    rig.score(message(3))
    assert [block is not None for block in rig.lookup.attach(messages[3:], wait_for=1)] == [True, True]


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


def test_a_flushed_store_is_waited_for_until_the_teacher_writes_again(rig: Rig, forget: Callable[[], None]) -> None:
    rig.score(*(message(o) for o in range(6)))
    rig.attach(message(0))
    forget()
    rig.sim.after(1.0, lambda: rig.score(message(6)))
    assert rig.attach(message(5), message(6))[0] == [False, True]
    assert rig.misses() == {"absent": ROWS}
    assert not rig.degraded


def test_a_teacher_that_starts_over_on_an_empty_store_is_seen_to_move(rig: Rig, forget: Callable[[], None]) -> None:
    rig.score(*(message(o) for o in range(6)))
    rig.attach(message(0))
    forget()
    rig.attach(message(6))
    assert rig.degraded
    rig.score(message(0))  # from its last snapshot on: behind where it was
    rig.sim.after(1.0, lambda: rig.score(message(7)))
    assert rig.attach(message(7))[0] == [True]


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


def test_a_degraded_lookup_that_is_stopped_counts_nothing_undecided(rig: Rig) -> None:
    rig.attach(message(0))
    rig.sim.set()
    assert rig.attach(message(1)) == ([False], 0.0)
    assert rig.misses() == {"timeout": ROWS}, "those of the first call"


def test_without_a_wait_labels_are_used_at_once(redis_url: str, prefix: str) -> None:
    rig = Rig(redis_url, prefix, wait_ms=0)
    assert rig.attach(message(0)) == ([False], 0.0)
    rig.score(message(1))
    assert rig.attach(message(1), message(2)) == ([True, False], 0.0)


@pytest.mark.parametrize("bad", [{"wait_ms": -1}, {"poll_ms": 0}, {"poll_ms": 500}, {"retry_ms": 0}, {"wait_s": 1}])
def test_a_wait_without_a_bound_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        LookupConfig.parse(bad)
