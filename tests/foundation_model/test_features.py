"""Encoding: every value lands where the documentation says, whichever way the rows are cut."""

from __future__ import annotations

import math
import time
from dataclasses import fields, replace

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from teacher_case import SCHEMA, START_MS, rows

from das.errors import ConfigError, Poison
from das.examples import JoinedRow, decode_examples, encode_examples, example_batch
from das.messages import MessageCodec
from das.schema import FeatureSchema
from foundation_model.batch import Batch
from foundation_model.features import NUMERIC_LIMIT, FeatureEncoder, TablesConfig

TABLES = TablesConfig(default_buckets=64, buckets={"item_id": 200})
MASK = 2**64 - 1


def _splitmix64(value: int) -> int:
    x = (value + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _local(table: str, value: int | str | None, buckets: int) -> int:
    if value is None:
        return 0
    if isinstance(value, str):
        value = xxhash.xxh64_intdigest(value.encode())
    return _splitmix64((value & MASK) ^ xxhash.xxh64_intdigest(table.encode())) % (buckets - 1) + 1


def _same(a: Batch, b: Batch) -> None:
    for field in fields(Batch):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "seqs":
            assert x.keys() == y.keys()
            for name in x:
                for part in ("ids_TF", "offsets", "age_s"):
                    assert torch.equal(getattr(x[name], part), getattr(y[name], part)), (name, part)
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, y), field.name
        else:
            np.testing.assert_array_equal(x, y, field.name)


def _batch(joined: list[JoinedRow], encoder: FeatureEncoder) -> pa.RecordBatch:
    return decode_examples(encode_examples(joined, encoder.schema), encoder.schema, encoder.columns)


def test_every_value_lands_where_documented() -> None:
    encoder, joined = FeatureEncoder(SCHEMA, tables=TABLES), rows(200)
    batch, spec = encoder.encode(_batch(joined, encoder)), encoder.spec
    assert spec.tables.names == ("user_id", "item_id", "tag")
    assert spec.tables.offsets == (0, 64, 264)
    assert spec.tables.total == 328
    assert spec.numeric == ("duration_ms", "score", "score.missing")
    start = 0
    for b, row in enumerate(joined):
        f = row.impression.features
        assert batch.cat_BC[b].tolist() == [
            _local("user_id", f.user_id, 64),
            64 + _local("item_id", f.item, 200),
            264 + _local("tag", f.tag, 64),
        ]
        score = (0.0, 1.0) if f.score is None else ((f.score - 5) / 2, 0.0)
        assert batch.num_BN[b].tolist() == pytest.approx([math.log1p(f.duration_ms), *score], rel=1e-5, abs=1e-6)
        clicks, sequence = f.clicks, batch.seqs["clicks"]
        stop = start + len(clicks.time_ms)
        assert sequence.offsets[b : b + 2].tolist() == [start, stop]
        assert sequence.ids_TF[start:stop].tolist() == [
            [64 + _local("item_id", item, 200), 264 + _local("tag", tag, 64)]
            for item, tag in zip(clicks.item, clicks.tag, strict=True)
        ]
        ages = [(row.impression.event_time - t) / 1000 for t in clicks.time_ms]
        assert sequence.age_s[start:stop].tolist() == pytest.approx(ages)
        start = stop
        assert batch.label_mask_BK[b].tolist() == [label is not None for label in row.labels]
        assert batch.labels_BK[b].tolist() == [float(label or 0) for label in row.labels]
        assert SCHEMA.domains[batch.domain_B[b]] == row.impression.domain
        assert batch.event_time_ms_B[b] == row.impression.event_time
        assert batch.ingest_time_ms_B[b] == row.ingest_time_ms
    assert batch.seqs["clicks"].offsets.dtype == torch.int32
    assert sum(row.impression.features.tag is None for row in joined) > 10


@pytest.mark.parametrize(
    "cut",
    [
        slice(5, 40),
        slice(0, 0),
        slice(3, 50, 2),
        np.array([7, 3, 3, 49]),
        np.arange(50) % 3 == 1,
        np.array([], np.int64),
    ],
)
def test_a_selection_equals_encoding_those_rows_alone(cut: slice | np.ndarray) -> None:
    encoder, joined = FeatureEncoder(SCHEMA, tables=TABLES), rows(50)
    batch = _batch(joined, encoder)
    indices = np.arange(50)[cut]
    alone = example_batch([joined[i] for i in indices], SCHEMA).select(encoder.columns)
    _same(encoder.encode(batch, cut), encoder.encode(alone))
    whole = encoder.encode(batch)
    if isinstance(cut, slice) and cut.step is None:
        _same(whole.slice(cut.start, cut.stop), encoder.encode(alone))


def test_concat_of_slices_is_the_whole() -> None:
    encoder = FeatureEncoder(SCHEMA, tables=TABLES)
    whole = encoder.encode(_batch(rows(50), encoder))
    _same(Batch.concat([whole.slice(0, 7), whole.slice(7, 7), whole.slice(7, 31), whole.slice(31, 50)]), whole)


