"""What noise costs, held against another library's accountant and against what is known in closed form."""

import math
from statistics import NormalDist
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from opacus.accountants import PRVAccountant
from scipy.stats import norm

from fedalign.client.accountant import (
    COUNT,
    LEAST_NOISE,
    MOST_LOSS,
    QUICK,
    SPENT,
    Release,
    Terms,
    epsilon,
    fitting,
    loss,
    terms,
)
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.errors import UserError

PRIVATE = ["algorithm.name=fedavg", "evaluation.clients=false"]


def config(*overrides: str) -> Config:
    return load_config(None, [*PRIVATE, *overrides])


@pytest.mark.filterwarnings("ignore:Optimal order is the largest")  # of a first guess by another method
@pytest.mark.parametrize("delta", [1e-5, 1e-6])
@pytest.mark.parametrize(
    ("noise", "rate", "times"),
    [(0.7, 0.01, 200), (1.0, 0.01, 1000), (1.0, 0.1, 100), (1.5, 0.02, 2000), (4.0, 0.2, 300), (3.0, 0.5, 40)],
)
def test_epsilon_is_that_of_another_accountant_within_a_percent(
    noise: float, rate: float, times: int, delta: float
) -> None:
    other = PRVAccountant()
    other.history = [(noise, rate, times)]
    mine = epsilon([Release(noise, rate, times)], delta)
    theirs = other.get_epsilon(delta, eps_error=0.002 * mine)
    assert mine == pytest.approx(theirs, rel=0.01)


@pytest.mark.filterwarnings("ignore:Optimal order is the largest")  # as above
def test_releases_of_different_runs_compose() -> None:
    other = PRVAccountant()
    other.history = [(1.0, 0.02, 300), (2.0, 0.1, 50), (20.0, 0.5, 4)]
    mine = epsilon(
        [Release(1.0, 0.02, 100), Release(2.0, 0.1, 50), Release(20.0, 0.5, 4), Release(1.0, 0.02, 200)], 1e-5
    )
    assert mine == pytest.approx(other.get_epsilon(1e-5, eps_error=0.002 * mine), rel=0.01)


def test_it_is_what_the_librarys_own_accountant_says_and_of_each_round_one_release_is_worked_out_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    either = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    gaussian, asked = privacy_loss_distribution.from_gaussian_mechanism, list[tuple[float, float]]()

    def counted(**given: Any) -> Any:
        asked.append((given["standard_deviation"], given["sampling_prob"]))
        return gaussian(**given)

    monkeypatch.setattr(privacy_loss_distribution, "from_gaussian_mechanism", counted)
    for rounds in (1, 2, 3):
        other = PLDAccountant(either, value_discretization_interval=QUICK)
        with monkeypatch.context() as patch:
            patch.setattr(privacy_loss_distribution, "from_gaussian_mechanism", gaussian)
            loads, batch = dp_accounting.GaussianDpEvent(9.25), dp_accounting.GaussianDpEvent(2.125)
            other.compose(dp_accounting.PoissonSampledDpEvent(0.2, batch), 7 * rounds)
            other.compose(loads, rounds)
        mine = epsilon([Release(2.125, 0.2, 7), Release(9.25)] * rounds, 1e-5, QUICK)
        assert mine == other.get_epsilon(1e-5)
    assert sorted(asked) == [(2.125, 0.2), *((9.25 / math.sqrt(rounds), 1.0) for rounds in (3, 2, 1))]


@pytest.mark.parametrize(("noise", "times"), [(0.8, 1), (2.0, 1), (20.0, 1), (10.0, 25)])
def test_gaussians_cost_what_their_formula_says(noise: float, times: int) -> None:
    """Balle and Wang 2018, arXiv 1805.06530, theorem 8; so many are as one of less noise."""
    found = epsilon([Release(noise, times=times)], 1e-5)
    normal, mu = NormalDist().cdf, math.sqrt(times) / noise
    delta = normal(mu / 2 - found / mu) - math.exp(found) * normal(-mu / 2 - found / mu)
    assert delta == pytest.approx(1e-5, rel=0.02)


