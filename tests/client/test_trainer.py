"""One client step on a tiny model of every family: it changes what it should, and reports what happened."""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor

from fedalign.algorithms.fedavg import FedAvg
from fedalign.client.evaluation import TestSet
from fedalign.client.fit import LocalFit, grouped, make_autocast, make_optimizer, make_schedule
from fedalign.client.forward import answer_logits
from fedalign.client.memory import ClientData, ClientMemory, Kept
from fedalign.client.spent import Privacy, PrivacyLedger
from fedalign.client.trainer import Trainer
from fedalign.config.run import ClientLimits, Config, TrainingConfig
from fedalign.config.toml import load_config
from fedalign.data.batches import batches
from fedalign.data.encode import Encoded
from fedalign.errors import TrainingFailedError, UserError
from fedalign.maths import rounding
from fedalign.maths.average import NORM_SLACK
from fedalign.maths.rounding import pack, unpack, unpack_weights
from fedalign.maths.sketch import Sketch
from fedalign.moe.model import MoEModel
from fedalign.moe.probe import RoutingProbe, RoutingStatistics
from fedalign.protocol import (
    SHARED,
    Broadcast,
    LocalRound,
    Packed,
    ParameterGroup,
    Request,
    Statistics,
    Step,
    Weights,
)
from tests.moe.tiny import EXPERTS, TABLE, VOCABULARY, build


def examples(count: int, seed: int = 0, seq2seq: bool = False) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        if seq2seq:
            made.append(Encoded(tokens, tokens[-2:], index, decoder_input_ids=[0, tokens[-2]]))
        else:
            made.append(Encoded(tokens, [-100] * (length - 2) + tokens[-2:], index))
    return made


def settings(*overrides: str) -> Config:
    return load_config(
        None, ["training.batch_examples=4", "training.learning_rate=1e-2", "statistics.min_tokens=2", *overrides]
    )


def trainer(family: str, *overrides: str) -> Trainer:
    config = settings(*overrides)
    return Trainer(MoEModel.wrap(build(family)), None, config.algorithm.build(), config)


def client(folder: Path, seq2seq: bool = False, count: int = 20) -> ClientData:
    return ClientData("c", examples(count, seq2seq=seq2seq), None, ClientMemory(folder))


def broadcast(moe: MoEModel, round: int = 1, dtype: str = "float32", **state: Tensor) -> Broadcast:
    weights = {group: pack(value, dtype, 0) for group, value in moe.read().items()}  # type: ignore[arg-type] # pytest's parameters are words of that kind
    return Broadcast(round, weights, state)


def local_fit(step: Trainer, data: ClientData) -> LocalFit:
    local = step._local_round(data, broadcast(step.moe), Kept())
    return LocalFit(step.moe, step.algorithm, step.config, data, local, 1, Kept())


def test_an_algorithm_that_changes_everybodys_weights_is_refused(tmp_path: Path) -> None:
    class Shrinking(FedAvg):
        def begin(self, local: LocalRound) -> None:
            local.start[SHARED].mul_(0.9)

    class Replacing(FedAvg):
        def begin(self, local: LocalRound) -> None:
            local.start[SHARED] = 0.9 * local.start[SHARED]

    step = trainer("olmoe", "algorithm.name=fedavg")
    Trainer(step.moe, None, Replacing(), step.config).train(client(tmp_path / "b"), broadcast(step.moe))
    with pytest.raises(UserError, match=r"fedavg': it changes in place what all clients received, of c first\. Set an"):
        Trainer(step.moe, None, Shrinking(), step.config).train(client(tmp_path / "a"), broadcast(step.moe))


