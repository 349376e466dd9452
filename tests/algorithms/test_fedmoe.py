"""FedMoE by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.algorithms.fedmoe import FedMoE
from fedalign.protocol import Layout, ParameterGroup, Statistics
from tests.algorithms.conftest import Report, planned

REST = ([0.1, 0.1], [[1.0, 0.0], [0.0, 1.0]], [[1.0], [1.0]])


@pytest.fixture
def trio(report: Report) -> list[Statistics]:
    """All three hold expert 0; expert 1 is held by a and b."""
    return [
        report("a", 30, [0.7, 0.3], [70.0, 30.0], *REST),
        report("b", 10, [0.6, 0.4], [60.0, 40.0], *REST),
        report("c", 60, [1.0, 0.0], [100.0, 0.0], *REST),
    ]


def columns(layout: Layout, reports: list[Statistics]) -> tuple[Tensor, Tensor, Tensor]:
    """Shared [C], router rows [C, E] and experts [C, E] of the plan."""
    plan = planned(FedMoE(), reports, layout)
    shared_C, gate_C_L_E, expert_C_L_E = layout.split(plan.weight_C_G)
    return shared_C, gate_C_L_E[:, 0], expert_C_L_E[:, 0]


def test_experts_are_averaged_by_data_among_their_holders(layout: Layout, trio: list[Statistics]) -> None:
    shared, gate, expert = columns(layout, trio)
    assert_close(shared, tensor([0.3, 0.1, 0.6]))
    # expert 0: 30 : 10 : 60; expert 1: 30 : 10 among a and b alone
    assert_close(expert, tensor([[0.3, 0.75], [0.1, 0.25], [0.6, 0.0]]))
    assert torch.equal(gate, expert)  # router rows follow their expert
    assert planned(FedMoE(), trio, layout).centred


def test_what_was_planned_for_nobody_is_never_uploaded(layout: Layout, trio: list[Statistics]) -> None:
    plan = planned(FedMoE(), trio, layout, {"left": tensor(1.0)})
    asked = {request.client: request.groups for request in plan.requests(1, layout)}
    assert asked["a"] == layout.groups
    assert set(layout.groups) - set(asked["c"]) == {ParameterGroup("gate", 0, 1), ParameterGroup("expert", 0, 1)}
    assert plan.factor_C_G is None
    assert plan.state == {}


def test_a_single_holder_is_taken_whole(layout: Layout, trio: list[Statistics]) -> None:
    trio[0] = replace(trio[0], load_L_E=tensor([[100.0, 0.0]]))  # a withholds expert 1
    _, gate, expert = columns(layout, trio)
    assert_close(expert, tensor([[0.3, 0.0], [0.1, 1.0], [0.6, 0.0]]))
    assert torch.equal(gate, expert)


def test_an_expert_nobody_activates_stays(layout: Layout, trio: list[Statistics]) -> None:
    idle = [replace(report, load_L_E=tensor([[100.0, 0.0]])) for report in trio]
    _, gate, expert = columns(layout, idle)
    assert_close(expert, tensor([[0.3, 0.0], [0.1, 0.0], [0.6, 0.0]]))
    assert torch.equal(gate, expert)


def test_without_any_load_only_the_rest_changes(layout: Layout, trio: list[Statistics]) -> None:
    shared, gate, expert = columns(layout, [replace(report, load_L_E=torch.zeros(1, 2)) for report in trio])
    assert_close(shared, tensor([0.3, 0.1, 0.6]))
    assert gate.count_nonzero() == expert.count_nonzero() == 0


def test_the_plan_follows_a_permutation_of_clients(layout: Layout, trio: list[Statistics]) -> None:
    plan = planned(FedMoE(), trio, layout)
    turned = planned(FedMoE(), [trio[i] for i in (2, 0, 1)], layout)
    assert turned.clients == ("c", "a", "b")
    assert_close(turned.weight_C_G, plan.weight_C_G[[2, 0, 1]])
