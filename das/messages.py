"""The JSON contracts of the `impressions` and `feedback` topics, decoded into typed structs.

An impression:

    {"impression_id": "a1", "event_time": 1650812741436, "domain": "1",
     "features": {"user_id": 712, "tag": "39", "duration_ms": 49866.0,
                  "clicks": {"video_id": [7, 9], "time_ms": [1650812700000, 1650812720000]}}}

Its feedback:

    {"impression_id": "a1", "objective": "click", "event_time": 1650812742000, "value": 1}

A nullable feature may be null or absent. Whatever else differs from the schema is Poison.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

import msgspec

from das.errors import Poison
from das.schema import CategoricalFeature, Feature, FeatureSchema, SequenceFeature

MAX_ID_CHARS = 128
MAX_STRING_CHARS = 1024
MAX_TIME_MS = 253_402_300_799_999  # the last millisecond of the year 9999
MAX_DETAIL_CHARS = 300
FLOAT32_MAX = 3.4028234663852886e38
TIME_FIELD = "time_ms"

REASONS = ("json", "type", "missing", "unknown", "domain", "objective", "sequence", "id")

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Float32 = Annotated[float, msgspec.Meta(ge=-FLOAT32_MAX, le=FLOAT32_MAX)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_STRING_CHARS)]
TimeMs = Annotated[int, msgspec.Meta(ge=0, le=MAX_TIME_MS)]

_MALFORMED = re.compile(r"^(?P<text>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)


class Impression(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A served item with its features as they were served. `features` has one attribute per schema feature."""

    impression_id: str
    event_time: TimeMs
    domain: str
    features: Any


class Feedback(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One outcome of an impression; `value` above 0 makes the objective's label 1."""

    impression_id: str
    objective: str
    event_time: TimeMs
    value: float = 1.0

    @property
    def positive(self) -> bool:
        """Whether the outcome happened."""
        return self.value > 0


class MessageCodec:
    """JSON to structs and back, for one schema."""

    def __init__(self, schema: FeatureSchema) -> None:
        self.schema = schema
        self.features_type = _features_type(schema)
        self.impression_type = _impression_type(self.features_type)
        self._domains = frozenset(schema.domains)
        self._objectives = frozenset(schema.objective_names)
        self._sequences = tuple((s.name, s.max_length) for s in schema.sequences)
        self._impressions = msgspec.json.Decoder(self.impression_type)
        self._feedback = msgspec.json.Decoder(Feedback)
        self._encoder = msgspec.json.Encoder()

    def decode_impression(self, value: bytes | None) -> Impression:
        """One message of the `impressions` topic. Raises Poison with a reason of `REASONS`."""
        try:
            return self._check_impression(self._impressions.decode(_not_empty(value)))
        except ValueError as error:  # msgspec's errors and UnicodeDecodeError
            _poison(error)

    def impression(self, data: Mapping[str, Any]) -> Impression:
        """The same from an already parsed object, under the same rules. Raises Poison."""
        try:
            return self._check_impression(msgspec.convert(data, self.impression_type))
        except ValueError as error:
            _poison(error)

    def decode_feedback(self, value: bytes | None) -> Feedback:
        """One message of the `feedback` topic. Raises Poison with a reason of `REASONS`."""
        try:
            feedback = self._feedback.decode(_not_empty(value))
        except ValueError as error:
            _poison(error)
        _check_id(feedback.impression_id)
        if feedback.objective not in self._objectives:
            known = ", ".join(self.schema.objective_names)
            raise Poison("objective", f"objective '{feedback.objective[:64]}' is not in the schema; known: {known}")
        return feedback

    def encode_impression(self, impression: Impression | Mapping[str, Any]) -> bytes:
        """JSON of an impression; null features that have a default are left out of a struct's JSON."""
        return self._encoder.encode(impression)

    def encode_feedback(self, feedback: Feedback | Mapping[str, Any]) -> bytes:
        """JSON of feedback."""
        return self._encoder.encode(feedback)

    def _check_impression(self, impression: Impression) -> Impression:
        _check_id(impression.impression_id)
        if impression.domain not in self._domains:
            known = ", ".join(self.schema.domains)
            raise Poison("domain", f"domain '{impression.domain[:64]}' is not in the schema; known: {known}")
        for name, max_length in self._sequences:
            sequence = getattr(impression.features, name)
            times = sequence.time_ms
            for field, values in zip(sequence.__struct_fields__, msgspec.structs.astuple(sequence), strict=True):
                if len(values) != len(times):
                    problem = f"{name}.{field} has {len(values)} events, {name}.{TIME_FIELD} {len(times)}"
                    raise Poison("sequence", problem)
            if len(times) > max_length:
                raise Poison("sequence", f"{name} has {len(times)} events, max_length is {max_length}")
            _check_times(name, times, impression.event_time)
        return impression


def _check_id(impression_id: str) -> None:
    if not 1 <= len(impression_id) <= MAX_ID_CHARS:
        raise Poison("id", f"impression_id has {len(impression_id)} characters, not 1 to {MAX_ID_CHARS}")


def _check_times(name: str, times: list[int], event_time: int) -> None:
    """A history is oldest first and of the past: an event after the impression would leak its outcome."""
    if times and (times[-1] > event_time or times != sorted(times)):
        problem = "is later than the impression" if max(times) > event_time else "is not oldest first"
        raise Poison("sequence", f"{name}.{TIME_FIELD} {problem}")


def _not_empty(value: bytes | None) -> bytes:
    if not value:
        raise Poison("json", "empty message")
    return value


def _poison(error: ValueError) -> NoReturn:
    """Map a decoding error to Poison. Raises Poison, always."""
    text = str(error)
    match = _MALFORMED.match(text)
    assert match is not None
    path = match["path"] or "(top level)"
    if not isinstance(error, msgspec.ValidationError):
        reason = "json"
    elif "missing required field" in text:
        reason = "missing"
    elif "unknown field" in text:
        reason = "unknown"
    else:
        reason = "type"
    raise Poison(reason, f"{path}: {match['text']}"[:MAX_DETAIL_CHARS]) from None


def _features_type(schema: FeatureSchema) -> type[msgspec.Struct]:
    """One attribute per feature: the required ones first, then the nullable ones, each in schema order."""
    required = [(f.name, _annotation(f)) for f in schema.features if not _nullable(f)]
    nullable = [(f.name, _annotation(f) | None, None) for f in schema.features if _nullable(f)]
    return msgspec.defstruct(
        "Features", [*required, *nullable], frozen=True, forbid_unknown_fields=True, omit_defaults=True
    )


def _impression_type(features: type[msgspec.Struct]) -> type[Impression]:
    """Impression with typed features."""
    return msgspec.defstruct(
        "SchemaImpression", [("features", features)], bases=(Impression,), frozen=True, forbid_unknown_fields=True
    )  # type: ignore[return-value]


def _nullable(feature: Feature) -> bool:
    return not isinstance(feature, SequenceFeature) and feature.nullable


def _annotation(feature: Feature) -> Any:
    """The type of one feature's JSON value."""
    if isinstance(feature, SequenceFeature):
        fields = [(f.name, list[_id_type(f.dtype)]) for f in feature.fields]  # type: ignore[misc]
        return msgspec.defstruct(
            feature.name.title(), [*fields, (TIME_FIELD, list[TimeMs])], frozen=True, forbid_unknown_fields=True
        )
    if isinstance(feature, CategoricalFeature):
        return _id_type(feature.dtype)
    return Float32


def _id_type(dtype: str) -> Any:
    return Int64 if dtype == "int" else Text
