"""FedProx by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.algorithms.fedavg import FedAvg
from fedalign.algorithms.fedprox import FedProx
from fedalign.protocol import Layout, Step
from tests.algorithms.conftest import Report, planned


def test_the_penalty_is_half_mu_times_the_drift_and_pulls_back() -> None:
    received, weights = tensor([1.0, 2.0]), tensor([2.0, 4.0], requires_grad=True)

    def drift() -> Tensor:
        return (weights - received).square().sum()

    penalty = FedProx(mu=0.1).penalty(Step([], drift, {}, None))
    assert penalty is not None
    assert_close(penalty, tensor(0.05 * 5))
    torch.autograd.backward(penalty)
    assert_close(weights.grad, 0.1 * tensor([1.0, 2.0]))


def test_mu_zero_does_not_even_look_at_the_drift() -> None:
    def drift() -> Tensor:
        pytest.fail("computed for nothing")

    assert FedProx(mu=0.0).penalty(Step([], drift, {}, None)) is None


def test_the_plan_is_fedavg(layout: Layout, report: Report) -> None:
    nothing = ([0.5, 0.5], [0.0, 0.0], [0.0, 0.0], [[0.0], [0.0]], [[0.0], [0.0]])
    reports = [report("a", 30, *nothing), report("b", 10, *nothing)]
    weights = [planned(algorithm, reports, layout).weight_C_G for algorithm in (FedProx(), FedAvg())]
    assert torch.equal(*weights)
