"""What is exported is what was trained: plain transformers and plain peft compute the run's own numbers."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedalign.client.evaluation import TestSet, evaluate
from fedalign.client.forward import AnswerLogits
from fedalign.client.memory import ClientMemory
from fedalign.config.toml import load_config, parse_config, read_config
from fedalign.data.batches import Batch
from fedalign.data.encode import IGNORED
from fedalign.errors import UserError
from fedalign.export.card import MIXER, Trained, of_docstrings, render, training_rows
from fedalign.export.write import Exported, Wanted, _cast, export, open_kept
from fedalign.federation.in_process import Prepared, prepare
from fedalign.files import LOCK, MARK, SUMS, WATCH, claimed, damage, locked, replacing
from fedalign.protocol import Evaluation, ParameterGroup
from fedalign.server.checkpoint import Checkpoints
from fedalign.server.results import ROUND, RunFolder, _described
from fedalign.server.run import execute
from fedalign.units import percent
from tests.conftest import SUBJECTS, changed
from tests.moe.tiny import build
from tests.server.test_checkpoint import flip
from tests.server.test_run import Silent, model_bytes, start

LORA = "tuning.kind=lora"
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Made:
    """`made(*overrides)`: the folder of a finished run, made once."""
    runs: dict[tuple[str, ...], Path] = {}

    def make(*more: str) -> Path:
        if more not in runs:
            runs[more] = tmp_path_factory.mktemp("runs") / "run"
            start(runs[more], settings, "run.rounds=2", *more)
        return runs[more]

    return make


def exported(run: Path, to: Path, **options: Any) -> Exported:
    return export(Wanted(run, to, **options), lambda _: None)


def prepared(run: Path, scratch: Path) -> Prepared:
    return prepare(read_config((run / "config.toml").read_text()), scratch)


def plain(folder: Path) -> Any:
    """The model that plain libraries load, as the folder's own card says."""
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's own
        from peft import AutoPeftModelForCausalLM  # noqa: PLC0415 - takes a second

        return AutoPeftModelForCausalLM.from_pretrained(str(folder))


