"""`fedalign compare` as a user meets it, with real runs of a tiny model."""

import csv
import json
import os
import re
import shutil
import textwrap
from pathlib import Path

import pytest

from fedalign.compare import comparison as comparing
from fedalign.compare.folder import WRITTEN
from tests.compare.conftest import tree
from tests.conftest import Command
from tests.foreign import check_foreign_files_are_kept
from tests.server.test_run import in_this_process

HALVES = textwrap.dedent(
    '''
    """Half a step of FedAvg, by somebody else."""

    from dataclasses import dataclass, replace

    from fedalign.algorithms.fedavg import FedAvg


    @dataclass(frozen=True)
    class Halves(FedAvg):
        """An option, a plan and a penalty of its own."""

        share: float = 0.5
        pull: float = 0.0

        def __post_init__(self):
            if not 0 < self.share <= 1:
                raise ValueError(f"share = {self.share}: must lie between 0 and 1")

        def plan(self, reports, state):
            plan = super().plan(reports, state)
            return replace(plan, factor_C_G=self.share * (plan.weight_C_G > 0), metrics={"share": self.share})

        def penalty(self, step):
            if not self.pull:
                return None
            return self.pull * step.routing[0].logits_T_E.square().mean()
    '''
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's package with an algorithm, as pip would lay it out."""
    folder = tmp_path_factory.mktemp("site-packages")
    (folder / "halves.py").write_text(HALVES)
    about = folder / "halves-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fedalign.algorithms]\nhalves = halves:Halves\n")
    return folder


@pytest.fixture
def config(settings: list[str], tmp_path: Path) -> str:
    """The settings as a file."""
    tables: dict[str, dict[str, str]] = {}
    for setting in settings:
        key, value = setting.split("=", 1)
        section, name = key.split(".")
        tables.setdefault(section, {})[name] = value if re.fullmatch(r"[0-9.e-]+", value) else json.dumps(value)
    lines = [f"[{name}]\n" + "".join(f"{k} = {v}\n" for k, v in table.items()) for name, table in tables.items()]
    path = tmp_path / "tiny.toml"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "run_all", in_this_process)


def results(out: Path, *without: str) -> dict[tuple[str, ...], dict[str, str]]:
    """results.csv by algorithm, seed and round, without what a clock measured."""
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (row["algorithm"], row["seed"], row["round"]): {
            name: value for name, value in row.items() if not name.endswith("seconds") and name not in without
        }
        for row in rows
    }


def refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, errors = result
    assert code == 2, errors
    assert errors.startswith("Error: ")
    assert "Traceback" not in errors
    for word in words:
        assert re.search(word, errors), errors


