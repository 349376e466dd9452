"""Made-up reports: a server would take them, the same seed gives the same, and what nobody asks for is not in them."""

from typing import Any

import pytest
import torch

from fedalign.algorithms import ALGORITHMS, make
from fedalign.protocol import asked_shapes
from fedalign.server.checks import check_statistics
from fedalign.testing import EVERYTHING, WIDTH, planned, reports


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [{}, {"clients": 1, "layers": 1, "experts": 1}, {"experts": 64, "token_rows": False}])
def test_a_server_would_take_them(size: dict[str, Any], seed: int) -> None:
    seen = reports(seed=seed, **size)
    shapes = asked_shapes(seen.layout, EVERYTHING, WIDTH, WIDTH)
    assert [check_statistics(report, seen.layout, shapes, 1) for report in seen.of] == [None] * len(seen.of)


def test_the_same_seed_gives_the_same() -> None:
    one, same, other = (reports(seed=seed).stack("prob_L_E") for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_experts_that_few_tokens_reached_are_withheld() -> None:
    held = [int(reports(min_tokens=least).held_C_L_E.sum()) for least in (1, 60, 129)]
    assert held[0] > held[1] > held[2] == 0


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_plans_for_them_and_for_nobody_holding_anything(name: str) -> None:
    algorithm = make(name, {})
    for least in (16, 129):
        plan = planned(algorithm, reports(asks=algorithm.asks, min_tokens=least))
        assert planned(algorithm, reports(asks=algorithm.asks, min_tokens=least, seed=1), plan.state).clients