@pytest.mark.parametrize("kept", [None, 1.0, {"a": 1.0}, [torch.zeros(1)]])
def test_an_algorithm_that_keeps_no_tensors_is_told_so(kept: object, tmp_path: Path) -> None:
    class Forgetful(FedAvg):
        def keep(self, local: LocalRound, update: Mapping[ParameterGroup, Tensor]) -> Any:
            return kept

    step = trainer("olmoe", "algorithm.name=fedavg")
    with pytest.raises(UserError, match=r"^algorithm.name = 'fedavg': it keeps .*no tensor"):
        Trainer(step.moe, None, Forgetful(), step.config).train(client(tmp_path), broadcast(step.moe))


def test_an_algorithm_may_keep_a_tensor_under_two_names(tmp_path: Path) -> None:
    class Twice(FedAvg):
        def keep(self, local: LocalRound, update: Mapping[ParameterGroup, Tensor]) -> Any:
            return {"start": local.start[SHARED], "received": local.received[SHARED]}

    step, data = trainer("olmoe", "algorithm.name=fedavg"), client(tmp_path)
    before = step.moe.read([SHARED])[SHARED]
    Trainer(step.moe, None, Twice(), step.config).train(data, broadcast(step.moe))
    kept = data.memory.before(2).algorithm
    assert torch.equal(kept["start"], before)
    assert torch.equal(kept["received"], before)


@pytest.mark.parametrize(("penalty", "told"), [(torch.ones(3), r"of shape \[3\]"), (0.5, "a float")])
def test_a_penalty_that_is_no_number_is_told(penalty: Any, told: str, tmp_path: Path) -> None:
    class Long(FedAvg):
        def penalty(self, step: Step) -> Any:
            return penalty

    step = trainer("olmoe", "algorithm.name=fedavg")
    with pytest.raises(UserError, match=f"^algorithm.name = 'fedavg': its penalty is {told}, and no tensor of one"):
        Trainer(step.moe, None, Long(), step.config).train(client(tmp_path), broadcast(step.moe))


@pytest.mark.parametrize("noise", [False, True])
def test_a_penalty_that_is_not_finite_is_not_told_as_a_rate(noise: bool, tmp_path: Path) -> None:
    class Lost(FedAvg):
        def penalty(self, step: Step) -> Any:
            return step.drift() * math.nan

    settings = ["privacy.noise_multiplier=1", "evaluation.clients=false"] if noise else []
    step, data = trainer("olmoe", "algorithm.name=fedavg", *settings), client(tmp_path)
    if noise:
        privacy = Privacy(step.config, PrivacyLedger(tmp_path / "ledger"), "here", tmp_path, "c")
        data = replace(data, privacy=privacy)
    with pytest.raises(TrainingFailedError, match=r"^the penalty of fedavg is nan at step 1$"):
        Trainer(step.moe, None, Lost(), step.config).train(data, broadcast(step.moe))


BAD_BEGINNINGS: dict[str, tuple[Callable[[LocalRound], object], str]] = {
    "start": (lambda local: local.start.update({SHARED: torch.zeros(3)}), r"`begin` left local\.start: .*3"),
    "none": (lambda local: local.start.pop(SHARED), r"its `begin` leaves no local\.start\[shared\]\."),
    "shift": (
        lambda local: setattr(local, "shift", {SHARED: torch.zeros(3)}),
        r"local\.shift\[shared\] of shape \[3\]",
    ),
    "lost": (
        lambda local: setattr(local, "shift", {SHARED: torch.full_like(local.start[SHARED], math.nan)}),
        r"local\.shift\[shared\] with a value that is not finite",
    ),
}


@pytest.mark.parametrize("case", BAD_BEGINNINGS)
def test_an_algorithm_that_begins_wrongly_is_told(case: str, tmp_path: Path) -> None:
    begun, told = BAD_BEGINNINGS[case]

    class Wrong(FedAvg):
        def begin(self, local: LocalRound) -> None:
            begun(local)

    step = trainer("olmoe", "algorithm.name=fedavg")
    with pytest.raises(UserError, match=f"^algorithm.name = 'fedavg': .*{told}"):
        Trainer(step.moe, None, Wrong(), step.config).train(client(tmp_path), broadcast(step.moe))


