"""The replay reads a user's own Parquet, CSV or JSON lines, and names the fix when it cannot."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from replay_kit import MAPPING, SCHEMA, START_MS, mapping, record, schema, write_jsonl, write_mapping

from das.errors import ConfigError
from services.replay.dataset import DatasetConfig
from services.replay.reader import RowReader
from services.replay.serving_log import Row

RECORDS = [record(n) for n in range(30)]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        write_jsonl(path, rows)
    return path


def _rows(tmp_path: Path, rows: list[dict[str, Any]], name: str = "t.jsonl", **changes: Any) -> list[Row]:
    path = _write(tmp_path / name, rows)
    return list(RowReader(path, mapping(tmp_path, **changes), schema()).rows())


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl", "t.ndjson"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = _rows(tmp_path, RECORDS, name)
    assert len(rows) == 30
    assert rows[1] == Row("s-1", START_MS + 10, "b", (1, 1, "t1", 1, 0.25), ((0, START_MS + 12),))
    assert rows[5] == Row("s-5", START_MS + 50, "b", (2, 1, "t1", None, 1.25), ((0, START_MS + 52), (1, START_MS + 65)))
    assert [type(value) for value in rows[5].values] == [int, int, str, type(None), float]


def test_numbers_of_any_type_are_read_as_the_schema_says(tmp_path: Path) -> None:
    """pandas writes integer columns with gaps as doubles, and flags as booleans."""
    odd = [
        {**r, "user": float(r["user"]), "clicked": bool(r["clicked"]), "wait": 1, "tag": 39, "page": "a"}
        for r in RECORDS
    ]
    rows = _rows(tmp_path, odd, "t.parquet")
    assert rows[5].values == (2, 1, "39", None, 1.25)
    assert rows[5].outcomes == ((0, START_MS + 52), (1, START_MS + 1050))


@pytest.mark.parametrize(
    ("unit", "convert"),
    [
        ("s", lambda ms: ms / 1000),
        ("us", lambda ms: ms * 1000),
        ("ns", lambda ms: ms * 1_000_000),
        ("iso", lambda ms: datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).isoformat()),
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_time_units(tmp_path: Path, unit: str, convert: Callable[[int], Any], name: str) -> None:
    rows = _rows(tmp_path, [{**r, "at": convert(r["at"])} for r in RECORDS], name, time={"column": "at", "unit": unit})
    assert [r.time_ms for r in rows] == [r["at"] for r in RECORDS]


def test_date_columns_are_times(tmp_path: Path) -> None:
    days = [{**r, "at": datetime.datetime(2022, 4, 1 + n // 3)} for n, r in enumerate(RECORDS)]
    rows = _rows(tmp_path, days, "t.parquet", time={"column": "at", "unit": "iso"})
    assert rows[3].time_ms == int(datetime.datetime(2022, 4, 2, tzinfo=datetime.UTC).timestamp() * 1000)


def test_row_number_is_the_id_and_one_domain_needs_no_column(tmp_path: Path) -> None:
    data = {k: v for k, v in MAPPING.items() if k not in ("id", "domain")}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(data))
    one = schema(domains=["only"])
    dataset = DatasetConfig.load(tmp_path / "m.yaml", one)
    rows = list(RowReader(_write(tmp_path / "t.jsonl", RECORDS), dataset, one).rows())
    assert [(r.impression_id, r.domain) for r in rows[:2]] == [("0", "only"), ("1", "only")]


def test_an_outcome_may_carry_its_own_time(tmp_path: Path) -> None:
    dated = [{**r, "done_at": (r["at"] + 77) / 1000} for r in RECORDS]
    outcomes = {**MAPPING["outcomes"], "buy": {"column": "clicked", "known_at": {"column": "done_at", "unit": "s"}}}
    assert _rows(tmp_path, dated, outcomes=outcomes)[1].outcomes == ((0, START_MS + 12), (1, START_MS + 87))


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_outcomes_may_be_true_and_false(tmp_path: Path, name: str) -> None:
    said = [{**r, "clicked": bool(r["clicked"])} for r in RECORDS]
    assert _rows(tmp_path, said, name) == _rows(tmp_path, RECORDS, name)
    spelt = [{**r, "clicked": "True" if r["clicked"] else "FALSE"} for r in RECORDS]
    assert _rows(tmp_path, spelt, name) == _rows(tmp_path, RECORDS, name)


def test_batches_keep_their_order_and_row_numbers(tmp_path: Path) -> None:
    many = [record(n) for n in range(9000)]
    for name in ("t.parquet", "t.csv", "t.jsonl"):
        rows = _rows(tmp_path, many, name, id={"prefix": "n"})
        assert [r.impression_id for r in rows] == [f"n{n}" for n in range(9000)]


BAD_TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "gap in a required column": ("row 7: column 'price' is empty; set nullable: true for 'price'", {"price": None}),
    "text for a number": ("row 7: column 'price' does not read as double: 'cheap'", {"price": "cheap"}),
    "fraction for an id": ("row 7: column 'item_id' does not read as int64: '?1.5", {"item_id": 1.5}),
    "infinite": ("row 7: column 'price' is infinite; clip it", {"price": float("inf")}),
    "unknown domain": (r"row 7: column 'page' has \['c'\], not in the schema; add to its domains", {"page": "c"}),
    "no time": ("row 7: column 'at' is empty; every row needs a time", {"at": None}),
    "no id": ("row 7: column 'id' is empty; every impression needs an id", {"id": None}),
    "back in time": ("row 7: column 'at' goes back in time; sort the table", {"at": 5}),
    "outcome before": ("row 7: column 'clicked' is known before its impression; check outcomes.click.delay", {"w": -1}),
}


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_name_the_row_and_the_fix(tmp_path: Path, case: str, name: str) -> None:
    message, change = BAD_TABLES[case]
    rows: list[dict[str, Any]] = [{**r, "w": 1} for r in RECORDS]
    if isinstance(next(iter(change.values())), str):
        rows = [{**r, **{k: str(r[k]) for k in change}} for r in rows]
    rows[7] = {**rows[7], **change}
    outcomes = {**MAPPING["outcomes"], "click": {"column": "clicked", "delay": {"seconds": 0, "column": "w"}}}
    with pytest.raises(ConfigError, match=message):
        _rows(tmp_path, rows, name, outcomes=outcomes)


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_an_absent_column_is_named_with_those_there(tmp_path: Path, name: str) -> None:
    rows = [{k: v for k, v in r.items() if k != "price"} for r in RECORDS]
    with pytest.raises(ConfigError, match=r"no column \['price'\]; name the right one .* the table has id, at"):
        _rows(tmp_path, rows, name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", '{"id": 1\n', "line 1: not a JSON object"),
        ("t.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("t.csv", "id,at\n1,2,3\n", "not readable as csv|no column"),
        ("t.parquet", "PAR?", "not readable as parquet"),
        ("t.txt", "x", "unknown suffix; set format to parquet, csv or jsonl"),
        ("t.csv", None, "no such file; set data in the dataset mapping or replay.data"),
    ],
)
def test_unreadable_files_name_the_fix(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        list(RowReader(path, mapping(tmp_path), schema()).rows())


def _counter(**changes: Any) -> list[dict[str, Any]]:
    return [{**MAPPING["counters"][0], **changes}, *MAPPING["counters"][1:]]


BAD_MAPPINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "misspelt key": ("did you mean 'counters'", {"conters": []}),
    "no such objective": ("need exactly the schema's objectives", {"outcomes": {"click": {"column": "clicked"}}}),
    "no domain": ("domain: name the column", {"domain": None}),
    "no user": ("user: name the categorical feature that owns the histories", {"user": None}),
    "feature of nothing": (
        "features.pice: not a feature read from the table",
        {"features": {"item": "item_id", "pice": "x"}},
    ),
    "counter of nothing": ("add a numeric feature 'x' to the schema", {"counters": _counter(name="x")}),
    "counter of no event": ("counts event 'like', which is no objective", {"counters": _counter(event="like")}),
    "counter by no feature": (
        r"has keys \['shop'\]; known: domain, item, size, tag, user",
        {"counters": _counter(keys=["shop"])},
    ),
    "age not nullable": ("set nullable: true in the schema", {"counters": _counter(kind="age")}),
    "rate of impressions": ("always 1; set event to an objective", {"counters": _counter(kind="rate")}),
    "smoothed count": ("toward smooths rates; remove it", {"counters": _counter(toward=["item"])}),
    "smoothed elsewhere": (
        "toward must be among the counter's keys",
        {"counters": _counter(kind="rate", event="click", toward=["user"])},
    ),
}


@pytest.mark.parametrize("case", BAD_MAPPINGS)
def test_bad_mappings_name_the_field_and_the_fix(tmp_path: Path, case: str) -> None:
    message, change = BAD_MAPPINGS[case]
    with pytest.raises(ConfigError, match=message):
        DatasetConfig.load(write_mapping(tmp_path, **change), schema())


def test_histories_need_their_fields_as_features(tmp_path: Path) -> None:
    seen = {"kind": "sequence", "name": "seen", "event": "view", "fields": [{"name": "shop"}]}
    features = [f if f["name"] != "seen" else seen for f in SCHEMA["features"]]
    with pytest.raises(ConfigError) as caught:
        DatasetConfig.load(write_mapping(tmp_path), schema(features=features))
    assert "'seen' is of event 'view'; known: impression, click, buy" in str(caught.value)
    assert "'seen.shop' needs a categorical feature 'shop'" in str(caught.value)


def test_histories_cannot_hold_nulls(tmp_path: Path) -> None:
    sized = {**SCHEMA["features"][5], "fields": [{"name": "size"}]}
    features = [f if f["name"] != "seen" else sized for f in SCHEMA["features"]]
    with pytest.raises(ConfigError, match=r"'seen.size' cannot hold nulls, but 'size' is nullable; drop it"):
        DatasetConfig.load(write_mapping(tmp_path), schema(features=features))
