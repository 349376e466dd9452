from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedalign.errors import UserError
from fedalign.maths.routing import router_log_prob
from fedalign.moe.families import MoELayer, router_weight
from fedalign.moe.model import MoEModel
from fedalign.moe.probe import Captured, RoutingProbe, RoutingStatistics, balancing_loss, idle_experts
from fedalign.protocol import LayerRouting, Scoring
from tests.moe import tiny
from tests.moe.given import given_experts

Tiny = Callable[[str], MoEModel]


def run(moe: MoEModel, inputs: dict[str, Tensor]) -> Captured:
    with RoutingProbe(moe) as probe, probe.capture(*tiny.masks(inputs)) as captured:
        moe.model(**inputs)
    return captured


@contextmanager
def training(moe: MoEModel) -> Iterator[None]:
    moe.model.train()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield
    moe.model.eval()


def backward(loss: Tensor) -> None:
    torch.autograd.backward([loss])


def mask_of(moe: MoEModel, layer: int, inputs: dict[str, Tensor]) -> Tensor:
    name = "decoder_attention_mask" if moe.layers[layer].in_decoder else "attention_mask"
    return inputs[name].flatten().bool()


# --- what is captured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.ALL)
@pytest.mark.parametrize("train", [False, True])
def test_logits_are_the_router_applied_to_its_input(family: str, train: bool) -> None:
    moe = MoEModel.wrap(tiny.build(family))
    inputs = tiny.batch(family)
    if train:
        with training(moe):
            captured = run(moe, inputs)
    else:
        captured = run(moe, inputs)
    assert len(captured.routing) == len(moe.layers)
    for index, layer in enumerate(moe.layers):
        tokens = int(mask_of(moe, index, inputs).sum())
        routing, router = captured.routing[index], moe.model.get_submodule(layer.router)
        hidden_T_H = captured.hidden_T_H(index)
        if family == "gemma4":  # scales what it is given, and returns probabilities
            hidden_T_H = router.norm(hidden_T_H) * router.scale * router.scalar_root_size
        expected = functional.linear(hidden_T_H, router_weight(router), getattr(router, "bias", None))
        expected = expected.log_softmax(1) if family == "gemma4" else expected
        assert routing.logits_T_E.shape == (tokens, tiny.EXPERTS)
        assert routing.logits_T_E.dtype == torch.float32
        torch.testing.assert_close(routing.logits_T_E, expected)


@pytest.mark.parametrize("family", tiny.ALL)
@pytest.mark.parametrize("train", [False, True])
def test_topk_is_what_the_experts_were_given(family: str, train: bool) -> None:
    moe = MoEModel.wrap(tiny.build(family))
    inputs = tiny.batch(family)
    with given_experts(moe) as given, training(moe) if train else nullcontext():
        captured = run(moe, inputs)
    for index, routing in enumerate(captured.routing):
        kept_T_E = given[index][0][mask_of(moe, index, inputs)]
        assert routing.topk_T_K.dtype == torch.int64
        assert routing.topk_T_K.shape == (len(kept_T_E), moe.top_k)
        chosen_T_E = torch.zeros_like(kept_T_E).scatter_(1, routing.topk_T_K, True)
        if family == "switch_transformers":
            received_T = kept_T_E.any(1)
            assert torch.equal(chosen_T_E[received_T], kept_T_E[received_T])
            assert torch.equal(routing.topk_T_K[:, 0], routing.logits_T_E.argmax(1))
        else:
            assert torch.equal(chosen_T_E, kept_T_E)


def test_phimoe_samples_its_choice_in_training() -> None:
    moe = MoEModel.wrap(tiny.build("phimoe", router_jitter_noise=0.5))
    with training(moe):
        captured = run(moe, tiny.batch("phimoe", examples=4, length=40))
    greedy = captured.routing[0].logits_T_E.topk(2).indices
    assert not torch.equal(greedy.sort().values, captured.routing[0].topk_T_K.sort().values)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "granitemoe", "phimoe", "qwen3_moe", "jamba"])
