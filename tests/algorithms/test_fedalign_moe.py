"""FedAlign-MoE by hand, by its defaults, to the letter and by use: plans, rare experts, the target, the penalty."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign import testing
from fedalign.algorithms import fedalign_moe as module
from fedalign.algorithms.by_use import ByUse
from fedalign.algorithms.fedalign_moe import FedAlignMoE
from fedalign.algorithms.fedalign_paper import FedAlignPaper
from fedalign.client.statistics import packed_bits
from fedalign.maths.average import StreamingSum
from fedalign.maths.routing import Overlap, alignment_strength, routing_penalty
from fedalign.protocol import (
    EMBEDDINGS,
    KINDS,
    LayerRouting,
    Layout,
    Packed,
    Reports,
    Statistics,
    Step,
    TokenRows,
    Update,
)
from tests.algorithms.conftest import Report, planned


@pytest.fixture
def pair(report: Report) -> list[Statistics]:
    """Client a sends more tokens to expert 0, b to expert 1; their updates of expert 0 agree, of expert 1 oppose."""
    return [
        report("a", 30, [0.6, 0.4], [75, 25], [0.5, 0.1], [[3, 1], [0, 0]], [[1.0, 0.0], [0.0, 1.0]]),
        report("b", 10, [0.2, 0.8], [50, 50], [0.5, 0.2], [[1, 1], [2, 0]], [[0.6, 0.8], [0.0, -1.0]]),
    ]


def columns(layout: Layout, reports: list[Statistics], algorithm: FedAlignMoE) -> tuple[Tensor, Tensor, Tensor]:
    plan = planned(algorithm, reports, layout)
    shared_C, gate_C_L_E, expert_C_L_E = layout.split(plan.weight_C_G)
    assert_close(plan.weight_C_G.sum(dim=0), torch.ones(7))
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
    state = planned(FedAlignPaper(max_weight=1.0), pair, layout).state
    mixed = tensor([[0.75 * 0.6 + 0.25 * 0.2, 0.2 * 0.4 + 0.8 * 0.8]])
    assert_close(state["target_L_E"], mixed / mixed.sum())


def test_momentum_keeps_a_share_of_the_old_target(layout: Layout, pair: list[Statistics]) -> None:
    old = {"target_L_E": tensor([[0.9, 0.1]]), "other": tensor(3.0)}
    fresh = planned(FedAlignPaper(), pair, layout, old).state
    slow = planned(FedAlignPaper(target_momentum=0.75), pair, layout, old).state
    assert_close(slow["target_L_E"], 0.75 * old["target_L_E"] + 0.25 * fresh["target_L_E"])
    assert set(slow) == {"target_L_E"}  # what a plan does not say is gone
    # the first round has nothing to keep
    first = planned(FedAlignPaper(target_momentum=0.75), pair, layout).state
    assert_close(first["target_L_E"], planned(FedAlignPaper(), pair, layout).state["target_L_E"])


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
    assert planned(FedAlignPaper(), pair, layout).centred
    assert not planned(FedAlignPaper(gate="average"), pair, layout).centred


def test_experts_may_be_averaged_for_the_ablation(layout: Layout, pair: list[Statistics]) -> None:
    expert = columns(layout, pair, FedAlignPaper(experts="average"))[2]
    assert_close(expert, tensor([[0.75, 0.75], [0.25, 0.25]]))


def test_a_client_of_another_role_is_left_out(layout: Layout, report: Report) -> None:
    same, other = [[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]
    rest = ([0.5, 0.5], [50, 50], [0.1, 0.1])
    reports = [report(c, 10, *rest, same if c != "d" else other, [[1.0, 0.2], [1.0, 0.2]]) for c in "abcd"]
    expert = columns(layout, reports, FedAlignPaper())[2]
    assert_close(expert, tensor([[1 / 3, 1 / 3]] * 3 + [[0.0, 0.0]]))
    plan = planned(FedAlignPaper(), reports, layout)
    asked = {request.client: {group.kind for group in request.groups} for request in plan.requests(1, layout)}
    assert asked["a"] == set(KINDS)
    assert asked["d"] == set(KINDS) - {"expert"}  # what is left out is never uploaded


def test_an_expert_nobody_holds_stays(layout: Layout, pair: list[Statistics]) -> None:
    reports = [replace(report, load_L_E=tensor([[50.0, 0.0]])) for report in pair]
    plan = planned(FedAlignPaper(), reports, layout)
    _, gate, expert = layout.split(plan.weight_C_G)
    assert_close(expert[:, 0, 1], torch.zeros(2))
    assert_close(gate[:, 0, 1], torch.full((2,), 0.5))  # its router row goes on with everyone's


def test_a_rare_expert_is_clipped_to_the_median_norm_of_its_layer(layout: Layout, pair: list[Statistics]) -> None:
    # the last two groups are experts 0 and 1. Only a holds expert 1; held norms 1, 2 and 8: median 2
    reports = [
        replace(pair[0], norm_G=tensor([9.0, 9, 9, 9, 9, 1, 8])),
        replace(pair[1], norm_G=tensor([9.0, 9, 9, 9, 9, 2, 7]), load_L_E=tensor([[50.0, 0.0]])),
    ]
    plan = planned(FedAlignPaper(), reports, layout)
    assert plan.factor_C_G is not None
    assert_close(plan.factor_C_G[0], tensor([1.0, 1, 1, 1, 1, 1, 0.25]))
    assert_close(plan.weight_C_G[:, 6], tensor([1.0, 0.0]))
    assert planned(FedAlignPaper(min_holders=1), reports, layout).factor_C_G is None
    assert planned(FedAlignPaper(experts="average"), reports, layout).factor_C_G is None
    # with all of them rare, the even number of norms 1, 2, 8: still 2; without b: 1 and 8, their middle 4.5
    all_rare = planned(FedAlignPaper(min_holders=5), reports, layout).factor_C_G
    assert all_rare is not None
    assert_close(all_rare[:, 5:], tensor([[1.0, 0.25], [1.0, 2 / 7]]))
    alone = planned(FedAlignPaper(), reports[:1], layout).factor_C_G
    assert alone is not None
    assert_close(alone[0, 5:], tensor([1.0, 4.5 / 8]))


def test_the_plan_follows_a_permutation_of_clients_and_does_not_depend_on_the_slices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = testing.reports(clients=5)
    plan = planned(FedAlignPaper(), seen.of, seen.layout)
    reverse = planned(FedAlignPaper(), seen.of[::-1], seen.layout)
    assert reverse.clients == plan.clients[::-1]
    assert_close(reverse.weight_C_G, plan.weight_C_G.flip(0))
    monkeypatch.setattr(module, "PAIRS", 1)
    assert_close(planned(FedAlignPaper(), seen.of, seen.layout).weight_C_G, plan.weight_C_G)


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
    # ω ∝ n·p·m: 30·.6·.5 : 10·.2·.5 = 9 : 1 and 30·.4·.1 : 10·.8·.2 = 1.2 : 1.6, both capped at a half
    assert_close(gate, torch.full((2, 2), 0.5))
    # a pair agrees or opposes for both alike, and nobody is left out: by size, 22.5 : 5 and 7.5 : 5
    assert_close(expert, tensor([[22.5 / 27.5, 0.6], [5 / 27.5, 0.4]]), atol=1e-3, rtol=0)
    plan = planned(algorithm, pair, layout)
    assert plan.centred
    assert plan.factor_C_G is None  # both hold both experts
    assert_close(plan.state["target_L_E"], tensor([[0.5 * 0.6 + 0.5 * 0.2, 0.5 * 0.4 + 0.5 * 0.8]]))
    assert algorithm.asks == {"probabilities", "margins", "centroids", "directions", "tokens"}
    # no pull; with λ = .1, that times the divergence of the batch's mean routing, (.5, .5) from (.4, .6), times α
    logits = torch.zeros(3, 2)
    seen = LayerRouting(logits, tensor([[0], [1], [0]]), "softmax")
    pull = alignment_strength(tensor([0.5, 0.5]), tensor([0.4, 0.6]))
    batch = routing_penalty(logits, seen.topk_T_K, tensor([0.4, 0.6]), pull, "batch", "bregman")
    assert float(batch) > 0
    step = step_of([seen], plan.state["target_L_E"])
    assert algorithm.penalty(step) is None
    assert_close(replace(algorithm, reg_strength=0.1).penalty(step), 0.1 * batch)


def test_less_agreement_counts_for_less_and_opposition_for_nothing(layout: Layout, report: Report) -> None:
    rest = ([0.5, 0.5], [50, 50], [0.1, 0.1], [[1.0, 0.0], [0.0, 1.0]])
    moves = {"a": [[1.0, 0.0]] * 2, "b": [[1.0, 0.0]] * 2, "c": [[0.0, 1.0], [-1.0, 0.0]]}
    expert = columns(layout, [report(c, 10, *rest, move) for c, move in moves.items()], FedAlignMoE())[2]
    # expert 0: D = 1, 0, 0; a and b agree by (1 + (1 + 0) / 2) / 2 = .75, c by .5: .75 : .75 : .5
    assert_close(expert[:, 0], tensor([0.375, 0.375, 0.25]), atol=1e-3, rtol=0)
    # expert 1: D = 1, -1, -1: a and b .5, c 0
    assert_close(expert[:, 1], tensor([0.5, 0.5, 0.0]), atol=1e-3, rtol=0)


def test_use_alone_by_hand(layout: Layout, pair: list[Statistics]) -> None:
    algorithm = ByUse()
    shared, gate, expert = columns(layout, pair, algorithm)
    assert_close(shared, tensor([0.75, 0.25]))
    assert_close(gate, tensor([[0.75, 0.75], [0.25, 0.25]]))
    assert_close(expert, tensor([[22.5 / 27.5, 7.5 / 12.5], [5 / 27.5, 5 / 12.5]]))
    assert algorithm.asks == {"tokens"}
    plan = planned(algorithm, pair, layout, {"target_L_E": torch.ones(1, 2) / 2})
    assert not plan.centred
    assert plan.state == {}
    assert algorithm.penalty(step_of([routing(3, 0)], torch.ones(1, 4) / 4)) is None
    alone = [replace(pair[0], norm_G=tensor([9.0, 9, 9, 9, 9, 1, 8])), replace(pair[1], load_L_E=tensor([[50.0, 0.0]]))]
    assert planned(algorithm, alone, layout).factor_C_G is None  # no clip by what others did


def test_the_papers_defaults_and_use_alone_are_options_of_ours() -> None:
    pull = FedAlignMoE(reg_strength=0.1, granularity="token", form="kl")
    assert vars(FedAlignPaper()) == vars(replace(pull, size_weighted=False, min_agreement=0.5, vocabulary="average"))
    assert vars(ByUse()) == vars(FedAlignMoE(gate="average", experts="load", min_holders=1))


@pytest.mark.parametrize(
    ("algorithm", "asks"),
    [
        (FedAlignPaper(), {"probabilities", "margins", "centroids", "directions"}),
        (FedAlignMoE(vocabulary="clients"), {"probabilities", "margins", "centroids", "directions", "met"}),
        (FedAlignMoE(gate_weights="uniform", vocabulary="average"), {"probabilities", "centroids", "directions"}),
        (FedAlignMoE(experts="load", vocabulary="average"), {"probabilities", "margins"}),
        (
            FedAlignMoE(gate="average", reg_strength=0.1, experts="average", vocabulary="average"),
            {"probabilities", "margins"},
        ),  # the target is of ω
        (FedAlignMoE(gate="average", experts="average", vocabulary="average"), set()),
    ],
)
def test_what_options_need_is_asked_for(algorithm: FedAlignMoE, asks: set[str]) -> None:
    assert algorithm.asks == asks
    testing.planned(algorithm, testing.reports(asks=algorithm.asks))  # and is enough


def test_a_target_is_made_for_the_penalty_alone(layout: Layout, pair: list[Statistics]) -> None:
    plan = planned(FedAlignMoE(gate="average", max_weight=1.0, reg_strength=0.1), pair, layout)
    assert_close(layout.split(plan.weight_C_G)[1][:, 0], tensor([[0.75, 0.75], [0.25, 0.25]]))
    assert not plan.centred
    mixed = tensor([[0.9 * 0.6 + 0.1 * 0.2, 3 / 7 * 0.4 + 4 / 7 * 0.8]])
    assert_close(plan.state["target_L_E"], mixed / mixed.sum())


def with_rows(layout: Layout) -> Layout:
    return replace(layout, token_rows=(TokenRows(1, tokens=3, width=1),), sizes={**layout.sizes, EMBEDDINGS: 4})


def test_token_rows_by_hand(layout: Layout, pair: list[Statistics]) -> None:
    met = [tensor([[60.0, 40.0, 0.0]]), tensor([[25.0, 0.0, 0.0]])]
    reports = [replace(report, token_count_M_V=count) for report, count in zip(pair, met, strict=True)]
    plan = planned(ByUse(), reports, with_rows(layout))
    # n·share: token 0 by 30·.6 and 10·1, token 1 by a alone, token 2 by nobody: by data
    expected = tensor([[[18 / 28, 1.0, 0.75]], [[10 / 28, 0.0, 0.25]]])
    assert plan.token_weight_C_M_V is not None
    assert_close(plan.token_weight_C_M_V, expected)
    ours = planned(FedAlignMoE(), reports, with_rows(layout)).token_weight_C_M_V
    assert ours is not None
    assert_close(ours, expected)
    assert planned(ByUse(vocabulary="average"), reports, with_rows(layout)).token_weight_C_M_V is None
    frozen = planned(ByUse(), pair, layout)  # no embedding is trained
    assert frozen.token_weight_C_M_V is None


@pytest.mark.parametrize(
    ("round", "left"),
    [(1, 1.0), (5, 0.5), (9, 0.25), (4001, 0.0)],
)
def test_token_rows_go_over_to_data_by_half_lives(
    layout: Layout, pair: list[Statistics], round: int, left: float
) -> None:
    met = [tensor([[60.0, 40.0, 0.0]]), tensor([[25.0, 0.0, 0.0]])]
    reports = [replace(report, round=round, token_count_M_V=one) for report, one in zip(pair, met, strict=True)]
    own, by_size = tensor([[[18 / 28, 1.0, 0.75]], [[10 / 28, 0.0, 0.25]]]), tensor([[[0.75]], [[0.25]]])
    plan = planned(ByUse(vocabulary_half_life=4), reports, with_rows(layout))
    assert plan.token_weight_C_M_V is not None
    assert_close(plan.token_weight_C_M_V, left * own + (1 - left) * by_size)
    stays = planned(ByUse(), reports, with_rows(layout)).token_weight_C_M_V
    assert stays is not None
    assert_close(stays, own)


def test_token_rows_by_who_met_them(layout: Layout, pair: list[Statistics]) -> None:
    bits = [tensor([[0b011]], dtype=torch.uint8), tensor([[0b001]], dtype=torch.uint8)]
    reports = [replace(report, token_met_M_B=byte) for report, byte in zip(pair, bits, strict=True)]
    plan = planned(ByUse(vocabulary="clients"), reports, with_rows(layout))
    # token 0 by both, 30 : 10; token 1 by a alone; token 2 by nobody: by data
    assert plan.token_weight_C_M_V is not None
    assert_close(plan.token_weight_C_M_V, tensor([[[0.75, 1.0, 0.75]], [[0.25, 0.0, 0.25]]]))


@pytest.mark.parametrize("vocabulary", ["tokens", "clients"])
def test_a_trigger_word_of_one_client_moves_by_its_share_alone_if_two_must_hold_a_word(vocabulary: str) -> None:
    """Ten clients of equal data; the first alone holds word 7, and pushes its row as far as it likes."""
    seen = testing.reports(clients=10, asks={"tokens", "met"})
    met_V = torch.arange(testing.VOCABULARY) != 7
    reports = []
    for index, report in enumerate(seen.of):
        count_M_V = (met_V if index else torch.ones_like(met_V)).float().unsqueeze(0)
        said = replace(report, examples=20, token_count_M_V=count_M_V, token_met_M_B=packed_bits(count_M_V > 0))
        reports.append(replace(said, norm_G=torch.full_like(report.norm_G, 1e6)))
    moved = {}
    for holders in (1, 2):
        algorithm = FedAlignMoE(vocabulary=vocabulary, vocabulary_holders=holders, experts="average", gate="average")  # type: ignore[arg-type] # pytest's parameters are words of that kind
        plan = testing.planned(replace(algorithm, reg_strength=0.0), Reports(reports, seen.layout, 10))
        total = StreamingSum(seen.layout, plan, {r.client: r.norm_G for r in reports}, "float32")
        for request in plan.requests(1, seen.layout):
            groups = {group: Packed(torch.ones(seen.layout.sizes[group])) for group in request.groups}
            if request.client == reports[0].client:
                groups[EMBEDDINGS].values[7] = 1000.0
            else:
                groups[EMBEDDINGS].values[7] = 0.0  # whoever never read a word does not move its row
            assert total.add(Update(request.client, 1, groups)) is None
        moved[holders] = total.result({g: torch.zeros(size) for g, size in seen.layout.sizes.items()})[EMBEDDINGS]
    assert_close(moved[1][7], torch.tensor(1000.0))  # it owns the word
    assert_close(moved[2][7], torch.tensor(100.0))  # its share under FedAvg
    assert_close(moved[1][met_V], moved[2][met_V])


@pytest.mark.parametrize("kind", [FedAlignPaper, FedAlignMoE])
def test_all_pairs_are_looked_at_up_to_a_hundred_clients(
    kind: type[FedAlignMoE], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a sample")

    monkeypatch.setattr(module, "sampled_weights", never)
    testing.planned(kind(), testing.reports(clients=module.ALL_PAIRS))
    with pytest.raises(AssertionError, match="a sample"):
        testing.planned(kind(), testing.reports(clients=module.ALL_PAIRS + 1))


@pytest.mark.parametrize("stacked", [1, 1 << 25])
def test_a_few_more_than_a_hundred_clients_are_planned_as_by_all_pairs(
    stacked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = testing.reports(clients=module.ALL_PAIRS + 20)
    monkeypatch.setattr(module, "STACKED", stacked)
    sampled = testing.planned(FedAlignPaper(), seen)
    monkeypatch.setattr(module, "ALL_PAIRS", 1000)
    exact = testing.planned(FedAlignPaper(), seen)
    assert_close(sampled.weight_C_G, exact.weight_C_G, atol=1e-6, rtol=1e-4)
    assert sampled.metrics == exact.metrics
