"""`fedalign upcycle` as a user meets it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Command, save_tokenizer
from tests.moe.tiny import build


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A dense model of four layers with a tokenizer, a chat template and generation settings of its own."""
    folder = tmp_path / "llama"
    model = build("llama", vocab_size=384, num_hidden_layers=4)
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(folder)
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_it_writes_a_model_that_anything_can_load(fedalign: Command, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    code, text, errors = fedalign("upcycle", str(llama), "--experts", "4", "--out", str(out))
    assert code == 0, errors
    for word in (
        "llama -> mixtral",
        "4 MoE, 0 dense",
        "4 a layer, top-2, noise 0.01, seed 0",
        "parameters",
        "active for a token",
        "copied, with its chat template",
        f"fedalign inspect {out}",
        f"fedalign run my.toml --set model.path={out}",
    ):
        assert word in text
    assert "it/s" not in errors  # no progress bars of other libraries
    model = AutoModelForCausalLM.from_pretrained(out)
    assert f"{model.num_parameters():,}" in text
    assert f"{AutoModelForCausalLM.from_pretrained(llama).num_parameters():,}" in text
    assert model.generation_config.max_new_tokens == 77
    before, after = AutoTokenizer.from_pretrained(llama), AutoTokenizer.from_pretrained(out)
    assert after.chat_template == before.chat_template
    assert after("the ward").input_ids == before("the ward").input_ids
    assert after.eos_token == before.eos_token == "</s>"
    assert "mixtral, found by table" in fedalign("inspect", str(out))[1]


def test_some_layers_stay_dense_and_the_result_trains(
    fedalign: Command, llama: Path, settings: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "sparse"
    code, text, errors = fedalign("upcycle", str(llama), "--experts", "4", "--layers", "every:2", "--out", str(out))
    assert code == 0, errors
    assert "llama -> qwen2_moe" in text
    assert "2 MoE, 2 dense" in text
    assert json.loads((out / "config.json").read_text())["mlp_only_layers"] == [0, 2]
    changes = [*settings, f"model.path={out}", "run.rounds=1", "training.epochs=1", "data.max_train=60"]
    words = [word for change in changes for word in ("--set", change)]
    code, _, errors = fedalign("run", os.devnull, *words, "--out", str(tmp_path / "run"))
    assert code == 0, errors
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["final_loss"] < summary["initial_loss"]


def test_without_noise_it_says_that_nothing_changed(fedalign: Command, llama: Path, tmp_path: Path) -> None:
    def difference(noise: str) -> float:
        _, text, _ = fedalign("upcycle", str(llama), "--noise", noise, "--out", str(tmp_path / noise))
        return float(text.split("at most ")[1].split()[0])

    assert difference("0") < 1e-6
    assert difference("0.5") > 1e-4


def test_a_model_is_replaced_only_if_told_to(fedalign: Command, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    for extra in ((), ("--overwrite", "--experts", "3")):
        assert fedalign("upcycle", str(llama), *extra, "--out", str(out))[0] == 0
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 3
    before = {file: file.read_bytes() for file in out.iterdir()}
    code, _, errors = fedalign("upcycle", str(llama), "--out", str(out))
    assert code == 2
    assert "already holds a model" in errors
    assert "--overwrite" in errors
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, _, errors = fedalign("upcycle", str(out), "--site-experts", "a", "--out", str(tmp_path / "more"))
    assert code == 2
    assert "damaged, or changed since it was written: model.safetensors" in " ".join(errors.split())
    weights.write_bytes(whole)
    (out / "thesis.tex").write_text("years of work")
    code, _, errors = fedalign("upcycle", str(llama), "--overwrite", "--out", str(out))
    assert code == 2
    assert "thesis.tex, which no model wrote" in " ".join(errors.split())
    assert (out / "thesis.tex").read_text() == "years of work"


def test_nothing_but_a_model_is_ever_replaced(fedalign: Command, llama: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "diary.txt").write_text("dear")
    for out, words in (
        (notes, "holds no model"),
        (notes / "diary.txt", "is a file"),
        (llama, "and would be lost"),
    ):
        code, _, errors = fedalign("upcycle", str(llama), "--overwrite", "--out", str(out))
        assert code == 2
        assert words in errors
    assert (notes / "diary.txt").read_text() == "dear"
    assert AutoModelForCausalLM.from_pretrained(llama).config.model_type == "llama"


def test_a_model_without_a_tokenizer_is_upcycled_and_said_so(fedalign: Command, tmp_path: Path) -> None:
    build("qwen3").save_pretrained(tmp_path / "qwen")
    code, text, errors = fedalign("upcycle", str(tmp_path / "qwen"), "--out", str(tmp_path / "out"))
    assert code == 0, errors
    assert "none: tokenizer" in text
    assert "there are no tokenizer files" in " ".join(text.split())
    assert "qwen3 -> qwen3_moe" in text


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("mixtral", (), ("already a Mixture-of-Experts model", "llama, mistral, qwen2, qwen3")),
        ("gemma2", (), ("dense family = 'gemma2': unknown", "llama, mistral, qwen2, qwen3")),
        ("llama", ("--top-k", "9"), ("--top-k 9", "from 1 to the number of experts, 8")),
        ("llama", ("--layers", "0,7"), ("--layers '0,7'", "layers 0 to 1")),
        ("llama", ("--layers", "every:0"), ("--layers 'every:0'", "N from 1 to 2")),
        ("llama", ("--noise", "-1"), ("--noise -1", "0 or more")),
        ("", (), ("no such file or folder", ".gguf")),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(
    fedalign: Command, tmp_path: Path, family: str, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    if family:
        build(family).save_pretrained(tmp_path / "model")
    code, _, errors = fedalign("upcycle", str(tmp_path / "model"), *options, "--out", str(tmp_path / "out"))
    assert code == 2
    assert errors.startswith("Error: ")
    assert "Traceback" not in errors
    for word in words:
        assert word in errors
    assert not (tmp_path / "out").exists()


def test_help_says_what_becomes_of_which_model(fedalign: Command) -> None:
    code, text, _ = fedalign("upcycle", "--help")
    assert code == 0
    for word in ("Mixtral; Qwen2-MoE where some layers stay dense", "fedalign upcycle Qwen/Qwen3-0.6B", "every:4"):
        assert word in " ".join(text.split())


def test_sites_get_experts_of_their_own(fedalign: Command, llama: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "base+2", tmp_path / "base+3"
    words = ("--experts", "3", "--top-k", "2", "--site-experts", "hospital-a, bank b", "--out", out)
    code, text, errors = fedalign("upcycle", llama, *words)
    assert code == 0, errors
    for word in ("5 a layer, top-2", "hospital-a, bank b: one a layer each", "quiet", "algorithm.name=site_experts"):
        assert word in " ".join(text.split())
    assert AutoModelForCausalLM.from_pretrained(out).config.site_experts == {"hospital-a": [3], "bank b": [4]}
    told = "bank b 4; hospital-a 3; public: the other 3 trained by what sites share: no run"
    assert told in " ".join(fedalign("inspect", out)[1].split())
    code, text, errors = fedalign("upcycle", out, "--site-experts", "c", "--out", more)
    assert code == 0, errors
    assert AutoModelForCausalLM.from_pretrained(more).config.site_experts == {
        "hospital-a": [3],
        "bank b": [4],
        "c": [5],
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--site-experts", ""], "--site-experts '': has an empty name"),
        (["--site-experts", " , ,"], "--site-experts ' , ,': has an empty name"),
        (["--site-experts", "a,,b"], "--site-experts 'a,,b': has an empty name"),
        (["--site-experts", "\t\0"], "site_experts: '\\x00': a site's name"),
        (["--site-experts", "a,a"], "--site-experts: 'a' is named twice"),
        (["--site-experts", "a", "--noise", "0"], "an MoE already, to which --site-experts adds experts"),
        (["--site-experts", "a", "--experts", "4"], "an MoE already, to which --site-experts adds experts"),
        ([], "--site-experts gives sites experts of their own"),
    ],
)
def test_site_experts_of_an_moe_are_refused_in_one_line(
    fedalign: Command, olmoe: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    code, _, errors = fedalign("upcycle", olmoe, *words, "--out", tmp_path / "out")
    assert code == 2
    assert said in " ".join(errors.split())
    assert not (tmp_path / "out").exists()