def test_nothing_released_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0


@pytest.mark.parametrize(("most", "examples"), [(1.0, 100), (4.0, 1000)])
def test_the_noise_that_fits_spends_nearly_all_and_no_more(most: float, examples: int) -> None:
    found = terms(config(f"privacy.epsilon={most}"), examples)
    assert SPENT * most * 0.95 <= found.epsilon <= most
    assert found.rate == 16 / examples
    assert found.steps == math.ceil(examples / 16)


def test_a_noise_that_is_given_is_used() -> None:
    found = terms(config("privacy.noise_multiplier=2.5", "training.accumulate=4"), 10)
    assert found == Terms(10, 1.0, 1, 2.5, 64, None, 10, 1e-5)


def test_loads_are_counted_where_they_leave() -> None:
    mine = config("algorithm.name=by_use", "algorithm.vocabulary=average", "privacy.noise_multiplier=1")
    with_loads, without = terms(mine, 500), terms(config("privacy.noise_multiplier=1"), 500)
    assert with_loads.round == (*without.round, Release(30.0))
    assert with_loads.epsilon > without.epsilon


def test_an_epsilon_that_nothing_keeps_is_refused() -> None:
    with pytest.raises(UserError, match=r"privacy.epsilon = 0.01: the number of examples and the loads alone cost"):
        terms(config("privacy.epsilon=0.01"), 1000)


def test_a_delta_of_more_than_one_example_is_refused() -> None:
    with pytest.raises(UserError, match=r"privacy.delta = 0.01: must be below 1 / examples, and a site tells of 200"):
        terms(config("privacy.epsilon=2", "privacy.delta=0.01"), 200)


def test_smaller_epsilons_take_more_noise() -> None:
    small, large = (fitting((COUNT,), 0.05, 100, most, 1e-5) for most in (1.0, 4.0))
    assert small > large > 0


def test_a_run_that_nobody_could_count_is_refused() -> None:
    with pytest.raises(UserError, match=r"run.rounds = 1000000: with \[privacy\] a run has at most 1,000,000 steps"):
        terms(config("privacy.epsilon=2", "run.rounds=1000000"), 100)


def test_noise_is_never_less_than_can_be_counted_quickly() -> None:
    assert fitting((COUNT,), 1.0, 1, 100.0, 1e-5) == LEAST_NOISE


def test_what_hides_nothing_is_not_counted_for_gigabytes() -> None:
    assert epsilon([Release(0.3, 1.0, 10_000)], 1e-5) == math.inf
    assert epsilon([Release(0.01), Release(20.0)], 1e-5) == math.inf
    often = config("privacy.noise_multiplier=0.3", "training.accumulate=100", "training.epochs=1000")
    with pytest.raises(UserError, match=r"privacy.noise_multiplier = 0.3: hides nothing in .* steps"):
        terms(often, 1000)


@pytest.mark.parametrize("release", [Release(1.0, 2e-3, 1_000_000), Release(0.1), Release(0.5, 0.05, 1000)])
def test_what_is_worth_counting_is(release: Release) -> None:
    assert loss([release]) < MOST_LOSS


@pytest.mark.parametrize(("one", "ten"), [(1.0, 14.4), (2.0, 33.2), (8.0, 209.0)])
def test_ten_rows_of_one_person_cost_more_than_ten_times(one: float, ten: float) -> None:
    """What docs/privacy.md says of a patient: a sum that ten rows move is one of a tenth of the noise."""
    low, high = 0.05, 50.0
    for _ in range(40):
        noise = math.sqrt(low * high)
        low, high = (noise, high) if exact_gaussian(noise) > one else (low, noise)
    assert exact_gaussian(noise / 10) == pytest.approx(ten, rel=0.01)


def exact_gaussian(noise: float, delta: float = 1e-5) -> float:
    """Of one release of that noise (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        tail = norm.logcdf(-1 / (2 * noise) - middle * noise) + middle
        lost = norm.cdf(1 / (2 * noise) - middle * noise) - math.exp(tail)
        low, high = (middle, high) if lost > delta else (low, middle)
    return high
