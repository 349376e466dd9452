"""DP-SGD at a client: exact clipping, noise of the right size, nothing of one example anywhere else."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedalign.client import noisy
from fedalign.client.accountant import Terms
from fedalign.client.forward import AnswerLogits, answer_logits
from fedalign.client.memory import ClientData, ClientMemory, Kept
from fedalign.client.noisy import PrivateFit, add_clipped, by_example, longest_share, possible
from fedalign.client.spent import Privacy, PrivacyLedger, Secret
from fedalign.client.trainer import Trainer
from fedalign.config.toml import load_config
from fedalign.data.batches import Batch
from fedalign.data.encode import Encoded
from fedalign.errors import TrainingFailedError, UserError
from fedalign.moe.families import FAMILIES
from fedalign.moe.model import MoEModel
from fedalign.moe.probe import RoutingProbe
from fedalign.protocol import asked_shapes
from fedalign.server.checks import check_statistics
from tests.client.test_trainer import broadcast, examples
from tests.moe.tiny import EXPERTS, TABLE, build, marked

PRIVATE = ["privacy.noise_multiplier=1", "algorithm.name=fedavg", "evaluation.clients=false"]
TERMS = Terms(20, 0.5, 3, 1.0, 10, None, 1, 1e-5)


def private(*overrides: str, family: str = "olmoe") -> Trainer:
    config = load_config(
        None,
        ["training.batch_examples=10", "training.learning_rate=1e-2", "training.optimizer=sgd", *PRIVATE, *overrides],
    )
    moe = MoEModel.wrap(build(family), tuning=config.tuning)
    return Trainer(moe, None, config.algorithm.build(), config)


def data(trainer: Trainer, folder: Path, every: list[Encoded] | None = None) -> ClientData:
    every = examples(20, seq2seq=trainer.moe.is_seq2seq) if every is None else every
    privacy = Privacy(trainer.config, PrivacyLedger(folder), "here", folder, "c")
    return ClientData("c", every, None, ClientMemory(folder), privacy=privacy)


def fit(trainer: Trainer, client: ClientData, terms: Terms = TERMS, seed: int = 0, clip: float = 1.0) -> PrivateFit:
    local = trainer._local_round(client, broadcast(trainer.moe), Kept())
    made = PrivateFit(trainer.moe, trainer.algorithm, trainer.config, client, local, 1, Kept())
    made.agree(terms, Secret(seed), clip)
    return made


def moved(trainer: Trainer, client: ClientData, terms: Terms, seed: int = 0, clip: float = 1.0) -> torch.Tensor:
    """All that training changed, one behind the other; the model is put back."""
    start = {group: value.clone() for group, value in trainer.moe.read().items()}
    made = fit(trainer, client, terms, seed, clip)
    made.run()
    end = made.trained()
    trainer.moe.write(start)
    return torch.cat([end[group] - start[group] for group in start])


THREE = ["olmoe", "mixtral", "switch_transformers"]
NOTHING_TO_TRAIN = {
    ("dbrx", "lora"): "its experts cannot be adapted",
    ("phimoe", "router"): "in evaluation its routers have no gradient",
}
ROUTER = ("mlp.gate", "block_sparse_moe.gate", "router.classifier")  # of these three


@pytest.mark.parametrize("family", TABLE)
def test_a_step_is_the_sum_of_clipped_gradients_of_single_examples(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_a_step("full", family, tmp_path, monkeypatch)


@pytest.mark.parametrize("tuning", ["lora", "moe", "experts", "router"])
@pytest.mark.parametrize("family", marked(sorted(FAMILIES), THREE))
def test_so_it_is_of_every_way_of_tuning(
    tuning: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (family, tuning) in NOTHING_TO_TRAIN:
        pytest.skip(NOTHING_TO_TRAIN[family, tuning])
    check_a_step(tuning, family, tmp_path, monkeypatch)


@pytest.mark.parametrize("missing", [0, 7, 19])
def test_one_example_moves_the_sum_by_the_clip_at_most_where_there_is_dropout(tmp_path: Path, missing: int) -> None:
    """Jitter and dropout of the others must not depend on it: else all of their gradients are other ones, too."""
    trainer = private("training.learning_rate=1", family="switch_transformers")
    drops = [module.p for module in trainer.moe.model.modules() if isinstance(module, nn.Dropout)]
    assert max(drops) > 0
    every = examples(20, seq2seq=True)
    terms = Terms(20, 1.0, 1, 1e-9, 10, None, 1, 1e-5)
    all_of_them = moved(trainer, data(trainer, tmp_path, every), terms)
    without = moved(trainer, data(trainer, tmp_path, [*every[:missing], *every[missing + 1 :]]), terms)
    assert 0.5 < 10 * float((all_of_them - without).norm()) <= 1.0001


@pytest.mark.parametrize("tuning", ["full", "router"])
@pytest.mark.parametrize("family", THREE)
def test_a_router_loss_is_of_one_example_alone(
    tuning: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_a_step(tuning, family, tmp_path, monkeypatch, balance=2.0)


def check_a_step(kind: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, balance: float = 0.0) -> None:
    """Against plain PyTorch, an example after another, of which some are cut."""
    asked = [f"tuning.kind={kind}", "tuning.rank=2", f"training.balance_coefficient={balance}"]
    trainer = private(*asked, "training.learning_rate=1.0", family=family)
    client = data(trainer, tmp_path, examples(5, seq2seq=trainer.moe.is_seq2seq))
    trained = [p for p in trainer.moe.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    trainer.moe.model.eval()
    monkeypatch.setattr(trainer.moe.model, "train", lambda mode=True: trainer.moe.model)  # no dropout, no jitter
    every = [alone(trainer.moe.model, one, trained, balance) for one in client.train]
    norms = [float(torch.cat([g.flatten() for g in gradients if g is not None]).norm()) for gradients in every]
    clip = sum(norms) / len(norms)  # some are cut, some are not
    assert min(norms) < clip < max(norms)
    expected = [torch.zeros_like(p) for p in trained]
    for gradients, norm in zip(every, norms, strict=True):
        for total, gradient in zip(expected, gradients, strict=True):
            if gradient is not None:
                total.add_(gradient * min(1.0, clip / norm))
    fit(trainer, client, replace(TERMS, rate=1.0, steps=1, noise=1e-12, batch=4), clip=clip).run()
    assert max(float(total.abs().max()) for total in expected) > 2e-5  # above the tolerance
    for old, new, total in zip(before, trained, expected, strict=True):
        torch.testing.assert_close(old - new.detach(), total / 4, rtol=1e-3, atol=2e-6)


def scored(router: nn.Module, hidden: Tensor, *_: object) -> Tensor:
    return nn.functional.linear(hidden.flatten(0, -2), router.get_parameter("weight"))


def alone(model: PreTrainedModel, one: Encoded, trained: Sequence[Tensor], balance: float) -> Sequence[Tensor | None]:
    """The gradient of one example's mean loss, and of `balance` times E sum_e f_e P_e, the mean over layers."""
    logits, hooks = [], []
    for name, module in model.named_modules():
        if balance and name.endswith(ROUTER):
            hooks.append(
                module.register_forward_pre_hook(lambda router, inputs: logits.append(scored(router, *inputs)))
            )
    inputs = {"input_ids": torch.tensor([one.input_ids])}
    if one.decoder_input_ids is not None:
        inputs["decoder_input_ids"] = torch.tensor([one.decoder_input_ids])
    answers, labels = model(**inputs, use_cache=False).logits[0].float(), torch.tensor(one.labels)
    if one.decoder_input_ids is None:
        answers, labels = answers[:-1], labels[1:]
    loss = nn.functional.cross_entropy(answers, labels)
    for hook in hooks:
        hook.remove()
    top = 1 if one.decoder_input_ids is not None else 2
    for scores in logits:
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(top).indices, 1 / top).mean(0)
        loss = loss + balance / len(logits) * EXPERTS * (chosen * scores.softmax(1).mean(0)).sum()
    assert len(logits) == (2 if balance else 0)
    return torch.autograd.grad(loss, trained, allow_unused=True)


