"""What a workbench makes of a configuration, beyond what whole runs show."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedalign.client.workbench import Workbench, pick_length
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.data.deal import split_among_clients
from fedalign.data.encode import load_tokenizer
from fedalign.errors import UserError
from fedalign.moe.families import FAMILIES
from fedalign.moe.load import hardware, model_path, pick_device
from fedalign.moe.model import MoEModel, load_model
from tests.conftest import changed
from tests.moe.tiny import build


@pytest.fixture(scope="module")
def skeleton(olmoe: Path) -> MoEModel:
    return MoEModel.skeleton(olmoe)


def test_demo_is_the_model_of_the_package_and_all_else_is_itself(tmp_path: Path) -> None:
    assert (Path(model_path("demo")) / "model.safetensors").is_file()
    assert [model_path(name) for name in (str(tmp_path), "allenai/OLMoE-1B-7B-0924")] == [
        str(tmp_path),
        "allenai/OLMoE-1B-7B-0924",
    ]


def test_a_device_that_is_not_there_is_named_with_those_that_are() -> None:
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "tpu", ""):
        with pytest.raises(UserError, match=rf"run.device = '{name}': not on this machine. Choose one of: auto, cpu"):
            pick_device(name)


def test_hardware_is_named_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"NVIDIA H200 ({device})")
    assert [hardware(name) for name in ("cpu", "cuda:1", "split")] == [
        *("1 thread", "NVIDIA H200 (cuda:1)", "2 x NVIDIA H200 (None)")
    ]


def test_threads_are_set_only_when_asked_for(site_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    Workbench.load(site_config)
    assert asked == []
    Workbench.load(changed(site_config, "run", threads=3))
    assert asked == [3]


@pytest.mark.parametrize(("asked", "picked"), [(0, 128), (64, 64), (128, 128)])
def test_examples_are_as_long_as_asked_and_the_model_allows(
    site_config: Config, skeleton: MoEModel, asked: int, picked: int
) -> None:
    config = changed(site_config, "data", max_length=asked)
    assert pick_length(config, skeleton) == picked
    assert Workbench.around(skeleton, config).encoder.max_length == picked


def test_longer_examples_than_the_model_allows_are_refused(site_config: Config, skeleton: MoEModel) -> None:
    with pytest.raises(UserError, match=r"data.max_length = 129: the model allows 128 tokens. Choose 1 to 128, or 0"):
        pick_length(changed(site_config, "data", max_length=129), skeleton)


def test_a_model_without_a_limit_takes_what_is_asked_for(
    site_config: Config, model_folder: Callable[..., Path]
) -> None:
    switch = MoEModel.skeleton(model_folder("switch_transformers"))
    assert pick_length(site_config, switch) == 0
    assert pick_length(changed(site_config, "data", max_length=5000), switch) == 5000


def test_a_skeleton_has_a_tokenizer_and_its_weights_are_not_there(site_config: Config, skeleton: MoEModel) -> None:
    bench = Workbench.around(skeleton, site_config)
    assert len(bench.tokenizer) == 384
    assert bench.moe.device.type == "meta"
    assert bench.score({}, None) is None  # nothing to score on: the model is not asked


def test_no_model_and_no_tokenizer_are_told_apart(site_config: Config, tmp_path: Path, skeleton: MoEModel) -> None:
    with pytest.raises(UserError, match=r"model = .*nowhere': no such folder"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no tokenizer to load"):
        Workbench.around(skeleton, changed(site_config, "model", path=str(tmp_path)))


def test_a_client_is_encoded_from_its_own_examples_alone(site_config: Config, texts: Path, tmp_path: Path) -> None:
    config = changed(changed(site_config, "data", train=str(texts / "train.jsonl")), "clients", count=3, held_out=0.25)
    bench = Workbench.load(config)
    examples, parts = split_among_clients(config)
    assert sorted(index for part in parts.values() for index in part) == list(range(len(examples)))
    name, part = next(iter(parts.items()))
    client = bench.client(name, examples, part, tmp_path)
    assert client.held_out is not None
    assert len(client.train) + len(client.held_out) == len(part)
    own = [" ".join(bench.tokenizer.decode(one.input_ids).split()) for one in (*client.train, *client.held_out.encoded)]
    texts_of_others = {examples[i].prompt for other, indices in parts.items() if other != name for i in indices}
    mine = {examples[i].prompt for i in part}
    assert all(any(text.startswith(prompt.split("\n")[0]) for prompt in mine) for text in own)
    assert not any(any(text.startswith(prompt.split("\n")[0]) for text in own) for prompt in texts_of_others - mine)
    again = bench.client(name, examples, part, tmp_path)
    assert again.train == client.train


def test_who_takes_part_changes_nothing_of_what_each_holds(site_config: Config, texts: Path) -> None:
    config = changed(changed(site_config, "data", train=str(texts / "train.jsonl")), "clients", count=3)
    _, parts = split_among_clients(config)
    _, some = split_among_clients(changed(config, "clients", only=("client-02", "client-00")))
    assert some == {name: parts[name] for name in ("client-00", "client-02")}


def test_scoring_writes_the_weights_that_are_scored(site_config: Config, texts: Path) -> None:
    config = changed(site_config, "data", train=str(texts / "train.jsonl"), test=str(texts / "test.jsonl"))
    bench = Workbench.load(config)
    tests = bench.test_set()
    weights = {group: value.clone() for group, value in bench.moe.read().items()}
    first = bench.score(weights, tests)
    assert first is not None
    assert first.client is None
    noise = {group: torch.randn_like(value) for group, value in weights.items()}
    other = bench.score(noise, tests)
    assert other is not None
    assert other.loss != first.loss
    assert bench.score(weights, tests) == first


def test_what_is_saved_is_a_model_with_its_tokenizer(site_config: Config, tmp_path: Path) -> None:
    bench = Workbench.load(site_config)
    weights = {group: value + 1 for group, value in bench.moe.read().items()}
    bench.save(weights, tmp_path)
    there = Workbench.load(changed(site_config, "model", path=str(tmp_path)))
    assert all(torch.equal(there.moe.read()[group], value) for group, value in weights.items())
    assert there.tokenizer.get_vocab() == bench.tokenizer.get_vocab()


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(
    model_folder: Callable[..., Path], settings: list[str]
) -> None:
    folder = model_folder("olmoe")
    tokenizer = load_tokenizer(folder)
    last = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{i}|>" for i in range(385 - last)]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"its tokenizer has token 384 \('<\|\d+\|>'\), its embedding rows 0 to 383\."):
        Workbench.load(load_config(None, [*settings, f"model.path={folder}"]))


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path, settings: list[str]) -> None:
    build("olmoe").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        Workbench.load(load_config(None, [*settings, f"model.path={tmp_path}"]))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_a_workbench_saved_is_held_against_plain_libraries(
    kind: str, olmoe: Path, settings: list[str], tmp_path: Path
) -> None:
    bench = Workbench.load(load_config(None, [*settings, f"tuning.kind={kind}"]))
    bench.save(bench.moe.read(), tmp_path)
    assert "logits" in bench.check(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(b"no")
    with pytest.raises(UserError):
        bench.check(tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["algorithm.name=fedalign_moe"], r'"fedalign_moe": reads the probabilities of routers, but how olmoe scores'),
        (["algorithm.name=hfedmoe"], r'"hfedmoe": reads the probabilities of routers'),
        (["algorithm.name=fedavg", "training.balance_coefficient=0.1"], r"balance_coefficient = 0.1: needs prob"),
        (["algorithm.name=fedavg"], None),
        (["algorithm.name=by_use"], None),
    ],
)
def test_what_reads_probabilities_refuses_a_scoring_that_is_unknown(
    options: list[str], told: str | None, olmoe: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "olmoe", replace(FAMILIES["olmoe"], scoring="unknown"))
    with pytest.raises(UserError, match=told) if told else nullcontext():
        Workbench.load(load_config(None, [*settings, *options]))
