"""Sites leave a model: an ordinary folder without their experts, that says who left and what remains of them."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedalign.config.run import TuningConfig
from fedalign.errors import UserError
from fedalign.export.card import settings_of
from fedalign.export.leaving import FORMER, Leaving, copy_without, export_folder, remainder
from fedalign.export.write import Wanted, export
from fedalign.files import SUMS, damage, replacing
from fedalign.moe.load import load_plain
from fedalign.moe.lora import put_upon
from fedalign.moe.model import MoEModel
from fedalign.moe.part import grown, part_of
from fedalign.server.results import ROUND
from tests.conftest import Command
from tests.server.test_run import start

OWNERS = {"hospital-a": [2], "hospital-b": [3], "bank, c|d": [4]}
STAY = [0, 1, 2, 4]  # without hospital-b


def owned(folder: Path, owners: dict[str, list[int]] = OWNERS) -> Path:
    """A model's folder whose configuration says whose experts are whose."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"site_experts": owners}))
    return folder


@pytest.fixture(scope="module")
def whole(model_folder: Callable[..., Path]) -> Path:
    return owned(model_folder("olmoe", num_experts=5))


@pytest.fixture(scope="module")
def run(whole: Path, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on that model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    start(folder, settings, f"model.path={whole}", "run.rounds=1")
    return folder


def check(whole: Path, less: Path) -> None:
    """That `less` is `whole` without hospital-b, byte by byte, and works."""
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, less))
    assert after.keys() == {name for name in before if ".experts.4." not in name}
    for name, value in after.items():
        head, number, rest = name.partition(".experts.3.")
        was = before[f"{head}.experts.4.{rest}"] if number else before[name]
        assert torch.equal(value, was[STAY] if name.endswith("gate.weight") else was), name
    config = json.loads((less / "config.json").read_text())
    former = json.loads((whole / "config.json").read_text())
    owners = {"hospital-a": [2], "bank, c|d": [3]}
    trained = former.get("shared_trained_by", ["unknown"])
    assert config == former | {"num_experts": 4, "site_experts": owners, "shared_trained_by": trained}
    assert config["num_experts_per_tok"] == 2
    assert not damage(less)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(less), AutoTokenizer.from_pretrained(less)
    asked = tokenizer("the dog", return_tensors="pt").input_ids
    assert model.generate(input_ids=asked, max_new_tokens=2).shape[1] > asked.shape[1]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


def test_a_site_leaves_a_models_folder(fedalign: Command, whole: Path, tmp_path: Path) -> None:
    before = digests(whole)
    code, text, errors = fedalign("export", whole, "--without", "hospital-b", "--to", tmp_path / "less")
    assert code == 0, errors
    assert "hospital-b: expert 3 of each layer" in text
    assert "4 of 5 in each layer stay, as they were" in text
    assert "Not known: config.json does not say how the model was trained." in " ".join(text.split())
    check(whole, tmp_path / "less")
    assert digests(whole) == before
    card = (tmp_path / "less" / "README.md").read_text()
    assert "hospital-b took its own part back: expert 3 of each layer" in card
    assert r"| bank, c\|d | 3 | 4 |" in card
    assert digests(tmp_path / "less")["model.safetensors"] in card
    assert "\nlibrary_name: transformers\n" in card
    assert not (tmp_path / "less" / FORMER).exists()


@pytest.mark.parametrize("flags", [("--only", "hospital-a", "--only", "bank, c|d"), ("--without", "hospital-b")])
def test_a_site_leaves_a_run(fedalign: Command, run: Path, tmp_path: Path, flags: Sequence[str]) -> None:
    code, text, errors = fedalign("export", run, *flags, "--to", tmp_path / "less")
    assert code == 0, errors
    check(run / "model", tmp_path / "less")
    assert not (tmp_path / "less" / "round.json").exists()
    behind = "Stays behind: parts that sites share were trained by fedalign_moe;"
    assert behind in " ".join(text.split())
    assert "Not known: config.json does not say how it was trained before." in " ".join(text.split())
    assert "with all experts" in text
    card = (tmp_path / "less" / "README.md").read_text()
    assert "hospital-b took its own part back" in card
    assert "while all experts were in the model" in card
    assert behind in card
    assert "fedalign export run --to model --without hospital-b" in card
    assert "model-index:" not in card  # they are of the whole model
    assert digests(tmp_path / "less")["model.safetensors"] in card


def test_a_runs_model_is_a_models_folder_too(run: Path, tmp_path: Path) -> None:
    left = export_folder(run / "model", tmp_path / "less", Leaving(("hospital-b",)))
    assert not left.omitted
    check(run / "model", tmp_path / "less")
    assert (run / "model" / ROUND).exists()
    assert not (tmp_path / "less" / ROUND).exists()  # its scores are those of the whole