@pytest.mark.parametrize("hook", ["begin", "penalty", "keep"])
def test_a_fault_in_a_hook_says_which_and_where(hook: str, tmp_path: Path) -> None:
    def fails(self: FedAvg, *_: object) -> None:
        raise RuntimeError("boom")

    broken = type("Broken", (FedAvg,), {hook: fails})()
    step = trainer("olmoe", "algorithm.name=fedavg")
    with pytest.raises(RuntimeError, match="boom") as caught:
        Trainer(step.moe, None, broken, step.config).train(client(tmp_path), broadcast(step.moe))
    assert caught.value.__notes__ == [f"`{hook}` of fedavg at c"]


def uniform(moe: MoEModel) -> Tensor:
    return torch.full((moe.layout.layers, moe.experts), 1 / moe.experts)


@pytest.mark.parametrize("family", TABLE)
def test_a_round_of_one_client(family: str, tmp_path: Path) -> None:
    step = trainer(family)
    moe, layout = step.moe, step.moe.layout
    data = client(tmp_path, moe.is_seq2seq)
    start = {group: value.clone() for group, value in moe.read().items()}
    buffers = {name: value.clone() for name, value in moe.model.named_buffers()}
    statistics = step.train(data, broadcast(moe, target_L_E=uniform(moe)))

    assert statistics.examples == 20
    assert statistics.loss > 0
    assert torch.allclose(statistics.prob_L_E.sum(1), torch.ones(layout.layers), atol=1e-5)
    after = moe.read()
    update = data.memory.hand_over("c", Request("c", 1, layout.groups))
    for index, group in enumerate(layout.groups):
        moved = after[group] - start[group]
        assert torch.equal(statistics.norm_G[index], unpack(update.groups[group]).norm())
        assert torch.equal(unpack(update.groups[group]), moved)  # router rows, too: the server centres them
    assert float(statistics.norm_G[0]) > 0
    assert float(statistics.norm_G.max()) < 1e3
    for name, value in moe.model.named_buffers():  # such as e_score_correction_bias
        assert torch.equal(value, buffers[name]), name


def test_an_update_is_no_longer_than_its_client_allows(tmp_path: Path) -> None:
    step, sent = trainer("olmoe"), []
    start = broadcast(step.moe)
    for most in (0.0, 1e3, 0.25):
        data = replace(client(tmp_path / str(most)), limits=ClientLimits(max_norm=most))
        told = step.train(data, start)
        update = data.memory.hand_over("c", Request("c", 1, step.moe.layout.groups))
        sent.append(torch.cat([unpack(packed) for packed in update.groups.values()]))
        assert torch.isclose(told.norm_G.norm(), sent[-1].norm())
    assert torch.equal(sent[0], sent[1])
    assert float(sent[0].norm()) > 0.25
    assert float(sent[2].norm()) == pytest.approx(0.25, rel=1e-5)
    assert torch.allclose(sent[2], sent[0] * (0.25 / sent[0].norm()), atol=1e-7)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_the_layout_says_whose_rows_may_be_centred(family: str) -> None:
    layout = MoEModel.wrap(build(family)).layout
    assert layout.softmax_L == (family != "deepseek_v3",) * layout.layers  # its router is a sigmoid


@pytest.mark.parametrize("algorithm", ["fedavg", "fedmoe", "fedalign_moe"])
def test_clients_leave_rows_as_trained(algorithm: str, tmp_path: Path) -> None:
    step = trainer("olmoe", f"algorithm.name={algorithm}")
    data, start = client(tmp_path), step.moe.read()
    step.train(data, broadcast(step.moe))
    row = ParameterGroup("gate", 1, 2)
    update = data.memory.hand_over("c", Request("c", 1, (row,)))
    assert torch.equal(unpack(update.groups[row]), step.moe.read()[row] - start[row])


