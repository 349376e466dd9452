"""Whole rounds with each way of tuning, and with clients that can do less than others."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.trainer import Trainer
from fedalign.config.run import ClientLimits, Config
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.federation.in_process import prepare
from fedalign.maths.average import StreamingSum
from fedalign.maths.rounding import pack, unpack
from fedalign.moe.model import MoEModel
from fedalign.moe.probe import RoutingProbe
from fedalign.protocol import Broadcast, ParameterGroup, Plan, Request, Statistics
from fedalign.server.results import RunFolder
from fedalign.server.run import execute
from tests.client.test_trainer import examples
from tests.moe.tiny import EXPERTS, batch, build, masks
from tests.server.test_run import Silent


def run(out: Path, settings: list[str], *more: str) -> dict[str, Any]:
    config = load_config(None, [*settings, "run.rounds=2", *more])
    folder = RunFolder(out)
    prepared = prepare(config, folder.clients)
    folder.begin(config)
    return execute(prepared, folder, Silent())


def configured(*overrides: str) -> Config:
    few = ["training.batch_examples=4", "training.learning_rate=1e-2", "statistics.min_tokens=2"]
    return load_config(None, [*few, *overrides])


def trainer(*overrides: str) -> Trainer:
    config = configured(*overrides)
    model = build("olmoe").bfloat16() if config.tuning.dtype == "bfloat16" else build("olmoe")
    return Trainer(MoEModel.wrap(model, config.tuning), None, config.algorithm.build(), config)


def trained(step: Trainer, folder: Path, name: str = "c", **limits: int) -> tuple[Statistics, ClientData]:
    data = ClientData(name, examples(20), None, ClientMemory(folder), ClientLimits(**limits))
    weights = {group: pack(value.cpu(), "float32", 0) for group, value in step.moe.read().items()}
    return step.train(data, Broadcast(1, weights)), data


@pytest.mark.parametrize("kind", ["moe", "experts", "router"])
def test_parts_of_a_model(kind: str, settings: list[str], tmp_path: Path) -> None:
    summary = run(tmp_path / "run", settings, f"tuning.kind={kind}")
    assert summary["final_loss"] < summary["initial_loss"]
    before = AutoModelForCausalLM.from_pretrained(load_config(None, settings).model.path).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {"moe": ("gate.", "experts."), "experts": ("experts.",), "router": ("gate.",)}[kind]
    assert changed
    assert all(any(part in name for part in parts) for name in changed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_client_under_lora_costs_its_adapters_alone(tmp_path: Path, dtype: str) -> None:
    step = trainer("tuning.kind=lora", f"tuning.dtype={dtype}")
    base = {name: p for name, p in step.moe.model.named_parameters() if not p.requires_grad}
    assert base
    places = {name: p.data_ptr() for name, p in base.items()}
    trained(step, tmp_path / "a", "a")
    assert {name: p.data_ptr() for name, p in base.items()} == places  # forks of this process go on sharing them
    written = {name: p._version for name, p in base.items()}
    step.moe.write(step.moe.read())  # as the next client's turn begins
    assert {name: p._version for name, p in base.items()} == written
    names = len(step.moe.layout.groups)
    values = sum(step.moe.layout.sizes.values())
    kept = sum(file.stat().st_size for file in (tmp_path / "a").rglob("*.safetensors"))
    assert kept < 4 * values + 200 * names


@pytest.mark.parametrize("average", ["factors", "freeze_a", "exact"])
def test_lora(average: str, settings: list[str], tmp_path: Path) -> None:
    whole = ["tuning.kind=lora", "tuning.rank=4", f"tuning.average={average}", "training.learning_rate=3e-2"]
    whole += ["training.epochs=3"]
    summary = run(tmp_path / "run", settings, *whole)
    assert summary["final_loss"] < summary["initial_loss"] - 0.1
    base = load_config(None, settings).model.path
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's own
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "run" / "model"))
    moe = MoEModel.load(base, tuning=load_config(None, whole).tuning)
    moe.read_adapter(tmp_path / "run" / "model")
    inputs = batch("olmoe")
    assert torch.equal(plain.eval()(**inputs).logits, moe.model.eval()(**inputs).logits)
    assert (tmp_path / "run" / "model" / "tokenizer.json").exists()


def test_every_algorithm_runs_on_adapters(settings: list[str], tmp_path: Path) -> None:
    for name in ("fedavg", "fc_moe", "scaffold", "pfl_moe", "local"):
        changes = ["tuning.kind=lora", f"algorithm.name={name}", "run.rounds=1"]
        assert run(tmp_path / name, settings, *changes)["rounds"] == 1


def test_how_adapters_are_averaged_means_nothing_without_adapters(settings: list[str], tmp_path: Path) -> None:
    changes = ["tuning.kind=moe", "tuning.average=exact", "algorithm.name=scaffold", "run.rounds=1"]
    assert run(tmp_path / "run", settings, *changes)["rounds"] == 1


def test_the_exact_average_is_that_of_the_products(tmp_path: Path) -> None:
    """Two clients, equal weight: the dense mean of what they trained, cut to the rank, expert by expert."""
    step = trainer("tuning.kind=lora", "tuning.rank=3", "tuning.average=exact", "algorithm.name=fedavg")
    layout, start = step.moe.layout, step.moe.read()
    start = {group: value + 0.05 * torch.randn(value.shape) for group, value in start.items()}
    step.moe.write(start)
    reports, updates = [], []
    for name in ("a", "b"):
        report, data = trained(step, tmp_path / name, name)
        reports.append(report)
        updates.append(
            data.memory.hand_over(name, Request(name, 1, tuple(group for group, size in layout.sizes.items() if size)))
        )
        step.moe.write(start)
    weights = torch.full((2, len(layout.groups)), 0.5)
    plan = Plan(("a", "b"), weights)
    total = StreamingSum(layout, plan, {r.client: r.norm_G for r in reports}, "float32", "exact")
    assert [total.add(update) for update in updates] == [None, None]
    after = total.result(start)
    for group in [g for g in layout.groups if g.kind == "expert"][:3]:
        for place in layout.factors[group]:

            def product(flat: torch.Tensor, place: Any = place) -> torch.Tensor:
                a = flat[place.start_A :][: place.rank * place.inputs].view(place.rank, place.inputs)
                return flat[place.start_B :][: place.outputs * place.rank].view(place.outputs, place.rank) @ a

            mean = sum(product(start[group] + unpack(update.groups[group])) for update in updates) / 2
            left, values, right = torch.linalg.svd(mean)
            best = left[:, :3] * values[:3] @ right[:3]
            assert torch.allclose(product(after[group]), best, atol=1e-5)


def test_bfloat16_weights_are_trained_in_float32(tmp_path: Path) -> None:
    step = trainer("tuning.dtype=bfloat16", "training.learning_rate=1e-4")
    expert = ParameterGroup("expert", 0, 0)
    assert step.moe.model.dtype == torch.bfloat16
    report, data = trained(step, tmp_path)
    update = unpack(data.memory.hand_over("c", Request("c", 1, (expert,))).groups[expert])
    assert report.loss > 0
    assert not torch.equal(update, update.bfloat16().float())
    coarse = step.moe.read()[expert]  # the model itself is rounded
    assert torch.equal(coarse, coarse.bfloat16().float())
    assert 0 < float(update.abs().max()) < 1e-3


def test_a_bfloat16_model_learns_what_a_float32_model_does(tmp_path: Path) -> None:
    expert = ParameterGroup("expert", 0, 0)
    updates, losses = [], []
    for number, dtype in enumerate(("float32", "bfloat16", "bfloat16")):
        step = trainer(f"tuning.dtype={dtype}", "training.optimizer=sgd")
        start = step.moe.read()
        for again in ("first", "second"):  # whatever the model did before, it starts from what it is sent
            step.moe.write(start)
            report, data = trained(step, tmp_path / f"{number}-{again}")
            updates.append(unpack(data.memory.hand_over("c", Request("c", 1, (expert,))).groups[expert]))
            losses.append(report.loss)
    assert torch.equal(updates[0], updates[1])
    assert all(torch.equal(updates[2], other) for other in updates[3:])
    assert float(torch.nn.functional.cosine_similarity(updates[0], updates[2], dim=0)) > 0.95
    assert losses[2] == pytest.approx(losses[0], rel=0.01)


def test_adapters_of_a_bfloat16_base_are_float32(tmp_path: Path) -> None:
    step = trainer("tuning.kind=lora", "tuning.dtype=bfloat16")
    assert {p.dtype for p in step.moe.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for n, p in step.moe.model.named_parameters() if "q_proj.base" in n} == {torch.bfloat16}
    assert trained(step, tmp_path)[0].loss > 0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_activations_computed_twice_change_nothing(kind: str, tmp_path: Path) -> None:
    kept, twice = trainer(f"tuning.kind={kind}"), trainer(f"tuning.kind={kind}")
    twice.moe.checkpoint_activations()
    for name, step in (("kept", kept), ("twice", twice)):
        trained(step, tmp_path / name)
    for group, value in kept.moe.read().items():
        assert torch.allclose(value, twice.moe.read([group])[group], atol=1e-6), group


def test_a_client_that_sends_tokens_to_fewer_experts(tmp_path: Path) -> None:
    step = trainer()
    small, large = (trained(step, tmp_path / str(top_k), top_k=top_k)[0] for top_k in (1, 0))
    assert torch.equal(small.load_L_E.sum(1), torch.full((2,), float(small.tokens)))
    assert torch.equal(large.load_L_E.sum(1), torch.full((2,), 2.0 * large.tokens))
    with RoutingProbe(step.moe) as probe, probe.capture(*masks(batch("olmoe"))) as captured:
        step.moe.model(**batch("olmoe"))
    assert captured.routing[0].topk_T_K.shape[1] == 2  # for the next client it is as before


def test_a_client_that_trains_its_most_used_experts_alone(tmp_path: Path) -> None:
    step = trainer()
    start = step.moe.read()
    report, data = trained(step, tmp_path, "small", max_experts=1)
    assert len(report.frozen) == 2 * (EXPERTS - 1)
    assert torch.equal((report.load_L_E > 0).sum(1), torch.ones(2, dtype=torch.long))
    after = step.moe.read()
    for group in step.moe.layout.groups:
        if group.kind == "expert":
            assert torch.equal(after[group], start[group]) == (group in report.frozen)
            held = report.load_L_E[group.layer, group.expert] > 0
            assert bool(held) == (group not in report.frozen)
    update = data.memory.hand_over("small", Request("small", 1, report.frozen))
    assert not any(packed.values.any() for packed in update.groups.values())


def test_what_a_client_did_not_train_counts_for_nothing() -> None:
    """Weights .5, .3 and .2 of one expert, the first frozen: .6 and .4 are left; all frozen: nobody is asked."""
    layout = MoEModel.wrap(build("olmoe")).layout
    column = {group: i for i, group in enumerate(layout.groups)}
    weights = torch.tensor([0.5, 0.3, 0.2]).unsqueeze(1).expand(3, len(layout.groups)).clone()
    one, all_ = ParameterGroup("expert", 0, 1), ParameterGroup("expert", 1, 3)
    plan = Plan(("a", "b", "c"), weights).without({"a": (one, all_), "b": (all_,), "c": (all_,)}, layout)
    assert torch.allclose(plan.weight_C_G[:, column[one]], torch.tensor([0.0, 0.6, 0.4]))
    assert not plan.weight_C_G[:, column[all_]].any()
    untouched = [i for group, i in column.items() if group not in (one, all_)]
    assert torch.equal(plan.weight_C_G[:, untouched], weights[:, untouched])
    assert one not in plan.requests(1, layout)[0].groups


def test_a_client_of_a_lower_rank_moves_the_strongest_components_alone(tmp_path: Path) -> None:
    step = trainer("tuning.kind=lora", "tuning.rank=4", "tuning.average=exact", "algorithm.name=fedavg")
    layout = step.moe.layout
    group = ParameterGroup("expert", 1, 0)
    _, data = trained(step, tmp_path, "small", rank=1)
    update = unpack(data.memory.hand_over("small", Request("small", 1, (group,))).groups[group])
    for place in layout.factors[group]:
        a = update[place.start_A :][: 4 * place.inputs].view(4, -1)
        b = update[place.start_B :][: 4 * place.outputs].view(-1, 4)
        assert b[:, 0].any()
        assert not a[1:].any()
        assert not b[:, 1:].any()


def test_a_run_with_small_clients(settings: list[str], tmp_path: Path) -> None:
    limits = ["clients.limits.client-00.max_experts=2", "clients.limits.client-01.top_k=1"]
    summary = run(tmp_path / "run", settings, *limits)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert summary["final_loss"] < summary["initial_loss"]
    assert not lines[-1]["failures"]


def test_qlora_on_the_processor_that_there_is(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same code as on a GPU: bitsandbytes packs on a CPU too, only slowly."""
    monkeypatch.setattr("fedalign.client.workbench.need_cuda", lambda device: None)
    monkeypatch.setattr("fedalign.moe.four_bit.LEAST_SAVED", 0.1)  # so small a model is mostly vocabulary
    tuning = ["tuning.kind=qlora", "tuning.rank=4", "tuning.average=exact", "training.learning_rate=3e-2"]
    tuning.append("algorithm.name=fedalign_paper")
    summary = run(tmp_path / "run", settings, *tuning)
    assert summary["final_loss"] < summary["initial_loss"] - 0.1
    config = load_config(None, [*settings, *tuning])
    packed = MoEModel.load(config.model.path, dtype="bfloat16", tuning=config.tuning, device="cpu")
    dense = MoEModel.load(config.model.path, dtype="bfloat16", tuning=config.tuning.model_copy(update={"kind": "lora"}))
    assert packed.saved is not None
    assert packed.nbytes < 0.9 * dense.nbytes
    assert packed.weights_hash() == dense.weights_hash()  # of the base that was packed
    for moe in (packed, dense):
        moe.read_adapter(tmp_path / "run" / "model")
    with torch.no_grad():
        one, two = (moe.model.eval()(**batch("olmoe")).logits.float() for moe in (packed, dense))
    assert 0 < float((one - two).abs().max()) < 0.5 * float(two.abs().max())