def test_labels_do_not_move_features() -> None:
    encoder, joined = FeatureEncoder(SCHEMA, tables=TABLES), rows(50)
    flipped = [JoinedRow(r.impression, r.ingest_time_ms, (1 - (r.labels[0] or 0), None)) for r in joined]
    one, other = encoder.encode(_batch(joined, encoder)), encoder.encode(_batch(flipped, encoder))
    assert not torch.equal(one.labels_BK, other.labels_BK)
    _same(replace(one, labels_BK=other.labels_BK, label_mask_BK=other.label_mask_BK), other)


def test_a_subset_reads_and_encodes_only_what_it_names() -> None:
    encoder = FeatureEncoder(SCHEMA, ("tag", "score"), TABLES, ("like",))
    assert encoder.columns == ("event_time", "ingest_time", "domain", "tag", "score", "like")
    assert encoder.spec.tables.names == ("tag",)
    batch = encoder.encode(_batch(rows(20), encoder))
    assert (batch.cat_BC.shape, batch.num_BN.shape, batch.labels_BK.shape) == ((20, 1), (20, 2), (20, 1))
    assert batch.seqs == {}
    numbers = FeatureEncoder(SCHEMA, ("score",), TABLES)
    assert numbers.encode(_batch(rows(20), numbers)).cat_BC.shape == (20, 0)


def test_hostile_numbers_stay_finite_and_clock_skew_has_no_negative_age() -> None:
    encoder, row = FeatureEncoder(SCHEMA, tables=TABLES), rows(1)[0]
    features, change = row.impression.features, msgspec.structs.replace
    skewed = change(features.clicks, item=[1], tag=["t"], time_ms=[START_MS + 3_600_000])
    features = change(features, duration_ms=-1e30, score=3e38, clicks=skewed)
    batch = encoder.encode(_batch([change(row, impression=change(row.impression, features=features))], encoder))
    assert batch.num_BN[0].tolist() == [0.0, NUMERIC_LIMIT, 0.0]
    assert batch.seqs["clicks"].age_s.tolist() == [0.0]


def test_fields_of_unequal_length_are_poison() -> None:
    encoder = FeatureEncoder(SCHEMA, tables=TABLES)
    batch = example_batch(rows(2), SCHEMA)
    where = batch.schema.get_field_index("clicks.item")
    longer = pa.array([[1, 2, 3], [4] * 7], batch.schema.field(where).type)
    with pytest.raises(Poison, match=r"clicks\.item"):
        encoder.encode(batch.set_column(where, batch.schema.field(where), longer))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": ("nope",)}, "nope"),
        ({"objectives": ("buy",)}, "buy.*known: click, like"),
        ({"tables": TablesConfig(buckets={"item": 10})}, "item.*known: item_id, tag, user_id"),
        ({"tables": TablesConfig(buckets={"tag": 1})}, r"tables\.buckets\.tag"),
    ],
)
def test_unknown_names_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureEncoder(SCHEMA, **arguments)


def test_encoding_is_fast() -> None:
    """200k rows/s on an idle core; a quarter of it must hold on a busy one."""
    features = [{"kind": "categorical", "name": f"c{i}", "dtype": "string" if i < 10 else "int"} for i in range(35)]
    features += [{"kind": "numeric", "name": f"n{i}", "transform": "log1p", "nullable": i % 4 == 0} for i in range(30)]
    for name in ("clicks", "views"):
        items = [{"name": "item"}, {"name": "author"}, {"name": "label", "dtype": "string"}]
        features.append({"kind": "sequence", "name": name, "event": name, "fields": items})
    wide = FeatureSchema.parse(
        {"name": "wide", "domains": ["0"], "objectives": [{"name": "click", "window_s": 1}], "features": features}
    )
    encoder = FeatureEncoder(wide)
    joined = [_wide_row(wide, i) for i in range(256)]
    batch = _batch(joined, encoder)
    best_s = math.inf
    for _ in range(20):
        began_s = time.perf_counter()
        encoder.encode(batch)
        best_s = min(best_s, time.perf_counter() - began_s)
    assert 256 / best_s > 50_000


def _wide_row(schema: FeatureSchema, i: int) -> JoinedRow:
    values: dict[str, object] = {f"c{j}": f"w{(i * j) % 20}" if j < 10 else i * j for j in range(35)}
    values |= {f"n{j}": float(i + j) for j in range(30)}
    past = {"item": [i] * 4, "author": [i] * 4, "label": ["a"] * 4, "time_ms": [1] * 4}
    values |= {"clicks": past, "views": past}
    value = {"impression_id": f"i{i}", "event_time": 1000, "domain": "0", "features": values}
    return JoinedRow(MessageCodec(schema).impression(value), i, (1,))