def test_no_example_counts_for_more_than_the_clip() -> None:
    gradients = [torch.full((3, 4), 5.0), None, torch.full((7,), -2.0)]
    sums = [torch.zeros(3, 4), torch.zeros(2), torch.zeros(7)]
    norm = add_clipped(sums, gradients, 0.5)
    assert norm == pytest.approx(math.sqrt(12 * 25 + 7 * 4))
    assert 0.4999 < torch.cat([total.flatten() for total in sums]).norm() <= 0.5
    assert not sums[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_clip_holds_over_millions_of_values(dtype: torch.dtype) -> None:
    gradient = torch.full((2048, 2049), 1e-3, dtype=dtype)  # torch's own norm is 0.2 % short of it
    sums = [torch.zeros(gradient.shape)]
    norm = add_clipped(sums, [gradient], 0.5)
    assert norm == pytest.approx(float(gradient.double().norm()), rel=1e-6)
    assert 0.49999 < float(sums[0].double().norm()) <= 0.5


def test_parameters_of_any_shape_have_a_length() -> None:
    every = [torch.tensor(3.0), torch.zeros(0), torch.ones(300, 2).t(), torch.full((256,), 2.0)]
    sums = [torch.zeros(one.shape) for one in every]
    assert add_clipped(sums, every, 1.0) == pytest.approx(math.sqrt(9 + 600 + 1024))


def test_a_key_is_longer_than_anybody_can_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's generator of a CPU takes 32 bits of a seed: rows of tokens that nobody has show noise alone."""
    trainer = private()
    made = fit(trainer, data(trainer, tmp_path))
    drawn = []
    for key in (7, 7 + 2**32, 7 + 2**64, 7 + 2**120):
        monkeypatch.setattr(made.secret, "draw", lambda *_, key=key: key)
        sums = [torch.zeros(1000)]
        made._add_noise(sums, 0)
        drawn.append(sums[0])
        sizes = [example[0].example for example in made._sample(0)]
        assert sizes
    assert len({tuple(one.tolist()) for one in drawn}) == 4
    assert max(Secret(None).draw() for _ in range(64)) >= 2**120


def test_a_short_gradient_stays_as_it_is_and_a_broken_one_adds_nothing() -> None:
    sums = [torch.zeros(2)]
    add_clipped(sums, [torch.tensor([0.1, 0.2])], 1.0)
    add_clipped(sums, [torch.tensor([math.nan, 1.0])], 1.0)
    add_clipped(sums, [torch.tensor([math.inf, 1.0])], 1.0)
    assert sums[0].tolist() == pytest.approx([0.1, 0.2])


def test_the_clip_holds_for_the_weights_dtype_too() -> None:
    sums = [torch.zeros(1000)]
    add_clipped(sums, [torch.randn(1000).bfloat16()], 1.0)
    assert 0.999 < float(sums[0].norm()) <= 1.0


@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_noise_has_the_standard_deviation_that_the_accountant_is_told(noise: float, tmp_path: Path) -> None:
    trainer = private("training.learning_rate=1.0")
    terms = replace(TERMS, rate=1e-300, steps=4, noise=noise, batch=10)  # samples are empty
    delta = moved(trainer, data(trainer, tmp_path), terms, clip=0.2)
    assert float(delta.std()) == pytest.approx(math.sqrt(4) * noise * 0.2 / 10, rel=0.02)
    assert bool((delta != 0).all())  # of idle experts and rows of other tokens, too


FULL = (
    torch.OutOfMemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
)


@pytest.mark.parametrize("error", FULL, ids=["GPU", "CPU"])
def test_an_example_that_takes_too_much_memory_adds_nothing_and_is_told_here_alone(
    error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure would tell whoever chose the lengths that one example is long."""
    trainer, backward = private(), PrivateFit._backward
    every = examples(3)

    def one_is_long(self: PrivateFit, example: list[Encoded], probe: RoutingProbe) -> None:
        backward(self, example, probe)
        if example[0].example == 2:
            raise error

    terms = replace(TERMS, rate=1.0, steps=2, noise=1e-12)
    two = moved(trainer, data(trainer, tmp_path, every[:2]), terms)
    monkeypatch.setattr(PrivateFit, "_backward", one_is_long)
    three = moved(trainer, data(trainer, tmp_path, every), terms)
    torch.testing.assert_close(three, two)
    assert "does not fit into memory and adds nothing" in caplog.text


@pytest.mark.parametrize("error", FULL, ids=["GPU", "CPU"])
def test_nor_does_it_to_the_loads(error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, every, forward = private(), examples(2), answer_logits
    every.append(Encoded([3] * 30, [-100] * 29 + [3], 2))
    terms = replace(TERMS, loads_noise=1e-9)

    def one_is_long(moe: MoEModel, batch: Batch) -> AnswerLogits:
        if batch.attention_mask_B_S.shape[1] == 30:
            raise error
        return forward(moe, batch)

    def loads(count: int) -> Tensor:
        return fit(trainer, data(trainer, tmp_path, every[:count]), terms).loads()

    two = loads(2)
    monkeypatch.setattr(noisy, "answer_logits", one_is_long)
    torch.testing.assert_close(loads(3), two)


def test_an_error_that_is_none_of_memory_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: PrivateFit, example: list[Encoded], probe: RoutingProbe) -> None:
        raise RuntimeError("shapes do not fit")

    trainer = private()
    monkeypatch.setattr(PrivateFit, "_backward", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        moved(trainer, data(trainer, tmp_path, examples(2)), replace(TERMS, rate=1.0, steps=1))


def test_experts_that_saw_nothing_move_as_others_do(tmp_path: Path) -> None:
    trainer = private()
    one = examples(1)
    delta = moved(trainer, data(trainer, tmp_path, one), replace(TERMS, rate=1.0, steps=1))
    assert bool((delta != 0).all())


def test_a_sample_is_each_example_with_the_same_chance(tmp_path: Path) -> None:
    trainer = private()
    made = fit(trainer, data(trainer, tmp_path), replace(TERMS, rate=0.3))
    sizes = torch.tensor([float(len(list(made._sample(step)))) for step in range(400)])
    assert float(sizes.mean()) == pytest.approx(20 * 0.3, abs=0.4)
    assert float(sizes.var()) == pytest.approx(20 * 0.3 * 0.7, rel=0.3)  # binomial: sizes are not fixed


def test_noise_is_the_systems_unless_a_study_asks_for_the_same_again(tmp_path: Path) -> None:
    trainer = private()
    client = data(trainer, tmp_path)
    start = {group: value.clone() for group, value in trainer.moe.read().items()}
    runs = []
    for seed in (None, None, 7, 7):
        made = fit(trainer, client, replace(TERMS, steps=1))
        made.secret = Secret(seed)
        made.run()
        end = made.trained()
        trainer.moe.write(start)
        runs.append(torch.cat([end[group] for group in start]))
    assert not torch.equal(runs[0], runs[1])
    assert torch.equal(runs[2], runs[3])
    assert trainer.config.privacy.seed is None


def test_sequences_of_one_chat_are_one_example() -> None:
    every = [Encoded([1, 2], [1, 2], index // 2) for index in range(6)]
    assert [len(example) for example in by_example(every)] == [2, 2, 2]


def test_steps_are_those_that_were_agreed_whatever_the_samples_are(tmp_path: Path) -> None:
    trainer = private()
    made = fit(trainer, data(trainer, tmp_path), replace(TERMS, rate=1e-300, steps=7))
    made.run()
    assert made.steps == 7


def test_too_many_steps_are_refused(tmp_path: Path) -> None:
    trainer = private()
    client = replace(data(trainer, tmp_path), most_steps=2)
    with pytest.raises(TrainingFailedError, match=r"3 steps, more than 2 \(limits.steps\)"):
        fit(trainer, client).run()


def test_batch_statistics_are_refused(tmp_path: Path) -> None:
    trainer = private()
    trainer.moe.model.add_module("odd", torch.nn.BatchNorm1d(2))
    with pytest.raises(UserError, match="odd: its batch statistics couple examples"):
        fit(trainer, data(trainer, tmp_path))


def test_fedprox_pulls_without_being_clipped(tmp_path: Path) -> None:
    plain, pulled = private(), private("algorithm.name=fedprox", "algorithm.mu=10.0")
    pulled.moe.write(plain.moe.read())
    terms = replace(TERMS, steps=8)
    far, near = (moved(one, data(one, tmp_path), terms).norm() for one in (plain, pulled))
    assert near < 0.9 * far


def test_loads_are_shares_with_noise_and_possible(tmp_path: Path) -> None:
    trainer = private("algorithm.name=by_use", "algorithm.vocabulary=average")
    client = data(trainer, tmp_path)
    exact_L_E = fit(trainer, client, replace(TERMS, loads_noise=1e-9)).loads()
    assert exact_L_E.sum(1).tolist() == pytest.approx([20.0] * trainer.moe.layout.layers)
    noisy_L_E = fit(trainer, client, replace(TERMS, loads_noise=1.0)).loads()
    assert bool((noisy_L_E >= 0).all())
    assert float((noisy_L_E - exact_L_E).abs().max()) > 0.05


def test_one_example_changes_loads_by_no_more_than_is_accounted_for(tmp_path: Path) -> None:
    trainer = private("algorithm.name=by_use", "algorithm.vocabulary=average")
    every, layout = examples(20), trainer.moe.layout
    most = longest_share(layout.top_k_L, layout.layers)
    totals = []
    for some in (every, every[1:]):
        made = fit(trainer, data(trainer, tmp_path, some), replace(TERMS, examples=len(some), loads_noise=1e-9))
        totals.append(made.loads())
    assert 0 < float((totals[0] - totals[1]).norm()) <= most + 1e-6


def test_what_a_report_says(tmp_path: Path) -> None:
    trainer = private("privacy.noise_multiplier=2")
    client = data(trainer, tmp_path)
    report = trainer.train(client, broadcast(trainer.moe))
    options, layout = trainer.config.statistics, trainer.moe.layout
    shapes = asked_shapes(layout, frozenset(), options.centroid_width, options.update_width)
    assert check_statistics(report, layout, shapes, 1, trainer.config.training) is None
    assert report.examples == report.tokens == client.told
    assert report.loss == 0
    assert not report.load_L_E.any()
    assert report.prob_L_E.unique().numel() == 1
    assert report.frozen == ()
    assert set(report.metrics) == {
        "privacy_epsilon",
        "privacy_delta",
        "privacy_noise_multiplier",
        "privacy_sampling_rate",
    }
    assert report.steps == math.ceil(client.told / 10)


def test_the_probe_is_gone_afterwards(tmp_path: Path) -> None:
    trainer = private()
    moved(trainer, data(trainer, tmp_path), replace(TERMS, steps=1))
    assert not any(module._forward_hooks for module in trainer.moe.model.modules())


@pytest.mark.parametrize("kind", ["moe", "experts", "router", "lora"])
def test_every_way_of_tuning_moves_what_it_trains_alone(kind: str, tmp_path: Path) -> None:
    trainer = private(f"tuning.kind={kind}", "tuning.rank=2")
    frozen = {name: p.detach().clone() for name, p in trainer.moe.model.named_parameters() if not p.requires_grad}
    made = fit(trainer, data(trainer, tmp_path), replace(TERMS, steps=2))
    made.run()
    parameters = dict(trainer.moe.model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())


def test_possible_loads_of_no_examples() -> None:
    assert possible(torch.tensor([[0.0, 0.0]]), 3).tolist() == [[0.0, 0.0]]


def test_weights_in_bfloat16_are_stepped_in_float32(tmp_path: Path) -> None:
    trainer = private("training.learning_rate=1e-4")
    trainer.moe = MoEModel.wrap(build("olmoe").bfloat16())
    made = fit(trainer, data(trainer, tmp_path), replace(TERMS, steps=2, noise=1.0))
    start = {group: value.clone() for group, value in made.local.start.items()}
    made.run()
    moved = torch.cat([value - start[group] for group, value in made.trained().items()])
    assert float(moved.std()) == pytest.approx(math.sqrt(2) * 1e-4 / 10, rel=0.2)  # far below a step of bfloat16
