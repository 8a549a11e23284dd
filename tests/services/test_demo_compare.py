"""The paired difference: right on a worked example, honest about chance, and only between the same rows."""

from __future__ import annotations

import math
import random

import pytest

from services.demo.compare import paired_ne_difference, student_t
from services.demo.plot import moving_ne


def test_known_ratio_and_interval() -> None:
    base = [(1000, 400, 100.0), (1000, 400, 200.0), (1000, 400, 300.0)]
    other = [(1000, 400, 99.0), (1000, 400, 197.0), (1000, 400, 298.0)]
    difference = paired_ne_difference(base, other)
    assert difference is not None
    assert difference.percent == pytest.approx(-1.0)
    # residuals 0, -1, 1: se = sqrt(2 * 3 / 2) / 600; t(2 df) = 4.303
    assert difference.high - difference.percent == pytest.approx(100 * 4.3027 * math.sqrt(3) / 600, rel=1e-3)
    assert "not significant" in str(difference)


def test_interval_covers_the_truth_about_95_percent_of_the_time() -> None:
    chance = random.Random(7)
    covered = 0
    for _ in range(1000):
        base = [(1000, 400, 600 + chance.gauss(0, 20)) for _ in range(15)]
        other = [(1000, 400, block[2] * 0.998 + chance.gauss(0, 2)) for block in base]
        difference = paired_ne_difference(base, other)
        assert difference is not None
        covered += difference.low <= -0.2 <= difference.high
    assert 925 <= covered <= 975


def test_equal_arms_are_not_significant_and_better_ones_are() -> None:
    base = [(1000, 400, 600.0 + i) for i in range(10)]
    same = paired_ne_difference(base, base)
    better = paired_ne_difference(base, [(r, p, loss * 0.99) for r, p, loss in base])
    assert same is not None
    assert not same.significant
    assert better is not None
    assert better.significant
    assert better.percent == pytest.approx(-1.0)


def test_different_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="same rows"):
        paired_ne_difference([(1000, 400, 1.0)] * 4, [(1000, 401, 1.0)] * 4)


def test_too_few_blocks_give_no_interval() -> None:
    assert paired_ne_difference([(1000, 400, 1.0)] * 2, [(1000, 400, 1.0)] * 2) is None


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (100, 1.984)])
def test_student_t_matches_the_tables(degrees: int, expected: float) -> None:
    assert student_t(0.975, degrees) == pytest.approx(expected, rel=2e-3)


def test_moving_ne_is_one_for_the_base_rate() -> None:
    entropy = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    seen, values = moving_ne([[1000, 400, 1000 * entropy]] * 5, width=2)
    assert seen == [1000, 2000, 3000, 4000, 5000]
    assert values == pytest.approx([1.0] * 5)
