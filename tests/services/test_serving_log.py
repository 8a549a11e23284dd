"""Features logged by the replay come from strictly past events: nothing of the future, nothing of the same moment."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_kit import MAPPING, START_MS, mapping, schema

from das.errors import ConfigError
from das.messages import Feedback, Impression, MessageCodec
from das.schema import FeatureSchema
from services.replay.bounded import BoundedTable
from services.replay.config import ServingLogConfig
from services.replay.dataset import DatasetConfig
from services.replay.reader import RowReader
from services.replay.serving_log import Row, ServingLog

KUAIRAND = Path(__file__).parents[2] / "services/demo/kuairand"
OUTCOMES = ["is_click", "long_view", "is_like", "is_profile_enter", "is_comment", "is_follow", "is_forward", "is_hate"]
OUTCOMES += ["play_time_ms", "profile_stay_time", "comment_stay_time"]


@pytest.fixture(scope="module")
def kuairand() -> tuple[FeatureSchema, DatasetConfig, list[Row]]:
    """The bundled stream's schema, mapping and first rows."""
    feature_schema = FeatureSchema.load(KUAIRAND / "schema.yaml")
    dataset = DatasetConfig.load(KUAIRAND / "dataset.yaml", feature_schema)
    assert dataset.data is not None
    return feature_schema, dataset, list(islice(RowReader(dataset.data, dataset, feature_schema).rows(), 3000))


def _logged(feature_schema: FeatureSchema, dataset: DatasetConfig, rows: list[Row]) -> list[bytes]:
    """The JSON of every impression."""
    codec = MessageCodec(feature_schema)
    events = ServingLog(feature_schema, dataset, ServingLogConfig()).events(rows)
    return [codec.encode_impression(event) for event in events if isinstance(event, Impression)]


def _flip(row: Row, source: random.Random) -> Row:
    return row._replace(outcomes=() if row.outcomes else ((0, row.time_ms + 1), (1, row.time_ms + 2)))


def _shift(row: Row, source: random.Random) -> Row:
    return row._replace(outcomes=tuple((k, known + source.randrange(1, 900_000)) for k, known in row.outcomes))


def _shuffle(row: Row, source: random.Random) -> Row:
    return row._replace(outcomes=tuple((k, row.time_ms + 5) for k in (0, 1) if source.random() < 0.5))


@pytest.mark.parametrize("change", [_flip, _shift, _shuffle])
def test_outcomes_of_later_rows_never_move_earlier_features(
    kuairand: tuple[FeatureSchema, DatasetConfig, list[Row]], change: Callable[[Row, random.Random], Row]
) -> None:
    feature_schema, dataset, rows = kuairand
    before = _logged(feature_schema, dataset, rows)
    source = random.Random(3)
    for cut in (0, 700, 1500, 2990):
        changed = rows[:cut] + [change(row, source) for row in rows[cut:]]
        after = _logged(feature_schema, dataset, changed)
        assert after[: cut + 1] == before[: cut + 1]
        assert cut > 2900 or after != before


def test_an_outcome_moves_only_features_after_it_was_known(
    kuairand: tuple[FeatureSchema, DatasetConfig, list[Row]],
) -> None:
    feature_schema, dataset, rows = kuairand
    before = _logged(feature_schema, dataset, rows)
    moved_any = 0
    for place in (5, 400, 1200):
        known_ms = rows[place].time_ms + 60_000
        for outcomes in ((), ((0, known_ms),), ((1, known_ms),), ((0, known_ms), (1, known_ms))):
            changed = [*rows[:place], rows[place]._replace(outcomes=outcomes), *rows[place + 1 :]]
            after = _logged(feature_schema, dataset, changed)
            first_ms = min([known for _, known in (*rows[place].outcomes, *outcomes)], default=math.inf)
            moved = [row.time_ms for row, old, new in zip(rows, before, after, strict=True) if old != new]
            assert all(time_ms > first_ms for time_ms in moved)
            moved_any += len(moved)
    assert moved_any > 100


def test_no_feature_reads_an_outcome_column(kuairand: tuple[FeatureSchema, DatasetConfig, list[Row]]) -> None:
    feature_schema, dataset, _ = kuairand
    assert dataset.forbidden_columns == set(OUTCOMES)
    assert not set(dataset.feature_columns(feature_schema).values()) & set(OUTCOMES)
    assert not {f.name for f in feature_schema.features} & set(OUTCOMES)


@pytest.mark.parametrize("column", ["clicked", "wait", "refunded"])
def test_a_mapping_that_leaks_is_refused(tmp_path: Path, column: str) -> None:
    with pytest.raises(ConfigError, match=f"'price' reads column '{column}', which is known only after"):
        mapping(tmp_path, features={**MAPPING["features"], "price": column})


# the same features by definition: for each row, look at every event that was known before it