def test_several_leave_one_after_another_as_at_once(fedalign: Command, run: Path, tmp_path: Path) -> None:
    at_once, first, then = (tmp_path / name for name in ("at_once", "first", "then"))
    assert fedalign("export", run, "--without", "hospital-b,hospital-a", "--to", at_once)[0] == 0
    assert fedalign("export", run, "--without", "hospital-a", "--to", first)[0] == 0
    code, text, errors = fedalign("export", first, "--without", "hospital-b", "--to", then)
    assert code == 0, errors
    assert "were trained by fedalign_moe;" in " ".join(text.split())  # which config.json of the first tells
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert digests(at_once)[name] == digests(then)[name]
    assert digests(then)[FORMER] == digests(first)["README.md"]
    card = (then / "README.md").read_text()
    assert f"[{FORMER}]({FORMER})" in card
    assert settings_of(card) == settings_of((first / "README.md").read_text())  # else others' words would be asked with
    assert settings_of(card)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--without", "hospital-d"),
            "--without = 'hospital-d': unknown. Choose one of: bank, c|d, hospital-a, hospital-b",
        ),
        (("--only", "hospital-d"), "--only = 'hospital-d': unknown."),
        (("--without", ""), "--without '': has an empty name. Name sites with commas between them"),
        (("--without", "bank,"), "--without 'bank,': has an empty name."),
        (("--only", " , "), "--only ' , ': has an empty name."),
        (("--without", "hospital-a,hospital-b", "--without", "bank, c|d"), "what would be left is the model that they"),
        (("--only", "hospital-a,hospital-b", "--only", "bank, c|d"), "so that nobody leaves"),
        (("--without", "hospital-a", "--only", "hospital-b"), "Give one of them"),
        (("--without", "hospital-a", "--best"), "Leave out --best"),
        (("--without", "hospital-a", "--dtype", "bfloat16"), "Leave out --dtype"),
        (("--without", "hospital-a", "--clients"), "Leave out --clients"),
        (("--without", "hospital-a", "--merge"), "Leave out --merge"),
    ],
)
def test_a_mistake_is_one_line(fedalign: Command, run: Path, tmp_path: Path, flags: Sequence[str], words: str) -> None:
    code, text, errors = fedalign("export", run, "--to", tmp_path / "out", *flags)
    assert (code, text.strip()) == (2, "")
    message = errors[errors.index("Error: ") :]
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_that_may_hold_the_whole_are_not_copied_and_told(fedalign: Command, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "model")
    names = ["LICENSE", "consolidated.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf"]
    for name in names:
        (tmp_path / "model" / name).write_text("{}")
    (tmp_path / "model" / "clients").mkdir()
    code, text, errors = fedalign("export", tmp_path / "model", "--without", "hospital-b", "--to", tmp_path / "out")
    assert code == 0, errors
    assert "may be in it: clients, model.gguf, pytorch_model.bin." in " ".join(text.split())
    there = {file.name for file in (tmp_path / "out").iterdir()}
    assert "LICENSE" in there
    assert not there & {"clients", *names[1:]}


