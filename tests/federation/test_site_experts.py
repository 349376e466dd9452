"""Runs in which each site trains an expert of its own: what a site writes, and what is left when it leaves."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor

from fedalign.client.evaluation import evaluate
from fedalign.client.trainer import Trainer
from fedalign.config.toml import load_config
from fedalign.doctor.estimate import StepCost, estimate, estimate_site
from fedalign.doctor.what_leaves import OWN_ROWS, empty_messages, tokens_told
from fedalign.errors import UserError
from fedalign.federation.in_process import prepare
from fedalign.maths.average import StreamingSum
from fedalign.moe.load import load_plain
from fedalign.moe.model import MoEModel
from fedalign.moe.part import grown, without
from fedalign.moe.site_experts import owners
from fedalign.protocol import DEALT, Evaluation, Failure, ParameterGroup, Piece, Update, Weights
from fedalign.server.results import RunFolder
from tests.conftest import Command, rows, save_tokenizer, write_jsonl
from tests.moe.tiny import EXPERTS, build

SITES = ("a", "b", "c")
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def base(model_folder: Callable[..., Path]) -> Path:
    return model_folder("olmoe", initializer_range=0.2)


@pytest.fixture
def model_of(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """`model_of("a", "c")`: the base with an expert for each of these sites."""

    def model(*sites: str) -> Path:
        folder = tmp_path / f"base+{'+'.join(sites)}"
        grown(MoEModel.wrap(load_plain(base)), sites).model.save_pretrained(folder)
        save_tokenizer(folder)
        return folder

    return model


@pytest.fixture
def run(fedalign: Command, model_of: Callable[..., Path], tmp_path: Path) -> Run:
    """`run("a", "c")`: a run of these sites, each with its own rows, and the folder of it."""

    def of(*sites: str, clients: tuple[str, ...] = (), join: str = "", **changes: Any) -> Path:
        every = [row | {"client": "abc"[i % 3]} for i, row in enumerate(rows())]
        there = clients or sites
        train = write_jsonl(tmp_path / "train.jsonl", [row for row in every if row["client"] in there])
        out = tmp_path / f"run-{'-'.join(there)}-{len(list(tmp_path.iterdir()))}"
        settings = {
            "model.path": changes.pop("model__path", None) or model_of(*sites),
            "data.train": train,
            "data.test": write_jsonl(tmp_path / "test.jsonl", every[::5]),
            "clients.partition": "natural",
            "clients.min_examples": 5,
            "training.learning_rate": "1e-2",
            "training.batch_examples": 4,
            "statistics.min_tokens": 4,
            "run.rounds": 2,
            **({} if join else {"algorithm.name": "site_experts"}),
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
        words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        code, _, errors = fedalign("run", "/dev/null", *words, *(["--join", join] if join else []), "--out", out)
        assert code == 0, errors
        RunFolder(out).check_free(overwrite=True)  # all of it is known as the run's
        return out

    return of


@pytest.fixture
def exported(fedalign: Command, tmp_path: Path) -> Callable[..., Path]:
    """`exported(run, "--merge")`: the folder that `fedalign export` wrote."""

    def of(folder: Path, *words: str) -> Path:
        out = tmp_path / f"exported-{len(list(tmp_path.iterdir()))}"
        code, _, errors = fedalign("export", folder, *words, "--to", out)
        assert code == 0, errors
        return out

    return of


def weights(folder: Path) -> Weights:
    return MoEModel.wrap(load_plain(folder)).read()


def moved(old: Weights, new: Weights) -> set[ParameterGroup]:
    return {group for group in old if not torch.equal(old[group], new[group])}


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"training__keep_optimizer": "false"},
        {"training__keep_optimizer": "true"},
        {"tuning__dtype": "bfloat16"},  # trained in float32 copies of what is trained
        {"tuning__kind": "moe", "wire__dtype": "bfloat16"},
        {"training__balance_coefficient": "0.01"},
    ],
    ids=str,
)
def test_without_b_it_is_byte_for_byte_the_run_in_which_b_never_was(
    run: Run, fedalign: Command, tmp_path: Path, changes: dict[str, str]
) -> None:
    with_b = run(*SITES, **changes)
    code, _, errors = fedalign("export", with_b, "--without", "b", "--to", tmp_path / "left")
    assert code == 0, errors
    never = run("a", "c", **changes) / "model"
    assert (tmp_path / "left" / "model.safetensors").read_bytes() == (never / "model.safetensors").read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "left", never)]
    assert configs[0] == configs[1]
    assert configs[0]["site_experts"] == {"a": [EXPERTS], "c": [EXPERTS + 1]}
    assert configs[0]["shared_trained_by"] == []


LOW_RANK = {"tuning__kind": "lora", "tuning__targets": '["experts"]', "tuning__rank": "2"}


@pytest.mark.parametrize(
    "changes",
    [{}, {"tuning__average": "freeze_a", "training__keep_optimizer": "true"}, {"tuning__dtype": "bfloat16"}],
    ids=str,
)
def test_of_low_rank_experts_it_is_byte_for_byte_that_run_too(
    run: Run, exported: Callable[..., Path], changes: dict[str, str]
) -> None:
    with_b, never = (run(*sites, **LOW_RANK | changes) for sites in (SITES, ("a", "c")))
    left, whole = exported(with_b, "--merge", "--without", "b"), exported(never, "--merge")
    assert (left / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert owners(load_plain(left).config) == owners(load_plain(whole).config) == {"a": (EXPERTS,), "c": (EXPERTS + 1,)}


def test_a_low_rank_expert_is_a_few_directions_beside_what_it_started_from(
    run: Run, exported: Callable[..., Path], tmp_path: Path
) -> None:
    folder = run(*SITES, **LOW_RANK)
    merged, start = exported(folder, "--merge"), tmp_path / "base+a+b+c"
    changed = moved(weights(start), weights(merged))
    owned = {EXPERTS, EXPERTS + 1, EXPERTS + 2}
    assert {(group.kind, group.expert) for group in changed} == {(k, e) for k in ("gate", "expert") for e in owned}
    before, after = tensors(start), tensors(merged)
    own = [name for name in before if f".experts.{EXPERTS}." in name]
    assert own
    assert all(torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) == 2 for name in own)
    whole, low = (json.loads((one / "metrics.jsonl").read_text().splitlines()[-1]) for one in (run(*SITES), folder))
    assert low["bytes_up"] < whole["bytes_up"] / 2
    ids_B_S = torch.arange(12).view(2, 6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's own
        adapted = AutoPeftModelForCausalLM.from_pretrained(exported(folder)).eval()(ids_B_S).logits
    assert torch.allclose(adapted, load_plain(merged).eval()(ids_B_S).logits, atol=1e-5)


def test_only_its_owner_writes_an_expert_and_nobody_what_is_public(run: Run, tmp_path: Path) -> None:
    new = weights(run(*SITES) / "model")
    old = weights(tmp_path / "base+a+b+c")
    changed = moved(old, new)
    owned = {EXPERTS, EXPERTS + 1, EXPERTS + 2}
    assert {(group.kind, group.expert) for group in changed} == {(k, e) for k in ("gate", "expert") for e in owned}
    alone = weights(run(*SITES, clients=("b",)) / "model")
    assert {group.expert for group in moved(old, alone)} == {EXPERTS + 1}
    b = [group for group in changed if group.expert == EXPERTS + 1]
    assert all(torch.equal(alone[group], new[group]) for group in b)


def test_who_joins_later_gives_the_model_of_a_run_in_which_it_was_from_the_start(run: Run) -> None:
    first = run("a", "b")
    later, together = run(*SITES, join="c", model__path=first), run(*SITES)
    files = [folder / "model" / "model.safetensors" for folder in (later, together)]
    assert files[0].read_bytes() == files[1].read_bytes()
    before, after = weights(first / "model"), weights(later / "model")
    assert all(torch.equal(after[group], value) for group, value in before.items())
    assert owners(load_plain(later / "model").config) == {name: (EXPERTS + i,) for i, name in enumerate(SITES)}
    lines = [json.loads(line) for line in (later / "metrics.jsonl").read_text().splitlines()]
    assert all(line["clients"] == ["c"] and not line["failures"] for line in lines[1:])


def test_a_row_whose_first_update_was_lost_is_fitted_again(
    run: Run, model_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    add, fit, fits = StreamingSum.add, Trainer._fitted_rows, list[Weights]()

    def lossy(total: StreamingSum, update: Update) -> Failure | None:
        lost = (update.client, update.round) == ("b", 1)
        return Failure("b", "update", "lost on the way") if lost else add(total, update)

    def noted(trainer: Trainer, *args: Any) -> Weights:
        fits.append(fit(trainer, *args))
        return fits[-1]

    monkeypatch.setattr(StreamingSum, "add", lossy)
    monkeypatch.setattr(Trainer, "_fitted_rows", noted)
    start, end = weights(model_of(*SITES)), weights(run(*SITES, run__rounds=3) / "model")
    assert len(fits) == len(SITES) + 1  # each once, and b's once more
    rows = {name: ParameterGroup("gate", 0, EXPERTS + i) for i, name in enumerate(SITES)}
    moves = {name: float((end[group] - start[group]).norm()) for name, group in rows.items()}
    assert moves["b"] > min(moves["a"], moves["c"]) / 2


def test_who_joins_a_low_rank_run_takes_its_merged_model(
    run: Run, fedalign: Command, exported: Callable[..., Path], tmp_path: Path
) -> None:
    first = run("a", "b", **LOW_RANK)
    code, _, errors = fedalign(
        "run", "/dev/null", "--set", f"model.path={first}", "--join", "c", "--out", tmp_path / "no"
    )
    assert code == 2
    assert "holds a PEFT adapter, not a model. Merge it into its base first" in " ".join(errors.split())
    later = run(*SITES, join="c", model__path=exported(first, "--merge"), **LOW_RANK)
    files = [exported(one, "--merge") / "model.safetensors" for one in (later, run(*SITES, **LOW_RANK))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_site_that_retrains_replaces_its_own_alone(run: Run) -> None:
    first = run(*SITES)
    again = run(*SITES, model__path=first / "model", clients__only='["b"]')
    changed = moved(weights(first / "model"), weights(again / "model"))
    assert {(group.kind, group.expert) for group in changed} == {("gate", EXPERTS + 1), ("expert", EXPERTS + 1)}


def test_a_run_in_which_somebody_joins_resumes(run: Run, fedalign: Command) -> None:
    first = run("a", "b")
    whole, half = (run(*SITES, join="c", model__path=first, run__rounds=rounds) for rounds in (2, 1))
    shutil.rmtree(first)
    code, _, errors = fedalign("run", "--resume", half, "--set", "run.rounds=2")
    assert code == 0, errors
    assert moved(weights(whole / "model"), weights(half / "model")) == set()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--join", "a"], "--site-experts: 'a' has an expert already."),
        (["--join", "c", "--set", "algorithm.name=by_use"], "--join c: algorithm.name = 'by_use' would train what"),
        (["--join", "c", "--set", "algorithm.shared=average"], "shared = 'average' would train what others have."),
        (["--join", "c", "--set", 'clients.only=["a"]'], "--join c: clients.only = a says otherwise."),
        (["--join", "c", "--set", "tuning.dtype=bfloat16"], "would round what others have"),
        (["--join", "c", "--set", "model.weights_hash=5f0c"], "model.weights_hash is of the model without its expert."),
        (["--join", "c,c"], "--join: 'c' is named twice."),
        (["--join", " ,"], "--join ' ,': has an empty name."),
        (["--join", "c", "--set", "data.max_length=2"], "Raise data.max_length, or set data.too_long"),
        (["--join", "z"], "clients.only = 'z': unknown. Choose one of: a, b, c."),
        (["--join", "c", "--set", "federation.engine=flower", "--set", "federation.min_sites=1"], "fedalign upcycle"),
        (
            ["--set", 'clients.only=["c"]', "--set", "federation.engine=simulation"],
            "federation.min_sites = 2: no round",
        ),
    ],
    ids=str,
)
def test_who_cannot_join_is_told_in_one_line(
    model_of: Callable[..., Path], fedalign: Command, tmp_path: Path, words: list[str], said: str
) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", [row | {"client": "abc"[i % 3]} for i, row in enumerate(rows())])
    settings = (f"model.path={model_of('a', 'b')}", f"data.train={data}", "clients.partition=natural")
    given = [word for setting in settings for word in ("--set", setting)]
    code, _, errors = fedalign("run", "/dev/null", *given, *words, "--out", tmp_path / "run")
    assert code == 2
    assert said in " ".join(errors.split())
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run-start").exists()  # else the right command would find it in its place


def test_what_is_unfinished_or_somebody_elses_is_left_alone(run: Run, fedalign: Command, tmp_path: Path) -> None:
    first = run("a", "b")
    (tmp_path / "new-start").mkdir()
    (tmp_path / "new-start" / "notes.txt").write_text("mine")
    words = ("--set", f"model.path={first}", "--join", "c", "--out", tmp_path / "new")
    code, _, errors = fedalign("run", "/dev/null", *words)
    assert code == 2
    assert f"{tmp_path / 'new-start'}" in errors
    code, _, errors = fedalign("run", "--resume", first, "--join", "c")
    assert code == 2
    assert "--join: begins a new run" in errors
    again = ("--set", f"model.path={first}", "--join", "c", "--out", first.with_name("again"), "--overwrite")
    shutil.copytree(first / "model", start := tmp_path / "again-start")
    before = {file: file.read_bytes() for file in start.iterdir()}
    code, _, errors = fedalign("run", "/dev/null", *again, "--set", f"model.path={start}")
    assert code == 2
    assert "and would be lost" in " ".join(errors.split())
    assert {file: file.read_bytes() for file in start.iterdir()} == before
    joined = ("run", "/dev/null", "--set", f"model.path={first}", "--join", "c", "--out", tmp_path / "no")
    file = first / "model" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, _, errors = fedalign(*joined)
    assert code == 2
    assert "is damaged (model.safetensors is not what was written)" in " ".join(errors.split())
    file.write_bytes(whole)
    last = max((first / "checkpoint").glob("round-*"))
    later = shutil.copytree(last, last.with_name("round-00099"))  # it goes on, and its model is of a round before
    unfinished = "is not finished. Go on with it: fedalign run --resume"
    code, _, errors = fedalign(*joined)
    assert code == 2
    assert unfinished in " ".join(errors.split())
    shutil.rmtree(later)
    (first / "summary.json").unlink()
    code, _, errors = fedalign(*joined)
    assert code == 2
    assert unfinished in " ".join(errors.split())


def test_a_client_that_owns_none_trains_nothing_and_is_told(run: Run, tmp_path: Path) -> None:
    folder = run("a", "b", clients=SITES)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["clients"] == ["a", "b"] for line in lines[1:])
    told = [failure for line in lines[1:] for failure in line["failures"]]
    assert {failure["client"] for failure in told} == {"c"}
    assert "no expert of this model is its own, so it trains nothing; owners are: a, b" in told[0]["reason"]
    assert owners(load_plain(folder / "model").config) == {"a": (EXPERTS,), "b": (EXPERTS + 1,)}


def test_averaged_shared_parts_move_and_then_leaving_is_not_exact(run: Run, fedalign: Command, tmp_path: Path) -> None:
    folder = run(*SITES, algorithm__shared="average")
    kinds = {group.kind for group in moved(weights(tmp_path / "base+a+b+c"), weights(folder / "model"))}
    assert kinds == {"shared", "embeddings", "head", "gate", "expert"}
    public = {
        group.expert
        for group in moved(weights(tmp_path / "base+a+b+c"), weights(folder / "model"))
        if group.kind in ("gate", "expert")
    }
    assert public == {EXPERTS, EXPERTS + 1, EXPERTS + 2}
    code, text, errors = fedalign("export", folder, "--without", "b", "--to", tmp_path / "left")
    assert code == 0, errors
    assert AVERAGED in " ".join(text.split())
    shutil.rmtree(tmp_path / "base+a+c", ignore_errors=True)
    never = run("a", "c", algorithm__shared="average") / "model"
    assert any(not torch.equal(value, tensors(never)[name]) for name, value in tensors(tmp_path / "left").items())


def held_out_scores(folder: Path, model: Path, tmp_path: Path) -> dict[str, Evaluation]:
    """Of each client's held-out rows of a run, by another model."""
    config = load_config(folder / "config.toml", [f"model.path={model}", "tuning.kind=full", "tuning.router=full"])
    there = prepare(config, tmp_path / "clients")
    return {
        name: evaluate(there.bench.moe, one.held_out, config.evaluation, there.bench.tokenizer, name)
        for name, one in there.clients.items()
        if one.held_out
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, ()), (LOW_RANK, ("--merge",)), ({"algorithm__name": "by_use", "run__workers": 2}, ())],
    ids=str,
)
def test_a_run_tells_what_each_site_loses_when_another_leaves(
    run: Run, exported: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    folder = run(*SITES, clients__held_out=0.3, run__rounds=1, **changes)
    told = json.loads((folder / "leaving.json").read_text())
    assert told["round"] == 1
    assert list(told["without"]) == list(told["rows"]) == [*SITES]
    models = [(exported(folder, "--without", name, *words), told["without"][name]) for name in SITES]
    for model, scores in [(exported(folder, *words), told["whole"]), *models]:
        for name, found in held_out_scores(folder, model, tmp_path).items():
            assert told["rows"][name] == found.examples
            assert scores[name]["accuracy"] == found.accuracy
            assert scores[name]["loss_nats"] == pytest.approx(found.loss, rel=1e-5)
    assert told["without"]["b"]["b"] != told["whole"]["b"]
    summary = json.loads((folder / "summary.json").read_text())
    whole = {name: one["accuracy"] for name, one in told["whole"].items()}
    assert changes.get("algorithm__name") != "by_use" or whole == summary["client_accuracies"]


def test_what_a_kill_cut_off_is_told_by_the_run_that_goes_on(
    run: Run, fedalign: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run("a", "b", run__rounds=1, evaluation__leaving=0)
    leaving, scored = folder / "leaving.json", list[int]()
    assert not leaving.exists()

    def broken_off(*args: Any) -> MoEModel:
        scored.append(1)
        if len(scored) == 2:
            raise KeyboardInterrupt
        return without(*args)

    with monkeypatch.context() as patch:
        patch.setattr("fedalign.client.leaving.without", broken_off)
        words = ("--set", "run.rounds=2", "--set", "evaluation.leaving=2")
        assert fedalign("run", "--resume", folder, *words)[0] == 130
    assert not leaving.exists()
    assert json.loads((folder / "model" / "round.json").read_text())["round"] == 2
    code, _, errors = fedalign("run", "--resume", folder, *words)
    assert code == 0, errors
    assert json.loads(leaving.read_text())["round"] == 2
    code, said, _ = fedalign("run", "--resume", folder, "--set", "run.rounds=3", "--set", "evaluation.leaving=1")
    assert code == 0
    assert "no leaving.json, which tells" in said
    assert "evaluation.leaving = 1, and owners of experts are 2" in said
    assert not leaving.exists()  # it was that of another model


@pytest.mark.parametrize("changes", [{}, LOW_RANK], ids=str)
def test_a_site_learns_from_its_own_rows_what_it_loses_when_another_leaves(
    run: Run, exported: Callable[..., Path], fedalign: Command, tmp_path: Path, changes: dict[str, str]
) -> None:
    folder = run(*SITES, run__rounds=1, **changes)
    adapter, merged = exported(folder), exported(folder, *(["--merge"] if changes else []))
    mine = write_jsonl(tmp_path / "mine.jsonl", rows()[::7])
    asked = ("--data", mine, "--json", "--set", 'data.labels=["animals", "food", "weather"]')
    less = exported(folder, "--without", "b", *(["--merge"] if changes else []))
    code, out, errors = fedalign("evaluate", less, *asked)
    assert code == 0, errors
    expected = json.loads(out)["tuned"]
    for model in (folder, adapter, merged):
        code, out, errors = fedalign("evaluate", model, *asked, "--leaving", "each")
        assert code == 0, errors
        told = json.loads(out)
        assert list(told["without"]) == [*SITES]
        assert told["without"]["b"]["accuracy"] == expected["accuracy"]
        assert told["without"]["b"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert told["without"]["b"].keys() == expected.keys()
        assert told["whole"]["loss"] != told["without"]["b"]["loss"]
    code, out, errors = fedalign("evaluate", folder, "--data", mine, "--leaving", "c, a")
    assert code == 0, errors
    table = [line.split() for line in out.splitlines()]
    assert [line[:2] for line in table if line[:1] in (["the"], ["without"])] == [
        ["the", "whole"],
        ["without", "a"],
        ["without", "c"],
    ]
    assert "One example is 5.6 points: what a few of them make is chance." in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--leaving", "d"], "--leaving = 'd': unknown. Choose one of: a, b."),
        (["--leaving", "a,,b"], "--leaving 'a,,b': has an empty name."),
        (["--leaving", "each", "--harness", "arc_easy"], "--leaving: not with --harness."),
    ],
    ids=str,
)
def test_who_cannot_leave_is_told_in_one_line(
    model_of: Callable[..., Path], fedalign: Command, words: list[str], said: str
) -> None:
    code, _, errors = fedalign("evaluate", model_of("a", "b"), *words)
    assert code == 2
    assert said in " ".join(errors.split())


def test_of_a_model_without_owners_nobody_can_leave(base: Path, fedalign: Command) -> None:
    code, _, errors = fedalign("evaluate", base, "--leaving", "each")
    assert code == 2
    assert "--leaving each: no expert of this model belongs to a site" in " ".join(errors.split())


AVERAGED = 'Stays behind: parts that sites share were trained by site_experts (shared = "average");'


def test_what_was_averaged_is_told_whatever_the_model_went_through_since(
    run: Run, exported: Callable[..., Path], fedalign: Command, tmp_path: Path
) -> None:
    first = run("a", "b", algorithm__shared="average", run__rounds=1)
    assert fedalign("upcycle", first / "model", "--site-experts", "c", "--out", tmp_path / "upcycled")[0] == 0
    bare = shutil.ignore_patterns("README.md", "SHA256SUMS")
    for last in (
        run("a", "b", model__path=first / "model", clients__only='["b"]', run__rounds=1),
        run(*SITES, join="c", model__path=first, run__rounds=1),
        first / "best",
        tmp_path / "upcycled",
        shutil.copytree(exported(first), tmp_path / "copied", ignore=bare),
    ):
        code, text, errors = fedalign("export", last, "--only", "a", "--to", tmp_path / "left", "--overwrite")
        assert code == 0, errors
        assert AVERAGED in " ".join(text.split()), last
        assert AVERAGED in " ".join((tmp_path / "left" / "README.md").read_text().split()), last
        assert json.loads((tmp_path / "left" / "config.json").read_text())["shared_trained_by"] == ["site_experts"]


def test_a_merged_adapter_records_what_the_run_trained(run: Run, exported: Callable[..., Path]) -> None:
    low = {"tuning__kind": "lora", "tuning__rank": "2", "run__rounds": 1}
    merged = exported(run("a", "b", algorithm__name="by_use", **low), "--merge")
    assert json.loads((merged / "config.json").read_text())["shared_trained_by"] == ["by_use"]
    assert json.loads((merged / "config.json").read_text())["site_experts"] == {"a": [EXPERTS], "b": [EXPERTS + 1]}


def test_a_model_of_whom_sites_trained_before_they_got_experts_says_so(
    run: Run, base: Path, fedalign: Command, tmp_path: Path
) -> None:
    before = run("a", "b", model__path=base, algorithm__name="fedavg", run__rounds=1)
    grown_later = tmp_path / "grown"
    assert fedalign("upcycle", before / "model", "--site-experts", "a,b", "--out", grown_later)[0] == 0
    last = run("a", "b", model__path=grown_later, run__rounds=1)
    code, text, errors = fedalign("export", last, "--without", "b", "--to", tmp_path / "left")
    assert code == 0, errors
    assert "parts that sites share were trained by fedavg; what a site that took part gave" in " ".join(text.split())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("server.robust", "clip", 'server.robust = "clip": with algorithm.name = "site_experts" nobody but its owner'),
        ("server.optimizer", "adam", 'server.optimizer = "adam": with algorithm.name = "site_experts" nobody'),
        ("tuning.kind", "lora", 'and with algorithm.shared = "frozen" nothing else. Choose: ["experts"].'),
        ("tuning.kind", "qlora", "Choose one of: full, moe, lora."),
        ("tuning.kind", "experts", "Choose one of: full, moe, lora."),
        ("privacy.epsilon", "8", "with [privacy] the fit of a site's router row would leave without noise"),
        ("algorithm.shared", "both", "algorithm.shared = 'both': unknown. Choose one of: average, frozen."),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(
    fedalign: Command, settings: list[str], key: str, value: str, said: str
) -> None:
    words = [word for change in settings for word in ("--set", change)]
    mine = ["--set", "algorithm.name=site_experts", "--set", f"{key}={value}", "--set", "clients.held_out=0"]
    code, _, errors = fedalign("run", "/dev/null", *words, *mine, "--set", "evaluation.clients=false", "--out", "/x")
    assert code == 2
    assert said in " ".join(errors.split())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tuning.router=lora", 'tuning.router = "lora": with algorithm.name = "site_experts" nobody'),
        ("tuning.router=frozen", "Choose: full."),
        ("tuning.average=exact", "so there are no products to average. Choose one of: factors, freeze_a."),
        ('tuning.targets=["attention", "experts"]', "tuning.targets = ['attention', 'experts']: with algorithm.name"),
        ('tuning.targets=["attention"]', 'Choose: ["experts"].'),
    ],
)
def test_adapters_that_an_expert_could_not_have_alone_are_refused(
    fedalign: Command, settings: list[str], change: str, said: str
) -> None:
    given = (*settings, "algorithm.name=site_experts", "tuning.kind=lora", 'tuning.targets=["experts"]', change)
    code, _, errors = fedalign("run", "/dev/null", *(word for one in given for word in ("--set", one)), "--out", "/x")
    assert code == 2
    assert said in " ".join(errors.split())


