"""The JSON contracts: what is accepted, and the reason given for everything else."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from example_kit import NOW_MS, features, impression, small_schema
from hypothesis import given, settings
from hypothesis import strategies as st

from das.errors import Poison
from das.messages import FLOAT32_MAX, REASONS, Feedback, Impression, MessageCodec

CODEC = MessageCodec(small_schema())


def test_impression_survives_the_round_trip() -> None:
    decoded = CODEC.decode_impression(json.dumps(impression()).encode())
    assert isinstance(decoded, Impression)
    assert (decoded.impression_id, decoded.event_time, decoded.domain) == ("i0", NOW_MS, "1")
    assert decoded.features.clicks.tag == ["a", "b"]
    assert decoded.features.age is None
    assert CODEC.decode_impression(CODEC.encode_impression(decoded)) == decoded
    assert CODEC.impression(impression()) == decoded


def test_nullable_features_may_be_absent() -> None:
    few = {key: value for key, value in features().items() if key not in ("maker", "color", "age")}
    decoded = CODEC.decode_impression(json.dumps(impression(features=few)).encode())
    assert (decoded.features.maker, decoded.features.color, decoded.features.age) == (None, None, None)


def test_feedback_survives_the_round_trip() -> None:
    decoded = CODEC.decode_feedback(b'{"impression_id":"a","objective":"buy","event_time":5}')
    assert decoded == Feedback("a", "buy", 5, 1.0)
    assert decoded.positive
    assert not CODEC.decode_feedback(CODEC.encode_feedback(Feedback("a", "buy", 5, 0.0))).positive


def _events(**columns: list[Any]) -> dict[str, Any]:
    return {"item": [1, 2], "tag": ["a", "b"], "time_ms": [5, 6], **columns}


BAD_IMPRESSIONS = {
    "no bytes": ("json", b""),
    "tombstone": ("json", None),
    "not json": ("json", b"{"),
    "trailing": ("json", json.dumps(impression()).encode() + b"x"),
    "bad utf-8": ("json", json.dumps(impression()).encode().replace(b'"x"', b'"\xff"')),
    "lone surrogate": ("json", json.dumps(impression(impression_id="\ud800")).encode()),
    "nan": ("json", json.dumps(impression(features=features(price=float("nan")))).encode()),
    "a list": ("type", b"[]"),
    "huge number": ("type", json.dumps(impression(features=features(price=1e300))).encode()),
    "endless number": ("type", json.dumps(impression()).encode().replace(b"1.5", b"9" * 5000)),
    "over int64": ("type", impression(features=features(item=2**63))),
    "float id": ("type", impression(features=features(item=1.5))),
    "bool id": ("type", impression(features=features(item=True))),
    "text id": ("type", impression(features=features(item="7"))),
    "null of a required feature": ("type", impression(features=features(price=None))),
    "long text": ("type", impression(features=features(tag="x" * 1025))),
    "negative time": ("type", impression(event_time=-1)),
    "time in seconds as text": ("type", impression(event_time="2022")),
    "far future": ("type", impression(event_time=2**60)),
    "numeric domain": ("type", impression(domain=1)),
    "no id": ("missing", {key: value for key, value in impression().items() if key != "impression_id"}),
    "no feature": ("missing", impression(features={k: v for k, v in features().items() if k != "tag"})),
    "no sequence": ("missing", impression(features={k: v for k, v in features().items() if k != "clicks"})),
    "no field": ("missing", impression(features=features(clicks={"item": [], "time_ms": []}))),
    "unknown feature": ("unknown", impression(features=features(is_click=1))),
    "unknown key": ("unknown", impression(label=1)),
    "unknown field": ("unknown", impression(features=features(clicks=_events(shop=[1, 2])))),
    "unknown domain": ("domain", impression(domain="9")),
    "empty id": ("id", impression(impression_id="")),
    "long id": ("id", impression(impression_id="x" * 129)),
    "uneven sequence": ("sequence", impression(features=features(clicks=_events(item=[1])))),
    "uneven times": ("sequence", impression(features=features(clicks=_events(time_ms=[5])))),
    "long sequence": ("sequence", impression(features=features(buys={"item": [1] * 3, "time_ms": [5] * 3}))),
    "newest first": ("sequence", impression(features=features(clicks=_events(time_ms=[6, 5])))),
    "future event": ("sequence", impression(features=features(clicks=_events(time_ms=[5, NOW_MS + 1])))),
}


@pytest.mark.parametrize("name", BAD_IMPRESSIONS)
def test_bad_impression_names_its_reason(name: str) -> None:
    reason, message = BAD_IMPRESSIONS[name]
    value = json.dumps(message).encode() if isinstance(message, dict) else message
    with pytest.raises(Poison) as caught:
        CODEC.decode_impression(value)
    assert caught.value.reason == reason
    assert len(caught.value.detail) <= 300


@pytest.mark.parametrize(
    ("reason", "value"),
    [
        ("json", b""),
        ("json", b"nope"),
        ("missing", b'{"impression_id":"a","event_time":5}'),
        ("unknown", b'{"impression_id":"a","objective":"buy","event_time":5,"x":1}'),
        ("type", b'{"impression_id":"a","objective":"buy","event_time":"5"}'),
        ("type", b'{"impression_id":"a","objective":"buy","event_time":5,"value":null}'),
        ("objective", b'{"impression_id":"a","objective":"like","event_time":5}'),
        ("id", b'{"impression_id":"","objective":"buy","event_time":5}'),
    ],
)
def test_bad_feedback_names_its_reason(reason: str, value: bytes) -> None:
    with pytest.raises(Poison) as caught:
        CODEC.decode_feedback(value)
    assert caught.value.reason == reason


def test_detail_names_the_field() -> None:
    with pytest.raises(Poison, match=r"features\.clicks\.item"):
        CODEC.impression(impression(features=features(clicks=_events(item=["1", 2]))))


def test_every_length_of_a_cut_message_is_poison() -> None:
    value = json.dumps(impression()).encode()
    for length in range(len(value)):
        with pytest.raises(Poison) as caught:
            CODEC.decode_impression(value[:length])
        assert caught.value.reason == "json"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400) | JSON.map(msgspec.json.encode))
def test_arbitrary_bytes_are_poison_and_nothing_else(value: bytes) -> None:
    for decode in (CODEC.decode_impression, CODEC.decode_feedback):
        with pytest.raises(Poison) as caught:
            decode(value)
        assert caught.value.reason in REASONS


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(sorted(features())), value=JSON)
def test_a_feature_is_either_kept_exactly_or_poison(key: str, value: Any) -> None:
    message = msgspec.json.encode(impression(features=features(**{key: value})))
    try:
        decoded = CODEC.decode_impression(message)
    except Poison as poison:
        reason: str | None = poison.reason
    else:
        reason = None
        kept = msgspec.to_builtins(getattr(decoded.features, key))
        assert kept == (float(value) if isinstance(kept, float) else value)
        assert not isinstance(kept, float) or abs(kept) <= FLOAT32_MAX
    assert reason in (None, *REASONS)
