"""Runs on a real model, by the clock: which come first, what is gone on with, what is said of them; and its checks."""

from __future__ import annotations

import doctest
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedalign.algorithms import options
from fedalign.moe.model import MoEModel
from fedalign.server.checkpoint import ServerState

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "evidence"))
import checks
import real


@pytest.fixture
def study(olmoe: Path, texts: Path, tmp_path: Path) -> real.Study:
    for folder in ("label_skew", "domain"):
        place = tmp_path / "data" / folder
        place.mkdir(parents=True)
        for part in ("train", "test"):
            rows = [json.loads(line) for line in (texts / f"{part}.jsonl").read_text().splitlines()]
            place.joinpath(f"{part}.jsonl").write_text(
                "".join(json.dumps({**row, "client": row["owner"]}) + "\n" for row in rows)
            )
    few = ("clients.count=2", "clients.alpha=1.0", "statistics.min_tokens=4")
    return real.Study(str(olmoe), tmp_path / "data", tmp_path / "out", 3, 60, 30, "cpu", few)


def write_history(cell: real.Cell, *accuracy: float) -> None:
    lines: list[dict[str, Any]] = [
        {"accuracy": value, "loss_nats": 2.0, "round_seconds": 4.0, "client_train_seconds": 2.0, "bytes_up": 10}
        for value in accuracy
    ]
    cell.folder.path.mkdir(parents=True, exist_ok=True)
    cell.folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {"machine": "a machine", "versions": {"torch": "9"}, "epoch_tokens": 8, "peak_gpu_mib": None}
    (cell.folder.path / real.ABOUT).write_text(json.dumps(about))


def test_examples_in_docstrings() -> None:
    found = doctest.testmod(real)
    assert found.attempted > 0
    assert found.failed == 0


def test_lines_are_what_they_say(study: real.Study) -> None:
    def built(line: str) -> dict[str, Any]:
        return options(study.cell("cells", "ag_news", line, "1e-3", 0).config.algorithm.build())

    by_use, ours, paper = built("by_use"), built("fedalign_moe"), built("fedalign_paper")
    assert (by_use["gate"], by_use["experts"], by_use["reg_strength"]) == ("average", "load", 0.0)
    assert (ours["gate"], ours["experts"], ours["reg_strength"]) == ("rows", "semantic", 0.1)
    assert (ours["size_weighted"], ours["granularity"], ours["form"]) == (True, "batch", "bregman")
    assert ours["min_agreement"] == 0.0
    assert (paper["size_weighted"], paper["granularity"], paper["form"]) == (False, "token", "kl")
    assert (paper["vocabulary"], paper["experts"], paper["gate"]) == ("average", "semantic", "rows")
    assert set(real.MAIN) < set(real.LINES)


def test_the_first_seed_of_all_lines_comes_first(study: real.Study) -> None:
    cells = list(study.cells(list(real.DATA), real.MAIN, 2, dict.fromkeys(real.DATA, "1e-3")))
    assert [(cell.seed, cell.line, cell.data) for cell in cells[:3]] == [
        (0, "fedavg", "ag_news"),
        (0, "fedavg", "clinc150"),
        (0, "by_use", "ag_news"),
    ]
    assert [cell.seed for cell in cells] == [0] * 8 + [1] * 8


def test_a_cell_is_made_once_and_told(study: real.Study) -> None:
    cells = list(study.cells(["ag_news"], ["fedavg"], 1, {"ag_news": "1e-2"}))
    assert real.run_all(cells, real.Clock(2), 1, partial=False) == []
    (cell,) = cells
    assert cell.finished
    assert len(cell.history) == 4
    assert {path.name for path in cell.folder.path.iterdir()}.isdisjoint({"model", "best", "checkpoint", "clients"})
    text = real.report(cells, 3)
    assert "| `fedavg` | 0 |" in text
    assert "seeds 0. 60 examples, 3 rounds, batches of 32, base in bfloat16, updates in bfloat16" in text
    before = cell.folder.summary.stat().st_mtime_ns
    real.run_all(cells, real.Clock(2), 1, partial=False)
    assert cell.folder.summary.stat().st_mtime_ns == before


