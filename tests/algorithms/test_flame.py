"""FLAME by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.algorithms.flame import FLAME
from fedalign.protocol import Layout, Statistics
from tests.algorithms.conftest import Report

REST = ([0.1, 0.1], [[1.0, 0.0], [0.0, 1.0]], [[1.0], [1.0]])


@pytest.fixture
def pair(report: Report) -> list[Statistics]:
    """Activations a step: a 80 / 10 = 8 and 2, b 80 / 5 = 16 and 4."""
    a = report("a", 30, [0.8, 0.2], [80.0, 20.0], *REST)
    b = report("b", 10, [0.8, 0.2], [80.0, 20.0], *REST)
    return [replace(a, metrics={"steps": 10.0}), replace(b, metrics={"steps": 5.0})]


def columns(layout: Layout, reports: list[Statistics], temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Shared [C], router rows [C, E] and experts [C, E] of the plan."""
    plan, _ = FLAME(temperature=temperature).plan(reports, layout, {})
    shared_C, gate_C_L_E, expert_C_L_E = layout.split(plan.weight_C_G)
    return shared_C, gate_C_L_E[:, 0], expert_C_L_E[:, 0]


def test_experts_are_weighted_by_activations_a_step(layout: Layout, pair: list[Statistics]) -> None:
    shared, gate, expert = columns(layout, pair)
    assert_close(shared, tensor([0.75, 0.25]))
    assert_close(gate, tensor([[0.75, 0.75], [0.25, 0.25]]))
    # 30·8 : 10·16 = 240 : 160; 30·2 : 10·4 = 60 : 40
    assert_close(expert, tensor([[0.6, 0.6], [0.4, 0.4]]))
    assert not FLAME().centre_gates


def test_the_temperature_sharpens(layout: Layout, pair: list[Statistics]) -> None:
    # 30·8² : 10·16² = 1920 : 2560
    assert_close(columns(layout, pair, 2.0)[2], tensor([[3 / 7, 3 / 7], [4 / 7, 4 / 7]]))
    # 30·√8 : 10·√16 = 84.85 : 40
    assert_close(columns(layout, pair, 0.5)[2][:, 0], tensor([30 * 8**0.5, 40]) / (30 * 8**0.5 + 40))
    assert_close(columns(layout, pair, 1e6)[2], tensor([[0.0, 0.0], [1.0, 1.0]]))
    withheld = [pair[0], replace(pair[1], load_L_E=tensor([[80.0, 0.0]]))]
    assert_close(columns(layout, withheld, 0.0)[2], tensor([[0.75, 1.0], [0.25, 0.0]]))  # 0 ** 0 gives no weight


@pytest.mark.parametrize("metrics", [{}, {"steps": 0.0}, {"steps": -5.0}, {"steps": float("nan")}, {"steps": 1e400}])
def test_without_steps_activations_a_token_count_for_everyone(
    layout: Layout, pair: list[Statistics], metrics: dict[str, float]
) -> None:
    # a 80 / 100 = .8 and .2, b 80 / 160 = .5 and .125: 30·.8 : 10·.5 = 24 : 5; 30·.2 : 10·.125 = 6 : 1.25
    reports = [pair[0], replace(pair[1], metrics=metrics, tokens=160)]
    assert_close(columns(layout, reports)[2], tensor([[24 / 29, 24 / 29], [5 / 29, 5 / 29]]))


def test_holders_only(layout: Layout, pair: list[Statistics]) -> None:
    one = [pair[0], replace(pair[1], load_L_E=tensor([[80.0, 0.0]]))]  # b withholds expert 1: a is taken whole
    assert_close(columns(layout, one)[2], tensor([[0.6, 1.0], [0.4, 0.0]]))
    nobody = [replace(report, load_L_E=tensor([[80.0, 0.0]])) for report in pair]
    assert_close(columns(layout, nobody)[2], tensor([[0.6, 0.0], [0.4, 0.0]]))


def test_without_any_load_only_experts_stay(layout: Layout, pair: list[Statistics]) -> None:
    idle = [replace(report, load_L_E=torch.zeros(1, 2), tokens=0, metrics={}) for report in pair]
    plan, state = FLAME().plan(idle, layout, {"kept": tensor(1.0)})
    assert_close(plan.weight_C_G, tensor([[0.75, 0.75, 0.75, 0, 0], [0.25, 0.25, 0.25, 0, 0]]))
    assert state == {"kept": tensor(1.0)}


def test_the_plan_follows_a_permutation_of_clients(layout: Layout, pair: list[Statistics]) -> None:
    plan, _ = FLAME().plan(pair, layout, {})
    turned, _ = FLAME().plan(pair[::-1], layout, {})
    assert turned.clients == ("b", "a")
    assert_close(turned.weight_C_G, plan.weight_C_G.flip(0))