def _by_definition(rows: list[Row], row: Row) -> dict[str, Any]:
    past = [(r.time_ms, 0, 0, r) for r in rows] + [(ms, 1 + k, 0, r) for r in rows for k, ms in r.outcomes]
    order = {id(r): n for n, r in enumerate(rows)}
    past = sorted((ms, order[id(r)], event, r) for ms, event, _, r in past if ms < row.time_ms)  # type: ignore[misc]
    user, item, _, size, _ = row.values

    def count(event: int, match: Callable[[Row], bool] = lambda r: True) -> int:
        return sum(e == event and match(r) for _, _, e, r in past)

    def rate(event: int, prior: float, levels: list[Callable[[Row], bool]]) -> float:
        value = (count(event) + 0.5) / (count(0) + 1)
        for match in levels:
            value = (count(event, match) + prior * value) / (count(0, match) + prior)
        return value

    def same_user(r: Row) -> bool:
        return bool(r.values[0] == user)

    def same_domain(r: Row) -> bool:
        return r.domain == row.domain

    odds = rate(2, 2.0, [same_domain, lambda r: same_user(r) and same_domain(r)])
    buys = [(ms, r) for ms, _, e, r in past if e == 2 and same_user(r)]
    seen = [(ms, r) for ms, _, e, r in past if e == 0 and same_user(r)][-2:]
    return {
        "item_shown": count(0, lambda r: r.values[1] == item),
        "user_size_clicks": count(1, lambda r: same_user(r) and r.values[3] == size),
        "item_click_rate": rate(1, 3.0, [lambda r: r.values[1] == item]),
        "user_a_buy_odds": math.log(odds / (1 - odds)),
        "user_last_buy_s": (row.time_ms - buys[-1][0]) / 1000 if buys else None,
        "seen": ([r.values[1] for _, r in seen], [ms for ms, _ in seen]),
        "bought": tuple(zip(*[(r.values[2], r.values[1], ms) for ms, r in buys[-3:]], strict=True)),
    }


DELAY = st.none() | st.integers(0, 4)
ROW = st.tuples(
    st.integers(0, 2),
    st.integers(0, 1),
    st.integers(0, 2),
    st.sampled_from("xy"),
    st.none() | st.just(4),
    st.sampled_from("ab"),
    DELAY,
    DELAY,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, max_size=14))
def test_features_equal_their_definition(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[Any, ...]]
) -> None:
    """Times are 0 to 2 ms apart and outcomes 0 to 4 ms late, so that ties of every kind occur."""
    dataset = mapping(tmp_path_factory.mktemp("log"))
    rows, now = [], START_MS
    for number, (gap, user, item, tag, size, domain, *delays) in enumerate(drawn):
        now += gap
        outcomes = tuple((k, now + delay) for k, delay in enumerate(delays) if delay is not None)
        rows.append(Row(f"r{number}", now, domain, (user, item, tag, size, 1.0), outcomes))
    events = list(ServingLog(schema(), dataset, ServingLogConfig()).events(rows))
    impressions = [event for event in events if isinstance(event, Impression)]
    assert [i.impression_id for i in impressions] == [r.impression_id for r in rows]
    for row, logged in zip(rows, impressions, strict=True):
        features, expected = logged.features, _by_definition(rows, row)
        for name in ("item_shown", "user_size_clicks", "item_click_rate", "user_a_buy_odds", "user_last_buy_s"):
            assert getattr(features, name) == pytest.approx(expected[name], abs=1e-9), name
        assert (features.seen.item, features.seen.time_ms) == expected["seen"]
        bought = (features.bought.tag, features.bought.item, features.bought.time_ms)
        assert bought == tuple(map(list, expected["bought"] or ((), (), ())))
    sent = [(e.event_time, e.impression_id, e.objective) for e in events if isinstance(e, Feedback)]
    names = ("click", "buy")
    assert sorted(sent) == sorted((ms, r.impression_id, names[k]) for r in rows for k, ms in r.outcomes)
    assert [e.event_time for e in events] == sorted(e.event_time for e in events)


def test_rows_of_one_millisecond_see_nothing_of_each_other(tmp_path: Path) -> None:
    values = (1, 2, "x", None, 0.5)
    same = [Row(f"r{n}", START_MS, "a", values, ((0, START_MS), (1, START_MS))) for n in range(3)]
    rows = [*same, Row("later", START_MS + 1, "a", values, ())]
    log = ServingLog(schema(), mapping(tmp_path), ServingLogConfig())
    shown = [e.features for e in log.events(rows) if isinstance(e, Impression)]
    assert [(f.item_shown, f.user_size_clicks, f.seen.item) for f in shown[:3]] == [(0.0, 0.0, [])] * 3
    assert (shown[3].item_shown, shown[3].user_size_clicks, shown[3].seen.item) == (3.0, 3.0, [2, 2])


def test_every_logged_impression_passes_the_contract(kuairand: tuple[FeatureSchema, DatasetConfig, list[Row]]) -> None:
    feature_schema, dataset, rows = kuairand
    codec = MessageCodec(feature_schema)
    for value in _logged(feature_schema, dataset, rows):
        codec.decode_impression(value)


def test_memory_is_bounded_and_used_keys_are_kept() -> None:
    table: BoundedTable[list[int]] = BoundedTable(10, lambda: [0])
    for number in range(1000):
        table.get("hot")[0] += 1
        table.get(number)[0] += 1
        assert len(table) <= 10
    assert table.get("hot") == [1000]
    assert table.get(0) == [0]


def test_forgotten_keys_keep_rates_between_0_and_1(tmp_path: Path) -> None:
    """An outcome can outlive the impression count it belongs to."""
    rows = [
        Row(f"r{n}", START_MS + n, "a", (n % 7, n % 5, f"t{n % 9}", n % 3, 1.0), ((0, START_MS + n + 30),))
        for n in range(500)
    ]
    log = ServingLog(schema(), mapping(tmp_path), ServingLogConfig(max_users=2, max_keys=4))
    rates = [e.features.item_click_rate for e in log.events(rows) if isinstance(e, Impression)]
    assert all(0 < rate < 1 for rate in rates)


def test_outcomes_that_are_never_known_are_refused(tmp_path: Path) -> None:
    rows = [Row(f"r{n}", START_MS + n, "a", (1, 2, "x", 3, 1.0), ((0, START_MS * 2),)) for n in range(60)]
    log = ServingLog(schema(), mapping(tmp_path), ServingLogConfig(max_pending=50))
    with pytest.raises(ConfigError, match=r"check the unit of the delay column"):
        list(log.events(rows))