def test_logits_agree_with_transformers_own_recorder(family: str, tiny_moe: Tiny) -> None:
    moe, inputs = tiny_moe(family), tiny.batch(family)
    recorded = moe.model(**inputs, output_router_logits=True).router_logits
    for index, routing in enumerate(run(moe, inputs).routing):
        torch.testing.assert_close(routing.logits_T_E, recorded[index][mask_of(moe, index, inputs)])


@pytest.mark.parametrize("family", tiny.ALL)
def test_gradients_flow_from_captured_logits_to_the_router(family: str) -> None:
    moe = MoEModel.wrap(tiny.build(family))
    backward(balancing_loss(run(moe, tiny.batch(family)).routing, moe.experts))
    for layer in moe.layers:
        gradient = next(moe.model.get_submodule(layer.router).parameters()).grad
        assert gradient is not None
        assert gradient.any()


def test_reading_statistics_first_keeps_the_gradients(tiny_moe: Tiny) -> None:
    moe = tiny_moe("olmoe")
    captured = run(moe, tiny.batch("olmoe"))
    RoutingStatistics(len(moe.layers), moe.experts, moe.hidden).update(captured)
    with torch.no_grad():
        routing = captured.routing
    assert all(layer.logits_T_E.requires_grad for layer in routing)


def test_nothing_is_recorded_for_gradients_in_an_evaluation(tiny_moe: Tiny) -> None:
    moe = tiny_moe("olmoe")
    with torch.no_grad():
        captured = run(moe, tiny.batch("olmoe"))
    assert not any(layer.logits_T_E.requires_grad for layer in captured.routing)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_selection_bias_moves_the_choice_and_not_the_logits(family: str) -> None:
    moe = MoEModel.wrap(tiny.build(family, n_group=1))
    inputs = tiny.batch(family)
    before = run(moe, inputs).routing[0]
    bias = dict(moe.model.named_buffers())[f"{moe.layers[0].router}.e_score_correction_bias"]
    bias.copy_(torch.tensor([0.0, 5.0, 0.0, 5.0]))
    after = run(moe, inputs).routing[0]
    assert torch.equal(before.logits_T_E, after.logits_T_E)
    assert set(after.topk_T_K.flatten().tolist()) == {1, 3}