def silence(moe: MoEModel) -> ParameterGroup:
    """An expert to which nothing is ever sent: every token is far from its row."""
    with torch.no_grad():
        router = moe.model.get_submodule(moe.layers[0].router)
        router.register_forward_pre_hook(lambda _, args: (args[0].abs(),))
        router.weight[3] = -100.0
    return ParameterGroup("expert", 0, 3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_corrections_of_gradients_move_idle_experts_as_any_other(optimizer: str, tmp_path: Path) -> None:
    """SCAFFOLD corrects each of the K steps by which it then divides (Karimireddy et al. 2020, algorithm 1)."""
    step = trainer(
        "olmoe", f"training.optimizer={optimizer}", "training.learning_rate=0.01", "training.max_grad_norm=0"
    )
    silent = silence(step.moe)
    fit = local_fit(step, client(tmp_path))
    fit.local.shift = {silent: torch.full((step.moe.layout.sizes[silent],), 2.0)}
    before = step.moe.read([silent])
    fit.run()
    moved = step.moe.read([silent])[silent] - before[silent]
    each = 0.01 * (2.0 if optimizer == "sgd" else 1.0)
    assert fit.steps > 1
    torch.testing.assert_close(moved, torch.full_like(moved, -each * fit.steps), rtol=1e-3, atol=1e-5)


def test_a_penalty_on_the_drift_pulls_idle_experts_back(tmp_path: Path) -> None:
    step = trainer(
        "olmoe", "training.optimizer=sgd", "training.learning_rate=0.01", "training.max_grad_norm=0",
        "algorithm.name=fedprox", "algorithm.mu=5.0", "training.weight_decay=0.0",
    )  # fmt: skip
    silent = silence(step.moe)
    fit = local_fit(step, client(tmp_path))
    start = step.moe.read([silent])[silent]
    assert fit._drift().item() == 0  # it counts from here on
    step.moe.write({silent: start + 1})
    fit.run()
    away = step.moe.read([silent])[silent] - start
    torch.testing.assert_close(away, torch.full_like(away, (1 - 0.01 * 5) ** fit.steps), rtol=1e-3, atol=1e-5)


def test_the_drift_is_that_of_the_masters_where_weights_are_rounded(tmp_path: Path) -> None:
    """A step smaller than a rounded weight can show counts, and pulls back."""
    sgd = ("training.optimizer=sgd", "training.learning_rate=1e-4", "training.max_grad_norm=0", "run.device=cpu")
    drifts, moved = [], []
    for dtype in ("float32", "bfloat16"):
        config = settings("algorithm.name=fedprox", "algorithm.mu=100.0", f"tuning.dtype={dtype}", *sgd)
        moe = MoEModel.wrap(build("olmoe").to(getattr(torch, dtype)), config.tuning)
        step = Trainer(moe, None, config.algorithm.build(), config)
        fit = local_fit(step, client(tmp_path / dtype))
        fit.run()
        drifts.append(fit._drift().item())
        kept = fit.trained()
        moved.append(sum((kept[g] - fit.local.start[g]).square().sum().item() for g in kept))
    assert bool(fit.masters)
    assert drifts == pytest.approx(moved, rel=1e-3)


def test_idle_experts_stay_where_they_are(tmp_path: Path) -> None:
    step = trainer("olmoe", "training.weight_decay=0.1")
    moe = step.moe
    silent = silence(moe)
    data, start = client(tmp_path), moe.read()
    statistics = step.train(data, broadcast(moe))
    after = moe.read()
    assert torch.equal(after[silent], start[silent])
    assert not statistics.held_L_E[0, 3]
    assert statistics.update_L_E_S[0, 3].abs().sum() == 0
    busy = ParameterGroup("expert", 0, 0)
    assert not torch.equal(after[busy], start[busy])


def test_an_expert_idle_in_one_step_is_not_moved_by_that_step(tmp_path: Path) -> None:
    step = trainer("olmoe")
    data = client(tmp_path)
    fit = local_fit(step, data)
    group = ParameterGroup("expert", 0, 1)
    before = step.moe.read()
    with fit._holding_still([group]), torch.no_grad():
        for parameter in fit.parameters:
            parameter.add_(1)
    after = step.moe.read()
    assert torch.equal(after[group], before[group])
    others = [other for other in step.moe.layout.groups if other != group and len(before[other])]
    assert all(torch.allclose(after[other], before[other] + 1) for other in others)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    reports: list[Statistics] = []
    for name in ("one", "two"):
        step = trainer("phimoe")  # routes stochastically in training
        torch.manual_seed(len(reports))  # whatever the surrounding process did
        reports.append(step.train(client(tmp_path / name), broadcast(step.moe)))
    for field, value in vars(reports[0]).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(reports[1], field)), field