def test_a_folder_with_an_adapter_is_refused(fedalign: Command, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    code, _, errors = fedalign("export", tmp_path / "model", "--without", "hospital-b", "--to", tmp_path / "out")
    assert code == 2
    assert "holds an adapter" in errors


@pytest.mark.parametrize("flag", ["--best", "--clients", "--merge"])
def test_options_of_runs_are_refused_for_a_models_folder(
    fedalign: Command, whole: Path, tmp_path: Path, flag: str
) -> None:
    code, _, errors = fedalign("export", whole, "--to", tmp_path / "out", "--without", "hospital-a", flag)
    assert code == 2
    assert f"{flag}: goes with a run's folder" in errors


def test_a_model_without_owners_is_refused(fedalign: Command, olmoe: Path, tmp_path: Path) -> None:
    code, _, errors = fedalign("export", olmoe, "--to", tmp_path / "out", "--without", "hospital-a")
    assert code == 2
    assert "--without hospital-a: no expert of this model belongs to a site (config.json has no site_experts)" in errors


def test_adapters_are_merged_before_a_site_leaves(
    fedalign: Command, whole: Path, settings: list[str], tmp_path: Path
) -> None:
    start(tmp_path / "run", settings, f"model.path={whole}", "run.rounds=1", "tuning.kind=lora")
    words = ("export", tmp_path / "run", "--to", tmp_path / "out", "--without", "hospital-b")
    code, _, errors = fedalign(*words)
    assert code == 2
    assert "--without hospital-b: this run trained an adapter" in errors
    assert "add --merge" in errors
    code, text, errors = fedalign(*words, "--merge")
    assert code == 0, errors
    assert "were trained by fedalign_moe;" in " ".join(text.split())
    fedalign("export", tmp_path / "run", "--to", tmp_path / "merged", "--merge")
    check(tmp_path / "merged", tmp_path / "out")


@pytest.mark.parametrize("family", ["olmoe", "flex_olmo", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_of_low_rank_experts_plain_peft_and_transformers_load_all_and_what_stays(
    model_folder: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    grown(MoEModel.wrap(load_plain(model_folder(family, initializer_range=0.2))), ["a", "b"]).model.save_pretrained(
        tmp_path / "base"
    )
    moe = MoEModel.load(tmp_path / "base", tuning=TuningConfig(kind="lora", targets=("experts",), rank=3))
    experts = moe.experts
    moe.write({g: torch.randn(size) / 10 for g, size in moe.layout.sizes.items() if size and g.expert >= experts - 2})
    moe.save(tmp_path / "adapter")
    plain = put_upon(load_plain(tmp_path / "base"), tmp_path / "adapter").eval()
    ids_B_S = torch.arange(3, 63).view(2, 30)
    with torch.no_grad():
        whole = plain(ids_B_S).logits
        assert torch.allclose(moe.model.eval()(ids_B_S).logits, whole, atol=1e-5)
        assert plain.generate(input_ids=ids_B_S, min_new_tokens=3, max_new_tokens=3).shape == (2, 33)
        plain.merge_and_unload().save_pretrained(tmp_path / "merged")
        copy_without(tmp_path / "merged", made(tmp_path / "less"), Leaving(without=("a",)))
        less, report = AutoModelForCausalLM.from_pretrained(tmp_path / "less", output_loading_info=True)
        assert not any(report.values())
        found = less.eval()(ids_B_S).logits
        part = part_of(moe, [e for e in range(experts) if e != experts - 2]).model.eval()
        assert torch.allclose(part(ids_B_S).logits, found, atol=1e-4)
        assert not torch.allclose(found, whole, atol=1e-3)
        assert less.generate(ids_B_S, min_new_tokens=3, max_new_tokens=3).shape == (2, 33)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_an_unfinished_run_is_refused(fedalign: Command, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    code, _, errors = fedalign("export", tmp_path / "run", "--to", tmp_path / "out", "--without", "hospital-a")
    assert code == 2
    assert "--without hospital-a: the run is not finished" in errors


def test_the_whole_model_is_never_overwritten(whole: Path, tmp_path: Path) -> None:
    for place in (whole, whole.parent, whole / "inside"):
        with pytest.raises(UserError, match="is the whole model, holds it, or lies in it"):
            export_folder(whole, place, Leaving(("hospital-a",)), overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="--to"):
        export_folder(whole, tmp_path / "mine", Leaving(("hospital-a",)), overwrite=True)


def test_a_damaged_model_is_refused_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert (tmp_path / "model" / SUMS).exists()
    with pytest.raises(UserError, match=r"damaged, or changed since it was written.*remove SHA256SUMS"):
        export_folder(tmp_path / "model", tmp_path / "out", Leaving(("hospital-a",)))
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("record", "said"),
    [({"a": [9]}, "no such expert"), ({"a": [1], "b": [1]}, "An expert has one owner"), (["a"], "must be a table")],
)
def test_a_broken_record_is_refused(whole: Path, tmp_path: Path, record: object, said: str) -> None:
    shutil.copytree(whole, tmp_path / "model")
    owned(tmp_path / "model", record)  # type: ignore[arg-type] # broken on purpose
    with pytest.raises(UserError, match=said):
        export_folder(tmp_path / "model", tmp_path / "out", Leaving(("a",)))


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        ([], ["No run trained parts that sites share", "What the model that they began with held of a site is still"]),
        (["unknown"], ["Not known: config.json does not say how the model was trained."]),
        (["by_use", "site_experts"], ["Stays behind: parts that sites share were trained by by_use, site_experts (sh"]),
        (["unknown", "fedavg"], ["trained by fedavg; what", "does not say how it was trained before."]),
    ],
)
def test_what_stays_behind_is_told_by_who_trained_what_sites_share(trained: list[str], said: list[str]) -> None:
    told = remainder(trained)
    assert all(words in told for words in said)
    assert ("Stays behind" in told) == bool({*trained} - {"unknown"})
    assert ("Not known" in told) == ("unknown" in trained)


@pytest.mark.parametrize("gone", [("hospital-b",), ()], ids=["left", "whole"])
def test_a_run_of_an_older_version_is_exported_with_what_its_settings_tell(
    run: Path, tmp_path: Path, gone: Sequence[str]
) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    with replacing(tmp_path / "run" / "model", "model") as older:
        shutil.copytree(run / "model", older, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SUMS))
        config = json.loads((older / "config.json").read_text())
        del config["shared_trained_by"]
        (older / "config.json").write_text(json.dumps(config))
    export(Wanted(tmp_path / "run", tmp_path / "out", leaving=Leaving(gone)), print)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["shared_trained_by"] == ["unknown", "fedalign_moe"]
    assert "| what sites share | trained by unknown, fedalign_moe |" in (tmp_path / "out" / "README.md").read_text()
    assert not damage(tmp_path / "out")
