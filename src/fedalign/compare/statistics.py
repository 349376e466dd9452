"""Means over seeds with their uncertainty: Student's t, never a bare mean.

    interval of a mean        m ± t(n-1, 97.5 %) · s / √n            s: standard deviation over n seeds
    difference to a baseline  the same, of the differences seed by seed

Runs of one seed share data, partition and start, so most of the noise of a seed cancels in the difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95
FEW = 4  # seeds: of fewer, tables for people tell single runs in place of an interval


@dataclass(frozen=True)
class Interval:
    """A mean over `count` seeds and the half-width of its 95 % interval; one seed has none."""

    mean: float
    half: float | None
    count: int
    values: tuple[float, ...] = ()

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside; never for a single seed."""
        return self.half is not None and abs(self.mean) > self.half

    @property
    def is_told(self) -> bool:
        """Whether there are seeds enough to tell it to people."""
        return self.half is not None and self.count >= FEW


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean and its Student-t interval.

    >>> mean_interval([1.0, 2.0, 3.0])  # t(2) = 4.303, s = 1  # doctest: +ELLIPSIS
    Interval(mean=2.0, half=2.484..., count=3, values=(1.0, 2.0, 3.0))
    >>> mean_interval([1.0])
    Interval(mean=1.0, half=None, count=1, values=(1.0,))
    """
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return Interval(mean, None, 1, tuple(values))
    quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(count), count, tuple(values))


def paired_interval(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """Mean and interval of the differences over the seeds that both have, None without any.

    >>> paired_interval({0: 3.0, 1: 5.0}, {0: 1.0, 1: 3.0, 2: 9.0})
    Interval(mean=2.0, half=0.0, count=2, values=(2.0, 2.0))
    """
    shared = [seed for seed in values if seed in baseline]
    return mean_interval([values[seed] - baseline[seed] for seed in shared]) if shared else None
