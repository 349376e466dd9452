"""Merges of the evidence that weights of whole groups cannot say: by Gram matrix, by token, and the calibrated gate."""

from __future__ import annotations

import doctest
import math
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedalign.config.toml import load_config
from fedalign.data.encode import IGNORED
from fedalign.federation.in_process import Prepared, prepare
from fedalign.maths.heap import Heap
from fedalign.protocol import ParameterGroup, Weights

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "evidence"))
import merges
import passes
from calibration import Tokens, calibrate, conjugate_gradient
from study import Part

EXPERTS, HIDDEN = 4, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def prepared(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    config = load_config(None, [*settings, "clients.count=2", "training.epochs=1", *merges.ASKING])
    return prepare(config, tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def seen(prepared: Prepared) -> merges.Round:
    return merges.next_round(prepared, 1, prepared.initial_weights(Heap()))


def test_clients_train_as_under_fedavg(seen: merges.Round, settings: list[str], tmp_path: Path) -> None:
    config = load_config(None, [*settings, "clients.count=2", "training.epochs=1", "algorithm.name=fedavg"])
    plain = merges.next_round(prepare(config, tmp_path), 1, seen.start)
    for client, update in plain.updates.items():
        for group, value in update.items():
            assert torch.equal(seen.updates[client][group], value)


def averaged(seen: merges.Round) -> Weights:
    average = merges.Alternative("fedavg", "fedavg")
    return average.merged(seen, average.plan(seen, {}))


def alone(seen: merges.Round) -> merges.Round:
    """The round as if its first client had been the only one."""
    first = seen.standard[0]
    return merges.Round(seen.prepared, seen.start, [first], {first.client: seen.updates[first.client]})


def test_examples_in_docstrings() -> None:
    found = doctest.testmod(passes)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_with_equal_gram_matrices_regmean_is_the_weighted_mean(off_diagonal: float) -> None:
    gram, one, other = passes.gram(normal(20, 5)), normal(3, 5, seed=1), normal(3, 5, seed=2)
    mean = passes.regression_mean([3 * gram, gram], [one, other], [3.0, 1.0], off_diagonal)
    assert_close(mean, (0.75 * one + 0.25 * other).float())
    # the shares only steer the tiny ridge
    assert_close(
        passes.regression_mean([3 * gram, gram], [one, other], [1.0, 1.0], off_diagonal), mean, atol=1e-4, rtol=0
    )


def test_regmean_minimises_the_squares_of_what_outputs_differ() -> None:
    inputs = [normal(30, 5, seed=1), normal(30, 5, seed=2)]
    changes = [normal(3, 5, seed=3), normal(3, 5, seed=4)]
    merged = passes.regression_mean([passes.gram(x) for x in inputs], changes, [1.0, 1.0], 1.0).double()
    wanted = torch.cat([x @ change.T for x, change in zip(inputs, changes, strict=True)])
    assert_close(merged, torch.linalg.lstsq(torch.cat(inputs), wanted).solution.T, atol=1e-4, rtol=0)
    assert (merged - (changes[0] + changes[1]) / 2).abs().max() > 0.01


def test_regmean_of_one_client_returns_its_own_update(seen: merges.Round) -> None:
    only = alone(seen)
    (update,) = only.updates.values()
    merged = {group: value.clone() for group, value in only.start.items()}
    merges.experts_by_gram(only, merged)
    (report,) = only.standard
    held = {ParameterGroup("expert", *cell) for cell in report.held_L_E.nonzero().tolist()}
    assert held
    for group, value in merged.items():
        assert_close(value, only.start[group] + (update[group] if group in held else 0))
    merges.attention_by_gram(only, merged)
    moe = only.prepared.bench.moe
    for name, parameter in moe.model.named_parameters():
        if parameter.shape and not name.endswith(("gate.weight", "gate_up_proj", "down_proj")):
            old, new, change = (merges.part(moe, parameter, w) for w in (only.start, merged, update))
            moved = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))
            assert_close(new, old + change if moved else old)