def test_qlora_without_cuda_is_refused(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"qlora.*needs a CUDA device.*tuning.kind = 'lora'"):
        run(tmp_path / "run", settings, "tuning.kind=qlora", "run.device=cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["clients.limits.nobody.top_k=1"], "clients.limits.nobody: no such client.*client-00"),
        (["clients.limits.client-00.top_k=9"], "clients.limits.client-00.top_k = 9.*4 experts"),
        (["clients.limits.client-00.top_k=1", "federation.engine=flower"], "a site says what it can do itself"),
        (["clients.limits.client-00.rank=2"], "ranks may differ only where products are averaged"),
        (
            ["tuning.kind=lora", "tuning.average=exact", "clients.limits.client-00.rank=99"],
            "clients.limits.client-00.rank = 99: at most tuning.rank = 8",
        ),
        (["tuning.kind=lora", "tuning.average=exact", "server.optimizer=adam"], "Choose: average"),
        (["tuning.kind=lora", "tuning.average=exact", "training.keep_optimizer=true"], "other factors each round"),
        (["tuning.kind=lora", "tuning.average=exact", "algorithm.name=scaffold"], "Choose one of: factors, freeze_a"),
        (["tuning.kind=lora", "tuning.average=exact", "algorithm.name=fc_moe"], "sets factors of one round against"),
        (["tuning.kind=lora", "tuning.rank=0"], "tuning.rank = 0: input should be greater than or equal to 1"),
        (["tuning.kind=half"], "Choose one of: experts, full, lora, moe, qlora, router"),
    ],
)
def test_bad_input(overrides: list[str], told: str, settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"(?s){told}"):
        run(tmp_path / "run", settings, *overrides)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
