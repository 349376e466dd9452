"""Intervals against tables of Student's t and numbers worked out by hand."""

import math

import pytest
from scipy.stats import t as student

from fedalign.compare.statistics import Interval, mean_interval, paired_interval


@pytest.mark.parametrize(
    ("count", "quantile"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (10, 2.262), (31, 2.042), (121, 1.980)]
)
def test_half_widths_follow_the_printed_table(count: int, quantile: float) -> None:
    values = [float(i) for i in range(count)]
    deviation = math.sqrt(count * (count + 1) / 12)  # of 0 .. n-1
    interval = mean_interval(values)
    assert interval.mean == (count - 1) / 2
    assert interval.half == pytest.approx(quantile * deviation / math.sqrt(count), rel=2e-4)


def test_it_is_the_interval_that_scipy_gives() -> None:
    values = [0.71, 0.68, 0.74, 0.70, 0.69]
    interval = mean_interval(values)
    assert interval.half is not None
    low, high = student.interval(0.95, 4, loc=interval.mean, scale=0.023021728866442676 / math.sqrt(5))
    assert (interval.mean - interval.half, interval.mean + interval.half) == pytest.approx((low, high))


def test_one_seed_has_no_interval_and_proves_nothing() -> None:
    assert mean_interval([0.7]) == Interval(0.7, None, 1, (0.7,))
    assert not mean_interval([0.7]).excludes_zero


def test_differences_are_taken_seed_by_seed() -> None:
    baseline = {0: 0.50, 1: 0.60, 2: 0.70}  # seeds differ much,
    better = {0: 0.52, 1: 0.61, 2: 0.73, 9: 0.0}  # the difference does not
    pair = paired_interval(better, baseline)
    assert pair is not None
    assert pair.mean == pytest.approx(0.02)
    assert pair.count == 3
    assert pair.half == pytest.approx(4.303 * 0.01 / math.sqrt(3), rel=1e-3)
    assert not pair.excludes_zero  # .0248 > .02
    sure = paired_interval({0: 0.520, 1: 0.619, 2: 0.721}, baseline)
    assert sure is not None
    assert sure.excludes_zero
    assert paired_interval({0: 1.0}, {1: 1.0}) is None