def test_training_leaves_the_random_state_of_the_process_alone(tmp_path: Path) -> None:
    step = trainer("olmoe")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    step.train(client(tmp_path), broadcast(step.moe))
    assert torch.equal(torch.rand(1), expected)


def test_statistics_are_those_of_the_last_epoch(tmp_path: Path) -> None:
    one, two = (
        trainer("olmoe", f"training.epochs={epochs}").train(client(tmp_path / str(epochs)), broadcast(model))
        for epochs, model in ((1, MoEModel.wrap(build("olmoe"))), (2, MoEModel.wrap(build("olmoe"))))
    )
    assert one.tokens == two.tokens == sum(len(example.input_ids) for example in examples(20))
    assert two.loss < one.loss
    assert two.steps == 2 * one.steps == 10
    assert one.learning_rate == 1e-2


def test_statistics_equal_a_pass_without_training(tmp_path: Path) -> None:
    step = trainer("olmoe", "training.learning_rate=1e-30", "statistics.centroid_width=64")
    data = client(tmp_path)
    statistics = step.train(data, broadcast(step.moe))
    sums = RoutingStatistics(step.moe.layout.layers, EXPERTS, step.moe.hidden)
    step.moe.model.eval()
    with RoutingProbe(step.moe) as probe, torch.no_grad():
        for batch in batches(data.train, 2048, 4, seed=None):
            with probe.capture(batch.attention_mask_B_S) as captured:
                step.moe.model(**batch.inputs())
            sums.update(captured)
    fresh = sums.finish(2, 4)
    assert torch.allclose(statistics.prob_L_E, fresh.prob_L_E, atol=1e-6)
    assert torch.equal(statistics.load_L_E, fresh.load_L_E)
    centroid = statistics.centroid_L_E_D.float() * statistics.centroid_scale_L[:, None, None]
    assert torch.allclose(centroid[0, 0], Sketch(64, 0).project(fresh.centroid_L_E_H[0, 0]), atol=1e-2)


def test_the_penalty_pulls_routing_towards_the_target(tmp_path: Path) -> None:
    target_E = torch.tensor([0.7, 0.1, 0.1, 0.1])
    divergence = {}
    for strength in (0.0, 10.0):
        step = trainer(
            "olmoe",
            f"algorithm.reg_strength={strength}",
            "algorithm.granularity=batch",
            "algorithm.adaptive_strength=false",
            "training.epochs=4",
        )
        moe = step.moe
        target_L_E = target_E.expand(moe.layout.layers, -1)
        report = step.train(client(tmp_path / str(strength)), broadcast(moe, target_L_E=target_L_E))
        divergence[strength] = float((report.prob_L_E * (report.prob_L_E / target_L_E).log()).sum(1).mean())
    assert divergence[10.0] < 0.5 * divergence[0.0]


