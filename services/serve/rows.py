"""The rows of a `/v1/score` request: parsed and checked by the codec of the `impressions` topic."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import msgspec

from das.errors import Poison
from das.messages import MAX_ID_CHARS, Impression, MessageCodec, TimeMs
from services.serve.gate import Refused

EXAMPLE_TIME_MS = 1_650_812_741_436
ID_LENGTH = msgspec.Meta(min_length=1, max_length=MAX_ID_CHARS)


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    rows: list[dict[str, Any]]


class RowParser:
    """JSON to impressions for one feature schema; a row may leave out its `event_time` (now) and `impression_id`."""

    def __init__(self, codec: MessageCodec, max_rows: int) -> None:
        self.codec = codec
        self._max_rows = max_rows
        self._decoder = msgspec.json.Decoder(_Body)

    def parse(self, body: bytes) -> list[Impression]:
        """The impressions of a request body. Raises Refused 422 naming row and field, 413 over the row limit."""
        try:
            rows = self._decoder.decode(body)
        except (ValueError, RecursionError) as error:
            raise Refused(422, f"body: {error}") from None
        return self.check(rows.rows)

    def check(self, rows: list[dict[str, Any]]) -> list[Impression]:
        """The same from parsed rows. Raises Refused."""
        self.check_count(len(rows))
        now_ms = time.time_ns() // 1_000_000
        return [self._impression(index, row, now_ms) for index, row in enumerate(rows)]

    def check_count(self, num_rows: int) -> None:
        """Raises Refused for no rows (422) or too many (413)."""
        if num_rows == 0:
            raise Refused(422, "rows: send at least one row")
        if num_rows > self._max_rows:
            raise Refused(413, f"rows: {num_rows} rows, the limit is {self._max_rows}; send fewer rows a request")

    def _impression(self, index: int, row: dict[str, Any], now_ms: int) -> Impression:
        try:
            return self.codec.impression({"impression_id": f"row-{index}", "event_time": now_ms, **row})
        except Poison as poison:
            raise Refused(422, f"rows[{index}]: {poison.detail}") from None


def body_type(codec: MessageCodec) -> type[msgspec.Struct]:
    """The type of a `/v1/score` body, made from the codec's own types; its JSON schema is in the OpenAPI document."""
    features = next(f.type for f in msgspec.structs.fields(codec.impression_type) if f.name == "features")
    row = msgspec.defstruct(
        "Row",
        [
            ("domain", Literal[codec.schema.domains]),
            ("features", features),
            ("event_time", TimeMs | msgspec.UnsetType, msgspec.UNSET),
            ("impression_id", Annotated[str, ID_LENGTH] | msgspec.UnsetType, msgspec.UNSET),
        ],
        module=__name__,
        forbid_unknown_fields=True,
    )
    rows = list[row]  # type: ignore[valid-type]
    return msgspec.defstruct("ScoreRequest", [("rows", rows)], module=__name__, forbid_unknown_fields=True)


def example_row(codec: MessageCodec) -> dict[str, Any]:
    """A small valid row of the schema, for the OpenAPI document."""
    schema = codec.schema
    features: dict[str, Any] = {f.name: 712 if f.dtype == "int" else "a" for f in schema.categorical}
    features |= {f.name: 1.5 for f in schema.numeric}
    for sequence in schema.sequences:
        ids = {f.name: [7, 9] if f.dtype == "int" else ["a", "b"] for f in sequence.fields}
        features[sequence.name] = {**ids, "time_ms": [EXAMPLE_TIME_MS - 60_000, EXAMPLE_TIME_MS - 1_000]}
        if sequence.max_length < 2:
            features[sequence.name] = {name: values[:1] for name, values in features[sequence.name].items()}
    return {"domain": schema.domains[0], "event_time": EXAMPLE_TIME_MS, "features": features}
