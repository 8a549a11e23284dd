"""Zipper's assignment and the heads that follow from it."""

from __future__ import annotations

from collections import Counter

import pytest
from pydantic import ValidationError

from das.schema import FeatureSchema
from das.zipper import ZipperConfig

HOUR = 3600.0


def _zipper(*windows: tuple[float, float], salt: str = "s") -> dict[str, object]:
    return {"salt": salt, "windows": [{"window_s": w, "share": p} for w, p in windows]}


def _schema(zipper: dict[str, object] | None) -> FeatureSchema:
    return FeatureSchema.model_validate(
        {
            "name": "t",
            "domains": ["a"],
            "objectives": [
                {"name": "click", "window_s": HOUR},
                {"name": "booking", "window_s": 24 * HOUR},
                {"name": "visit", "window_s": 12 * HOUR},
            ],
            "features": [{"kind": "numeric", "name": "x"}],
            "zipper": zipper,
        }
    )


def test_each_window_gets_its_share_of_the_ids_and_always_the_same_ones() -> None:
    zipper = ZipperConfig.model_validate(_zipper((HOUR, 0.5), (6 * HOUR, 0.3), (24 * HOUR, 0.2)))
    assigned = [zipper.assign(f"id-{i}") for i in range(20_000)]
    counts = Counter(assigned)
    for window, share in enumerate((0.5, 0.3, 0.2)):
        assert abs(counts[window] / 20_000 - share) < 0.015
    assert assigned == [zipper.assign(f"id-{i}") for i in range(20_000)]


def test_another_salt_assigns_independently() -> None:
    one = ZipperConfig.model_validate(_zipper((HOUR, 0.5), (6 * HOUR, 0.5), salt="one"))
    two = ZipperConfig.model_validate(_zipper((HOUR, 0.5), (6 * HOUR, 0.5), salt="two"))
    same = sum(one.assign(f"{i}") == two.assign(f"{i}") for i in range(10_000))
    assert abs(same / 10_000 - 0.5) < 0.03


def test_without_zipper_the_heads_are_the_objectives() -> None:
    schema = _schema(None)
    assert [h.name for h in schema.heads] == ["click", "booking", "visit"]
    assert all(h.served and h.share == 1.0 for h in schema.heads)
    assert schema.windows_ms == (24 * 3_600_000,)
    assert schema.head_table() == ((0,), (1,), (2,))


def test_an_objective_has_one_head_for_each_window_it_can_be_cut_off_at() -> None:
    schema = _schema(_zipper((HOUR, 0.5), (6 * HOUR, 0.3), (24 * HOUR, 0.2)))
    hour = 3_600_000
    assert [(h.objective, h.window_ms // hour, round(h.share, 9), h.served) for h in schema.heads] == [
        (0, 1, 1.0, True),
        *((1, 1, 0.5, False), (1, 6, 0.3, False), (1, 24, 0.2, True)),
        *((2, 1, 0.5, False), (2, 6, 0.3, False), (2, 12, 0.2, True)),
    ]
    assert schema.head_table() == ((0, 0, 0), (1, 2, 3), (4, 5, 6))


def test_windows_that_miss_the_longest_objective_are_refused() -> None:
    with pytest.raises(ValidationError, match="make them equal"):
        _schema(_zipper((HOUR, 0.5), (6 * HOUR, 0.5)))


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (((6 * HOUR, 0.5), (HOUR, 0.5)), "ascend"),
        (((HOUR, 0.5), (24 * HOUR, 0.4)), "sum to 0.9"),
        (((24 * HOUR, 0.5),), "at least 2"),
    ],
)
def test_windows_out_of_order_or_shares_that_do_not_sum_are_refused(
    windows: tuple[tuple[float, float], ...], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        ZipperConfig.model_validate(_zipper(*windows))


def test_a_schema_without_zipper_keeps_the_fingerprint_it_had_before_there_was_one() -> None:
    assert _schema(None).fingerprint == 16574540487945624613
    assert _schema(_zipper((HOUR, 0.5), (24 * HOUR, 0.5))).fingerprint != 16574540487945624613
