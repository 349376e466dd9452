"""What a page tells of answers: of the right rows, of the right round, and of no other."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from fedalign.config.toml import load_config
from fedalign.report import write_report
from fedalign.report.answers import Sheets, sheets
from fedalign.report.material import read_material
from tests.report.made import make_answers, make_comparison, make_run

ROUNDS = 3


def made(folder: Path, *overrides: str, rounds: int | None = None) -> Path:
    return make_run(folder, load_config(None, [f"run.rounds={ROUNDS}", *overrides]), rounds=rounds)


def told(folder: Path) -> Sheets:
    return sheets(read_material([folder]))


def rewritten(run: Path, **rounds: Any) -> Path:
    """Other records of some rounds."""
    path = run / "answers.json"
    kept = json.loads(path.read_text()) | {name.removeprefix("r"): told for name, told in rounds.items()}
    path.write_text(json.dumps(kept))
    return run


def test_start_and_end_stand_beside_each_other_with_their_counts(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (sheet,) = told(run).shown
    assert sheet.start is not None
    assert sheet.end is not None
    assert (sheet.start.round, sheet.end.round, sheet.examples) == (0, 4, 400)
    assert (sheet.start.right / 400, sheet.end.right / 400) == (history[0]["accuracy"], history[4]["accuracy"])
    assert sum(one.examples for one in sheet.classes) == sum(one.given for one in sheet.classes) == 400
    weighted = sum(one.examples * (one.end or 0) for one in sheet.classes)
    assert weighted == pytest.approx(sheet.end.right)
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "10 of n = 400 test rows" in page
    assert "given after round 4" in page
    assert "✗ wrong" in page


def test_a_round_that_is_not_complete_is_not_shown(tmp_path: Path) -> None:
    run = rewritten(made(tmp_path / "run", "run.rounds=9", rounds=2), r3=make_answers(1.0))
    (sheet,) = told(run).shown
    assert sheet.end is not None
    assert sheet.end.round == 2


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (make_answers(0.99), "another accuracy"),
        (make_answers(0.5) | {"examples": 30}, "another number of rows than in metrics.jsonl"),
        (make_answers(0.5) | {"confusion": {"sport": {"sport": 3}}}, "another number of rows than the test set"),
        ({"examples": 400}, "KeyError: 'answered'"),
        ([], "KeyError: 'examples'"),
        (
            {"examples": 400, "answered": [{"prompt": "another", "expected": "x", "given": "", "right": None}]},
            "different rows",
        ),
    ],
)
def test_records_of_something_else_are_told_and_left_out(tmp_path: Path, record: Any, said: str) -> None:
    found = told(rewritten(made(tmp_path / "run"), r4=record))
    assert found.shown == []
    assert found.why_empty == ""
    assert said in found.problems[0]


def test_each_algorithm_has_its_first_seed(tmp_path: Path) -> None:
    make_comparison(tmp_path / "runs", "fedavg,fedalign_moe", seeds=[1, 2])
    found = told(tmp_path / "runs").shown
    assert [(one.name, one.seed) for one in found] == [("fedavg", 1), ("fedalign_moe", 1)]


def test_why_there_is_nothing_is_said(tmp_path: Path) -> None:
    old, off = made(tmp_path / "old"), made(tmp_path / "off", "evaluation.answers=0")
    for run in (old, off):
        (run / "answers.json").unlink()
    assert told(old).why_empty.startswith("Not recorded")
    assert told(off).why_empty == "Not kept: evaluation.answers = 0."
    own = made(tmp_path / "own")
    (own / "answers.json").unlink()
    lines = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("accuracy", "loss_nats", "test_examples"):
            del line[name]
    (own / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "no global test set" in told(own).why_empty
    for run in (old, off, own):
        write_report([run], tmp_path / "page.html")
        page = html.unescape((tmp_path / "page.html").read_text())
        assert told(run).why_empty in page
        assert 'id="figure-confusion"' not in page


def test_rows_are_only_text(tmp_path: Path) -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
    record = make_answers(0.5) | {"confusion": {}}
    record["answered"] = [{"prompt": evil, "expected": evil, "given": evil, "right": None}]
    run = rewritten(made(tmp_path / "run"), r0=record, r3=record, r4=record)
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("&lt;/script&gt;&lt;script&gt;alert(1)") == 4


def test_many_classes_are_thinned_to_the_most_frequent(tmp_path: Path) -> None:
    names = [f"class {i:02d}" for i in range(57)]
    confusion = {name: {name: 1 if i < 17 else 2 if i < 56 else 305} for i, name in enumerate(names)}
    record = make_answers(1.0) | {"confusion": confusion}
    run = made(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line | {"accuracy": 1.0}) + "\n" for line in lines))
    (sheet,) = told(rewritten(run, r0=record, r3=record, r4=record)).shown
    assert sheet.figure is not None
    assert sheet.figure["of"] == len(sheet.classes) == 57

    assert set(names[17:]) == set(sheet.figure["names"])
