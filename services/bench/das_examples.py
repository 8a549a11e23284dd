"""Arrow messages to training tensors, against one JSON message per event through pydantic to the same tensors."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, create_model

from das.errors import Fatal
from das.example_poll import PollRows, decode_poll
from das.examples import Compression, ExampleDecoder, JoinedRow, encode_examples, example_batch
from das.messages import Impression, MessageCodec
from das.schema import CategoricalFeature, FeatureSchema, SequenceFeature
from foundation_model.batch import Batch
from foundation_model.features import FeatureEncoder
from foundation_model.online import POLL_MESSAGES
from foundation_model.poll import encode_messages
from services.bench import das_events
from services.bench.document import Row

PASSES = 10
"""Each poll is decoded so often in one measurement; JSON once."""
JSON_ROWS = 1024
"""Rows that the JSON side turns into tensors at once; with fewer and with more it is slower."""


def measure(*, rows: int, repeats: int) -> list[Row]:
    """`examples.decode`, on one thread. Raises Fatal when the two sides' tensors differ."""
    cases: dict[str, dict[str, Any]] = {
        "": {},
        "one_message_per_poll_": {"poll": 1},
        "lz4_": {"compression": "lz4"},
        "1024_rows_per_message_": {"batch_rows": 1024},
        "with_sequence_": {"sequence": True},
        "with_sequence_lz4_": {"sequence": True, "compression": "lz4"},
        "with_sequence_1024_rows_per_message_": {"sequence": True, "batch_rows": 1024},
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {name: _decode(rows, repeats, **changes) for name, changes in cases.items()}
    finally:
        torch.set_num_threads(threads)
    extra: dict[str, Any] = {
        "rows_per_message": 256,
        "messages_per_poll": POLL_MESSAGES,
        "compression": "none",
        "clock": "CPU time of one thread",
    }
    for name, case in found.items():
        extra |= {f"{name}columns": case.columns, f"{name}message_bytes_per_row": case.bytes_per_row}
        if name:
            extra |= {f"{name}rows_per_s": case.rate, f"{name}ratio": case.rate / case.base_rate}
    baseline = "JSON per event, pydantic, then the same tensors"
    return [Row("examples.decode", found[""].rate, "rows/s", baseline, found[""].base_rate, extra=extra)]


@dataclass(frozen=True, slots=True)
class _Case:
    """Rows per CPU second of both sides."""

    columns: int
    bytes_per_row: float
    rate: float
    base_rate: float


def _decode(
    rows: int,
    repeats: int,
    *,
    batch_rows: int = 256,
    poll: int = POLL_MESSAGES,
    compression: Compression = "none",
    sequence: bool = False,
) -> _Case:
    """Messages always hold the sequence; without `sequence` both sides leave its columns out of their fields."""
    schema = das_events.schema(sequence=True)
    names = [f.name for f in schema.features if sequence or not isinstance(f, SequenceFeature)]
    codec, encoder = MessageCodec(schema), FeatureEncoder(schema, names)
    decoder = ExampleDecoder(schema, encoder.columns)
    num_rows = max(1, rows // (batch_rows * poll)) * batch_rows * poll
    messages = [
        {**message, "labels": {"click": n % 5 == 0, "buy": None if n % 2 else n % 3 == 0}}
        for n, message in enumerate(das_events.impressions(num_rows, sequence=True))
    ]
    texts = [json.dumps(message).encode() for message in messages]
    joined = [_row(codec, message) for message in messages]
    starts = range(0, num_rows, batch_rows)
    values = [encode_examples(joined[i : i + batch_rows], schema, compression) for i in starts]
    polls = [values[i : i + poll] for i in range(0, len(values), poll)]
    narrow = MessageCodec(das_events.schema(sequence=sequence))
    model = _model(narrow.schema)
    _same(
        Batch.concat([batch for some in polls for batch in _from_arrow(some, decoder, encoder)]),
        Batch.concat(list(_all_from_json(model, texts, narrow, encoder))),
    )
    del messages, joined
    ours_s, base_s = [], []
    with _only_new_garbage():
        for _ in range(repeats):
            began_s = time.process_time()
            for _ in range(PASSES):
                for some in polls:
                    _from_arrow(some, decoder, encoder)
            ours_s.append((time.process_time() - began_s) / PASSES)
            began_s = time.process_time()
            for _ in _all_from_json(model, texts, narrow, encoder):
                pass
            base_s.append(time.process_time() - began_s)
    rates = (num_rows / statistics.median(seconds) for seconds in (ours_s, base_s))
    return _Case(len(encoder.columns), sum(map(len, values)) / num_rows, *rates)


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """What was prepared is nobody's cost: the collector looks at neither side's input."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _from_arrow(values: Sequence[bytes], decoder: ExampleDecoder, encoder: FeatureEncoder) -> list[Batch]:
    """The messages of one poll, as both training loops decode and encode them."""
    rows = [found for found in decode_poll(values, decoder) if isinstance(found, PollRows)]
    return encode_messages(encoder, rows)


def _all_from_json(
    model: type[BaseModel], texts: Sequence[bytes], codec: MessageCodec, encoder: FeatureEncoder
) -> Iterator[Batch]:
    for i in range(0, len(texts), JSON_ROWS):
        yield _from_json(model, texts[i : i + JSON_ROWS], codec, encoder)


def _row(codec: MessageCodec, message: dict[str, Any]) -> JoinedRow:
    labels = tuple(None if value is None else int(value) for value in message["labels"].values())
    plain = {key: value for key, value in message.items() if key != "labels"}
    return JoinedRow(codec.impression(plain), plain["event_time"] + 1, labels)


def _model(schema: FeatureSchema) -> type[BaseModel]:
    """The same message as a pydantic model."""
    fields: dict[str, Any] = {}
    for feature in schema.features:
        if isinstance(feature, SequenceFeature):
            own: dict[str, Any] = {f.name: (list[int], ...) for f in feature.fields}
            fields[feature.name] = (create_model(feature.name, **own, time_ms=(list[int], ...)), ...)
            continue
        kind: Any = float
        if isinstance(feature, CategoricalFeature):
            kind = int if feature.dtype == "int" else str
        fields[feature.name] = (kind | None, None) if feature.nullable else (kind, ...)
    features = create_model("features", **fields)
    envelope: dict[str, Any] = {"impression_id": (str, ...), "event_time": (int, ...), "domain": (str, ...)}
    return create_model("message", **envelope, features=(features, ...), labels=(dict[str, bool | None], ...))


def _from_json(model: type[BaseModel], texts: Sequence[bytes], codec: MessageCodec, encoder: FeatureEncoder) -> Batch:
    """Each event to a validated object, the objects to columns, the columns through the same encoder."""
    rows = []
    for text in texts:
        message: Any = model.model_validate_json(text)
        features = codec.features_type(**vars(message.features))
        impression = Impression(message.impression_id, message.event_time, message.domain, features)
        labels = tuple(None if value is None else int(value) for value in message.labels.values())
        rows.append(JoinedRow(impression, message.event_time + 1, labels))
    return encoder.encode(example_batch(rows, codec.schema))


def _same(one: Batch, other: Batch) -> None:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("cat_BC", "num_BN", "labels_BK", "domain_B")]
    for name, jagged in one.seqs.items():
        pairs += [(getattr(jagged, part), getattr(other.seqs[name], part)) for part in ("ids_TF", "age_s")]
    if not all(torch.equal(a, b) for a, b in pairs):
        raise Fatal("the tensors from Arrow and from JSON differ")
