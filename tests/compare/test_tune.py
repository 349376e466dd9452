"""Hyper-parameters: the same grid for everyone, chosen on the validation part, written down."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from fedalign.compare.plan import Cell, cells, make_design, parse_algorithms
from fedalign.compare.schedule import Task
from fedalign.compare.tune import Choices, candidates, choose, record, tuning_cells, why_not
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.server.results import RunFolder
from tests.compare.conftest import Ask


def task(cell: Cell, accuracy: float | None) -> Task:
    """A tried run that ended with this accuracy, or failed."""
    made = Task(cell, RunFolder(Path("nowhere")), Path("nowhere.log"))
    if accuracy is None:
        made.state, made.reason = "failed", "it exploded"
    else:
        made.state, made.history = "finished", [{"round": 0, "accuracy": 0.99}, {"round": 1, "accuracy": accuracy}]
    return made


def test_learning_rates_for_all_and_a_strength_for_those_that_have_one() -> None:
    fedavg, fedprox, fixed = parse_algorithms(["fedavg,fedprox,fedprox:mu=5"])
    rates = {"training.learning_rate=0.0001", "training.learning_rate=3.33e-05", "training.learning_rate=0.0003"}
    assert [{tried[0] for tried in candidates(choice, 1e-4)} for choice in (fedavg, fedprox, fixed)] == [rates] * 3
    assert [len(candidates(choice, 1e-4)) for choice in (fedavg, fedprox, fixed)] == [3, 9, 3]
    (nothing_left,) = parse_algorithms(["fedavg:training.learning_rate=1"])
    assert candidates(nothing_left, 1e-4) == [()]


def test_neither_the_test_set_nor_held_out_parts_are_looked_at(ask: Ask) -> None:
    design = ask("fedavg,fedprox", "3,7", tune=True)
    tried = tuning_cells(design)
    assert len(tried) == 3 + 9
    assert {cell.seed for cell in tried} == {3}
    assert {cell.config.evaluation.part for cell in tried} == {"validation"}
    assert not any(cell.config.evaluation.clients for cell in tried)
    assert len({cell.path for cell in tried}) == len(tried)
    # the comparison itself scores on the test set, and keeps the validation part out of training all the same
    final = cells(design, {("fedavg", ()): ("training.learning_rate=0.5",)})
    assert [cell.choice.label for cell in final] == ["fedavg", "fedavg"]
    assert {cell.config.evaluation.part for cell in final} == {"test"}
    assert {cell.config.data.validation for cell in [*tried, *final]} == {0.1}
    assert {cell.config.training.learning_rate for cell in final} == {0.5}


def test_the_best_last_round_wins_and_is_written_down(ask: Ask, tmp_path: Path) -> None:
    design = ask("fedavg,fedprox:mu=5,fedmoe", "1", ["clients.alpha=0.1,1.0"], tune=True)
    tried = tuning_cells(design)
    scores: dict[str, list[float | None]] = {
        "fedavg": [0.5, None, 0.7],
        "fedprox:mu=5": [0.6, 0.6, 0.2],
        "fedmoe": [None, None, None],
    }
    tasks = [task(cell, scores[cell.choice.label][i % 3]) for i, cell in enumerate(tried)]
    chosen = choose(tasks)
    assert [(one.algorithm, one.point["clients.alpha"], one.settings, one.validation_score) for one in chosen] == [
        (label, alpha, (f"training.learning_rate={rate}",), score)
        for alpha in ("0.1", "1.0")
        for label, rate, score in [("fedavg", "0.0003", 0.7), ("fedprox:mu=5", "0.0001", 0.6)]
    ]
    for one, loss in zip(tasks[:3], (1.0, 3.0, 2.0), strict=True):  # fedavg's, by its loss
        one.history = [line | {"loss_nats": loss} for line in one.history]
    by_loss = ask("fedavg", "1", ["evaluation.best=loss"], tune=True)
    judged = [replace(one, cell=cell) for one, cell in zip(tasks, tuning_cells(by_loss), strict=False)]
    assert [one.validation_score for one in choose(judged)] == [-1.0]
    untuned = why_not(tasks)
    assert set(untuned) == {("fedmoe", (("clients.alpha", alpha),)) for alpha in ("0.1", "1.0")}
    assert untuned["fedmoe", (("clients.alpha", "0.1"),)].endswith("it exploded")

    assert {one.note for one in chosen if one.algorithm != "fedavg"} == {""}
    assert chosen[0].note == (
        "fedavg, clients.alpha = 0.1: chosen on the validation part without training.learning_rate=3.33e-05 "
        "(it exploded)"
    )

    path = tmp_path / "tuned.toml"
    assert Choices.load(path) == Choices()
    Choices(tuned=tuple(chosen)).save(path)
    assert Choices.load(path).tuned == tuple(chosen)
    again = tuning_cells(design, [one.line for one in chosen])
    assert {cell.choice.label for cell in again} == {"fedmoe"}  # what is chosen stays
    path.write_text("tuned = 3")
    with pytest.raises(UserError, match="damaged"):
        Choices.load(path)


def test_a_run_that_was_killed_chooses_nothing_and_is_tried_again(ask: Ask) -> None:
    """By a machine without memory, say: among the rest another value would win, for good."""
    tried = tuning_cells(ask("fedavg,fedmoe", "1", tune=True))
    tasks = [task(cell, 0.5) for cell in tried]
    tasks[1] = task(tried[1], None)
    tasks[1].reason, tasks[1].killed = "ended by SIGKILL", True
    assert [one.algorithm for one in choose(tasks)] == ["fedmoe"]
    ((line, reason),) = why_not(tasks).items()
    assert line == ("fedavg", ())
    assert reason.startswith("a run on the validation part did not end by itself, so none is chosen; ")
    assert "ended by SIGKILL" in reason


def test_the_configured_rate_is_tried_as_it_is() -> None:
    (fedavg,) = parse_algorithms(["fedavg"])
    rates = [settings[0] for settings in candidates(fedavg, 0.00123456)]
    assert rates == [f"training.learning_rate={rate}" for rate in ("0.00123456", "0.000412", "0.0037")]


def test_every_tried_run_is_recorded(ask: Ask, tmp_path: Path) -> None:
    design = ask("fedavg,fedprox", "1", tune=True)
    tasks = [task(cell, None if i == 1 else 0.5) for i, cell in enumerate(tuning_cells(design))]
    record(tmp_path / "tune.csv", tasks[:3])
    record(tmp_path / "tune.csv", tasks[3:])
    with (tmp_path / "tune.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "algorithm",
        "seed",
        "training.learning_rate",
        "algorithm.mu",
        "validation_score",
        "failed",
    ]
    assert len(rows) == 12
    assert (rows[1]["validation_score"], rows[1]["failed"]) == ("", "it exploded")
    assert rows[-1] == {
        "algorithm": "fedprox",
        "seed": "0",
        "training.learning_rate": "0.0003",
        "algorithm.mu": "0.1",
        "validation_score": "0.5",
        "failed": "",
    }


def test_tuning_needs_its_learning_rate_and_its_part_to_itself(ask: Ask) -> None:
    with pytest.raises(UserError, match=r"training\.learning_rate: --tune chooses it"):
        ask("fedavg", sets=["training.learning_rate=1e-3,1e-4"], tune=True)
    with pytest.raises(UserError, match="--tune: local trains no model for all, which the validation part could score"):
        ask("fedavg,local", tune=True)
    base = load_config(None, ["data.validation=0.2", "evaluation.part=validation"])
    with pytest.raises(UserError, match="--tune looks at that part itself"):
        make_design(base, parse_algorithms(["fedavg"]), {}, (0,), True)
    own_share = ask("fedavg", sets=["data.validation=0.2"], tune=True)
    assert own_share.base.data.validation == 0.2
