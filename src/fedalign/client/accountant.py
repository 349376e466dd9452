"""The cost of noise: epsilon of all that a site has released, as a privacy loss distribution (dp-accounting).

A release is a Gaussian of a Poisson sample of a site's examples, so many times. Neighbours differ in one example, which
is there or is not. Releases of different kinds, rounds and runs are composed, whoever asked for them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from fedalign.config.run import Config
from fedalign.errors import UserError

COUNT_NOISE = 20.0  # of the number of examples, told once a run
MOST_STEPS = 1_000_000  # of a run
SPENT = 0.98  # of an epsilon that was asked for, at least: noise that is nearer to the least takes longer to find
FINE, QUICK = 1e-4, 5e-4  # steps in which privacy loss is counted, rounded up; the quick one is for the search
LEAST_NOISE, MOST_NOISE = 0.3, 1e4  # of a step: less hides nothing and takes long to count, more lets nothing be learnt
MOST_LOSS = 500.0  # of `loss`: beyond it nothing is hidden, and to count it takes gigabytes


@dataclass(frozen=True)
class Release:
    """Something that left with noise."""

    noise: float  # standard deviation, in lengths of what one example can change
    rate: float = 1.0  # chance of each example to be in it
    times: int = 1


@dataclass(frozen=True)
class Terms:
    """One site's part in a run; it follows from the configuration and the number of examples as the site tells it."""

    examples: int  # as told, with noise
    rate: float  # of sampling: chance of each example to be in a step
    steps: int  # of a round
    noise: float  # of a step, in lengths of max_grad_norm
    batch: int  # examples of a step, on average
    loads_noise: float | None  # None: loads do not leave
    rounds: int
    delta: float

    @property
    def round(self) -> tuple[Release, ...]:
        """All that leaves in a round of training."""
        loads = () if self.loads_noise is None else (Release(self.loads_noise),)
        return (Release(self.noise, self.rate, self.steps), *loads)

    @property
    def run(self) -> tuple[Release, ...]:
        """All that leaves in the run."""
        return (COUNT, *(one for one in self.round for _ in range(self.rounds)))

    @property
    def epsilon(self) -> float:
        """Of the whole run, at `delta`."""
        return epsilon(self.run, self.delta)


COUNT = Release(COUNT_NOISE)


def terms(config: Config, examples: int) -> Terms:
    """A site's part in a run.

    Raises:
        UserError: No noise keeps the epsilon that was asked for, or delta is too large for so few examples.
    """
    privacy, training, rounds = config.privacy, config.training, config.run.rounds
    if privacy.delta * examples >= 1:
        raise UserError(
            f"privacy.delta = {privacy.delta:g}: must be below 1 / examples, and a site tells of {examples}. "
            f"Choose {0.1 / examples:.1g} or less."
        )
    batch = training.batch_examples * training.accumulate
    rate = min(1.0, batch / examples)
    steps = training.epochs * -(-examples // batch)
    if rounds * steps > MOST_STEPS:  # a coordinator could keep a site counting for ever
        raise UserError(
            f"run.rounds = {rounds}: with [privacy] a run has at most {MOST_STEPS:,} steps, and this one "
            f"{rounds * steps:,}. Choose fewer rounds or epochs, or more examples a step."
        )
    loads = privacy.loads_noise if config.sends_loads else None
    others = (COUNT,) if loads is None else (COUNT, Release(loads, times=rounds))
    noise = privacy.noise_multiplier
    if noise is None:
        assert privacy.epsilon is not None
        noise = fitting(others, rate, rounds * steps, privacy.epsilon, privacy.delta)
    if loss((*others, Release(noise, rate, rounds * steps))) > MOST_LOSS:
        raise UserError(
            f"privacy.noise_multiplier = {noise:g}: hides nothing in {rounds * steps:,} steps, each of a share of "
            f"{rate:.3g} of the examples. Choose more noise, fewer steps, or privacy.epsilon instead."
        )
    return Terms(examples, rate, steps, noise, batch, loads, rounds, privacy.delta)


def epsilon(releases: Iterable[Release], delta: float, step: float = FINE) -> float:
    """Of all of these together; 0: nothing was released; infinite: more than is worth counting.

    Raises:
        UserError: The extra `privacy` is not installed.
    """
    times: Counter[tuple[float, float]] = Counter()
    releases = list(releases)
    if loss(releases) > MOST_LOSS:
        return math.inf
    for one in releases:
        times[one.noise, one.rate] += one.times
    return _epsilon(tuple(sorted(times.items())), delta, step)


def loss(releases: Iterable[Release]) -> float:
    """About the largest privacy loss of all of these together, nats: its mean, or more, and ten standard deviations.

    The mean of one sampled release is a Kullback-Leibler divergence: at most q / 2σ², by its convexity, and at most
    q²·(exp(1/σ²) − 1), which is χ².

    >>> loss([Release(1.0)]) == 0.5 + 10, loss([])
    (True, 0.0)
    """
    mean = 0.0
    for one in releases:
        sharp = 1 / one.noise**2
        mean += one.times * min(one.rate * sharp / 2, one.rate**2 * math.expm1(min(sharp, MOST_LOSS)))
    return mean + 10 * math.sqrt(2 * mean)


@lru_cache(maxsize=1024)
def _epsilon(times: tuple[tuple[tuple[float, float], int], ...], delta: float, step: float) -> float:
    total = _library().pld.privacy_loss_distribution.identity(value_discretization_interval=step)
    for (noise, rate), count in times:  # so many Gaussians of all examples are one of less noise
        alike = (
            _once(noise / math.sqrt(count), 1.0, step) if rate == 1 else _once(noise, rate, step).self_compose(count)
        )
        total = total.compose(alike)
    return float(total.get_epsilon_for_delta(delta))


@lru_cache(maxsize=32)  # some megabytes each
def _once(noise: float, rate: float, step: float) -> Any:
    """The privacy loss of one release: up to seconds of work, and of a run's releases that of every round again."""
    dp = _library()
    return dp.pld.privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise,
        sampling_prob=rate,
        value_discretization_interval=step,
        neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


@lru_cache(maxsize=1024)
def fitting(others: Sequence[Release], rate: float, times: int, most: float, delta: float) -> float:
    """The least noise of so many sampled releases that, with the others, cost at most an epsilon.

    Raises:
        UserError: There is none.
    """

    def cost(noise: float) -> float:
        return epsilon((*others, Release(noise, rate, times)), delta, QUICK)

    if (alone := epsilon(others, delta)) >= most or cost(MOST_NOISE) > most:
        raise UserError(
            f"privacy.epsilon = {most:g}: the number of examples and the loads alone cost {alone:.3g} in this run. "
            "Choose more, fewer rounds, or a larger privacy.loads_noise."
        )
    if cost(LEAST_NOISE) <= most:
        return LEAST_NOISE
    low, high, noise, power = LEAST_NOISE, MOST_NOISE, 1.0, 0.5
    while not SPENT * most <= (found := cost(noise)) <= most and high > (1 + 1e-4) * low:
        low, high = (noise, high) if found > most else (low, noise)
        guess = noise * (found / ((1 + SPENT) / 2 * most)) ** power  # noise is about a power of epsilon
        noise, power = (guess if low < guess < high else (low + high) / 2), 0.6
    return noise if found <= most else high


def _library() -> Any:
    if find_spec("dp_accounting") is None:
        raise UserError("[privacy]: dp-accounting, which counts it, is not there. Install it: fedalign-moe[privacy].")
    import dp_accounting.pld  # noqa: PLC0415 - of the extra `privacy`

    return dp_accounting
