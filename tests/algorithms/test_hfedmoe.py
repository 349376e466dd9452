"""HFedMoE by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.algorithms.hfedmoe import HFedMoE
from fedalign.protocol import Layout, Statistics
from tests.algorithms.conftest import Report, planned

REST = ([0.1, 0.1], [[1.0, 0.0], [0.0, 1.0]], [[1.0], [1.0]])


@pytest.fixture
def trio(report: Report) -> list[Statistics]:
    """With two experts the default threshold is 0.75 / 2 = 0.375: b drops out of expert 0, c of expert 1."""
    return [
        report("a", 30, [0.6, 0.4], [60.0, 40.0], *REST),
        report("b", 10, [0.2, 0.8], [20.0, 80.0], *REST),
        report("c", 60, [0.9, 0.1], [90.0, 10.0], *REST),
    ]


def columns(
    layout: Layout, reports: list[Statistics], algorithm: HFedMoE | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Shared [C], router rows [C, E] and experts [C, E] of the plan."""
    plan = planned(algorithm or HFedMoE(), reports, layout)
    shared_C, gate_C_L_E, expert_C_L_E = layout.split(plan.weight_C_G)
    return shared_C, gate_C_L_E[:, 0], expert_C_L_E[:, 0]


def test_experts_and_rows_are_weighted_by_importance_and_data(layout: Layout, trio: list[Statistics]) -> None:
    shared, gate, expert = columns(layout, trio)
    assert_close(shared, tensor([0.3, 0.1, 0.6]))
    # expert 0: a 30·.6 = 18, b out (.2 < .375), c 60·.9 = 54; expert 1: a 30·.4 = 12, b 10·.8 = 8, c out (.1 < .375)
    assert_close(expert, tensor([[0.25, 0.6], [0.0, 0.4], [0.75, 0.0]]))
    assert torch.equal(gate, expert)
    assert planned(HFedMoE(), trio, layout).centred


def test_the_threshold_is_a_share_of_the_uniform(layout: Layout, trio: list[Statistics]) -> None:
    # 0: all pass. Expert 0: 18, 10·.2 = 2, 54; expert 1: 12, 8, 60·.1 = 6
    everyone = columns(layout, trio, HFedMoE(threshold=0.0))[2]
    assert_close(everyone, tensor([[18 / 74, 12 / 26], [2 / 74, 8 / 26], [54 / 74, 6 / 26]]))
    # 1.2 / 2 = .6, and what reaches it passes: expert 0 keeps a and c, expert 1 keeps b
    strict = columns(layout, trio, HFedMoE(threshold=1.2))[2]
    assert_close(strict, tensor([[0.25, 0.0], [0.0, 1.0], [0.75, 0.0]]))
    # 1.7 / 2 = .85: only expert 0 on c; nobody is asked for expert 1
    plan = planned(HFedMoE(threshold=1.7), trio, layout)
    assert_close(layout.split(plan.weight_C_G)[2][:, 0], tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))
    assert plan.metrics == {"experts_important_to_nobody": 1}


def test_a_uniform_router_passes_a_threshold_of_one(layout: Layout, trio: list[Statistics]) -> None:
    uniform = [replace(report, prob_L_E=tensor([[0.5, 0.5]])) for report in trio]
    assert_close(columns(layout, uniform, HFedMoE(threshold=1.0))[2], tensor([[0.3, 0.3], [0.1, 0.1], [0.6, 0.6]]))


def test_experts_by_size_as_in_the_paper(layout: Layout, trio: list[Statistics]) -> None:
    _, gate, expert = columns(layout, trio, HFedMoE(experts="size"))
    # expert 0: a 30, c 60; expert 1: a 30, b 10
    assert_close(expert, tensor([[1 / 3, 0.75], [0.0, 0.25], [2 / 3, 0.0]]))
    assert_close(gate, tensor([[0.25, 0.6], [0.0, 0.4], [0.75, 0.0]]))


def test_the_whole_gate_as_in_the_paper(layout: Layout, trio: list[Statistics]) -> None:
    _, gate, expert = columns(layout, trio, HFedMoE(gate="whole"))
    # a .6² + .4² = .52, b .8² = .64, c .9² = .81, for every row; data size does not enter
    assert_close(gate, tensor([[0.52, 0.52], [0.64, 0.64], [0.81, 0.81]]) / 1.97)
    assert_close(expert, tensor([[0.25, 0.6], [0.0, 0.4], [0.75, 0.0]]))
    assert not planned(HFedMoE(gate="whole"), trio, layout).centred


def test_withheld_experts_have_no_say(layout: Layout, trio: list[Statistics]) -> None:
    trio[0] = replace(trio[0], load_L_E=tensor([[60.0, 0.0]]))  # a withholds expert 1: b is its one holder that passes
    _, gate, expert = columns(layout, trio)
    assert_close(expert, tensor([[0.25, 0.0], [0.0, 1.0], [0.75, 0.0]]))
    assert torch.equal(gate, expert)
    trio[1] = replace(trio[1], load_L_E=tensor([[20.0, 0.0]]))  # now nobody is left
    _, gate, expert = columns(layout, trio)
    assert_close(expert, tensor([[0.25, 0.0], [0.0, 0.0], [0.75, 0.0]]))
    assert torch.equal(gate, expert)


@pytest.mark.parametrize("gate", ["rows", "whole"])
def test_without_any_load_only_the_rest_changes(layout: Layout, trio: list[Statistics], gate: str) -> None:
    idle = [replace(report, load_L_E=torch.zeros(1, 2)) for report in trio]
    plan = planned(HFedMoE(gate=gate), idle, layout, {"left": tensor(1.0)})  # type: ignore[arg-type] # pytest's parameters are words of that kind
    assert_close(plan.weight_C_G, tensor([[share] * 3 + [0] * 4 for share in (0.3, 0.1, 0.6)]))
    assert plan.metrics == {"experts_important_to_nobody": 2}
    assert plan.state == {}


@pytest.mark.parametrize("algorithm", [HFedMoE(), HFedMoE(experts="size", gate="whole")])
def test_the_plan_follows_a_permutation_of_clients(layout: Layout, trio: list[Statistics], algorithm: HFedMoE) -> None:
    plan = planned(algorithm, trio, layout)
    turned = planned(algorithm, [trio[i] for i in (2, 0, 1)], layout)
    assert turned.clients == ("c", "a", "b")
    assert_close(turned.weight_C_G, plan.weight_C_G[[2, 0, 1]])