def test_fedprox_holds_clients_near_what_they_received(tmp_path: Path) -> None:
    norms = {}
    for mu in (0.0, 50.0):
        step = trainer("olmoe", "algorithm.name=fedprox", f"algorithm.mu={mu}", "training.optimizer=sgd")
        norms[mu] = float(step.train(client(tmp_path / str(mu)), broadcast(step.moe)).norm_G[0])
    assert norms[50.0] < 0.9 * norms[0.0]


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    updates: list[Weights] = []
    for accumulate, size in ((1, 8), (4, 2)):
        step = trainer("olmoe", "algorithm.name=fedavg", "training.optimizer=sgd", "training.max_grad_norm=0")
        options = step.config.training.model_copy(update={"accumulate": accumulate, "batch_examples": size})
        step.config = step.config.model_copy(update={"training": options})
        data = replace(client(tmp_path / str(size)), train=examples(8))
        step.train(data, broadcast(step.moe))
        updates.append({SHARED: unpack(data.memory.hand_over("c", Request("c", 1, (SHARED,))).groups[SHARED])})
    assert torch.allclose(updates[0][SHARED], updates[1][SHARED], atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_end_at_zero_within_the_round(tmp_path: Path, schedule: str) -> None:
    step = trainer("olmoe", f"training.schedule={schedule}", "training.epochs=2", "training.warmup_steps=2")
    fit = local_fit(step, client(tmp_path))
    rates: list[float] = []
    fit.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    fit.run()
    assert len(rates) == fit.steps == 10
    assert rates[0] == 0.0
    assert max(rates) == rates[2] == 1e-2
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert fit.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("warmup", [0, 3, 9])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_transformers(schedule: Literal["constant", "linear", "cosine"], warmup: int) -> None:
    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.zeros(1)], lr=0.3)

    options = TrainingConfig(schedule=schedule, warmup_steps=warmup)
    theirs = "constant_with_warmup" if schedule == "constant" else schedule
    both = make_schedule(optimizer(), options, 7), transformers.get_scheduler(theirs, optimizer(), warmup, 7)
    for _ in range(7):
        assert both[0].get_last_lr() == both[1].get_last_lr()
        for one in both:
            one.optimizer.step()
            one.step()
    assert both[0].get_last_lr() == both[1].get_last_lr()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_of_a_part_leaves_what_lies_between_its_values(optimizer: Literal["adamw", "sgd"]) -> None:
    whole = torch.zeros(4, 6)
    part = whole.view(4, 3, 2)[:, :, 1:]  # as B of the second of two experts lies
    part.grad = torch.ones(4, 3, 1)
    make_optimizer([part], TrainingConfig(optimizer=optimizer, learning_rate=0.1)).step()
    assert bool((whole[:, 1::2] < -0.05).all())
    assert bool((whole[:, 0::2] == 0).all())


def test_the_balancing_loss_spreads_tokens_over_experts(tmp_path: Path) -> None:
    spread = {}
    for coefficient in (0.0, 1.0):
        step = trainer(
            "olmoe", f"training.balance_coefficient={coefficient}", "training.epochs=4", "algorithm.name=fedavg"
        )
        spread[coefficient] = float(step.train(client(tmp_path / str(coefficient)), broadcast(step.moe)).prob_L_E.std())
    assert spread[1.0] < 0.7 * spread[0.0]


def test_a_kept_optimizer_changes_the_next_round(tmp_path: Path) -> None:
    norms = {}
    for keep in ("true", "false"):
        step = trainer("olmoe", f"training.keep_optimizer={keep}")
        data, start = client(tmp_path / keep), broadcast(step.moe)
        step.train(data, start)
        assert bool(data.memory.before(2).optimizer) == (keep == "true")
        norms[keep] = float(step.train(data, replace(start, round=2)).norm_G[0])
    assert norms["true"] != norms["false"]


@pytest.mark.parametrize("algorithm", ["fedavg", "local", "pfl_moe"])
def test_scores_and_updates_are_of_the_weights_that_were_sent_whatever_the_model_holds(
    tmp_path: Path, algorithm: str
) -> None:
    step = trainer("olmoe", f"algorithm.name={algorithm}")
    data, start = replace(client(tmp_path), held_out=TestSet(examples(6, seed=9))), broadcast(step.moe)
    received = unpack_weights(start.weights)
    scores, norms = [], []
    for _ in range(2):
        norms.append(step.train(data, start).norm_G)
        for _ in range(2):
            scores.append(step.evaluate(data, received, 1))
            step.moe.write({group: torch.full_like(value, 7.0) for group, value in received.items()})
    assert scores[0] is not None
    assert scores[0] == scores[1] == scores[2] == scores[3]
    assert torch.equal(norms[0], norms[1])
    before = step.evaluate(data, received, 0)  # nothing is kept of an earlier round
    assert (before == scores[0]) == (algorithm == "fedavg")


