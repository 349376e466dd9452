"""The script on what noise costs: its cells, the settings of a run, and a table that tells what was not run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedalign.config.toml import load_config

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import hiding
import private

FULL, LORA = (private.Study(kind=kind) for kind in ("full", "lora"))


def test_a_seed_comes_after_another_and_noise_is_all_that_differs() -> None:
    cells = private.cells([LORA, FULL])
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert len({cell.study for cell in cells[:6]}) == 2
    for cell in cells[:6]:
        config = load_config("demo", private.settings(cell, None, None))
        assert (config.tuning.kind, config.privacy.epsilon) == (cell.study.kind, cell.epsilon)
        same = load_config("demo", private.settings(private.Cell(cell.study, None, cell.seed), None, None))
        assert config.model_copy(update={"privacy": same.privacy}) == same


@pytest.mark.parametrize("epsilon", [None, 8.0])
def test_a_cell_is_a_run(monkeypatch: pytest.MonkeyPatch, settings: list[str], epsilon: float | None) -> None:
    monkeypatch.setattr(private, "SETTINGS", [*private.SETTINGS, *settings, "training.epochs=1"])
    told = private.run(private.Cell(replace(LORA, rounds=1), epsilon, 0), None, None)
    assert told["rows"] == 30
    assert 0 <= told["accuracy"] <= 1
    assert ("spent" in told) == (epsilon is not None)
    assert told.get("spent", 0) <= 8
    assert told["cpu_seconds"] > 0


def test_data_of_ones_own_is_dealt_as_it_is(tmp_path: Path) -> None:
    cell = next(private.Study("mine", "base", 7, "full", 0.5).cells())
    config = load_config("demo", private.settings(cell, tmp_path, tmp_path / "base"))
    assert config.clients.partition == "natural"
    assert config.data.test == str(tmp_path / "test.jsonl")
    assert config.model.path == str(tmp_path / "base")
    assert (config.run.rounds, config.evaluation.every, config.training.learning_rate) == (7, 7, 0.5)


def test_the_table_has_what_was_run_and_says_what_was_not() -> None:
    ran = [cell for cell in LORA.cells() if cell.epsilon == 8.0]
    lines = [cell.key | {"before": 0.2, "accuracy": 0.4 + cell.seed / 10, "machine": "one"} for cell in ran]
    lines[1] |= {"cpu_seconds": 1200.4}  # the others are from before it was kept
    stale = next(FULL.cells()).key | {"accuracy": 1.0, "revision": 0}
    audit = {"audit": 2.0, "noise": False, "batch": 80, "claimed": 1.9, "refuted": 3.9, "revision": private.REVISION}
    told = private.tables([*lines, stale, audit])
    assert "| demo | demo | 5 | lora | 0.002 | 20.0 (1) | not run | 50.0 | not run |" in told
    assert "| demo | demo | 5 | full | 0.002 | not run | not run | not run | not run |" in told
    assert "| demo | demo | 5 | lora | 0.002 | not run | 1,200 (1) | not run |" in told
    assert "| demo | demo | 5 | full | 0.002 | not run | not run | not run |" in told
    assert "Not run: 15 of 18 runs." in told
    said = "- Audit at epsilon 2, noise off, a quarter of the examples in a step: claimed 1.90, refuted up to 3.90"
    assert f"{said}, which refutes it." in told
    heads = [line for line in told.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in heads[:4]} == {10}
    assert {line.count("|") for line in heads[4:]} == {9}


def test_the_table_keeps_models_apart(tmp_path: Path) -> None:
    cells = [next(private.Study("domain", model).cells()) for model in ("demo", "start")]
    lines = [cell.key | {"before": 0.1, "accuracy": 0.2 + 0.1 * n} for n, cell in enumerate(cells)]
    del lines[0]["model"], lines[0]["rounds"]  # as it was written before there was a choice
    (tmp_path / "private.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    told = private.tables(private.read(tmp_path / "private.jsonl"))
    assert "| domain | demo | 5 | lora | 0.002 | 10.0 (1) | 20.0 (1) | not run | not run |" in told
    assert "| domain | start | 5 | lora | 0.002 | 10.0 (1) | 30.0 (1) | not run | not run |" in told


def test_guesses_refute_no_more_than_they_can() -> None:
    assert private.least_epsilon(80, 160) == pytest.approx(0, abs=1e-9)
    assert private.least_epsilon(160, 160) > 3
    assert private.least_epsilon(120, 160) < private.least_epsilon(140, 160)


def test_processor_time_is_that_of_children_too() -> None:
    before, own = private.processor_seconds(), time.process_time()
    subprocess.run([sys.executable, "-c", "sum(i * i for i in range(10**6))"], check=True)
    assert private.processor_seconds() - before > time.process_time() - own + 0.01  # a tick of the clock


def test_tables_are_written_where_their_marks_are() -> None:
    for script in (private, hiding):
        page = script.DOCUMENT.read_text(encoding="utf-8")
        assert page.count(script.BEGIN) == 1
        assert script.END in page[page.index(script.BEGIN) :]
