"""Attacks on one site again, with masks and with noise: what each of them hides, and what totals of few still tell."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import hiding
from hiding import ALONE, ATTACKS, FEW, HELPED, MESSAGE

TARGETS, EPSILON = 6, 2.0
Rates = dict[str, dict[str, float]]  # view -> attack -> share of right answers; tokens: AUC


def rates(settings: list[str], epsilon: float | None, folder: Path) -> Rates:
    mine = [one for one in settings if one.startswith(("model.", "data."))]
    found = hiding.attacked(hiding.Lab(folder, epsilon, mine, None), TARGETS, others=4, each=12)
    return {view: {attack: sum(of) / len(of) for attack, of in by.items()} for view, by in found.items()}


@pytest.fixture(scope="module")
def without(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Rates:
    return rates(settings, None, tmp_path_factory.mktemp("without"))


@pytest.fixture(scope="module")
def noisy(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Rates:
    return rates(settings, EPSILON, tmp_path_factory.mktemp("noisy"))


def test_an_update_as_it_is_tells_all(without: Rates) -> None:
    assert without[ALONE]["tokens"] > 0.95
    assert (without[ALONE]["label"], without[ALONE]["there"]) == (1, 1)


@pytest.mark.parametrize("kind", ["without", "noisy"])
def test_a_masked_message_tells_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    told: Rates = request.getfixturevalue(kind)
    assert abs(told[MESSAGE]["tokens"] - 0.5) < 0.05
    assert max(told[MESSAGE]["label"], told[MESSAGE]["there"]) <= 0.75


def test_a_sum_of_few_tells_of_a_word_that_one_alone_has(without: Rates) -> None:
    """Masks hide whose tokens and labels they are, to some degree; not that somebody has this one."""
    assert without[FEW]["there"] == 1
    assert without[FEW]["tokens"] < 0.7
    assert without[FEW]["label"] < 1


def test_those_who_are_summed_with_a_site_can_take_themselves_off(without: Rates) -> None:
    assert without[HELPED] == pytest.approx(without[ALONE])


def test_noise_hides_an_example_from_all_of_them(noisy: Rates) -> None:
    for view in (ALONE, FEW, HELPED):
        assert noisy[view]["there"] <= math.exp(EPSILON) / (1 + math.exp(EPSILON))
        assert abs(noisy[view]["tokens"] - 0.5) < 0.05
        assert noisy[view]["label"] < 1


def test_the_table_has_all_of_it() -> None:
    about = {"view": ALONE, "epsilon": 2.0, "targets": 40, "machine": "a machine"}
    told = hiding.table([about | dict.fromkeys(ATTACKS, hiding.shown([1.0, 0.0]))])
    assert "| its update | epsilon 2 | 50 ± 35 | 50 ± 35 | 50 ± 35 |" in told
    assert "Run on: a machine." in told
