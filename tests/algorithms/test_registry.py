"""The dict of algorithms, and what a user may get wrong about it."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from fedalign import algorithms
from fedalign.algorithms import ALGORITHMS, make
from fedalign.algorithms.fedalign_moe import FedAlignMoE
from fedalign.algorithms.fedprox import FedProx
from fedalign.errors import UserError


def test_the_dict_is_the_folder() -> None:
    folder = {path.stem for path in Path(algorithms.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(ALGORITHMS) == folder
    assert {name: kind.__module__ for name, kind in ALGORITHMS.items()} == {
        name: f"fedalign.algorithms.{name}" for name in ALGORITHMS
    }


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_options_are_the_fields_of_a_frozen_dataclass(name: str) -> None:
    kind: Any = ALGORITHMS[name]
    assert kind.__dataclass_params__.frozen
    assert {field.name for field in fields(kind)} <= set(get_type_hints(kind))


def test_options_reach_the_algorithm() -> None:
    assert make("fedprox", {"mu": 1}) == FedProx(mu=1)
    chosen = make("fedalign_moe", {"gate": "average", "size_weighted": True, "min_holders": 3})
    assert chosen == FedAlignMoE(gate="average", size_weighted=True, min_holders=3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fedalgin", {}, "algorithm.name = 'fedalgin': unknown. Choose one of: fedalign_moe, fedavg, fedprox."),
        ("fedavg", {"mu": 1.0}, "algorithm.mu = 1.0: fedavg has no such option. It has no options."),
        (
            "fedprox",
            {"nu": 1.0},
            "algorithm.nu = 1.0: fedprox has no such option. Its options and defaults: mu = 0.01.",
        ),
        ("fedprox", {"mu": -1.0}, "algorithm.mu = -1.0: must be at least 0 and finite"),
        ("fedprox", {"mu": math.nan}, "algorithm.mu = nan: must be at least 0 and finite"),
        ("fedprox", {"mu": "1"}, "algorithm.mu = '1': must be a number."),
        ("fedprox", {"mu": True}, "algorithm.mu = True: must be a number."),
        ("fedalign_moe", {"gate": "row"}, "algorithm.gate = 'row': unknown. Choose one of: average, rows."),
        ("fedalign_moe", {"size_weighted": 1}, "algorithm.size_weighted = 1: must be true or false."),
        ("fedalign_moe", {"min_holders": 2.0}, "algorithm.min_holders = 2.0: must be a whole number."),
        ("fedalign_moe", {"max_weight": 0.0}, "algorithm.max_weight = 0.0: must lie between 1e-06 and 1"),
        ("fedalign_moe", {"min_agreement": 1.5}, "algorithm.min_agreement = 1.5: must lie between 0 and 1"),
        ("fedalign_moe", {"beta": math.nan}, "algorithm.beta = nan: must lie between -100 and 100"),
    ],
)
def test_mistakes_are_told_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(name, options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
