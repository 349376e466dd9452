"""What training would take, against what it takes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedalign
from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.data.encode import Encoded
from fedalign.data.formats import load_examples
from fedalign.doctor.estimate import (
    AT_CLIENT,
    AT_SERVER,
    CARRIER,
    Kept,
    StepCost,
    bytes_down,
    bytes_up,
    estimate,
    estimate_run,
    estimate_site,
    exchange_nbytes,
    measure_step,
    round_tokens,
    server_nbytes,
    state_nbytes,
)
from fedalign.federation.in_process import prepare
from fedalign.federation.messages import encode
from fedalign.files import KEPT_BY_CLIENTS
from fedalign.maths.rounding import broadcast_dtype, pack
from fedalign.moe.model import MoEModel
from fedalign.protocol import DEALT, Broadcast
from tests.conftest import changed


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8", "int4"])
def config(request: pytest.FixtureRequest, settings: list[str]) -> Config:
    return load_config(None, [*settings, f"wire.dtype={request.param}"])


def examples(bench: Workbench) -> Sequence[Encoded]:
    return bench.encoder.encode(load_examples(bench.config.data.train, bench.config.data, "train", 0))


def test_a_skeleton_is_estimated_as_the_model_is(config: Config) -> None:
    skeleton = Workbench.around(MoEModel.skeleton(config.model.path), config)
    assert estimate_site(skeleton, "ward", DEALT) == estimate_site(Workbench.load(config), "ward", DEALT)


def test_bytes_are_those_of_the_messages(config: Config, tmp_path: Path) -> None:
    bench = Workbench.load(config)
    expected = estimate_site(bench, "ward", DEALT)
    wire = broadcast_dtype(config.wire.dtype)
    every = bench.moe.read()
    broadcast = Broadcast(1, {group: pack(value, wire, 0) for group, value in every.items()})
    state = {"target_L_E": torch.full((bench.moe.layout.layers, bench.moe.experts), 1 / bench.moe.experts)}
    broadcast = replace(broadcast, state=state)
    assert expected.down_whole == broadcast.nbytes
    changes = sum(pack(value, config.wire.broadcasts, 0).nbytes for value in every.values())
    assert expected.down_a_round == changes + state["target_L_E"].nbytes
    assert expected.carrier == CARRIER * broadcast.nbytes
    data = load_examples(config.data.train, config.data, "train", 0)
    client = bench.client("ward", data, range(len(data)), tmp_path)
    statistics = bench.trainer().train(client, broadcast)
    assert expected.statistics == pytest.approx(encode(statistics).nbytes, rel=0.15)
    kept = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert expected.disk == pytest.approx(4 * kept, rel=0.2)  # names of groups weigh something in so small a model


def test_a_kept_optimizer_is_on_the_disk_too(config: Config) -> None:
    bench = Workbench.around(MoEModel.skeleton(config.model.path), config)
    keeps = config.model_copy(update={"training": config.training.model_copy(update={"keep_optimizer": True})})
    trained = sum(bench.moe.layout.sizes.values())
    more = estimate_site(replace(bench, config=keeps), "ward", DEALT).disk - estimate_site(bench, "ward", DEALT).disk
    assert more == 4 * 2 * 4 * trained


@pytest.mark.parametrize(
    ("tuning", "nbytes"),
    [
        ([], lambda total, trained: 4 * 4 * total),  # weights, gradients, two moments
        (["tuning.kind=lora"], lambda total, trained: 4 * total + 4 * 3 * trained),
        (["tuning.kind=moe", "training.optimizer=sgd"], lambda total, trained: 4 * total + 4 * trained),
    ],
)
def test_what_is_frozen_needs_neither_gradient_nor_moments(
    tuning: list[str], nbytes: Callable[[int, int], int], settings: list[str]
) -> None:
    config = load_config(None, [*settings, "algorithm.name=fedavg", *tuning])  # which has no state
    moe = MoEModel.skeleton(config.model.path, tuning=config.tuning)
    total, trained = sum(p.numel() for p in moe.model.parameters()), sum(moe.layout.sizes.values())
    assert estimate_site(Workbench.around(moe, config), "ward", DEALT).training == nbytes(total, trained)


def test_a_bfloat16_model_has_masters(settings: list[str]) -> None:
    config = load_config(None, [*settings, "algorithm.name=fedavg", "tuning.dtype=bfloat16"])
    moe = MoEModel.skeleton(config.model.path, dtype="bfloat16")
    total = sum(p.numel() for p in moe.model.parameters())
    routers = sum(size for group, size in moe.layout.sizes.items() if group.kind == "gate")
    # weights and gradients of 2 bytes; masters, their gradients and two moments of 4; routers are float32 themselves
    assert estimate_site(Workbench.around(moe, config), "ward", DEALT).training == 20 * (total - routers) + 16 * routers


def test_activations_are_what_the_backward_pass_reads() -> None:
    model = torch.nn.Linear(10, 4)
    x = torch.randn(7, 10)
    kept = Kept(model)
    with kept.counting():
        (model(x).exp() * 1.0).sum()
    assert kept.nbytes == 4 * (7 * 10 + 7 * 4)  # the input, and what exp made; the weights are the model's own


def test_a_measured_step_leaves_the_weights_as_they_are(settings: list[str]) -> None:
    bench = Workbench.load(load_config(None, settings))
    before = {group: value.clone() for group, value in bench.moe.read().items()}
    step = measure_step(bench, examples(bench))
    assert step.activations > 0
    assert step.seconds_a_token > 0
    assert all(torch.equal(before[group], value) for group, value in bench.moe.read().items())
    assert all(parameter.grad is None for parameter in bench.moe.model.parameters())


def test_larger_batches_have_more_activations(settings: list[str]) -> None:
    bench = Workbench.load(load_config(None, [*settings, "training.batch_examples=2"]))
    larger = replace(bench, config=load_config(None, [*settings, "training.batch_examples=8"]))
    small, large = measure_step(bench, examples(bench)), measure_step(larger, examples(bench))
    assert 3 < large.activations / small.activations < 5.5


ALONE = ["clients.sample=0.4", "evaluation.everyone=2", "run.rounds=4"]
MASKED = ["privacy.masked=true", "server.max_norm_ratio=0"]
QUIET = ["evaluation.clients=false", "tracking.health=full"]


@pytest.mark.parametrize(
    "more",
    [  # of models tuned by adapters, each of whose groups changes in each round
        ["algorithm.name=fedavg", *ALONE],
        ["algorithm.name=fedavg", "wire.dtype=int8", *ALONE],
        ["algorithm.name=fedmoe", *QUIET],
        ["algorithm.name=scaffold"],  # whose control variates are as large as the weights
        ["algorithm.name=scaffold", "wire.down=int4"],
        ["algorithm.name=local"],
        ["algorithm.name=centralised"],
        ["algorithm.name=centralised", *QUIET],
        ["algorithm.name=by_use", *MASKED],
        ["algorithm.name=fedavg", *MASKED, "evaluation.clients=false", "privacy.noise_multiplier=1"],
    ],
)
def test_bytes_of_a_run_are_those_that_its_metrics_count(settings: list[str], tmp_path: Path, more: list[str]) -> None:
    given = [*settings, "tuning.kind=lora", "training.epochs=1", "run.check=false", *more]
    told = estimate(prepare(load_config("demo", given), tmp_path / "clients"))
    lines = fedalign.run("demo", overrides=given, out=tmp_path / "run").history
    assert [line["bytes_down"] for line in lines] == list(told.bytes_down)
    assert [line["bytes_up"] for line in lines] == list(told.bytes_up)
    trained = len(lines[1]["clients"])
    assert lines[1]["bytes_up_statistics"] == trained * told.bytes_statistics_a_client


@pytest.mark.parametrize("name", ["fedalign_moe", "fc_moe", "hfedmoe"])
def test_bytes_are_told_at_most_where_plans_choose_groups(settings: list[str], tmp_path: Path, name: str) -> None:
    given = [*settings, f"algorithm.name={name}", "training.epochs=1", "run.check=false"]
    told = estimate(prepare(load_config("demo", given), tmp_path / "clients"))
    lines = fedalign.run("demo", overrides=given, out=tmp_path / "run").history
    assert all(line["bytes_down"] <= most for line, most in zip(lines, told.bytes_down, strict=True))
    assert all(line["bytes_up"] <= most for line, most in zip(lines, told.bytes_up, strict=True))
    assert lines[2]["bytes_down"] > 0.9 * told.bytes_down[2]


def test_a_masked_site_is_told_of_counts_and_shares(settings: list[str]) -> None:
    config = load_config("demo", [*settings, *MASKED, "algorithm.name=by_use"])
    bench = Workbench.around(MoEModel.skeleton(config.model.path), config)
    told = estimate_site(bench, "ward", DEALT)
    of_run = bytes_up(config, bench.moe.layout, ["ward"])
    assert told.up_a_round_at_most == of_run[1]
    assert told.down_a_round == bytes_down(config, bench.moe.layout, ["ward"])[1]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_workers_share_the_time_and_what_is_frozen(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    monkeypatch.setattr("fedalign.doctor.estimate.measure_step", lambda *_: StepCost(1000, 1e-3))
    config = load_config(None, [*settings, f"tuning.kind={kind}"])
    bench = Workbench.load(config)
    a, b = (ClientData(name, examples(bench), None, ClientMemory(tmp_path)) for name in "ab")
    one, two = (
        estimate_run(replace(bench, config=changed(config, "run", workers=workers)), {"a": a, "b": b}, None)
        for workers in (1, 2)
    )
    assert one.seconds == pytest.approx(2 * two.seconds)
    frozen = [p for p in bench.moe.model.parameters() if not p.requires_grad]
    assert bool(frozen) == (kind == "lora")
    # weights, gradients and two moments; what was received and the update; activations
    own = AT_CLIENT * state_nbytes(config, bench.moe.layout)
    assert two.memory - one.memory == 4 * 6 * one.trained + 1000 + own


def test_variates_as_large_as_the_model_are_counted(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fedalign.doctor.estimate.measure_step", lambda *_: StepCost(1000, 1e-3))
    made, at_sites = [], []
    for name in ("fedavg", "scaffold"):
        bench = Workbench.load(load_config(None, [*settings, f"algorithm.name={name}"]))
        made.append(estimate_run(bench, {"a": ClientData("a", examples(bench), None, ClientMemory(tmp_path))}, None))
        at_sites.append(estimate_site(bench, "ward", DEALT))
    variate = 4 * made[0].trained
    assert made[1].memory - made[0].memory == (AT_CLIENT + AT_SERVER) * variate
    assert at_sites[1].training - at_sites[0].training == AT_CLIENT * variate
    assert at_sites[1].disk - at_sites[0].disk == (KEPT_BY_CLIENTS + 1) * variate


def test_what_lies_in_files_takes_no_memory(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fedalign.doctor.estimate.measure_step", lambda *_: StepCost(1000, 1e-3))
    bench = Workbench.load(load_config(None, settings))
    clients = {"a": ClientData("a", examples(bench), None, ClientMemory(tmp_path))}
    memory, files = (
        estimate_run(replace(bench, config=changed(bench.config, "server", memory_gb=gb)), clients, None)
        for gb in (8.0, 0.0)
    )
    assert memory.memory - files.memory == 4 * 2 * memory.trained  # the server's weights and their sum


def test_tokens_of_a_round_count_epochs_and_a_third_of_scoring(settings: list[str]) -> None:
    bench = Workbench.load(load_config(None, settings))  # two epochs
    train = examples(bench)
    tests = bench.test_set()
    assert tests is not None
    trained, scored = (sum(len(one.input_ids) for one in part) for part in (train, tests.encoded))
    assert round_tokens(bench.config, [train, train], [None, tests]) == pytest.approx(4 * trained + scored / 3)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", 8000), ("bfloat16", 12000), ("int8", 11016), ("int4", 10564)]
)
def test_float32_travels_without_a_copy(dtype: str, expected: int) -> None:
    assert exchange_nbytes(1000, load_config(None, [f"wire.dtype={dtype}"])) == expected


@pytest.mark.parametrize(
    ("rule", "dtype", "expected"),
    [("none", "float32", 8000), ("clip", "float32", 8000), ("centered_clip", "float32", 12000)]
    + [("none", "int8", 8000 + 2 * (2000 + 1016)), ("none", "int4", 8000 + 2 * (2000 + 564))]
    + [(rule, "bfloat16", 8000 + 10 * 2000) for rule in ("trimmed_mean", "median", "krum")],
)
def test_rules_that_compare_updates_keep_them_all(rule: str, dtype: str, expected: int) -> None:
    config = load_config(None, [f"server.robust={rule}", f"wire.dtype={dtype}"])
    assert server_nbytes(1000, config, clients=10) == expected
