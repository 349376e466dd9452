"""FLAME by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.algorithms.flame import FLAME
from fedalign.protocol import Layout, Statistics
from tests.algorithms.conftest import Report, planned

REST = ([0.1, 0.1], [[1.0, 0.0], [0.0, 1.0]], [[1.0], [1.0]])


@pytest.fixture
def pair(report: Report) -> list[Statistics]:
    """Activations a step: a 80 / 10 = 8 and 2, b 80 / 5 = 16 and 4."""
    a = report("a", 30, [0.8, 0.2], [80.0, 20.0], *REST)
    b = report("b", 10, [0.8, 0.2], [80.0, 20.0], *REST)
    return [replace(a, steps=10), replace(b, steps=5)]


def columns(layout: Layout, reports: list[Statistics], temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Shared [C], router rows [C, E] and experts [C, E] of the plan."""
    plan = planned(FLAME(temperature=temperature), reports, layout)
    shared_C, gate_C_L_E, expert_C_L_E = layout.split(plan.weight_C_G)
    return shared_C, gate_C_L_E[:, 0], expert_C_L_E[:, 0]


def test_experts_are_weighted_by_activations_a_step(layout: Layout, pair: list[Statistics]) -> None:
    shared, gate, expert = columns(layout, pair)
    assert_close(shared, tensor([0.75, 0.25]))
    assert_close(gate, tensor([[0.75, 0.75], [0.25, 0.25]]))
    # 30·8 : 10·16 = 240 : 160; 30·2 : 10·4 = 60 : 40
    assert_close(expert, tensor([[0.6, 0.6], [0.4, 0.4]]))
    assert not planned(FLAME(), pair, layout).centred


def test_the_temperature_sharpens(layout: Layout, pair: list[Statistics]) -> None:
    # 30·8² : 10·16² = 1920 : 2560
    assert_close(columns(layout, pair, 2.0)[2], tensor([[3 / 7, 3 / 7], [4 / 7, 4 / 7]]))
    # 30·√8 : 10·√16 = 84.85 : 40
    assert_close(columns(layout, pair, 0.5)[2][:, 0], tensor([30 * 8**0.5, 40]) / (30 * 8**0.5 + 40))
    assert_close(columns(layout, pair, 1e6)[2], tensor([[0.0, 0.0], [1.0, 1.0]]))
    withheld = [pair[0], replace(pair[1], load_L_E=tensor([[80.0, 0.0]]))]
    assert_close(columns(layout, withheld, 0.0)[2], tensor([[0.75, 1.0], [0.25, 0.0]]))  # 0 ** 0 gives no weight


def test_tokens_read_do_not_enter_but_steps_do(layout: Layout, pair: list[Statistics]) -> None:
    again = [pair[0], replace(pair[1], tokens=160, metrics={"steps": 1.0})]
    assert_close(columns(layout, again)[2], columns(layout, pair)[2])
    # b took 16 steps: 80 / 16 = 5 and 1.25. 30·8 : 10·5 = 240 : 50; 30·2 : 10·1.25 = 60 : 12.5
    slow = [pair[0], replace(pair[1], steps=16)]
    assert_close(columns(layout, slow)[2], tensor([[24 / 29, 24 / 29], [5 / 29, 5 / 29]]))


def test_holders_only(layout: Layout, pair: list[Statistics]) -> None:
    one = [pair[0], replace(pair[1], load_L_E=tensor([[80.0, 0.0]]))]  # b withholds expert 1: a is taken whole
    assert_close(columns(layout, one)[2], tensor([[0.6, 1.0], [0.4, 0.0]]))
    nobody = [replace(report, load_L_E=tensor([[80.0, 0.0]])) for report in pair]
    assert_close(columns(layout, nobody)[2], tensor([[0.6, 0.0], [0.4, 0.0]]))


def test_without_any_load_only_experts_stay(layout: Layout, pair: list[Statistics]) -> None:
    idle = [replace(report, load_L_E=torch.zeros(1, 2), tokens=1) for report in pair]
    plan = planned(FLAME(), idle, layout, {"left": tensor(1.0)})
    assert_close(plan.weight_C_G, tensor([[0.75] * 5 + [0, 0], [0.25] * 5 + [0, 0]]))
    assert plan.state == {}


def test_the_plan_follows_a_permutation_of_clients(layout: Layout, pair: list[Statistics]) -> None:
    plan = planned(FLAME(), pair, layout)
    turned = planned(FLAME(), pair[::-1], layout)
    assert turned.clients == ("b", "a")
    assert_close(turned.weight_C_G, plan.weight_C_G.flip(0))