def test_a_comparison_from_start_to_finish(
    fedalign: Command, config: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One story: four of its six runs are made here, the others are real ones, each of which imports torch."""
    out = tmp_path / "out"
    common = ["compare", config, "--seeds", "3,", "--set", "run.rounds=2", "--set", "run.threads=1", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "run_all", in_this_process)
        code, text, errors = fedalign(*common, "--algorithms", "fedavg,fedalign_moe")
    assert code == 0, errors + text
    assert re.search(r"^2/2 fed.*, seed 3: accuracy [0-9.]+ %, [0-9:]+, left 0:00$", text, re.MULTILINE)
    assert "Final scores" in text
    first = results(out)
    assert len(first) == 2 * 3

    # same start, same partition, same order of batches: nothing differs until the plans of round 1 do
    starts = [first[algorithm, "3", "0"] for algorithm in ("fedavg", "fedalign_moe")]
    assert {**starts[0], "algorithm": ""} == {**starts[1], "algorithm": ""}
    assert float(starts[0]["client_accuracy_mean"]) >= 0
    rounds = [first[algorithm, "3", "1"] for algorithm in ("fedavg", "fedalign_moe")]
    for metric in ("train_loss_nats", "train_examples", "routing_divergence_nats"):
        assert rounds[0][metric] == rounds[1][metric]
    assert rounds[0]["bytes_up"] != rounds[1]["bytes_up"]

    # one run broke off, and one is damaged
    broken, damaged = (out / "runs" / algorithm / "seed-3" for algorithm in ("fedavg", "fedalign_moe"))
    (broken / "summary.json").unlink()
    shutil.rmtree(broken / "checkpoint" / "round-00002")
    (damaged / "metrics.jsonl").write_text('{"round": 0}\n')
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "run_all", in_this_process)
        code, text, errors = fedalign(*common, "--algorithms", "fedavg,fedalign_moe")
    assert code == 0, errors + text
    assert "fedalign_moe, seed 3: damaged (metrics.jsonl holds 1 lines, not rounds 0 to 2)" in text
    assert (out / "runs" / "fedalign_moe" / "seed-3.damaged-1" / "metrics.jsonl").read_text() == '{"round": 0}\n'
    assert results(out) == first  # the same numbers, made again

    # more is asked for: a package's algorithm, and one that cannot train
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setenv("PYTHONPATH", str(package), prepend=os.pathsep)
    more = "fedavg,fedalign_moe,halves:share=0.25,fedavg:training.learning_rate=1e30"
    code, text, errors = fedalign(*common, "--algorithms", more)
    assert code == 1, errors + text
    assert re.search(r"learning_rate=1e30, seed 3: failed: round 1: 0 of 3 clients can be used", text)
    assert "1 failed; try them again: fedalign compare --resume" in text
    second = results(out, "share")
    assert {key: second[key] for key in first} == first  # the same numbers, kept
    assert results(out)["halves:share=0.25", "3", "1"]["share"] == "0.25"
    assert second["halves:share=0.25", "3", "0"]["accuracy"] == second["fedavg", "3", "0"]["accuracy"]
    table = (out / "table.md").read_text()
    assert re.search(r"^\| halves:share=0.25 \| 1 \| \**[0-9.]+\** \|", table, re.MULTILINE)
    assert "Missing: fedavg:training.learning_rate=1e30, seed 3: round 1: 0 of 3" in table

    # nothing else may use the folder
    before = tree(out)
    refused(fedalign(*common, "--algorithms", "fedavg"), "another comparison", "it holds runs of halves:share=0.25")
    refused(fedalign(*common, "--algorithms", more, "--set", "training.epochs=1"), r"training\.epochs = 2")
    assert tree(out) == before


def test_resume_takes_the_request_from_the_folder(
    fedalign: Command, config: str, tmp_path: Path, at_once: None
) -> None:
    out = tmp_path / "out"
    short = ["--seeds", "2", "--set", "run.rounds=1", "--out", str(out)]
    assert fedalign("compare", config, "--algorithms", "fedavg", *short)[0] == 0
    whole = results(out)
    assert whole["fedavg", "0", "1"]["train_loss_nats"] != whole["fedavg", "1", "1"]["train_loss_nats"]
    shutil.rmtree(out / "runs" / "fedavg" / "seed-0")
    kept = tree(out / "runs")
    Path(config).unlink()
    code, text, errors = fedalign("compare", "--resume", str(out))
    assert code == 0, errors
    assert re.search(r"fedavg \| 2 \| [0-9.]+( \([0-9., ]+\))? \|", text)
    assert results(out) == whole
    assert {name: content for name, content in tree(out / "runs").items() if name in kept} == kept
    refused(fedalign("compare", "--resume", str(out), "--tune"), "--resume: takes the comparison's folder and --jobs")
    refused(fedalign("compare", "--resume", str(tmp_path)), "holds no comparison")


def test_the_ablation_and_a_grid(fedalign: Command, config: str, tmp_path: Path, at_once: None) -> None:
    out = tmp_path / "out"
    grid = ["--set", "clients.alpha=1.0,5.0", "--set", "run.rounds=1"]
    code, text, errors = fedalign("compare", config, "--ablation", "--seeds", "7,", *grid, "--out", str(out))
    assert code == 0, errors
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 2 * 2
    assert {(row["clients.alpha"], row["seed"]) for row in rows} == {("1.0", "7"), ("5.0", "7")}
    table = (out / "table.md").read_text()
    assert (
        table.index("### clients.alpha = 1.0")
        < table.index("+ semantic experts")
        < table.index("### clients.alpha = 5.0")
    )
    assert "Differences to parameter average" in text
    run = out / "runs" / "parameter-average" / "clients.alpha=5.0" / "seed-7"
    assert {"model", "best", "summary.json", "config.toml"} <= {path.name for path in run.iterdir()}


def test_tuning_then_comparing(fedalign: Command, config: str, tmp_path: Path, at_once: None) -> None:
    out = tmp_path / "out"
    command = ["compare", config, "--algorithms", "fedavg,fedprox:mu=0.1", "--seeds", "1", "--tune"]
    command += ["--set", "run.rounds=1", "--set", "clients.count=2", "--out", str(out)]
    code, text, errors = fedalign(*command)
    assert code == 0, errors
    assert text.startswith(f"algorithms 2, seeds 1: 2 runs after 6 runs of tuning in {out}\n")
    with (out / "tune.csv").open(newline="") as file:
        tried = list(csv.DictReader(file))
    assert [row["algorithm"] for row in tried] == ["fedavg"] * 3 + ["fedprox:mu=0.1"] * 3
    tuned = (out / "tuned.toml").read_text()
    for label in ("fedavg", "fedprox:mu=0.1"):
        best = max((row for row in tried if row["algorithm"] == label), key=lambda row: float(row["validation_score"]))
        rate = float(best["training.learning_rate"])
        run_config = (out / "runs" / label.replace(":", "-") / "seed-0" / "config.toml").read_text()
        assert float(re.search(r"learning_rate = (\S+)", run_config)[1]) == rate  # type: ignore[index] # no match fails the test as well
        assert "validation = 0.1" in run_config
        assert 'part = "test"' in run_config
    looked_at = [line for path in (out / "tune").rglob("metrics.jsonl") for line in path.read_text().splitlines()]
    assert {json.loads(line)["test_examples"] for line in looked_at} == {9}  # a tenth of 90 training examples
    assert "Learning rate and strength of every algorithm were chosen on a validation part (10%" in text
    again = tree(out / "tune")
    assert fedalign(*command)[0] == 0
    assert (tree(out / "tune"), (out / "tuned.toml").read_text()) == (again, tuned)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--algorithms", "fedavg,fedalgin"], ["fedalgin", "Choose one of", "fedprox", "Did you mean"]),
        (["--algorithms", "fedavg", "--seeds", "0"], ["--seeds 0: no runs at all"]),
        (["--algorithms", "fedavg", "--seeds", ""], ["--seeds '': give how many"]),
        (["--algorithms", ""], ["--algorithms '': has an empty part"]),
        (["--algorithms", "fedavg", "--seeds", "1,1"], ["'1' is given twice"]),
        (["--algorithms", "fedavg,fedavg"], ["'fedavg' is given twice"]),
        ([], ["what is to be compared", "--ablation"]),
        (["--ablation", "--algorithms", "fedavg"], ["Give either --algorithms"]),
        (["--algorithms", "fedavg", "--set", "clients.cuont=1,2"], ["clients.cuont", "clients.count"]),
        (["--algorithms", "fedavg", "--set", "clients.alpha"], ["section.key=value"]),
        (["--algorithms", "fedavg", "--tune", "--set", "data.train=nowhere.jsonl"], ["data.train", "nowhere.jsonl"]),
        (["--algorithms", "fedavg", "--set", "clients.count=500,600"], ["clients.count = 500"]),
    ],
)
def test_bad_input(fedalign: Command, config: str, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    out = tmp_path / "out"
    refused(fedalign("compare", config, *arguments, "--out", str(out)), *words)
    assert not out.exists()


def test_nothing_is_overwritten_unasked(fedalign: Command, config: str, tmp_path: Path, at_once: None) -> None:
    out = tmp_path / "out"
    command = ["compare", config, "--algorithms", "fedavg", "--seeds", "1", "--set", "run.rounds=1", "--out", str(out)]
    assert fedalign(*command)[0] == 0
    before = tree(out)
    refused(fedalign(*command, "--set", "clients.count=2"), "another comparison: clients.count = 3, asked for is 2")
    run_config = out / "runs" / "fedavg" / "seed-0" / "config.toml"
    text = run_config.read_text()
    run_config.write_text(text.replace("epochs = 2", "epochs = 1"))
    refused(fedalign(*command), "is a run with another configuration than fedavg, seed 0")
    run_config.write_text(text)
    assert tree(out) == before
    check_foreign_files_are_kept(out, "comparison", WRITTEN)
    assert fedalign(*command, "--set", "clients.count=2", "--overwrite")[0] == 0
    assert "count = 2" in run_config.read_text()
    refused(fedalign(*command[:-1], str(tmp_path)), "is not empty and holds no comparison")
    refused(fedalign("compare"), "no configuration")


def test_help_has_examples(fedalign: Command) -> None:
    text = fedalign("compare", "--help")[1]
    assert "fedalign compare my.toml --ablation --seeds 3,7,11" in text
    assert "--resume" in text
