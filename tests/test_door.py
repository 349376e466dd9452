"""The Python door: what the command line does, from a script or a notebook."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers.utils.logging import is_progress_bar_enabled

import fedalign as door
from fedalign.cli.live import LiveTable
from fedalign.compare import comparison as comparing
from fedalign.server.checkpoint import ServerState
from tests.conftest import SUBJECTS, Command
from tests.server.test_run import in_this_process

README = Path(__file__).parents[1] / "README.md"
Tables = dict[str, dict[str, Any]]


@pytest.fixture
def tables(settings: list[str]) -> Tables:
    """A configuration as a notebook would write it; a run takes a second."""
    tables: Tables = {}
    for setting in [*settings, "run.rounds=2", "training.epochs=1"]:
        key, value = setting.split("=", 1)
        section, name = key.split(".")
        tables.setdefault(section, {})[name] = json.loads(value) if re.fullmatch(r"[0-9.e-]+", value) else value
    return tables


def without_clocks(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if not name.endswith("seconds")} for line in history]


def test_the_import_loads_no_library() -> None:
    heavy = ("torch", "transformers", "pydantic", "peft", "rich", "typer", "numpy", "datasets")
    code = f"import fedalign, sys; print([name for name in {heavy} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
    assert all(hasattr(door, name) and name in dir(door) for name in door.__all__)
    with pytest.raises(AttributeError, match="no attribute 'ran'"):
        door.ran  # noqa: B018 - that it fails is the point


def test_the_readme_runs(tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(import fedalign\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setattr(comparing, "run_all", in_this_process)
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text(door.load_config(tables, {"run.rounds": 1, "clients.count": 2}).to_toml())
    names: dict[str, Any] = {}
    exec(block, names)
    assert list(names["rounds"]["round"]) == [0, 1]
    assert names["run"].summary["final_accuracy"] == names["rounds"]["accuracy"].iloc[-1]
    assert door.load_config("runs/a/config.toml").training.learning_rate == 2e-5
    saved = load_file("runs/a/model/model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in names["model"].state_dict().items() if name in saved)
    assert names["tokenizer"]("the dog").input_ids
    classes = names["run"].talk().classes({"text": "the dog runs"})
    assert (classes.keys(), sum(classes.values())) == (SUBJECTS.keys(), pytest.approx(1))
    rows = names["found"].rows
    assert [(row["algorithm"], row["seed"]) for row in rows[:3]] == [("fedavg", 0), ("fedalign_moe", 0), ("fedavg", 1)]
    assert [door.Run(row["folder"]).summary["final_accuracy"] for row in rows] == [
        row["final_accuracy"] for row in rows
    ]
    assert "| fedavg | 3 |" in names["found"].table
    assert Path("runs/b/report.html").exists()
    exec(block, names)  # a cell is run twice


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_a_run_leaves_the_process_as_it_was(
    tables: Tables, tmp_path: Path, capfd: pytest.CaptureFixture[str], two_threads: None
) -> None:
    def found() -> list[object]:
        root, generator = logging.getLogger(), torch.get_rng_state().tolist()
        threads, bars = torch.get_num_threads(), is_progress_bar_enabled()
        return [list(warnings.filters), root.level, list(root.handlers), threads, bars, generator]

    tables["run"]["threads"] = 1
    before, settings = found(), door.load_config(tables)
    first = door.run(settings, out=tmp_path / "run", progress=False)
    with pytest.raises(door.UserError, match="already holds a run"):
        door.run(tables, out=tmp_path / "run")
    again = door.run(tables, out=str(tmp_path / "run"), overwrite=True, progress=False)
    assert again.talk().answer({"text": "the dog runs"}) in SUBJECTS
    assert found() == before
    assert without_clocks(first.history) == without_clocks(again.history)
    assert capfd.readouterr() == ("", "")
    assert tables["run"]["rounds"] == 2  # what was given is not written to


def test_a_file_gets_a_line_a_round(tables: Tables, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    door.run(tables, out=tmp_path / "run")
    lines = capfd.readouterr().out.splitlines()
    assert "3 clients with" in lines[0]
    assert lines[1].startswith("accuracy and loss: ")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["round 0", "round 1", "round 2"]


def test_ctrl_c_leaves_what_can_be_resumed(tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    completed = LiveTable.completed

    def impatient(self: LiveTable, state: ServerState, improved: bool) -> None:
        completed(self, state, improved)
        if state.round == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(LiveTable, "completed", impatient)
    with pytest.raises(KeyboardInterrupt):
        door.run(tables, out=tmp_path / "broken off")
    monkeypatch.undo()
    with pytest.raises(door.UserError, match="holds no finished run"):
        _ = door.Run(tmp_path / "broken off").summary
    with pytest.raises(door.UserError, match=r"is not finished\. Go on with it"):
        door.Run(tmp_path / "broken off").model()
    resumed = door.run(resume=tmp_path / "broken off", overrides={"run.threads": 1})
    whole = door.run(tables, out=tmp_path / "whole")
    assert without_clocks(resumed.history) == without_clocks(whole.history)
    one, other = (load_file(run.folder / "model" / "model.safetensors") for run in (resumed, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_adapters_come_on_their_base(
    tables: Tables, tmp_path: Path, model_folder: Callable[..., Path], olmoe: Path
) -> None:
    tuned = {"tuning.kind": "lora", "tuning.rank": 2, "run.rounds": 1}
    run = door.run(tables, overrides=tuned, out=tmp_path / "run", progress=False)
    model = run.model(best=True)
    assert isinstance(model, PeftModel)
    kept = load_file(run.folder / "best" / "adapter_model.safetensors")
    values = {name.replace(".default", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(values[name], value) for name, value in kept.items() if ".lora_" in name)
    config = run.folder / "config.toml"
    config.write_text(config.read_text().replace(str(olmoe), str(model_folder("olmoe", initializer_range=0.5))))
    with pytest.raises(door.UserError, match="are not those that the adapter was trained on"):
        run.model()


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (door.run, ["run"]),
        (lambda: door.run("none.toml"), ["run", "none.toml"]),
        (lambda: door.run({}, overrides={"run.sed": 1}), ["run", os.devnull, "--set", "run.sed=1"]),
        (lambda: door.run({}, out=README), ["run", os.devnull, "--out", README]),
        (lambda: door.run(resume="none", overwrite=True), ["run", "--resume", "none", "--overwrite"]),
        (lambda: door.run(resume="none"), ["run", "--resume", "none"]),
        (door.compare_runs, ["compare"]),
        (lambda: door.compare_runs("demo"), ["compare", "demo"]),
        (lambda: door.compare_runs("demo", "fedalgin"), ["compare", "demo", "--algorithms", "fedalgin"]),
        (
            lambda: door.compare_runs("demo", ["fedavg"], seeds=0),
            ["compare", "demo", "--algorithms", "fedavg", "--seeds", 0],
        ),
        (
            lambda: door.compare_runs("demo", ["fedavg"], seeds=[1, 1]),
            ["compare", "demo", "--algorithms", "fedavg", "--seeds", "1,1"],
        ),
        (
            lambda: door.compare_runs("demo", ["fedavg"], seeds=[]),
            ["compare", "demo", "--algorithms", "fedavg", "--seeds", ""],
        ),
        (lambda: door.compare_runs(resume="none", seeds=[]), ["compare", "--resume", "none", "--seeds", ""]),
        (lambda: door.compare_runs(resume="none", seeds=2), ["compare", "--resume", "none", "--seeds", 2]),
    ],
)
def test_mistakes_are_told_as_the_command_line_tells_them(
    fedalign: Command,
    call: Callable[[], object],
    arguments: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(door.UserError) as caught:
        call()
    code, _, said = fedalign(*arguments)
    assert (code, said) == (2, f"Error: {caught.value}\n")
    assert not any(tmp_path.iterdir())


def test_torchrun_is_for_runs_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(door.UserError, match="fedalign compare: torchrun is for `fedalign run` alone"):
        door.compare_runs("demo", ["fedavg"], out=tmp_path / "c", progress=False)
    with pytest.raises(door.UserError, match=r"tuning\.kind"):
        door.run("demo", overrides=["tuning.kind=lora"], out=tmp_path / "r")
    assert not any(tmp_path.iterdir())
