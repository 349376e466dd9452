"""FedAlign-MoE by hand, as the paper has it and by its defaults: plans, rare experts, the target, the penalty."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.algorithms import fedalign_moe as module
from fedalign.algorithms.fedalign_moe import FedAlignMoE
from fedalign.algorithms.fedalign_paper import FedAlignPaper
from fedalign.maths.routing import Overlap, alignment_strength, routing_penalty
from fedalign.protocol import LayerRouting, Layout, Statistics, Step, TokenRows
from tests.algorithms.conftest import Report


@pytest.fixture
def pair(report: Report) -> list[Statistics]:
    """Client a sends more tokens to expert 0, b to expert 1; their updates of expert 0 agree, of expert 1 oppose."""
    return [
        report("a", 30, [0.6, 0.4], [75, 25], [0.5, 0.1], [[3, 1], [0, 0]], [[1.0, 0.0], [0.0, 1.0]]),
        report("b", 10, [0.2, 0.8], [50, 50], [0.5, 0.2], [[1, 1], [2, 0]], [[0.6, 0.8], [0.0, -1.0]]),
    ]


def columns(layout: Layout, reports: list[Statistics], algorithm: FedAlignMoE) -> tuple[Tensor, Tensor, Tensor]:
    plan, _ = algorithm.plan(reports, layout, {})
    shared_C, gate_C_L_E, expert_C_L_E = layout.split(plan.weight_C_G)
    assert_close(plan.weight_C_G.sum(dim=0), torch.ones(5))
    return shared_C, gate_C_L_E[:, 0], expert_C_L_E[:, 0]


def test_the_plan_by_hand(layout: Layout, pair: list[Statistics]) -> None:
    shared, gate, expert = columns(layout, pair, FedAlignPaper(max_weight=1.0, min_agreement=0.0))
    assert_close(shared, tensor([0.75, 0.25]))
    # the target cancels: ω(0) ∝ .6·.5, .2·.5 and ω(1) ∝ .4·.1, .8·.2
    assert_close(gate, tensor([[0.75, 0.2], [0.25, 0.8]]))
    # sizes n·load share: a 22.5, 7.5; b 5, 5. Two holders, one pair: S passes its own mean; a = (1 + D) / 2 alike for
    # both, so expert 0 is weighted by size; D = -1 leaves expert 1 without agreement: size as well
    assert_close(expert, tensor([[22.5 / 27.5, 0.6], [5 / 27.5, 0.4]]), atol=1e-3, rtol=0)


def test_the_target_is_the_weighted_routing(layout: Layout, pair: list[Statistics]) -> None:
    _, state = FedAlignPaper(max_weight=1.0).plan(pair, layout, {})
    mixed = tensor([[0.75 * 0.6 + 0.25 * 0.2, 0.2 * 0.4 + 0.8 * 0.8]])
    assert_close(state["target_L_E"], mixed / mixed.sum())


def test_momentum_keeps_a_share_of_the_old_target(layout: Layout, pair: list[Statistics]) -> None:
    old = {"target_L_E": tensor([[0.9, 0.1]]), "other": tensor(3.0)}
    fresh = FedAlignPaper().plan(pair, layout, old)[1]
    slow = FedAlignPaper(target_momentum=0.75).plan(pair, layout, old)[1]
    assert_close(slow["target_L_E"], 0.75 * old["target_L_E"] + 0.25 * fresh["target_L_E"])
    assert slow["other"] == 3.0
    # the first round has nothing to keep
    first = FedAlignPaper(target_momentum=0.75).plan(pair, layout, {})[1]
    assert_close(first["target_L_E"], FedAlignPaper().plan(pair, layout, {})[1]["target_L_E"])


def test_round_one_measures_overlap_with_the_mean_by_data(layout: Layout, pair: list[Statistics]) -> None:
    # p_g = .75·(.6, .4) + .25·(.2, .8) = (.5, .5): ratios .5/.6, .2/.5 | .4/.5, .5/.8
    _, gate, _ = columns(layout, pair, FedAlignPaper(overlap="relative", max_weight=1.0))
    score = tensor([[0.5 * 0.5 / 0.6, 0.1 * 0.8], [0.5 * 0.4, 0.2 * 0.625]])
    assert_close(gate, score / score.sum(dim=0))


def test_the_cap_holds_among_holders(layout: Layout, pair: list[Statistics]) -> None:
    assert_close(columns(layout, pair, FedAlignPaper())[1], torch.full((2, 2), 0.5))
    assert_close(columns(layout, pair, FedAlignPaper(max_weight=0.7))[1], tensor([[0.7, 0.3], [0.3, 0.7]]))
    alone = [replace(pair[0], load_L_E=tensor([[75.0, 0.0]])), pair[1]]
    assert_close(columns(layout, alone, FedAlignPaper())[1], tensor([[0.5, 0.0], [0.5, 1.0]]))


def test_gate_options(layout: Layout, pair: list[Statistics]) -> None:
    by_data = tensor([[0.75, 0.75], [0.25, 0.25]])
    assert_close(columns(layout, pair, FedAlignPaper(gate="average"))[1], by_data)
    assert_close(columns(layout, pair, FedAlignPaper(gate_weights="uniform"))[1], torch.full((2, 2), 0.5))
    # 30 and 10 examples: .75·3 : .25·1 and .2·3 : .8·1
    sized = columns(layout, pair, FedAlignPaper(size_weighted=True, max_weight=1.0))[1]
    assert_close(sized, tensor([[0.9, 3 / 7], [0.1, 4 / 7]]))
    assert FedAlignPaper().centre_gates
    assert not FedAlignPaper(gate="average").centre_gates


def test_experts_may_be_averaged_for_the_ablation(layout: Layout, pair: list[Statistics]) -> None:
    expert = columns(layout, pair, FedAlignPaper(experts="average"))[2]
    assert_close(expert, tensor([[0.75, 0.75], [0.25, 0.25]]))


def test_a_client_of_another_role_is_left_out(layout: Layout, report: Report) -> None:
    same, other = [[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]
    rest = ([0.5, 0.5], [50, 50], [0.1, 0.1])
    reports = [report(c, 10, *rest, same if c != "d" else other, [[1.0, 0.2], [1.0, 0.2]]) for c in "abcd"]
    expert = columns(layout, reports, FedAlignPaper())[2]
    assert_close(expert, tensor([[1 / 3, 1 / 3]] * 3 + [[0.0, 0.0]]))
    plan, _ = FedAlignPaper().plan(reports, layout, {})
    asked = {request.client: {group.kind for group in request.groups} for request in plan.requests(1, layout)}
    assert asked["a"] == {"shared", "gate", "expert"}
    assert asked["d"] == {"shared", "gate"}  # what is left out is never uploaded


def test_an_expert_nobody_holds_stays(layout: Layout, pair: list[Statistics]) -> None:
    reports = [replace(report, load_L_E=tensor([[50.0, 0.0]])) for report in pair]
    plan, _ = FedAlignPaper().plan(reports, layout, {})
    _, gate, expert = layout.split(plan.weight_C_G)
    assert_close(expert[:, 0, 1], torch.zeros(2))
    assert_close(gate[:, 0, 1], torch.full((2,), 0.5))  # its router row goes on with everyone's


def test_a_rare_expert_is_clipped_to_the_median_norm_of_its_layer(layout: Layout, pair: list[Statistics]) -> None:
    # groups: shared, gate 0, gate 1, expert 0, expert 1. Only a holds expert 1; held norms 1, 2 and 8: median 2
    reports = [
        replace(pair[0], norm_G=tensor([9.0, 9, 9, 1, 8])),
        replace(pair[1], norm_G=tensor([9.0, 9, 9, 2, 7]), load_L_E=tensor([[50.0, 0.0]])),
    ]
    plan, _ = FedAlignPaper().plan(reports, layout, {})
    assert plan.factor_C_G is not None
    assert_close(plan.factor_C_G[0], tensor([1.0, 1, 1, 1, 0.25]))
    assert_close(plan.weight_C_G[:, 4], tensor([1.0, 0.0]))
    assert FedAlignPaper(min_holders=1).plan(reports, layout, {})[0].factor_C_G is None
    assert FedAlignPaper(experts="average").plan(reports, layout, {})[0].factor_C_G is None
    # with all of them rare, the even number of norms 1, 2, 8: still 2; without b: 1 and 8, their middle 4.5
    all_rare = FedAlignPaper(min_holders=5).plan(reports, layout, {})[0].factor_C_G
    assert all_rare is not None
    assert_close(all_rare[:, 3:], tensor([[1.0, 0.25], [1.0, 2 / 7]]))
    alone = FedAlignPaper().plan(reports[:1], layout, {})[0].factor_C_G
    assert alone is not None
    assert_close(alone[0, 3:], tensor([1.0, 4.5 / 8]))


def test_the_plan_follows_a_permutation_of_clients_and_does_not_depend_on_the_slices(
    layout: Layout, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    reports = [
        report(
            str(c),
            10 + c,
            torch.rand(2, generator=generator).softmax(0).tolist(),
            [50.0, 40.0 + c],
            torch.rand(2, generator=generator).tolist(),
            torch.randn(2, 4, generator=generator).tolist(),
            torch.randn(2, 4, generator=generator).tolist(),
        )
        for c in range(5)
    ]
    plan, _ = FedAlignPaper().plan(reports, layout, {})
    reverse, _ = FedAlignPaper().plan(reports[::-1], layout, {})
    assert_close(reverse.weight_C_G, plan.weight_C_G.flip(0))
    monkeypatch.setattr(module, "PAIRS", 1)
    assert_close(FedAlignPaper().plan(reports, layout, {})[0].weight_C_G, plan.weight_C_G)


def routing(tokens: int, seed: int) -> LayerRouting:
    logits = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed))
    return LayerRouting(logits.requires_grad_(), logits.detach().topk(2).indices, "softmax")


def step_of(layers: list[LayerRouting], target: Tensor | None, prob: Tensor | None = None) -> Step:
    return Step(layers, lambda: tensor(0.0), {} if target is None else {"target_L_E": target}, prob)


def test_no_penalty_without_a_target_or_strength() -> None:
    assert FedAlignPaper().penalty(step_of([routing(3, 0)], None)) is None
    assert FedAlignPaper(reg_strength=0.0).penalty(step_of([routing(3, 0)], torch.ones(1, 4) / 4)) is None


@pytest.mark.parametrize("overlap", ["product", "relative"])
@pytest.mark.parametrize("own", [True, False])
def test_the_penalty_is_the_mean_over_layers_whatever_their_lengths(own: bool, overlap: Overlap) -> None:
    layers = [routing(3, 0), routing(5, 1), routing(3, 2)]
    target = torch.rand(3, 4, generator=torch.Generator().manual_seed(3)).softmax(-1)
    prob = torch.rand(3, 4, generator=torch.Generator().manual_seed(4)).softmax(-1)
    expected = []
    for i, layer in enumerate(layers):
        batch = layer.logits_T_E.detach().softmax(-1).mean(0)
        strength = alignment_strength(prob[i] if own else batch, target[i], overlap)
        expected.append(routing_penalty(layer.logits_T_E, layer.topk_T_K, target[i], strength))
    penalty = FedAlignPaper(reg_strength=0.3, overlap=overlap).penalty(step_of(layers, target, prob if own else None))
    assert penalty is not None
    assert_close(penalty, 0.3 * torch.stack(expected).mean())
    torch.autograd.backward(penalty)
    assert all(layer.logits_T_E.grad is not None and layer.logits_T_E.grad.abs().sum() > 0 for layer in layers)


def test_the_penalty_passes_its_options_on() -> None:
    layer, target = routing(3, 0), torch.ones(1, 4) / 4
    algorithm = FedAlignPaper(reg_strength=1.0, granularity="batch", form="bregman", adaptive_strength=False)
    sigmoid = replace(layer, scoring="sigmoid")
    expected = routing_penalty(
        layer.logits_T_E, layer.topk_T_K, target[0], torch.ones(4), "batch", "bregman", "sigmoid"
    )
    assert_close(algorithm.penalty(step_of([sigmoid], target)), expected)


def test_descending_the_penalty_leads_to_the_target() -> None:
    target = tensor([[0.4, 0.3, 0.2, 0.1]])
    logits = torch.zeros(6, 4, requires_grad=True)
    everyone = torch.arange(4).expand(6, 4)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    algorithm = FedAlignPaper(reg_strength=1.0, adaptive_strength=False)
    for _ in range(200):
        optimizer.zero_grad()
        penalty = algorithm.penalty(step_of([LayerRouting(logits, everyone, "softmax")], target))
        assert penalty is not None
        torch.autograd.backward(penalty)
        optimizer.step()
    assert_close(logits.detach().softmax(-1), target.expand(6, 4), atol=1e-2, rtol=0)


def test_experts_by_load_alone(layout: Layout, pair: list[Statistics]) -> None:
    _, _, expert = columns(layout, pair, FedAlignPaper(experts="load"))
    assert_close(expert, tensor([[22.5 / 27.5, 7.5 / 12.5], [5 / 27.5, 5 / 12.5]]))


def test_the_defaults_by_hand(layout: Layout, pair: list[Statistics]) -> None:
    algorithm = FedAlignMoE()
    shared, gate, expert = columns(layout, pair, algorithm)
    assert_close(shared, tensor([0.75, 0.25]))
    assert_close(gate, tensor([[0.75, 0.75], [0.25, 0.25]]))
    assert_close(expert, tensor([[22.5 / 27.5, 7.5 / 12.5], [5 / 27.5, 5 / 12.5]]))
    assert algorithm.counts_tokens
    assert not algorithm.centre_gates
    assert algorithm.penalty(step_of([routing(3, 0)], torch.ones(1, 4) / 4)) is None


def test_the_papers_defaults_are_options_of_ours() -> None:
    paper = FedAlignMoE(reg_strength=0.1, gate="rows", experts="semantic", vocabulary="average")
    assert vars(FedAlignPaper()) == vars(paper)


def test_token_rows_by_hand(layout: Layout, pair: list[Statistics]) -> None:
    met = [tensor([[60.0, 40.0, 0.0]]), tensor([[25.0, 0.0, 0.0]])]
    reports = [replace(report, token_count_M_V=count) for report, count in zip(pair, met, strict=True)]
    with_rows = replace(layout, token_rows=(TokenRows(1, tokens=3, width=1),))
    plan, _ = FedAlignMoE().plan(reports, with_rows, {})
    # n·share: token 0 by 30·.6 and 10·1, token 1 by a alone, token 2 by nobody: by data
    expected = tensor([[[18 / 28, 1.0, 0.75]], [[10 / 28, 0.0, 0.25]]])
    assert plan.token_weight_C_M_V is not None
    assert_close(plan.token_weight_C_M_V, expected)
    assert FedAlignMoE(vocabulary="average").plan(reports, with_rows, {})[0].token_weight_C_M_V is None
    frozen = FedAlignMoE().plan(pair, layout, {})[0]  # no embedding is trained
    assert frozen.token_weight_C_M_V is None
