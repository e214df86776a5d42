import math
import random

import pytest

from pipelines.evaluation.statistics import (
    mean_over_items,
    share,
    share_over_items,
    student_quantile,
    upper_quantile,
)


@pytest.mark.parametrize(
    ("degrees", "table", "tolerance"),
    [
        (1, 12.706, 1e-4),
        (2, 4.3027, 1e-4),
        (3, 3.1824, 0.025),
        (7, 2.3646, 1e-3),
        (10, 2.2281, 1e-4),
        (30, 2.0423, 1e-4),
    ],
)
def test_student_quantile_is_the_tables(degrees: int, table: float, tolerance: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(table, rel=tolerance)


def test_mean_of_equal_items_is_the_t_interval() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    found = mean_over_items(values, [1] * 11, confidence=0.95)
    half = 2.2281 * math.sqrt(11.0) / math.sqrt(11)  # the sample variance of 1..11 is 11
    assert found.value == pytest.approx(6.0)
    assert (found.low, found.high) == (pytest.approx(6 - half, rel=1e-4), pytest.approx(6 + half, rel=1e-4))


def test_mean_is_weighted_by_tokens() -> None:
    assert mean_over_items([10.0, 1.0], [10, 2], confidence=0.95).value == pytest.approx(11 / 12)


def test_one_item_has_no_interval_and_none_is_refused() -> None:
    found = mean_over_items([1.0], [4], confidence=0.95)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert found.exp().low == 0.0
    assert found.exp().high == math.inf
    with pytest.raises(ValueError, match="Nothing was scored"):
        mean_over_items([], [], confidence=0.95)


def test_interval_over_items_covers_the_truth_as_often_as_it_says() -> None:
    source = random.Random(3)
    hits = 0
    for _ in range(400):
        counts = [source.randint(5, 40) for _ in range(25)]
        sums = [n * 0.5 + n * source.gauss(0, 0.2) for n in counts]  # the whole item shares one error
        found = mean_over_items(sums, counts, confidence=0.9)
        hits += found.low <= 0.5 <= found.high
    assert 0.86 <= hits / 400 <= 0.94


def test_wilson_is_the_published_example() -> None:
    # Newcombe 1998, table I, method 3: 81 of 263.
    found = share(81, 263, confidence=0.95)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("successes", "low", "high"), [(0, 0.0, 0.2775), (10, 0.7225, 1.0)])
def test_wilson_at_the_ends_has_no_width_of_zero(successes: int, low: float, high: float) -> None:
    found = share(successes, 10, confidence=0.95)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_no_trials_say_nothing() -> None:
    found = share(0, 0, confidence=0.95)
    assert (found.low, found.high, found.num_units) == (0.0, 1.0, 0)


def test_dependent_tokens_widen_the_interval() -> None:
    counts = [10] * 20
    spread = share_over_items([9] * 20, counts, confidence=0.95)
    clumped = share_over_items([10] * 18 + [0] * 2, counts, confidence=0.95)
    assert spread.value == clumped.value == 0.9
    assert spread.low == share(180, 200, confidence=0.95).low
    assert clumped.high - clumped.low > 2.5 * (spread.high - spread.low)


def test_upper_quantile_and_its_order_statistics() -> None:
    found = upper_quantile([float(i) for i in range(1, 10001)], 0.99, confidence=0.95)
    assert found.value == 9900
    assert found.low == pytest.approx(9880, abs=2)
    assert found.high == pytest.approx(9921, abs=2)
    assert upper_quantile([1.0, 2.0], 0.99, confidence=0.95).high == math.inf
