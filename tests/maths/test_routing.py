"""Routing maths against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.maths.routing import (
    Form,
    Granularity,
    alignment_strength,
    cap_weights,
    consistency,
    consistency_weights,
    decision_margin,
    global_routing,
    router_log_prob,
    routing_penalty,
)
from fedalign.protocol import Scoring

few = settings(deadline=None, max_examples=40)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_consistency_product() -> None:
    score = consistency(tensor([[0.6, 0.4], [0.2, 0.8]]), tensor([[0.5, 0.1], [0.2, 0.25]]), tensor([0.5, 0.5]))
    assert_close(score, tensor([[0.15, 0.02], [0.02, 0.1]]))


def test_consistency_relative() -> None:
    score = consistency(
        tensor([[0.6, 0.0], [0.2, 0.0]]), tensor([[0.5, 1.0], [0.5, 1.0]]), tensor([0.4, 0.0]), overlap="relative"
    )
    assert_close(score, tensor([[0.5 * 0.4 / 0.6, 0.0], [0.25, 0.0]]))


def test_consistency_is_zero_where_not_held_whatever_was_reported() -> None:
    prob, margin = tensor([[0.5, 0.5]]), tensor([[0.3, torch.nan]])
    assert_close(consistency(prob, margin, tensor([0.5, 0.5]), tensor([[True, False]])), tensor([[0.075, 0.0]]))


def test_half_precision_is_computed_in_float32_and_float64_stays() -> None:
    prob, margin, target = tensor([[1e-4]]), tensor([[1e-4]]), tensor([1e-4])
    assert_close(consistency(prob.half(), margin.half(), target.half()), tensor([[1e-12]]), rtol=1e-2, atol=0)
    assert consistency(prob.double(), margin, target).dtype == torch.float64
    assert cap_weights(tensor([[0.5], [0.5]]).half(), 0.5).dtype == torch.float32
    assert cap_weights(tensor([[0.5], [0.5]]).double(), 0.5).dtype == torch.float64


def test_consistency_weights_columns() -> None:
    score = tensor([[0.3, 0.0, 0.0, 5.0], [0.1, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 5.0]])
    held = tensor([[True, True, False, False], [True, False, False, True], [True, True, False, True]])
    weight = consistency_weights(score, held)
    third = 1 / 3
    assert_close(weight, tensor([[0.75, 0.5, third, 0.0], [0.25, 0.0, third, 0.5], [0.0, 0.5, third, 0.5]]))


def test_consistency_weights_without_mask_and_with_tiny_scores() -> None:
    assert_close(consistency_weights(torch.zeros(4, 1)), torch.full((4, 1), 0.25))
    assert_close(consistency_weights(tensor([[3e-42], [1e-42]])), tensor([[0.75], [0.25]]), rtol=1e-3, atol=0)
    assert_close(consistency_weights(tensor([[0.0]])), tensor([[1.0]]))


@few
@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_weights_sum_to_one_and_keep_to_the_cap(clients: int, seed: int, cap: float) -> None:
    score = (seeded(clients, 8, seed=seed) - 0.4).clamp_min(0) ** 3
    held = seeded(clients, 8, seed=seed + 1) > 0.4
    weight = cap_weights(consistency_weights(score, held), cap, held)
    assert_close(weight.sum(dim=0), torch.ones(8))
    for column, mask in zip(weight.T, held.T, strict=True):
        holders = int(mask.sum())
        assert float(column.max()) <= max(cap, 1 / (holders or clients)) + 1e-6
        assert holders == 0 or float(column[~mask].abs().sum()) == 0


@pytest.mark.parametrize(
    ("weights", "cap", "expected"),
    [
        ([0.8, 0.15, 0.05], 0.5, [0.5, 0.375, 0.125]),  # excess in proportion 3 : 1
        ([0.7, 0.2, 0.1], 0.4, [0.4, 0.4, 0.2]),  # exactly at the cap
        ([0.7, 0.25, 0.05], 0.4, [0.4, 0.4, 0.2]),  # the second is pushed over and capped in turn
        ([1.0, 0.0, 0.0], 0.5, [0.5, 0.25, 0.25]),  # others all zero: equally
        ([0.9, 0.1, 0.0, 0.0], 0.3, [0.3, 0.3, 0.2, 0.2]),
        ([0.9, 0.1], 0.4, [0.5, 0.5]),  # cannot be kept
        ([0.9, 0.1], 0.5, [0.5, 0.5]),
        ([1.0], 0.5, [1.0]),
        ([0.6, 0.4], 1.0, [0.6, 0.4]),
        ([0.8, 0.1, 0.1], 1 / 3, [1 / 3, 1 / 3, 1 / 3]),
        ([0.0, 0.0], 0.7, [0.5, 0.5]),
    ],
)
def test_cap_weights(weights: list[float], cap: float, expected: list[float]) -> None:
    assert_close(cap_weights(tensor(weights).unsqueeze(1), cap), tensor(expected).unsqueeze(1))


def test_cap_weights_gives_the_excess_to_holders_only() -> None:
    weight, held = tensor([[0.9], [0.1], [0.0]]), tensor([[True], [True], [False]])
    assert_close(cap_weights(weight, 0.6, held), tensor([[0.6], [0.4], [0.0]]))
    assert_close(cap_weights(weight, 0.4, held), tensor([[0.5], [0.5], [0.0]]))
    assert_close(cap_weights(weight, 0.4, torch.zeros(3, 1, dtype=torch.bool)), torch.full((3, 1), 1 / 3))


def test_clients_may_lead_further_axes() -> None:
    score, held = seeded(5, 3, 4), seeded(5, 3, 4, seed=1) > 0.3
    together = cap_weights(consistency_weights(score, held), 0.4, held)
    apart = [cap_weights(consistency_weights(score[:, i], held[:, i]), 0.4, held[:, i]) for i in range(3)]
    assert_close(together, torch.stack(apart, dim=1))


def test_weights_follow_a_permutation_of_clients() -> None:
    score, order = seeded(6, 4), torch.tensor([3, 0, 5, 1, 4, 2])
    assert_close(
        cap_weights(consistency_weights(score[order]), 0.3), cap_weights(consistency_weights(score), 0.3)[order]
    )


def test_global_routing() -> None:
    prob, weight = tensor([[0.6, 0.4], [0.2, 0.8]]), tensor([[0.75, 0.5], [0.25, 0.5]])
    assert_close(global_routing(prob, weight), tensor([0.5, 0.6]) / 1.1)
    assert_close(global_routing(prob, torch.zeros(2, 2)), tensor([0.5, 0.5]))


def test_alignment_strength() -> None:
    assert_close(alignment_strength(tensor([0.5, 0.25, 0.25]), tensor([0.2, 0.6, 0.2])), tensor([2 / 3, 1.0, 1 / 3]))
    assert_close(alignment_strength(tensor([1.0, 0.0]), tensor([0.0, 1.0])), torch.zeros(2))
    seldom = alignment_strength(tensor([0.5, 0.48, 0.02]), tensor([0.5, 0.46, 0.04]), "relative")
    assert_close(seldom, tensor([1.0, 0.46 / 0.48, 0.5]))  # an expert that nobody uses much is pulled on as well


# softmax of (log 3, 0) is (3/4, 1/4), of (0, 0) is (1/2, 1/2)
LOGITS = tensor([[3.0, 1.0], [1.0, 1.0]]).log()
TOPK = tensor([[0], [1]])
TARGET, STRENGTH = tensor([0.6, 0.4]), tensor([1.0, 0.5])
KL_TOKEN = tensor([0.75 * torch.tensor(0.75 / 0.6).log(), 0.25 * torch.tensor(0.5 / 0.4).log()])
P_MEAN = tensor([0.625, 0.375])


@pytest.mark.parametrize(
    ("granularity", "form", "expected"),
    [
        ("token", "kl", KL_TOKEN.mean()),
        ("token", "bregman", (KL_TOKEN + tensor([-0.75 + 0.6, 0.5 * (-0.5 + 0.4)])).mean()),
        ("batch", "kl", (STRENGTH * P_MEAN * (P_MEAN / TARGET).log()).sum()),
        ("batch", "bregman", (STRENGTH * (P_MEAN * (P_MEAN / TARGET).log() - P_MEAN + TARGET)).sum()),
    ],
)
def test_routing_penalty_by_hand(granularity: Granularity, form: Form, expected: Tensor) -> None:
    assert_close(routing_penalty(LOGITS, TOPK, TARGET, STRENGTH, granularity, form), expected)


def test_routing_penalty_of_sigmoid_scores() -> None:
    # σ(0) = 1/2 and σ(log 1/3) = 1/4: normalised 2/3 and 1/3
    logits = tensor([[0.0, 1 / 3]]).where(tensor([[True, False]]), tensor([[0.0, 1 / 3]]).log())
    expected = 2 / 3 * tensor((2 / 3) / 0.6).log()
    assert_close(routing_penalty(logits, tensor([[0]]), TARGET, STRENGTH, scoring="sigmoid"), expected)


def test_a_target_of_zero_is_clamped() -> None:
    value = routing_penalty(LOGITS[:1], tensor([[1]]), tensor([1.0, 0.0]), torch.ones(2))
    assert_close(value, 0.25 * (tensor(0.25).log() - tensor(1e-8).log()))


modes = pytest.mark.parametrize(
    ("granularity", "form", "scoring"),
    [(g, f, s) for g in get_args(Granularity) for f in get_args(Form) for s in get_args(Scoring) if s != "unknown"],
)


@modes
def test_penalty_gradient_is_exact_and_flows_through_the_logits_alone(
    granularity: Granularity, form: Form, scoring: Scoring
) -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    target = seeded(4).double().requires_grad_()
    topk = logits.detach().topk(2).indices

    def penalty(x: Tensor) -> Tensor:
        return routing_penalty(x, topk, target, seeded(4, seed=2).double(), granularity, form, scoring)

    assert torch.autograd.gradcheck(penalty, (logits,))
    torch.autograd.backward(penalty(logits))
    assert target.grad is None


@modes
def test_layers_may_lead(granularity: Granularity, form: Form, scoring: Scoring) -> None:
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    topk, target, strength = logits.topk(2).indices, seeded(3, 4), seeded(3, 4, seed=2)
    one_by_one = [
        routing_penalty(logits[i], topk[i], target[i], strength[i], granularity, form, scoring) for i in range(3)
    ]
    together = routing_penalty(logits, topk, target, strength, granularity, form, scoring)
    assert_close(together, torch.stack(one_by_one).mean())


@modes
def test_extreme_logits_stay_finite(granularity: Granularity, form: Form, scoring: Scoring) -> None:
    logits = tensor([[1e4, -1e4, 0.0], [-torch.inf, 0.0, 5.0]]).requires_grad_()
    value = routing_penalty(
        logits, tensor([[0, 1], [0, 2]]), torch.ones(3) / 3, torch.ones(3), granularity, form, scoring
    )
    torch.autograd.backward(value)
    assert logits.grad is not None
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@modes
def test_no_tokens_cost_nothing(granularity: Granularity, form: Form, scoring: Scoring) -> None:
    logits, topk = torch.zeros(0, 3), torch.zeros(0, 1, dtype=torch.int64)
    value = routing_penalty(logits, topk, torch.ones(3) / 3, torch.ones(3), granularity, form, scoring)
    assert value == 0


@few
@given(st.integers(0, 10**6))
def test_bregman_is_zero_at_the_target_and_positive_elsewhere(seed: int) -> None:
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed))
    everyone = torch.arange(5).unsqueeze(0)
    own = logits.softmax(-1)[0]
    assert_close(routing_penalty(logits, everyone, own, torch.ones(5), form="bregman"), tensor(0.0), atol=1e-6, rtol=0)
    assert routing_penalty(logits, everyone, own.flip(0) * 0.5 + 0.1, torch.ones(5), form="bregman") > 0


def test_router_log_prob_of_square_roots_of_softplus() -> None:
    """Of logits 0 and log(e - 1) softplus is log 2 and 1."""
    log_p = router_log_prob(tensor([[0.0, math.log(math.e - 1)]]), "sqrtsoftplus")
    scores = tensor([[math.sqrt(math.log(2)), 1.0]])
    assert_close(log_p.exp(), scores / scores.sum())
    assert router_log_prob(tensor([[-200.0, 0.0]]), "sqrtsoftplus").isfinite().all()


def test_what_is_not_known_has_no_probabilities() -> None:
    with pytest.raises(ValueError, match="unknown scoring"):
        router_log_prob(tensor([[0.0, 1.0]]), "unknown")


def test_router_log_prob_of_tiny_sigmoid_scores() -> None:
    log_p = router_log_prob(tensor([[-200.0, -201.0]]), "sigmoid")
    assert_close(log_p, tensor([[0.0, -1.0]]).log_softmax(-1))


def test_decision_margin_by_hand() -> None:
    prob = tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.35, 0.25]])
    # best left out: 0.2 | 0.1 | 0.4 (chosen against the probabilities: no negative margin)
    topk = tensor([[0, 1], [2, 1], [1, 2]])
    assert_close(decision_margin(prob, topk), tensor([0.3, (0.1 + 0.1 + 0.0) / 3, (0.6 + 0.0) / 2]))


def test_decision_margin_edges() -> None:
    prob = tensor([[0.9, 0.1]])
    assert_close(decision_margin(prob, tensor([[1, 0]])), torch.zeros(2))  # K = E
    assert_close(decision_margin(prob, tensor([[0]])), tensor([0.8, 0.0]))  # nobody chose the second
    assert_close(decision_margin(tensor([[1.0]]), tensor([[0]])), torch.zeros(1))  # E = 1
    assert_close(decision_margin(torch.zeros(0, 2), torch.zeros(0, 1, dtype=torch.int64)), torch.zeros(2))