def test_group_limited_routing_stays_within_a_group(tiny_moe: Tiny) -> None:
    for family in ("deepseek_v2", "deepseek_v3"):
        topk_T_K = run(tiny_moe(family), tiny.batch(family)).routing[0].topk_T_K
        assert torch.equal(topk_T_K[:, 0] // 2, topk_T_K[:, 1] // 2)


def test_captured_logits_are_float32_under_autocast(tiny_moe: Tiny) -> None:
    moe = tiny_moe("olmoe")
    with torch.autocast("cpu", torch.bfloat16):
        captured = run(moe, tiny.batch("olmoe"))
        statistics = RoutingStatistics(len(moe.layers), moe.experts, moe.hidden)
        statistics.update(captured)
    assert captured.routing[0].logits_T_E.dtype == torch.float32
    hidden_T_H, topk_T_K = captured.hidden_T_H(0).float(), captured.routing[0].topk_T_K
    expected = hidden_T_H[(topk_T_K == 3).any(1)].mean(0)
    torch.testing.assert_close(statistics.finish(1, 1).centroid_L_E_H[0, 3], expected)


# --- hooks --------------------------------------------------------------------------------------------------------


def _hooks(moe: MoEModel) -> int:
    return sum(len(moe.model.get_submodule(layer.router)._forward_hooks) for layer in moe.layers)


def test_hooks_are_idle_outside_a_capture_and_removed_at_the_end() -> None:
    moe, inputs = MoEModel.wrap(tiny.build("olmoe")), tiny.batch("olmoe")
    before = _hooks(moe)
    with RoutingProbe(moe) as probe:
        assert _hooks(moe) == before + 2
        moe.model(**inputs)
        with probe.capture(*tiny.masks(inputs)) as captured:
            moe.model(**inputs)
        moe.model(**tiny.batch("olmoe", seed=9))
        assert captured.routing[0].logits_T_E.shape == (27, 4)
    assert _hooks(moe) == before


def enable_checkpointing(moe: MoEModel, use_reentrant: bool) -> None:
    # transformers 5.23 renamed it and deprecates the old name
    name = "activation" if hasattr(moe.model, "activation_checkpointing_enable") else "gradient"
    getattr(moe.model, f"{name}_checkpointing_enable")({"use_reentrant": use_reentrant})


def _gradients(checkpointing: bool) -> tuple[Captured, list[Tensor]]:
    moe, inputs = MoEModel.wrap(tiny.build("olmoe")), tiny.batch("olmoe")
    moe.model.train()
    if checkpointing:
        enable_checkpointing(moe, use_reentrant=False)
    with RoutingProbe(moe) as probe, probe.capture(*tiny.masks(inputs)) as captured:
        logits = moe.model(**inputs, use_cache=False).logits
        loss = logits.square().mean() + balancing_loss(captured.routing, moe.experts)
        backward(loss)  # inside the capture on purpose: routers run again here
    return captured, [p.grad for p in moe.model.parameters() if p.grad is not None]


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, checkpointed = _gradients(checkpointing=False), _gradients(checkpointing=True)
    assert torch.equal(plain[0].routing[1].logits_T_E, checkpointed[0].routing[1].logits_T_E)
    assert len(plain[1]) == len(checkpointed[1])
    for expected, gradient in zip(plain[1], checkpointed[1], strict=True):
        torch.testing.assert_close(gradient, expected)


def test_reentrant_checkpointing_is_refused() -> None:
    moe, inputs = MoEModel.wrap(tiny.build("olmoe")), tiny.batch("olmoe")
    probe = RoutingProbe(moe)
    moe.model.train()
    enable_checkpointing(moe, use_reentrant=True)
    moe.model.enable_input_require_grads()
    with pytest.raises(UserError, match=r"use_reentrant = True.*Choose"), probe.capture(*tiny.masks(inputs)):
        moe.model(**inputs, use_cache=False)
    with pytest.raises(UserError, match=r"use_reentrant = True"):
        RoutingProbe(moe)


def test_misuse_is_told(tiny_moe: Tiny) -> None:
    moe, inputs = tiny_moe("olmoe"), tiny.batch("olmoe")
    with RoutingProbe(moe) as probe:
        with probe.capture(*tiny.masks(inputs)) as captured:
            pass
        with pytest.raises(RuntimeError, match=r"layers.0.mlp.gate did not run"):
            captured.routing  # noqa: B018  # reading it is the point
        with probe.capture(*tiny.masks(inputs)):
            moe.model(**inputs)
            with pytest.raises(RuntimeError, match=r"ran twice"):
                moe.model(**inputs)
        with probe.capture(torch.ones(2, 5)) as captured:
            moe.model(**inputs)
        with pytest.raises(RuntimeError, match=r"saw 36 tokens, the mask has 2 x 5"):
            captured.routing  # noqa: B018  # reading it is the point


def test_an_encoder_decoder_model_needs_both_masks(tiny_moe: Tiny) -> None:
    moe, inputs = tiny_moe("switch_transformers"), tiny.batch("switch_transformers")
    with RoutingProbe(moe) as probe, probe.capture(inputs["attention_mask"]) as captured:
        moe.model(**inputs)
    with pytest.raises(RuntimeError, match=r"needs decoder_mask_B_S"):
        captured.routing  # noqa: B018  # reading it is the point


# --- statistics ---------------------------------------------------------------------------------------------------


def naive(moe: MoEModel, batches: list[dict[str, Tensor]], outputs: list[list[Tensor]]) -> dict[str, Tensor]:
    """ALGORITHM.md's definitions, token by token; `outputs` are what the experts were given."""
    layers, experts, hidden = len(moe.layers), moe.experts, moe.hidden
    prob, load, chosen, margin = (torch.zeros(layers, experts, dtype=torch.float64) for _ in range(4))
    centroid = torch.zeros(layers, experts, hidden, dtype=torch.float64)
    tokens = torch.zeros(layers, 1)
    for inputs, given in zip(batches, outputs, strict=True):
        captured = run(moe, inputs)
        for index, layer in enumerate(moe.layers):
            kept = given[index][mask_of(moe, index, inputs)]
            for token in range(len(kept)):
                logits = captured.routing[index].logits_T_E[token].detach().double()
                scores = {"sigmoid": logits.sigmoid(), "sqrtsoftplus": functional.softplus(logits).sqrt()}
                p = (
                    logits.softmax(0)
                    if layer.scoring == "softmax"
                    else scores[layer.scoring] / scores[layer.scoring].sum()
                )
                sent = kept[token].nonzero().flatten().tolist()
                top = [int(logits.argmax())] if layer.dispatch == "one_hot" else sent
                best_left = max(float(p[e]) for e in range(experts) if e not in top)
                tokens[index] += 1
                prob[index] += p
                for e in top:
                    chosen[index, e] += 1
                    margin[index, e] += max(0.0, float(p[e]) - best_left)
                for e in sent:
                    load[index, e] += 1
                    centroid[index, e] += captured.hidden_T_H(index)[token].double()
    return {
        "prob_L_E": prob / tokens,
        "load_L_E": load,
        "margin_L_E": margin / chosen.clamp(min=1),
        "centroid_L_E_H": centroid / load.clamp(min=1).unsqueeze(2),
    }


@pytest.mark.parametrize("family", tiny.ALL)
def test_statistics_equal_a_loop_over_tokens(family: str) -> None:
    moe = MoEModel.wrap(tiny.build(family))
    batches = [tiny.batch(family, seed=1), tiny.batch(family, examples=2, length=9, seed=2)]
    statistics = RoutingStatistics(len(moe.layers), moe.experts, moe.hidden)
    for inputs in batches:
        statistics.update(run(moe, inputs))
    with given_experts(moe) as given:
        for inputs in batches:
            moe.model(**inputs)
    expected = naive(moe, batches, [[layer[index] for layer in given] for index in range(2)])
    summary = statistics.finish(min_tokens=1, min_examples=1)
    for name, values in expected.items():
        torch.testing.assert_close(getattr(summary, name), values.float(), rtol=1e-4, atol=1e-6, msg=name)
    assert summary.tokens == sum(int(inputs["attention_mask"].sum()) for inputs in batches)


@pytest.mark.parametrize("family", tiny.TABLE)
def test_padding_does_not_count(family: str, tiny_moe: Tiny) -> None:
    """A padded batch has the statistics of its examples, each alone and unpadded."""
    moe, inputs = tiny_moe(family), tiny.batch(family)
    padded, alone = (RoutingStatistics(len(moe.layers), moe.experts, moe.hidden) for _ in range(2))
    padded.update(run(moe, inputs))
    for example in range(3):
        one = {}
        for name, values in inputs.items():
            mask = inputs[name.replace("input_ids", "attention_mask")][example]
            one[name] = values[example : example + 1, : int(mask.sum())]
        alone.update(run(moe, one))
    for left, right in zip(padded.finish(1, 1), alone.finish(1, 1), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def layer(experts: int = 3, top_k: int = 1, scoring: Scoring = "softmax") -> MoELayer:
    return MoELayer("router", "experts", scoring, experts, top_k, 2, False, logits=0, dispatch="index", chosen=2)


def capture_of(prob_T_E: list[list[float]], topk: list[list[int]], mask: list[list[int]], **kwargs: Any) -> Captured:
    """A capture by hand: probabilities and choices of every position of a [B, S] batch; token t enters as [t, 1]."""
    spec = layer(len(prob_T_E[0]), len(topk[0]), **kwargs)
    captured = Captured([spec], torch.tensor(mask), None)
    hidden_T_H = torch.stack([torch.arange(len(topk)).float(), torch.ones(len(topk))], dim=1)
    captured.add(0, hidden_T_H, (torch.tensor(prob_T_E).log(), None, torch.tensor(topk)))
    return captured


def test_a_row_that_another_one_repeats_is_no_example_of_its_own() -> None:
    captured = capture_of([[0.6, 0.4]] * 4, [[0], [0], [0], [1]], [[1, 1], [1, 1]])
    for whole, reached in ((None, [[3.0, 1.0]]), (torch.tensor([True, False]), [[3.0, 0.0]])):
        statistics = RoutingStatistics(1, 2, 2)
        statistics.update(captured, whole)
        assert statistics.finish(min_tokens=1, min_examples=1).load_L_E.tolist() == reached


def test_statistics_by_hand() -> None:
    prob = [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.1, 0.1, 0.8]]
    captured = capture_of(prob, [[0], [1], [0], [2]], [[1, 1], [1, 0]])  # the last token is padding
    statistics = RoutingStatistics(1, 3, 2)
    statistics.update(captured)
    summary = statistics.finish(min_tokens=1, min_examples=1)
    torch.testing.assert_close(summary.prob_L_E, torch.tensor([[1.3 / 3, 1.4 / 3, 0.1]]))
    assert summary.load_L_E.tolist() == [[2.0, 1.0, 0.0]]
    torch.testing.assert_close(summary.margin_L_E, torch.tensor([[0.2, 0.5, 0.0]]))  # (.3 + .1) / 2
    assert summary.centroid_L_E_H.tolist() == [[[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]]  # tokens 0 and 2; token 1; none
    assert summary.tokens == 3


def test_a_router_of_unknown_scoring_has_the_share_of_its_choices() -> None:
    captured = capture_of([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], [[0, 1], [1, 2]], [[1, 1]], scoring="unknown")
    statistics = RoutingStatistics(1, 3, 2)
    statistics.update(captured)
    summary = statistics.finish(min_tokens=1, min_examples=1)
    assert summary.prob_L_E.tolist() == [[0.25, 0.5, 0.25]]
    assert summary.load_L_E.tolist() == [[1.0, 2.0, 1.0]]


def test_no_margin_when_nothing_is_left_out() -> None:
    statistics = RoutingStatistics(1, 2, 2)
    statistics.update(capture_of([[0.9, 0.1]], [[0, 1]], [[1]]))
    assert not statistics.finish(1, 1).margin_L_E.any()


@pytest.mark.parametrize(
    ("min_tokens", "min_examples", "held"),
    [(1, 1, [1, 1, 0]), (2, 1, [1, 1, 0]), (3, 1, [1, 0, 0]), (1, 2, [1, 0, 0]), (4, 1, [0, 0, 0]), (0, 0, [1, 1, 0])],
)
def test_experts_reached_too_rarely_are_withheld(min_tokens: int, min_examples: int, held: list[int]) -> None:
    """Expert 0: 3 tokens of 2 examples; expert 1: 2 tokens of 1 example; expert 2: none."""
    prob = [[0.6, 0.3, 0.1]] * 2 + [[0.3, 0.6, 0.1]] * 2 + [[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]
    topk = [[0], [0], [1], [1], [0], [2]]
    statistics = RoutingStatistics(1, 3, 2)
    statistics.update(capture_of(prob, topk, [[1, 1], [1, 1], [1, 0]]))
    summary = statistics.finish(min_tokens, min_examples)
    for reported in (summary.load_L_E, summary.margin_L_E, summary.centroid_L_E_H.sum(2)):
        assert (reported[0] > 0).long().tolist() == held
    assert summary.prob_L_E.sum() == pytest.approx(1)


def test_a_client_without_tokens_reports_zeros() -> None:
    summary = RoutingStatistics(2, 4, 8).finish()
    assert summary.tokens == 0
    assert not any(values.any() for values in summary[:4])


def test_dropped_tokens_are_choices_but_no_load() -> None:
    """Switch, capacity 4: of 12 tokens of a sequence an expert takes the first 4 that chose it."""
    moe = MoEModel.wrap(tiny.build("switch_transformers"))
    router = moe.model.get_submodule(moe.layers[0].router)
    with torch.no_grad():
        router.classifier.weight.zero_()  # argmax of equals: expert 0 for all
    inputs = tiny.batch("switch_transformers")  # encoder lengths 12, 9, 6
    captured = run(moe, inputs)
    assert not captured.routing[0].topk_T_K.any()
    statistics = RoutingStatistics(2, moe.experts, moe.hidden)
    statistics.update(captured)
    summary = statistics.finish(1, 1)
    assert summary.load_L_E[0].tolist() == [12.0, 0.0, 0.0, 0.0]
    hidden = captured.hidden_T_H(0)
    received = torch.cat([hidden[0:4], hidden[12:16], hidden[21:25]])
    torch.testing.assert_close(summary.centroid_L_E_H[0, 0], received.mean(0))
    assert idle_experts(captured)[0].tolist() == [False, True, True, True]


# --- idle experts and balance -------------------------------------------------------------------------------------


def test_an_expert_reached_by_padding_alone_is_idle() -> None:
    captured = capture_of([[0.5, 0.3, 0.2]] * 3, [[0], [1], [2]], [[1, 1, 0]])
    assert idle_experts(captured).tolist() == [[False, False, True]]


@pytest.mark.parametrize("family", tiny.TABLE)
def test_idle_experts_have_no_gradient_and_others_have(family: str) -> None:
    moe = MoEModel.wrap(tiny.build(family))
    inputs = tiny.batch(family, examples=2, length=5)
    with RoutingProbe(moe) as probe, probe.capture(*tiny.masks(inputs)) as captured:
        logits = moe.model(**inputs).logits
    mask_B_S = inputs.get("decoder_attention_mask", inputs["attention_mask"])
    backward(logits[mask_B_S.bool()].square().mean())
    active_L_E = torch.zeros(len(moe.layers), moe.experts, dtype=torch.bool)
    for slot in moe.slots:
        if slot.kind == "expert":
            for place, group in enumerate(slot.groups):
                gradient = slot.parameter.grad if slot.parameter.grad is not None else torch.zeros_like(slot.parameter)
                part = gradient if slot.owners.axis is None else gradient.select(slot.owners.axis, place)
                active_L_E[group.layer, group.expert] |= bool(part.any())
    assert torch.equal(active_L_E, ~idle_experts(captured))


def routing_of(prob_T_E: list[list[float]], topk: list[list[int]], scoring: Scoring = "softmax") -> LayerRouting:
    return LayerRouting(torch.tensor(prob_T_E).log().requires_grad_(), torch.tensor(topk), scoring)


def test_balancing_loss_by_hand() -> None:
    balanced = routing_of([[0.5, 0.5], [0.5, 0.5]], [[0], [1]])
    lopsided = routing_of([[0.9, 0.1], [0.7, 0.3]], [[0], [0]])
    assert balancing_loss([balanced], 2).item() == pytest.approx(1.0)
    assert balancing_loss([lopsided], 2).item() == pytest.approx(2 * 1.0 * 0.8)
    assert balancing_loss([balanced, lopsided], 2).item() == pytest.approx(1.3)
    top_2 = routing_of([[0.5, 0.3, 0.2]], [[0, 1]])
    assert balancing_loss([top_2], 3).item() == pytest.approx(3 * (0.5 * 0.5 + 0.5 * 0.3))
    longer = routing_of([[0.5, 0.5]] * 4, [[0], [1]] * 2)  # an encoder and a decoder differ in length
    assert balancing_loss([balanced, longer], 2).item() == pytest.approx(1.0)


def test_balancing_loss_of_a_sigmoid_router() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    scores = logits.sigmoid()[0]
    loss = balancing_loss([LayerRouting(logits, torch.tensor([[1]]), "sigmoid")], 3)
    assert loss.item() == pytest.approx(3 * float(scores[1] / scores.sum()))


def test_balancing_loss_falls_along_its_gradient() -> None:
    lopsided = routing_of([[0.9, 0.1], [0.7, 0.3]], [[0], [0]])
    loss = balancing_loss([lopsided], 2)
    (gradient,) = torch.autograd.grad(loss, lopsided.logits_T_E)
    better = LayerRouting(lopsided.logits_T_E - gradient, lopsided.topk_T_K, "softmax")
    assert balancing_loss([better], 2) < loss


def test_probabilities_of_stacked_layers_sum_to_one(tiny_moe: Tiny) -> None:
    for family in ("olmoe", "deepseek_v3"):
        (stack,) = run(tiny_moe(family), tiny.batch(family)).stacks
        total = router_log_prob(stack.logits_M_T_E, stack.scoring).exp().sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))