def test_a_pass_sums_the_same_however_it_is_batched(prepared: Prepared) -> None:
    moe, examples = prepared.bench.moe, next(iter(prepared.clients.values())).train
    together, apart = passes.walk(moe, examples, 4096, 0), passes.walk(moe, examples, 1, 0)
    assert len({one.tokens for one in examples}) > 1  # so that there is padding
    assert torch.equal(together.load_L_E, apart.load_L_E)
    for least in (1, 4):
        assert torch.equal(together.met.finish(least), apart.met.finish(least))
        assert torch.equal(together.answers.finish(least), apart.answers.finish(least))
    assert 0 < together.answers.finish(1).sum() < together.met.finish(4).sum() < together.met.finish(1).sum()
    for name in ("attention_in_L_H_H", "attention_out_L_N_N", "expert_in_L_E_H_H", "expert_mid_L_E_I_I"):
        assert_close(getattr(together, name), getattr(apart, name), atol=1e-4, rtol=1e-4)
        assert getattr(together, name).abs().sum() > 0


def test_a_pass_sees_every_token_once(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, examples = prepared.bench.moe, next(iter(prepared.clients.values())).train
    passed = passes.walk(moe, examples, 4096, 0)
    assert passed.tokens == sum(one.tokens for one in examples) == passed.met.finish(1)[0].sum()
    assert torch.equal(
        passed.load_L_E.sum(1), torch.full((len(moe.layers),), float(moe.top_k * passed.tokens)).double()
    )
    # an expert's input is the router's: what is sent to all experts together is there top_k times
    router_L_T_H = torch.stack([passed.router_input_T_H(layer) for layer in range(len(moe.layers))])
    assert router_L_T_H.shape[1] == passed.tokens < passes.SAMPLE
    summed_L_H_H = torch.stack([passes.gram(router_T_H) for router_T_H in router_L_T_H])
    assert_close(passed.expert_in_L_E_H_H.sum(1), moe.top_k * summed_L_H_H, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(passes, "SAMPLE", 7)
    few, same, other = (passes.walk(moe, examples, 4096, seed).router_input_T_H(0) for seed in (0, 0, 1))
    assert torch.equal(few, same)
    assert few.shape == other.shape == (7, moe.hidden)
    assert not torch.equal(few, other)


@pytest.mark.parametrize("words", ["all", "answers", "others"])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(("rare", "holders"), [(True, 1), (True, 2), (False, 1)])
def test_token_rows_of_two_clients_by_hand(
    seen: merges.Round, words: str, counted: bool, rare: bool, holders: int
) -> None:
    moe, average = seen.prepared.bench.moe, averaged(seen)
    weigh = partial(merges.token_rows, rare=rare, counted=counted, words=words, holders=holders)  # type: ignore[arg-type] # pytest's parameters are words of that kind
    by_row = merges.Alternative("", "fedavg", weigh=weigh)
    merged = by_row.merged(seen, by_row.plan(seen, {}))
    table = moe.model.get_input_embeddings().weight
    old, mean, new = (merges.part(moe, table, weights) for weights in (seen.start, average, merged))
    encoded = {client: seen.prepared.clients[client].train for client in seen.updates}
    answers = {label for train in encoded.values() for one in train for label in one.labels} - {IGNORED}
    moved = 0
    for token in range(len(table)):
        weight = {}
        for client, train in encoded.items():
            examples = sum(token in one.input_ids for one in train)
            count = Counter(i for one in train for i in one.input_ids)
            share = count[token] / count.total() if counted else 1
            weight[client] = len(train) * share * (examples >= (1 if rare else 4))
        change = {client: merges.part(moe, table, update)[token] for client, update in seen.updates.items()}
        held = sum(w > 0 for w in weight.values())
        if held < holders or (words != "all" and (token in answers) != (words == "answers")):
            assert_close(new[token], mean[token])
        else:
            by_hand = sum((w * change[client] for client, w in weight.items()), torch.zeros(()))
            assert_close(new[token], old[token] + by_hand / sum(weight.values()))
            moved += not torch.allclose(new[token], mean[token])
    assert moved > 0 or words == "answers" or (holders == 2 and not counted)  # both met it: FedAvg
    rest = moe.model.model.norm.weight
    assert torch.equal(merges.part(moe, rest, merged), merges.part(moe, rest, average))


@pytest.mark.parametrize(("label", "power"), [("experts by load", 1), ("experts by load^2", 2)])
def test_loads_weigh_experts_alone(seen: merges.Round, label: str, power: int) -> None:
    (alternative,) = (one for one in merges.beyond() if one.label == label)
    weight_C_G = alternative.plan(seen, {}).weight_C_G
    plain_C_G = merges.Alternative("", "fedavg").plan(seen, {}).weight_C_G
    layout, (one, other) = seen.prepared.layout, seen.standard
    cell = tuple((one.held_L_E & other.held_L_E).nonzero()[0].tolist())
    sizes = [r.examples * float(r.load_L_E[cell] / r.load_L_E[cell[0]].sum()) ** power for r in (one, other)]
    _, gate_C_L_E, expert_C_L_E = layout.split(weight_C_G)
    assert_close(expert_C_L_E[:, cell[0], cell[1]], torch.tensor(sizes) / sum(sizes))
    assert torch.equal(gate_C_L_E, layout.split(plain_C_G)[1])


def test_the_calibrated_gate_of_one_client_is_its_own_and_of_two_a_compromise(seen: merges.Round) -> None:
    only = alone(seen)
    merged = averaged(only)
    merges.calibrated_gate(only, merged)
    for group, value in averaged(only).items():
        assert_close(merged[group], value)
    both = averaged(seen)
    merges.calibrated_gate(seen, both)
    for group, value in averaged(seen).items():
        assert torch.equal(both[group], value) == (group.kind != "gate")


def test_every_alternative_gives_a_finite_line(olmoe: Path, texts: Path, tmp_path: Path) -> None:
    shutil.copytree(texts, tmp_path / "label_skew")
    few = ("training.batch_examples=8", "clients.count=3", "clients.alpha=1.0", "statistics.min_tokens=4")
    part = Part("label_skew", "label_skew", ("fedavg",), "full", 1, few, rate="1e-2")
    lines = merges.run(part, 0, tmp_path, str(olmoe), 1)
    by_label = {line["alternative"]: line for line in lines}
    assert list(by_label) == [alternative.label for alternative in merges.alternatives()]
    assert len(by_label) == len(lines)
    assert all(math.isfinite(line["loss_nats"]) for line in lines)
    centred, as_trained = (by_label[label]["loss_nats"] for label in ("gate side alone", "rows not centred"))
    assert abs(centred - as_trained) > 1e-6  # more than rounding: they were not centred
    beyond = [by_label[alternative.label] for alternative in merges.beyond()]
    assert {line["about"] for line in beyond} == {"beyond the paper"}
    assert len({line["loss_nats"] for line in beyond}) > len(beyond) * 0.8  # they are not the same model
    assert by_label["gate as received"]["uploaded_share"] < by_label["token rows"]["uploaded_share"] == 1.0
    first, second = merges.run(part, 0, tmp_path, str(olmoe), 2, follow="token rows")
    assert first == by_label["token rows"]
    assert second["loss_nats"] != first["loss_nats"]


def given(clients: int, seed: int = 0, alike: bool = False) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs, trained routers and centred updates."""
    random = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=random, dtype=torch.float64)
    inputs = [draw(50, HIDDEN) + (0 if alike else draw(1, HIDDEN)) for _ in range(clients)]
    gates = [draw(EXPERTS, HIDDEN) for _ in range(clients)]
    updates = [draw(EXPERTS, HIDDEN) for _ in range(clients)]
    if alike:
        inputs, gates = clients * inputs[:1], clients * gates[:1]
    return inputs, gates, [u - u.mean(0) for u in updates]


def test_calibrating_one_client_keeps_its_update() -> None:
    inputs, gates, updates = given(1)
    tokens = Tokens.of([1.0], inputs, gates, updates)
    assert_close(
        calibrate(tokens, torch.zeros_like(updates[0]), ridge=1e-12, tolerance=1e-9)[0], updates[0], atol=1e-3, rtol=0
    )
    assert_close(calibrate(tokens, updates[0])[0], updates[0])
    shifted = updates[0] + torch.arange(HIDDEN)  # a vector common to all rows
    assert tokens.error(shifted) < 1e-12 < tokens.error(torch.zeros_like(shifted))


def test_clients_of_the_same_tokens_and_routing_are_averaged() -> None:
    inputs, gates, updates = given(2, alike=True)
    average = 0.75 * updates[0] + 0.25 * updates[1]
    tokens = Tokens.of([0.75, 0.25], inputs, gates, updates)
    assert_close(calibrate(tokens, average)[0], average)
    assert_close(
        calibrate(tokens, torch.zeros_like(average), ridge=1e-12, tolerance=1e-9)[0], average, atol=1e-3, rtol=0
    )


def test_the_objective_is_the_written_one_and_the_solution_its_minimum() -> None:
    inputs, gates, updates = given(3)
    share = [0.5, 0.3, 0.2]
    tokens = Tokens.of(share, inputs, gates, updates)
    average = sum(s * u for s, u in zip(share, updates, strict=True))
    assert isinstance(average, Tensor)

    def written(change: Tensor, pull: float) -> Tensor:
        total = pull / 2 * (change - average).square().sum()
        for s, x_T_H, gate, update in zip(share, inputs, gates, updates, strict=True):
            for x in x_T_H:
                r = (gate @ x).softmax(0)
                off = (change - update) @ x
                total = total + s / len(x_T_H) * off @ (r.diag() - r.outer(r)) @ off / 2
        return total

    assert_close(tokens.error(average), float(written(average, 0)))
    pull = 1e-3 * tokens.mean_diagonal()
    solved, steps = calibrate(tokens, average)
    assert 1 < steps <= 2 * EXPERTS * HIDDEN
    assert tokens.error(solved) < tokens.error(average)
    variable = solved.clone().requires_grad_()
    (slope,) = torch.autograd.grad(written(variable, pull), variable)
    start = average.clone().requires_grad_()
    (before,) = torch.autograd.grad(written(start, pull), start)
    assert slope.norm() < 1e-3 * before.norm()
    assert_close(solved.sum(0), torch.zeros(HIDDEN, dtype=torch.float64), atol=1e-6, rtol=0)  # stays centred
    # the diagonal's mean, entry by entry
    entries = []
    for e in range(EXPERTS):
        for h in range(HIDDEN):
            unit = torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64)
            unit[e, h] = 1
            entries.append(float(tokens.curvature(unit)[e, h]))
    assert abs(sum(entries) / len(entries) - tokens.mean_diagonal()) < 1e-9


def test_the_error_approximates_the_divergence_between_routers() -> None:
    inputs, gates, updates = given(2)
    small = [1e-2 * update for update in updates]
    tokens = Tokens.of([0.5, 0.5], inputs, gates, small)
    change = 0.5 * (small[0] + small[1])
    exact = 0.0
    for x, gate, update in zip(inputs, gates, small, strict=True):
        own, new = (x @ gate.T).log_softmax(-1), (x @ (gate - update + change).T).log_softmax(-1)
        exact += 0.5 * float((own.exp() * (own - new)).sum(-1).mean())
    assert abs(tokens.error(change) / exact - 1) < 0.05


def test_conjugate_gradient_stops_where_nothing_is_wanted() -> None:
    solution, steps = conjugate_gradient(lambda x: x, torch.zeros(3))
    assert steps == 0
    assert_close(solution, torch.zeros(3))
