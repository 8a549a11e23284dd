"""Arrow messages to training tensors, against one JSON message per event through pydantic to the same tensors."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, create_model

from das.errors import Fatal
from das.examples import JoinedRow, decode_examples, encode_examples, example_batch
from das.messages import Impression, MessageCodec
from das.schema import CategoricalFeature, FeatureSchema, SequenceFeature
from foundation_model.batch import Batch
from foundation_model.features import FeatureEncoder
from services.bench import das_events
from services.bench.document import Row

PASSES = 20
"""Each message is decoded so often in one measurement; JSON once."""


def measure(*, rows: int, repeats: int) -> list[Row]:
    """`examples.decode`, on one thread. Raises Fatal when the two sides' tensors differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases = {
            "": _decode(rows, repeats, 256, sequence=False),
            "1024_rows_per_message_": _decode(rows, repeats, 1024, sequence=False),
            "with_sequence_": _decode(rows, repeats, 256, sequence=True),
            "with_sequence_1024_rows_per_message_": _decode(rows, repeats, 1024, sequence=True),
        }
    finally:
        torch.set_num_threads(threads)
    extra: dict[str, Any] = {"rows_per_message": 256, "clock": "CPU time of one thread"}
    for name, case in cases.items():
        extra[f"{name}columns"] = case.columns
        if name:
            extra |= {f"{name}rows_per_s": case.rate, f"{name}ratio": case.rate / case.base_rate}
    baseline = "JSON per event, pydantic, then the same tensors"
    return [Row("examples.decode", cases[""].rate, "rows/s", baseline, cases[""].base_rate, extra=extra)]


@dataclass(frozen=True, slots=True)
class _Case:
    """Rows per CPU second of both sides."""

    columns: int
    rate: float
    base_rate: float


def _decode(rows: int, repeats: int, batch_rows: int, *, sequence: bool) -> _Case:
    """Messages always hold the sequence; without `sequence` both sides leave its columns out of their fields."""
    schema = das_events.schema(sequence=True)
    names = [f.name for f in schema.features if sequence or not isinstance(f, SequenceFeature)]
    codec, encoder = MessageCodec(schema), FeatureEncoder(schema, names)
    num_rows = max(1, rows // batch_rows) * batch_rows
    starts = range(0, num_rows, batch_rows)
    messages = [
        {**message, "labels": {"click": n % 5 == 0, "buy": None if n % 2 else n % 3 == 0}}
        for n, message in enumerate(das_events.impressions(num_rows, sequence=True))
    ]
    texts = [json.dumps(message).encode() for message in messages]
    joined = [_row(codec, message) for message in messages]
    values = [encode_examples(joined[i : i + batch_rows], schema) for i in starts]
    narrow = MessageCodec(das_events.schema(sequence=sequence))
    model = _model(narrow.schema)
    ours_s, base_s = [], []
    for _ in range(repeats):
        began_s = time.process_time()
        for _ in range(PASSES):
            batches = [encoder.encode(decode_examples(value, schema, encoder.columns)) for value in values]
        ours_s.append((time.process_time() - began_s) / PASSES)
        began_s = time.process_time()
        baseline = [_from_json(model, texts[i : i + batch_rows], narrow, encoder) for i in starts]
        base_s.append(time.process_time() - began_s)
    _same(batches, baseline)
    return _Case(len(encoder.columns), *(num_rows / statistics.median(seconds) for seconds in (ours_s, base_s)))


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


def _same(ours: Sequence[Batch], baseline: Sequence[Batch]) -> None:
    for one, other in zip(ours, baseline, strict=True):
        pairs = [(getattr(one, name), getattr(other, name)) for name in ("cat_BC", "num_BN", "labels_BK", "domain_B")]
        for name, jagged in one.seqs.items():
            pairs += [(getattr(jagged, part), getattr(other.seqs[name], part)) for part in ("ids_TF", "age_s")]
        if not all(torch.equal(a, b) for a, b in pairs):
            raise Fatal("the tensors from Arrow and from JSON differ")