@pytest.mark.parametrize("algorithm", ["fedavg", "local", "pfl_moe"])
def test_a_broadcast_is_scored_before_it_is_trained_on_as_it_would_be_alone(tmp_path: Path, algorithm: str) -> None:
    step, alone = (trainer("olmoe", f"algorithm.name={algorithm}") for _ in range(2))
    tests = TestSet(examples(6, seed=9), answers=[[1]] * 6)
    scored = replace(client(tmp_path / "scored"), held_out=tests)
    plain = replace(client(tmp_path / "plain"), held_out=tests)
    start = broadcast(step.moe)
    for round in (1, 2):  # in the second it has something of its own, where it keeps any
        expected = alone.evaluate(plain, unpack_weights(start.weights), round - 1)
        with_score = step.train(scored, replace(start, round=round, score=True))
        without = alone.train(plain, replace(start, round=round))
        assert with_score.score == expected is not None
        assert without.score is None
        for name, value in vars(without).items():
            if isinstance(value, Tensor):
                assert torch.equal(value, getattr(with_score, name)), name
    assert step.train(client(tmp_path / "nothing"), replace(start, score=True)).score is None


def test_a_nan_loss_is_a_failure_of_this_client(tmp_path: Path) -> None:
    step = trainer("olmoe")
    start = broadcast(step.moe)
    poisoned = replace(start, weights={**start.weights, SHARED: Packed(start.weights[SHARED].values * torch.nan)})
    with pytest.raises(TrainingFailedError, match="loss is nan at step 1"):
        step.train(client(tmp_path), poisoned)
    assert not list(tmp_path.rglob("*.safetensors"))
    step.train(client(tmp_path), start)  # the model is whole again


def test_bfloat16_keeps_routers_and_weights_in_float32(tmp_path: Path) -> None:
    step = trainer("olmoe", "training.precision=bfloat16")
    exact = trainer("olmoe", "training.precision=float32")
    short = step.train(client(tmp_path / "short"), broadcast(step.moe))
    long = exact.train(client(tmp_path / "long"), broadcast(exact.moe))
    assert all(parameter.dtype == torch.float32 for parameter in step.moe.model.parameters())
    assert short.loss == pytest.approx(long.loss, rel=0.05)
    assert short.loss != long.loss
    with RoutingProbe(step.moe) as probe, make_autocast(step.moe.device, "bfloat16")():
        batch = next(iter(batches(examples(4), 2048, 4, seed=None)))
        with probe.capture(batch.attention_mask_B_S) as captured:
            answer_logits(step.moe, batch)
    logits = captured.routing[0].logits_T_E
    assert not torch.equal(logits, logits.bfloat16().float())  # not rounded


@pytest.mark.parametrize("family", TABLE)
def test_cutting_the_head_changes_no_prediction(family: str) -> None:
    moe = MoEModel.wrap(build(family))
    batch = next(iter(batches(examples(5, seq2seq=moe.is_seq2seq), 2048, 8, seed=None)))
    with torch.no_grad():
        answers = answer_logits(moe, batch)
        whole = moe.model(**batch.inputs(), use_cache=False).logits
    labels = batch.labels_B_S
    rows, positions = torch.nonzero(labels != -100, as_tuple=True)
    expected = whole[rows, positions if moe.is_seq2seq else positions - 1]
    assert len(answers.target_N) == 10  # two answer tokens an example
    assert torch.equal(answers.target_N, labels[rows, positions])
    assert torch.allclose(answers.logits_N_V, expected, atol=1e-5)


