"""FedAvg by hand."""

from __future__ import annotations

import torch
from torch import tensor
from torch.testing import assert_close

from fedalign.algorithms.fedavg import FedAvg
from fedalign.protocol import Layout, Step
from tests.algorithms.conftest import Report, planned

NOTHING = ([0.5, 0.5], [0.0, 0.0], [0.0, 0.0], [[0.0], [0.0]], [[0.0], [0.0]])


def test_every_group_is_weighted_by_data(layout: Layout, report: Report) -> None:
    reports = [report("a", 30, *NOTHING), report("b", 10, *NOTHING)]
    plan = planned(FedAvg(), reports, layout, {"left": tensor(1.0)})
    assert plan.clients == ("a", "b")
    assert_close(plan.weight_C_G, tensor([[0.75] * 7, [0.25] * 7]))
    assert plan.factor_C_G is None
    assert not plan.centred
    assert plan.state == {}  # a state is what a plan says, and nothing else
    assert plan.then is None


def test_a_client_without_data_is_asked_for_nothing(layout: Layout, report: Report) -> None:
    plan = planned(FedAvg(), [report("a", 0, *NOTHING), report("b", 10, *NOTHING)], layout)
    assert [len(request.groups) for request in plan.requests(1, layout)] == [0, 7]


def test_shares_of_many_clients_sum_to_one(layout: Layout, report: Report) -> None:
    plan = planned(FedAvg(), [report(str(i), i + 1, *NOTHING) for i in range(100)], layout)
    assert_close(plan.weight_C_G.double().sum(dim=0), torch.ones(7, dtype=torch.float64), atol=1e-6, rtol=0)


def test_clients_minimise_their_own_loss() -> None:
    assert FedAvg().penalty(Step([], lambda: tensor(1.0), {}, None)) is None
    assert not FedAvg().asks
    assert not FedAvg().private
    assert FedAvg().mix is None