def test_a_model_without_owners_is_refused(fedalign: Command, settings: list[str], tmp_path: Path) -> None:
    words = [word for change in settings for word in ("--set", change)]
    code, _, errors = fedalign(
        "run", "/dev/null", *words, "--set", "algorithm.name=site_experts", "--out", tmp_path / "run"
    )
    assert code == 2
    assert "has an owner. Make it so: fedalign upcycle MODEL --site-experts" in " ".join(errors.split())


def test_what_leaving_costs_is_told_before(
    model_of: Callable[..., Path], settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedalign.doctor.estimate.measure_step", lambda *_: StepCost(0, 1.0))  # a second a token
    told, held = [], 0
    for most in (2, 1):
        changes = [*settings, f"model.path={model_of('a', 'b')}", f"evaluation.leaving={most}", "tuning.kind=router"]
        prepared = prepare(load_config(None, changes), tmp_path / "clients")
        told.append(estimate(prepared))
        tests = [client.held_out for client in prepared.clients.values() if client.held_out]
        held = sum(len(one.input_ids) for one in itertools.chain(*(test.encoded for test in tests)))
    assert held
    assert told[0].seconds - told[1].seconds == pytest.approx(held)  # whole and without each: three times a third
    assert told[0].memory > told[1].memory  # of a router little is trained, and the experts are copied


@pytest.mark.parametrize("changes", [{"algorithm__shared": '"frozen"'}, {"algorithm__shared": '"average"'}])
def test_bytes_are_told_before_of_what_each_site_trains(run: Run, changes: dict[str, str], tmp_path: Path) -> None:
    out = run(*SITES, **changes, run__rounds=1)
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[1])
    prepared = prepare(load_config(RunFolder(out).config), tmp_path / "again")
    told = estimate(prepared).bytes_up[1]
    assert line["bytes_up"] == pytest.approx(told, rel=0.05)  # no site of the run sends less
    for name, sent in line["bytes_up_by_client"].items():
        site = estimate_site(prepared.bench, name, DEALT)
        assert sent == pytest.approx(site.up_a_round_at_most, rel=0.05)
        leaving = empty_messages(name, prepared.bench.moe, prepared.config)
        (update,) = [message for message in leaving if isinstance(message, Piece)]
        assert sent == pytest.approx(site.statistics + update.data.numel(), rel=0.05)
        of_tokens = tokens_told(name, prepared.bench.moe.layout, prepared.config, DEALT)
        assert OWN_ROWS in of_tokens
        assert ("neither their rows nor counts" in of_tokens) == (changes["algorithm__shared"] == '"frozen"')


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["training.loss=label_shift"], 'training.loss = "label_shift": '),
        (["tuning.dtype=bfloat16", 'clients.only=["b"]'], 'tuning.dtype = "bfloat16": '),
    ],
)
def test_what_would_touch_anothers_expert_is_refused(settings: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(None, ["algorithm.name=site_experts", *settings])


def test_a_router_that_scales_what_it_reads_can_have_no_row_computed_for_it() -> None:
    with pytest.raises(UserError, match=r"gemma4.*: scales or normalises what a router reads"):
        grown(MoEModel.wrap(build("gemma4")), ["a"], 0)