def scored(run: Prepared, folder: Path, tests: TestSet | None, answer: Any = None) -> Evaluation:
    """The run's own evaluation, of the model that plain libraries load, with the exported tokenizer."""
    assert tests is not None
    model: Any = SimpleNamespace(equal_lengths=False, model=plain(folder), device=torch.device("cpu"), is_seq2seq=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return evaluate(model, tests, run.config.evaluation, tokenizer, None, answer)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def other_weights(base: Path, to: Path) -> Path:
    """The same architecture, with one weight that differs by a little."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(to)
    return to


# --------------------------------------------------------------------------------------------------- the round trip


@pytest.mark.parametrize("more", [(), (LORA,), ("tuning.kind=moe",), (LORA, "tuning.average=freeze_a")])
def test_the_round_trip_is_exact(made: Made, tmp_path: Path, more: tuple[str, ...]) -> None:
    run, out = made(*more), tmp_path / "out"
    bench = prepared(run, tmp_path / "scratch")
    state = Checkpoints(run / "checkpoint", {}).load()
    assert state is not None
    before = bench.bench.score(state.weights, bench.test)
    exported(run, out)
    after = scored(bench, out, bench.test)
    assert after == before
    assert (after.loss, after.accuracy) == (lines(run)[-1]["loss_nats"], lines(run)[-1]["accuracy"])
    assert lines(run)[0]["loss_nats"] != after.loss


def test_a_checkpoint_is_a_copy_of_what_the_run_wrote(made: Made, tmp_path: Path) -> None:
    run, out = made(), tmp_path / "out"
    exported(run, out)
    files, kept = model_bytes(out), model_bytes(run / "model")
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors", "README.md"} <= set(files)
    marks = [one.pop(MARK).decode().splitlines() for one in (files, kept)]
    assert [listed for _, *listed in marks] == [sorted(files), sorted(kept)]
    assert kept.keys() - files.keys() == {ROUND}  # what the run says of it is in the card
    assert files.keys() - kept.keys() == {"README.md"}
    assert {name for name in files if files[name] != kept.get(name)} == {"README.md", SUMS}
    assert damage(out) == ""
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert f"| model.safetensors | `{digest}` |" in files["README.md"].decode()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing else is left there


def test_a_merged_adapter_needs_no_peft_and_scores_the_same(made: Made, tmp_path: Path) -> None:
    run, out = made(LORA), tmp_path / "out"
    exported(run, out, merge=True)
    assert {path.name for path in out.iterdir()} == {
        ".fedalign",
        "README.md",
        "SHA256SUMS",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    bench = prepared(run, tmp_path / "scratch")
    after, last = scored(bench, out, bench.test), lines(run)[-1]
    assert after.loss == pytest.approx(last["loss_nats"], abs=1e-5)
    assert after.accuracy == last["accuracy"]


def test_a_card_claims_the_embedded_data_of_no_site() -> None:
    sites = ["federation.engine=flower", 'data.labels=["a", "b"]']
    dealt, theirs = load_config(None), load_config(None, sites)
    assert (dealt.data.train, theirs.data.train) == ("docstrings", "docstrings")
    for config, embedded in ((dealt, True), (theirs, False)):
        rows = dict(training_rows(Trained(config, 1, False, (), {}, {}, None)))
        assert ("docstrings" in rows["data"]) == of_docstrings(config) == embedded


def test_the_best_round_is_not_the_last(made: Made, tmp_path: Path) -> None:
    run = made("run.rounds=3", "algorithm.name=fedavg", "run.seed=1")
    best, last = json.loads((run / "summary.json").read_text())["best_round"], tmp_path / "last"
    assert 0 < best < 3
    exported(run, last)
    assert exported(run, tmp_path / "best", best=True).snapshot.round == best
    bench = prepared(run, tmp_path / "scratch")
    for folder, number in ((tmp_path / "best", best), (last, 3)):
        assert scored(bench, folder, bench.test).loss == lines(run)[number]["loss_nats"]
    card = (tmp_path / "best" / "README.md").read_text()
    assert "chosen by these very scores" in card
    assert f"{best} of 3, the best one by accuracy" in card
    assert "chosen by these very scores" not in (last / "README.md").read_text()


@pytest.mark.parametrize(
    "more", [(), (LORA, "tuning.average=freeze_a"), ("evaluation.every=9", "clients.held_out=0.0")]
)
def test_of_an_interrupted_run_it_is_the_last_complete_round(
    settings: list[str], tmp_path: Path, more: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start(run, settings, *more, watch=Silent(lambda *where: where == (3, "training", 1)))
    state = Checkpoints(run / "checkpoint", {}).load()
    assert state is not None
    assert state.round == 2
    result = exported(run, tmp_path / "out")
    assert result.snapshot.round == 2
    assert "after round 2 of 3" in result.notes[0]
    bench = prepared(run, tmp_path / "scratch")
    assert scored(bench, tmp_path / "out", bench.test) == bench.bench.score(state.weights, bench.test)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the dog").input_ids


def test_a_resumed_run_that_was_cut_off_has_an_older_model_folder(settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, settings, "run.rounds=1")
    config = run / "config.toml"
    config.write_text(config.read_text().replace("rounds = 1", "rounds = 3"))
    bench = prepared(run, run / "clients")
    with pytest.raises(KeyboardInterrupt):
        execute(bench, RunFolder(run), Silent(lambda *where: where == (3, "training", 1)))
    assert exported(run, tmp_path / "out").snapshot.round == 2
    state = Checkpoints(run / "checkpoint", {}).load()
    assert state is not None
    assert scored(bench, tmp_path / "out", bench.test).loss == state.lines[2]["loss_nats"]


# ------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_is_rounded_as_transformers_does(made: Made, tmp_path: Path, dtype: str) -> None:
    run, out = made(), tmp_path / "out"
    exported(run, out, dtype=dtype)
    kind = getattr(torch, dtype)
    assert {value.dtype for value in tensors(out).values()} == {kind}
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    expected = AutoModelForCausalLM.from_pretrained(run / "model", dtype=kind).state_dict()
    found = plain(out).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert AutoTokenizer.from_pretrained(out)("the dog").input_ids
    assert f"rounded to {dtype}" in (out / "README.md").read_text()


def test_what_a_family_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    model = build("deepseek_v3")
    model.save_pretrained(tmp_path / "model")
    _cast(tmp_path / "model", "bfloat16", trust_remote_code=False)
    kinds = {
        name.endswith("e_score_correction_bias"): value.dtype for name, value in tensors(tmp_path / "model").items()
    }
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_of_an_adapter_the_factors_are_rounded(made: Made, tmp_path: Path) -> None:
    run, out = made(LORA), tmp_path / "out"
    exported(run, out, dtype="bfloat16")
    whole = tensors(run / "model")
    for name, value in tensors(out).items():
        assert value.dtype == (torch.bfloat16 if ".lora_" in name else torch.float32)
        assert torch.equal(value, whole[name].to(value.dtype))
    plain(out)


def test_a_run_in_bfloat16_keeps_its_routers(made: Made, tmp_path: Path) -> None:
    run, out = made("tuning.dtype=bfloat16", "algorithm.gate=local"), tmp_path / "out"
    exported(run, out, clients=True)
    found = tensors(out)
    assert {name.endswith("mlp.gate.weight"): value.dtype for name, value in found.items()} == {
        True: torch.float32,
        False: torch.bfloat16,
    }
    assert all(torch.equal(value, found[name]) for name, value in tensors(run / "model").items())
    kept = ClientMemory(run / "clients" / "client-01").before(3)
    gates = {name: value for name, value in tensors(out / "clients" / "client-01").items() if "mlp.gate" in name}
    assert torch.equal(gates["model.layers.1.mlp.gate.weight"][3], kept.private[ParameterGroup("gate", 1, 3)])


def test_an_adapter_of_a_base_in_four_bits_is_exported_where_there_is_no_gpu(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:  # bitsandbytes packs on a CPU too, only slowly
        patched.setattr("fedalign.client.workbench.need_cuda", lambda device: None)
        patched.setattr("fedalign.moe.four_bit.LEAST_SAVED", 0.1)
        start(tmp_path / "run", settings, "tuning.kind=qlora", "run.rounds=1")
    exported(tmp_path / "run", tmp_path / "adapter")
    exported(tmp_path / "run", tmp_path / "merged", merge=True)
    values = tensors(tmp_path / "merged")
    assert values["model.layers.0.self_attn.q_proj.weight"].shape == (32, 32)
    assert {value.dtype for value in values.values()} == {torch.bfloat16}
    inputs = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        one, two = (plain(tmp_path / name).eval()(inputs).logits.float() for name in ("adapter", "merged"))
    assert float((one - two).abs().max()) < 0.05 * float(one.abs().max())
    for name in ("adapter", "merged"):
        card = (tmp_path / name / "README.md").read_text()
        assert "on a base in 4 bits" in card
        assert "scored it on the base in 4 bits" in card
        assert "model-index" not in card
    assert 'dtype="bfloat16"' in code_of(tmp_path / "adapter")


# -------------------------------------------------------------------------------------------------- personal parts


@pytest.mark.parametrize(
    ("more", "merge"),
    [
        (("algorithm.gate=local",), False),
        (("algorithm.gate=local", LORA), False),
        (("algorithm.gate=local", LORA), True),
        (("algorithm.name=local",), False),
    ],
)
def test_each_client_has_its_own_model_beside_the_global_one(
    made: Made, tmp_path: Path, more: tuple[str, ...], merge: bool
) -> None:
    run, out = made(*more), tmp_path / "out"
    result = exported(run, out, clients=True, merge=merge)
    assert result.clients == 3
    bench, last = prepared(run, tmp_path / "scratch"), lines(run)[-1]
    close = 1e-5 if merge else 0.0
    for name, client in bench.clients.items():
        score = scored(bench, out / "clients" / name, client.held_out)
        assert score.loss == pytest.approx(last["client_losses_nats"][name], abs=close, rel=0)
        assert score.accuracy == last["client_accuracies"][name]
    card = (out / "README.md").read_text()
    assert card.count("of each client's own model, not of this one") == 4
    assert "split: held out" not in card  # what the Hub reads
    if "algorithm.name=local" not in more:
        assert scored(bench, out, bench.test).loss == pytest.approx(last["loss_nats"], abs=close, rel=0)
    first, second = (tensors(out / "clients" / f"client-0{i}") for i in (0, 1))
    differing = {name for name in first if not torch.equal(first[name], second[name])}
    assert differing
    if "algorithm.gate=local" in more:
        assert all("mlp.gate" in name for name in differing)


@pytest.mark.parametrize("more", [(), (LORA,)])
def test_a_mixture_is_computed_by_the_code_of_its_card(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    run, out = made("algorithm.name=pfl_moe", *more), tmp_path / "out"
    exported(run, out, clients=True)
    bench, last = prepared(run, tmp_path / "scratch"), lines(run)[-1]
    for name in ("client-00", "client-02"):
        folder = out / "clients" / name
        monkeypatch.chdir(folder)
        defined: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            exec(code_of(folder), defined)

        def answer(batch: Batch, log_probabilities: Any = defined["log_probabilities"]) -> AnswerLogits:
            target_B_S = batch.targets_B_S
            row_N, position_N = torch.nonzero(target_B_S != IGNORED, as_tuple=True)
            said = log_probabilities(**batch.inputs())[row_N, position_N]
            return AnswerLogits(said, target_B_S[row_N, position_N], row_N, said)

        score = scored(bench, folder, bench.clients[name].held_out, answer)
        assert score.loss == pytest.approx(last["client_losses_nats"][name], abs=1e-6)
        assert score.accuracy == last["client_accuracies"][name]
        assert (folder / MIXER).exists()


def test_a_client_that_never_took_part_has_no_model(made: Made, tmp_path: Path) -> None:
    run = made("algorithm.gate=local", "clients.sample=0.34", "run.rounds=1")
    result = exported(run, tmp_path / "out", clients=True)
    assert (result.clients, result.without) == (1, 2)
    assert len(list((tmp_path / "out" / "clients").iterdir())) == 1


# ------------------------------------------------------------------------------------------------------------ card


def code_of(folder: Path) -> str:
    card = (folder / "README.md").read_text()
    return card.split("```python\n")[1].split("```")[0]


def test_the_code_of_a_card_runs_where_it_lies(
    made: Made, settings: list[str], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """In a process of its own that knows plain libraries alone and has no network."""
    start(tmp_path / "switch", settings, LORA, f"model.path={model_folder('switch_transformers')}", "run.rounds=1")
    exported(made(), tmp_path / "checkpoint")
    exported(made(LORA), tmp_path / "adapter", dtype="bfloat16")
    exported(made(LORA), tmp_path / "merged", dtype="float16", merge=True)
    assert exported(tmp_path / "switch", tmp_path / "seq2seq").made.loader == "AutoPeftModelForSeq2SeqLM"
    folders = [tmp_path / name for name in ("checkpoint", "adapter", "merged", "seq2seq")]
    program = (
        "import os, sys\n"
        "for folder in sys.argv[1:]:\n"
        "    os.chdir(folder)\n"
        "    exec(open('README.md').read().split('```python\\n')[1].split('```')[0], {})\n"
        "assert not any(name.startswith('fedalign') for name in sys.modules)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *folders],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()
    assert "pipeline_tag" not in (tmp_path / "seq2seq" / "README.md").read_text()


def test_a_card_says_how_it_was_made(made: Made, tmp_path: Path) -> None:
    run, out = made(LORA), tmp_path / "out"
    exported(run, out)
    text, first, last = (out / "README.md").read_text(), lines(run)[0], lines(run)[-1]
    held = json.loads((run / "clients.json").read_text())
    examples = [client["examples"] for client in held.values()]
    for said in (
        "`fedalign_moe`",
        "LoRA of rank 8, alpha 16",
        "2 of 2",
        "3 clients",
        "texts with a class each, 3 classes",
        f"{sum(examples)} in all, {min(examples)} to {max(examples)} a client",
        "Dirichlet with alpha 1",
        f"| accuracy, global test set, 30 examples | {percent(first['accuracy'])} | {percent(last['accuracy'])} |",
        f"| accuracy, worst client | {percent(first['client_accuracy_worst'])} |",
        f"{last['routing_divergence_nats']:.4f} nats",
        "Of 8 experts (2 layers of 4)",
        "No differential privacy was used",
        '`"{text}\\nLabel:"`',
        f"| torch | {torch.__version__} | {torch.__version__} |",
    ):
        assert said in text, said


@pytest.mark.parametrize("more", [(), (LORA,), ("algorithm.gate=local",)])
def test_a_card_names_no_client_and_no_place(made: Made, tmp_path: Path, more: tuple[str, ...]) -> None:
    run, out = made(*more), tmp_path / "out"
    exported(run, out, clients="algorithm.gate=local" in more)
    config = read_config((run / "config.toml").read_text())
    for card in out.rglob("README.md"):
        text = card.read_text()
        for private in ("client-0", config.model.path, str(config.data.train), str(tmp_path), str(run)):
            assert private not in text, private
    assert not more or len(list(out.rglob("README.md"))) == (4 if "algorithm.gate=local" in more else 1)


@pytest.mark.parametrize("more", [(), (LORA,)])
def test_the_settings_of_a_card_are_those_of_the_run(made: Made, tmp_path: Path, more: tuple[str, ...]) -> None:
    run, out = made(*more), tmp_path / "out"
    exported(run, out)
    config = read_config((run / "config.toml").read_text())
    tables = tomllib.loads((out / "README.md").read_text().split("```toml\n")[1].split("```")[0])
    assert "path" not in tables["model"]
    tables["model"]["path"] = config.model.path
    tables["data"] |= {"train": config.data.train, "test": config.data.test}
    assert tables["data"].pop("labels") == sorted(SUBJECTS)  # which the run took from its rows
    assert parse_config(tables) == config


def test_the_head_of_a_card_is_what_the_hub_reads(made: Made, tmp_path: Path) -> None:
    run = made(LORA)
    result = exported(run, tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.library_name == "peft"
    assert data.base_model is None  # a folder has no name on the Hub
    assert data.license is None
    assert {"federated-learning", "mixture-of-experts", "fedalign_moe", "lora"} <= set(data.tags)
    assert data.eval_results is not None
    scores = {(r.metric_type, r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    last = lines(run)[-1]
    assert scores["accuracy", "global test set", None] == last["accuracy"]
    assert scores["accuracy", "clients' held-out examples", "worst client"] == last["client_accuracy_worst"]

    public = replace(result.made, base="allenai/OLMoE-1B-7B-0924", local_base=False)
    card = ModelCard(render(public, result.trained))
    head: dict[str, Any] = vars(card.data)
    assert head["base_model"] == "allenai/OLMoE-1B-7B-0924"
    assert head["base_model_relation"] == "adapter"
    assert "https://huggingface.co/allenai/OLMoE-1B-7B-0924" in card.text
    assert 'path = "' not in card.text.split("[data]")[0].split("```toml")[0]


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("federation", {"engine": "flower"}, ["3 sites that kept their data", "without secure aggregation"]),
        (
            "privacy",
            {"masked": True, "epsilon": 4.0},
            ["Differential privacy, epsilon 4 at most at delta 1e-05, of which each site knows what it spent, of one "],
        ),
        ("privacy", {"masked": True, "noise_multiplier": 2.0}, ["Differential privacy, noise of 2 a step at delta"]),
        ("privacy", {"epsilon": 4.0, "seed": 1}, ["a study, which protects nobody."]),
        ("data", {"kind": "chat"}, ["conversations", "chat template"]),
        ("data", {"kind": "text"}, ["plain text"]),
        ("data", {"kind": "instruction"}, [r'`"Instruction: {prompt}\nResponse:"`']),
        ("data", {"kind": "multiple_choice"}, [r'`"Question: {question}\nAnswer:"`']),
        ("data", {"template": "Mrs Miller, 52: {text}"}, [r'`"Mrs Miller, 52: {text}"`']),
        ("clients", {"partition": "files"}, ["each client has its own"]),
        ("tuning", {"kind": "experts"}, ["| tuning | experts |"]),
    ],
)
def test_a_card_of_another_run(
    made: Made, tmp_path: Path, section: str, values: dict[str, str], said: list[str]
) -> None:
    result = exported(made(), tmp_path / "out")
    config = result.trained.config
    other = config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
    text = render(result.made, replace(result.trained, config=other))
    for words in said:
        assert words in text, text
    assert ("No differential privacy" in text) == (section != "privacy")
    assert ("Miller" in text) == ("template" in values)


def test_a_card_of_a_run_that_scored_nothing_and_kept_no_health(made: Made, tmp_path: Path) -> None:
    result = exported(made(), tmp_path / "out")
    text = render(result.made, replace(result.trained, history=(), health=None, versions={}))
    assert "The run scored nothing." in text
    assert "The run kept nothing of it." in text
    assert "model-index" not in text


# ------------------------------------------------------------------------------------------------------- bad input


def refused(words: str, run: Path, to: Path, **options: Any) -> None:
    there = {path: path.read_bytes() for path in to.parent.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=words):
        exported(run, to, **options)
    assert {path: path.read_bytes() for path in to.parent.rglob("*") if path.is_file()} == there


def test_what_is_no_finished_run_is_refused(made: Made, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused("holds no run", tmp_path, out)
    refused("holds no run", tmp_path / "nothing", out)
    folder = RunFolder(tmp_path / "begun")
    folder.begin(load_config(None, settings))
    refused("no round is complete yet. Go on with it: fedalign run --resume", folder.path, out)
    refused("--best: no round of this run was scored", folder.path, out, best=True)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "zero", settings, watch=Silent(lambda *where: where == (1, "training", 1)))
    refused("no round is complete yet", tmp_path / "zero", out)
    (folder.path / "config.toml").write_text("[run]\nseed = -1\n")
    refused("cannot be read", folder.path, out)
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "comparison.toml").write_text("")
    refused("is a comparison", tmp_path / "compared", out)


def test_nothing_is_overwritten_unless_asked_for(made: Made, tmp_path: Path) -> None:
    run, out = made(), tmp_path / "out"
    exported(run, out, dtype="bfloat16")
    refused("already holds a model. Replace it: --overwrite", run, out)
    exported(run, out, overwrite=True)
    assert {value.dtype for value in tensors(out).values()} == {torch.float32}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    refused("is not empty and holds no model", run, tmp_path / "thesis", overwrite=True)
    (tmp_path / "thesis" / "config.json").touch()
    refused("is not empty and holds no model", run, tmp_path / "thesis", overwrite=True)
    (out / "thesis.tex").write_text("years of work")
    refused("holds thesis.tex, which no model wrote", run, out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    refused("is a file", run, tmp_path / "thesis" / "chapter.txt")
    refused("cannot be written", run, tmp_path / "thesis" / "chapter.txt" / "out")


@pytest.mark.parametrize("part", [".", "model", "best", "checkpoint", "clients/new", ".."])
def test_no_part_of_a_run_is_overwritten(made: Made, tmp_path: Path, part: str) -> None:
    run = made(LORA)
    with pytest.raises(UserError, match=r"--to .*: (is the run,|lies in .* a run or a model\.)"):
        exported(run, run / part, overwrite=True)
    base = Path(read_config((run / "config.toml").read_text()).model.path)
    with pytest.raises(UserError, match="the model that the run began with"):
        exported(run, base, overwrite=True)
    assert (base / "config.json").exists()


def test_options_that_do_not_fit_are_refused(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused("--merge: not needed, this run has no adapters", made(), out, merge=True)
    refused("--base: not needed, this run has no adapters", made(), out, base="x")
    refused("--dtype = 'int8': unknown. Choose one of: bfloat16, float16, float32", made(), out, dtype="int8")
    refused("--clients: fedalign_moe left nothing personal", made(), out, clients=True)


def test_sites_keep_what_is_personal_to_themselves(made: Made, tmp_path: Path) -> None:
    run = copy_of(made("algorithm.gate=local"), tmp_path / "run")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('engine = "in_process"', 'engine = "flower"'))
    refused("the sites of this run keep what is personal to themselves", run, tmp_path / "out", clients=True)
    exported(run, tmp_path / "out")


def test_what_clients_have_forgotten_is_not_made_up(made: Made, tmp_path: Path) -> None:
    run = copy_of(made("algorithm.gate=local", "run.rounds=3"), tmp_path / "run")
    history = lines(run)
    for line, accuracy in zip(history, (0.9, 0.5, 0.5, 0.5), strict=True):  # as if round 0 had been the best
        line["accuracy"] = accuracy
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    remade(run / "best", lambda new: (new / ROUND).write_text(json.dumps(_described(history[0]))))
    refused("took part in as many after round 0", run, tmp_path / "out", best=True, clients=True)


def copy_of(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def remade(folder: Path, change: Callable[[Path], object]) -> None:
    """A model as if a run had written it so."""
    with replacing(folder, "model") as new:
        for file in folder.iterdir():
            if file.name not in (MARK, SUMS):
                shutil.copyfile(file, new / file.name)
        change(new)


def test_an_adapter_is_merged_into_its_own_base_alone(made: Made, olmoe: Path, tmp_path: Path) -> None:
    run, out = made(LORA), tmp_path / "out"
    changed = other_weights(olmoe, tmp_path / "changed")
    refused("not those that the adapter was trained on", run, out, merge=True, base=str(changed))
    refused("not those that the adapter was trained on", run, out, base=str(changed))
    wider = tmp_path / "wider"
    build("olmoe", vocab_size=384, intermediate_size=24).save_pretrained(wider)
    refused("made for another base", run, out, merge=True, base=str(wider))
    refused("no such folder.*--base", run, out, merge=True, base=str(tmp_path / "nowhere"))
    exported(run, out, merge=True, base=str(olmoe))
    moved = copy_of(run, tmp_path / "moved")
    text = (moved / "config.toml").read_text()
    (moved / "config.toml").write_text(text.replace(str(olmoe), str(changed)))  # the base changed in its place
    refused("or the base changed since", moved, tmp_path / "other", merge=True)
    exported(moved, tmp_path / "other", merge=True, base=str(olmoe))
    assert model_bytes(tmp_path / "other")["model.safetensors"] == model_bytes(out)["model.safetensors"]


@pytest.mark.parametrize("more", [(), (LORA,)])
def test_a_damaged_model_is_refused(made: Made, tmp_path: Path, more: tuple[str, ...]) -> None:
    run, out = copy_of(made(*more), tmp_path / "run"), tmp_path / "out"
    file = next((run / "model").glob("*.safetensors"))
    flip(file)
    refused(rf"model': is damaged \({file.name} is not what was written\); asked for is round 2\. Make", run, out)
    flip(file)
    for name in (ROUND, SUMS, file.name):
        whole = (run / "model" / name).read_bytes()
        (run / "model" / name).unlink()
        refused(name, run, out)
        (run / "model" / name).write_bytes(whole)
    exported(run, tmp_path / "whole")
    if more:
        values = dict(list(tensors(made(*more) / "model").items())[1:])
        remade(run / "model", lambda new: save_file(values, new / file.name))
        refused("It was made for another base or tuned otherwise", run, out, merge=True)


def test_what_changes_while_it_is_copied_is_not_exported(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, copytree = copy_of(made(), tmp_path / "run"), shutil.copytree

    def meanwhile(kept: Path, folder: Path, **options: Any) -> None:
        copytree(kept, folder, **options)
        flip(folder / "config.json")  # of the model of a resumed run that ends

    monkeypatch.setattr(shutil, "copytree", meanwhile)
    refused("damaged, or changed while it was read: config.json", run, tmp_path / "out")
    assert damage(run / "model") == ""


@pytest.mark.parametrize("name", [LOCK, WATCH])
def test_a_run_at_work_is_not_exported(made: Made, tmp_path: Path, name: str) -> None:
    run = made()
    with locked(run / name, "a run"):
        refused(rf"a run is at work there \(process {os.getpid()} on ", run, tmp_path / "out")
        with pytest.raises(UserError, match="a run is at work there"):
            open_kept(run, best=False)


def test_two_exports_do_not_write_one_folder(made: Made, tmp_path: Path) -> None:
    with claimed(tmp_path / "out", "an export"):
        refused(rf"out': an export is at work there \(process {os.getpid()} on ", made(), tmp_path / "out")


def test_an_adapter_names_its_base_so_that_it_is_found_from_anywhere(
    settings: list[str], olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(olmoe.parent)
    start(tmp_path / "run", settings, LORA, "run.rounds=1", f"model.path={olmoe.name}")
    exported(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(olmoe)
    monkeypatch.chdir(tmp_path)
    plain(tmp_path / "out")


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        ({}, 'prompt = \'{text}\\nLabel:\'.format_map({"text": "..."})'),
        (
            {"template": "{my note}|{text}"},
            'prompt = \'{my note}|{text}\'.format_map({"my note": "...", "text": "..."})',
        ),
        ({"kind": "text"}, 'prompt = "..."'),
        ({"kind": "chat"}, 'messages = [{"role": "user", "content": "..."}]'),
    ],
)
def test_a_snippet_asks_as_it_was_trained_and_runs(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, str], asked: str
) -> None:
    out = tmp_path / "out"
    result = exported(made(), out)
    config = changed(result.trained.config, "data", **data)
    card = render(result.made, replace(result.trained, config=config))
    assert asked in card
    (out / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (out / "README.md").write_text(card)
    monkeypatch.chdir(out)
    defined: dict[str, Any] = {}
    exec(code_of(out), defined)
    prompt = {"text": "...", "my note": "..."}
    ids = AutoTokenizer.from_pretrained(out)(defined.get("prompt", "..."), return_tensors="pt").input_ids
    assert torch.equal(defined["input_ids"], ids)
    if "template" in data:
        assert defined["prompt"] == data["template"].format_map(prompt)


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (None, "Licence of the base: unknown."),
        ("---\nlicense: mit\n---\n", "Licence of the base: mit."),
        ("---\nlicense: other\nlicense_name: my-terms\n---\n", "Licence of the base: my-terms."),
        ("---\nlicense: [\n---\n", "Licence of the base: unknown."),
    ],
)
def test_a_card_names_licences_or_says_that_they_are_unknown(
    made: Made, olmoe: Path, tmp_path: Path, card: str | None, said: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(olmoe, base)
    if card is not None:
        (base / "README.md").write_text(card)
    out = tmp_path / "out"
    exported(made(LORA), out, base=str(base), data_license="CC-BY-4.0" if card else None)
    text = (out / "README.md").read_text()
    assert said in text
    assert f"Licence of the data: {'CC-BY-4.0' if card else 'unknown'}." in text


def test_a_card_tells_which_loaders_were_tried(made: Made, tmp_path: Path) -> None:
    checked = json.loads((made(LORA) / "summary.json").read_text())["checked"]
    exported(made(LORA), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"with plain peft, and compared: {checked}." in text
    assert "No other loader was tried (vLLM, llama.cpp, ollama)." in text
