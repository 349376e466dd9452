"""What an earlier comparison left: kept, gone on with, set aside or refused."""

import json
from pathlib import Path

import pytest
import torch

from fedalign.compare.folder import ComparisonFolder, set_aside, standing
from fedalign.compare.plan import Cell, cells
from fedalign.errors import UserError
from fedalign.protocol import SHARED
from fedalign.server.checkpoint import Checkpoints, ServerState
from fedalign.server.results import RunFolder, read_history
from tests.compare.conftest import Ask, tree
from tests.server.test_checkpoint import flip


@pytest.fixture
def cell(ask: Ask) -> Cell:
    return cells(ask("fedavg", "1"))[0]


@pytest.fixture
def run(cell: Cell, tmp_path: Path) -> RunFolder:
    """A finished run of two rounds, as far as a comparison looks at it."""
    folder = RunFolder(tmp_path / "run")
    folder.begin(cell.config)
    folder.metrics.write_text("".join(json.dumps({"round": i, "accuracy": 0.5}) + "\n" for i in range(3)))
    folder.summary.write_text("{}")
    for round in (0, 1):
        Checkpoints(folder.checkpoint, {}).save(ServerState(round, {SHARED: torch.zeros(2)}, {}, ()))
    return folder


def test_a_finished_run_is_kept(cell: Cell, run: RunFolder) -> None:
    found = standing(cell, run)
    assert (found.state, [line["round"] for line in found.history]) == ("finished", [0, 1, 2])


def test_a_run_that_broke_off_is_gone_on_with(cell: Cell, run: RunFolder, tmp_path: Path) -> None:
    run.summary.unlink()
    assert standing(cell, run).state == "begun"
    assert standing(cell, RunFolder(tmp_path / "none")).state == "waiting"
    (tmp_path / "empty").mkdir()
    assert standing(cell, RunFolder(tmp_path / "empty")).state == "waiting"
    just_begun = RunFolder(tmp_path / "begun")
    just_begun.begin(cell.config)
    assert standing(cell, just_begun).state == "begun"


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.toml", "[run", "config.toml: "),
        ("config.toml", None, "no config.toml"),
        ("summary.json", '{"half', "Unterminated"),
        ("metrics.jsonl", '{"round": 0}\n{"rou', "metrics.jsonl: "),
        ("metrics.jsonl", '{"round": 0}\n{"round": 1}\n', "metrics.jsonl holds 2 lines, not rounds 0 to 2"),
        ("metrics.jsonl", "3\n", "a line is not an object"),
        ("metrics.jsonl", None, "metrics.jsonl: "),
    ],
)
def test_a_damaged_run_is_found(cell: Cell, run: RunFolder, file: str, content: str | None, told: str) -> None:
    path = run.path / file
    path.unlink() if content is None else path.write_text(content)
    found = standing(cell, run)
    assert found.state == "damaged"
    assert told in found.reason


@pytest.mark.parametrize("file", ["weights.safetensors", "moments.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_found_before_it_is_gone_on_with(cell: Cell, run: RunFolder, file: str) -> None:
    run.summary.unlink()
    flip(run.checkpoint / "round-00001" / file)
    assert standing(cell, run).state == "begun"  # from the round before
    flip(run.checkpoint / "round-00000" / file)
    assert standing(cell, run).state == "damaged"


def test_nothing_of_a_damaged_run_is_lost(run: RunFolder) -> None:
    before = tree(run.path)
    aside = set_aside(run)
    assert not run.path.exists()
    assert tree(aside) == before
    run.path.mkdir()
    assert set_aside(run) != aside


def test_a_run_of_another_configuration_is_refused(ask: Ask, run: RunFolder) -> None:
    other = cells(ask("fedavg", "1", ["training.epochs=2"]))[0]
    with pytest.raises(UserError, match=r"another configuration than fedavg, seed 0.*--overwrite"):
        standing(other, run)


def test_a_reader_does_not_stumble_over_a_run_at_work(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_history(folder) == []
    folder.metrics.write_text('{"round": 0}\n{"rou')
    assert read_history(folder) == []


def test_only_its_own_comparison_goes_on_in_a_folder(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    folder, design = ComparisonFolder(tmp_path / "out"), ask("fedavg,fedprox")
    folder.check(design, overwrite=False)
    with folder.locked():
        folder.begin(design, overwrite=False)
    assert folder.read() == design
    folder.check(ask("fedavg,fedprox", "3"), overwrite=False)
    with pytest.raises(UserError, match=r"another comparison: training\.epochs = 1, asked for is 2"):
        folder.check(ask("fedavg,fedprox", sets=["training.epochs=2"]), overwrite=False)
    cell = cells(folder.read())[0]
    started = folder.run(cell, "runs")
    started.begin(cell.config)
    other = ask("fedavg", sets=["training.epochs=2"])
    for thesis in (folder.path / "thesis.tex", folder.path / "runs" / "thesis.tex", started.path / "thesis.tex"):
        thesis.write_text("years of work")
        with pytest.raises(UserError, match=rf"holds {thesis.relative_to(folder.path)}, which no comparison wrote"):
            folder.check(other, overwrite=True)
        thesis.unlink()
    own = [f"model.path={started.path}"]  # a comparison that would replace the run that it begins with
    for losing in (ask("fedavg", sets=own), ask("fedavg", sets=[f"{own[0]},demo"])):
        with pytest.raises(UserError, match=r"model\.path = .*lies in it, and would be lost"):
            folder.check(losing, overwrite=True)
    ComparisonFolder(Path("demo")).check(ask("fedavg", sets=["model.path=demo"]), overwrite=True)  # no folder is meant
    asked = folder.design.read_bytes()
    folder.design.unlink()  # whose runs these are is not known then; they are no less worth
    with pytest.raises(
        UserError, match=r"holds a comparison without what was asked for \(comparison\.toml\).*--overwrite"
    ):
        folder.check(design, overwrite=False)
    folder.design.write_bytes(asked)
    folder.check(other, overwrite=True)
    with folder.locked():
        folder.begin(other, overwrite=True)
    assert folder.read() == other
    assert not (folder.path / "runs").exists()


def test_what_is_no_comparison_is_never_touched(ask: Ask, run: RunFolder, tmp_path: Path) -> None:
    before = tree(run.path)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds no comparison"):
            ComparisonFolder(run.path).check(ask("fedavg"), overwrite)
    assert tree(run.path) == before
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="is a file"):
        ComparisonFolder(tmp_path / "thesis.tex").check(ask("fedavg"), overwrite=True)
    with pytest.raises(UserError, match=r"holds no comparison \(no comparison\.toml\)"):
        ComparisonFolder(tmp_path / "none").read()
    (run.path / "comparison.toml").write_text("seeds = 3")
    with pytest.raises(UserError, match="cannot be read"):
        ComparisonFolder(run.path).read()


def test_two_comparisons_do_not_work_in_one_folder(tmp_path: Path) -> None:
    folder = ComparisonFolder(tmp_path)
    with (
        folder.locked(),
        pytest.raises(UserError, match=r"a comparison, .*is at work there \(process \d+ on"),
        folder.locked(),
    ):
        pass
    with folder.locked():
        pass