def test_grouping_loses_nothing() -> None:
    every = list(batches(examples(11), 2048, 2, seed=1))
    parts = list(grouped(iter(every), 4))
    assert [len(part) for part in parts] == [4, 2]


@pytest.mark.parametrize(
    ("dtype", "feedback", "expected"),
    [("int4", "auto", True), ("int4", "off", False), ("int8", "auto", False), ("int8", "on", True)]
    + [(dtype, "on", False) for dtype in ("bfloat16", "float32")],
)
def test_feedback_sends_later_what_rounding_lost(dtype: str, feedback: str, expected: bool, tmp_path: Path) -> None:
    step = trainer("olmoe", f"wire.dtype={dtype}", f"wire.error_feedback={feedback}")
    data, start, groups = client(tmp_path), broadcast(step.moe), step.moe.layout.groups
    sent, moved, last = [{group: torch.zeros(size) for group, size in step.moe.layout.sizes.items()} for _ in range(3)]
    for round in (1, 2, 3):
        statistics = step.train(data, replace(start, round=round))
        update = data.memory.hand_over("c", Request("c", round, groups))
        for column, group in enumerate(groups):
            last[group] = step.moe.read()[group] - unpack(start.weights[group])
            moved[group] += last[group]
            arrived = unpack(update.groups[group])
            sent[group] += arrived
            assert float(arrived.norm()) <= float(statistics.norm_G[column]) * (1 + NORM_SLACK)
    lost = data.memory.before(4).lost
    assert bool(lost) == expected
    if expected:
        for group in groups:
            assert torch.allclose(sent[group] + lost[group], moved[group], atol=1e-6)
        level = unpack(pack(last[SHARED], "int8", 0)).abs().max() * {"int4": 1 / 7, "int8": 1 / 127}[dtype]
        assert 0 < float(lost[SHARED].abs().max()) < 2 * level


@pytest.mark.parametrize("broken", ["nan", "inf"])
@pytest.mark.parametrize("adapters", [(), ("tuning.kind=lora", "tuning.average=exact")], ids=["whole", "products"])
def test_an_update_that_is_not_finite_is_told_whatever_is_fed_back(
    broken: str, adapters: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("wire.dtype=int4", *adapters)
    moe = MoEModel.wrap(build("olmoe"), config.tuning)
    step = Trainer(moe, None, config.algorithm.build(), config)
    assert bool(moe.layout.factors) == bool(adapters)
    honest = step._trained

    def breaking(*asked: Any) -> dict[ParameterGroup, Tensor]:
        trained = honest(*asked)
        return {group: torch.full_like(trained[group], float(broken)) for group in moe.layout.groups}

    monkeypatch.setattr(step, "_trained", breaking)
    with pytest.raises(TrainingFailedError, match=r"its update of .* is not finite"):
        step.train(client(tmp_path), broadcast(moe))


@pytest.mark.parametrize("choice", [(), ("algorithm.name=fedavg",), ("tuning.dtype=bfloat16",)])
def test_no_more_than_a_few_groups_lie_beside_the_model(
    tmp_path: Path, choice: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Received weights, what was trained and the update are there when they are looked up, and then no more."""
    step = trainer("olmoe", "wire.dtype=bfloat16", *choice)
    data, start = client(tmp_path), broadcast(step.moe, dtype="bfloat16", target_L_E=uniform(step.moe))
    made, most = list[Any](), list[int]()

    def counted(value: Tensor) -> Tensor:
        most.append(sum(one() is not None for one in made))
        made.append(weakref.ref(value))
        return value

    read, unpacked = MoEModel.read, rounding.unpack
    monkeypatch.setattr(MoEModel, "read", lambda *args: {group: counted(value) for group, value in read(*args).items()})
    monkeypatch.setattr(rounding, "unpack", lambda packed: counted(unpacked(packed)))
    step.train(data, start)
    assert len(most) > len(step.moe.layout.groups)
    assert max(most) <= 3