def test_a_cell_that_was_cut_off_goes_on(study: real.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = study.cell("cells", "clinc150", "fedalign_moe", "1e-2", 0)
    cell.folder.path.mkdir(parents=True)
    cell.folder.config.write_text(cell.config.to_toml())

    def cut(watch: real.Watch, state: ServerState, improved: bool) -> None:
        if state.round == 2:
            raise SystemExit(143)

    with monkeypatch.context() as patched:
        patched.setattr(real.Watch, "completed", cut)
        with pytest.raises(SystemExit):
            real.work(cell.folder.path, "cpu")
    assert (cell.rounds_left, cell.finished) == (1, False)
    assert "Cut off after 2 rounds" in real.report([cell], 3)
    real.work(cell.folder.path, "cpu")
    assert (cell.rounds_left, cell.finished) == (0, True)
    whole = study.cell("whole", "clinc150", "fedalign_moe", "1e-2", 0)
    whole.folder.path.mkdir(parents=True)
    shutil.copy(cell.folder.config, whole.folder.config)
    real.work(whole.folder.path, "cpu")
    assert [line["accuracy"] for line in whole.history] == [line["accuracy"] for line in cell.history]
    assert [line["loss_nats"] for line in whole.history] == [line["loss_nats"] for line in cell.history]


def test_what_does_not_fit_is_not_begun(study: real.Study) -> None:
    done, new = (study.cell("cells", "ag_news", line, "1e-2", 0) for line in ("fedavg", "by_use"))
    pace = real.Pace()
    assert pace.needs(new) == 0.0
    write_history(done, 0.1, 0.2)
    pace.saw(done)
    assert pace.needs(new) == pytest.approx(3 * 4.0)
    assert pace.needs(done) == pytest.approx(2 * 4.0)


def test_a_cell_that_broke_off_counts_for_the_rounds_it_has(study: real.Study) -> None:
    short = replace(study, rounds=2)
    for line, accuracy in (("fedavg", 0.3), ("by_use", 0.5)):
        cell = study.cell("cells", "ag_news", line, "1e-2", 0)
        write_history(cell, 0.1, 0.2, accuracy)  # two of three rounds
        (cell.folder.path / real.ABOUT).unlink()  # the machine was gone
    assert "Cut off after 2 rounds" in real.report(
        [study.cell("cells", "ag_news", line, "1e-2", 0) for line in ("fedavg", "by_use")], 3
    )
    text = real.report([short.cell("cells", "ag_news", line, "1e-2", 0) for line in ("fedavg", "by_use")], 2)
    assert "Cut off" not in text
    assert "Machine and versions were not kept" in text
    assert "+20.0" in text


def test_a_cell_of_other_settings_is_not_gone_on_with(study: real.Study) -> None:
    cell = study.cell("cells", "ag_news", "fedavg", "1e-2", 0)
    cell.folder.path.mkdir(parents=True)
    cell.folder.config.write_text(cell.config.to_toml())
    real.refuse_others([cell])
    other = study.cell("cells", "ag_news", "fedavg", "1e-2", 0, "training.epochs=2")
    with pytest.raises(SystemExit, match=r"\[training\]"):
        real.refuse_others([other])


def test_the_scan_chooses_a_rate_and_says_which_regimes_count(study: real.Study) -> None:
    ends = {("ag_news", "fedavg"): 0.4, ("ag_news", "centralised"): 0.5, ("clinc150", "fedavg"): 0.3}
    cells = list(study.scan(list(real.DATA), ("1e-3", "3e-3", "1e-2")))
    for cell in cells:
        bonus = 0.05 if cell.rate == "3e-3" else 0.0
        write_history(cell, 0.3, ends.get((cell.data, cell.line), 0.35) + bonus)
    text = real.chosen(cells, study)
    assert real.rates_of(study.out, list(real.DATA), None) == {"ag_news": "3e-3", "clinc150": "3e-3"}
    assert "ag_news: learning rate 3e-3; FedAvg +15.0 points, pooled +25.0." in text
    assert "clinc150: learning rate 3e-3; FedAvg +5.0 points, pooled +10.0. The regime does not count." in text
    assert real.rates_of(study.out, ["ag_news"], "1e-4") == {"ag_news": "1e-4"}


def test_differences_are_to_fedavg_seed_by_seed(study: real.Study) -> None:
    cells = [study.cell("cells", "ag_news", line, "1e-2", seed) for seed in (0, 1) for line in ("fedavg", "by_use")]
    for cell in cells:
        write_history(cell, 0.1, 0.2, 0.3 + 0.1 * cell.seed + 0.02 * (cell.line == "by_use"), 0.4)
        cell.folder.summary.write_text("{}")
    (row,) = [line for line in real.report(cells, 3).splitlines() if line.startswith("| `by_use`")]
    assert "| 0, 1 | 10.0 ± 0.0 | 20.0 ± 0.0 |" in row
    assert "| **+1.0 ± 0.0** |" in row
    assert row.endswith("| 1.00 | 4.0 | 4 |  |")


def test_checks_keep_what_they_found(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(place: checks.Place) -> checks.Findings:
        yield "first", 1
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(checks, "CHECKS", {"numerics": checks.numerics, "broken": broken})
    with pytest.raises(SystemExit, match="failed: broken"):
        checks.run("all", str(olmoe), "cpu", tmp_path)
    found = json.loads((tmp_path / "numerics.json").read_text())["found"]
    same = found["lora, device, float32, to the CPU"]
    assert (same["start_difference"], same["update_difference"]) == (0.0, 0.0)
    assert 0 < found["full, device, autocast, to float32"]["update_difference"] < 0.5
    partly = json.loads((tmp_path / "broken.json").read_text())["found"]
    assert partly == {"first": 1, "failed": "RuntimeError: no such kernel"}
    with pytest.raises(SystemExit, match="Choose some of: numerics"):
        checks.run("nothing", str(olmoe), "cpu", tmp_path)


def test_a_model_in_one_shard_trains_as_a_whole_one(olmoe: Path, tmp_path: Path) -> None:
    found = dict(checks.fsdp(checks.Place(str(olmoe), "cpu", tmp_path)))
    assert found["sharded"] is True
    assert found["FSDP2, to the whole"]["update_difference"] < 1e-5
    assert found["saved model differs by"] == 0
    assert MoEModel.load(olmoe).sharded is False
