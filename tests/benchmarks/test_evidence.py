"""The evidence's scripts: what they draw, measure and write. They are no package, so their folder is on the path."""

import doctest
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "evidence"))
import by_round
import figures
import measure
import study
import tables
from candidates.fedalign_candidates import MixedRows

import data
from fedalign.algorithms.fedalign_moe import FedAlignMoE
from fedalign.config.toml import load_config
from fedalign.server.results import RunFolder
from fedalign.testing import reports


@pytest.mark.parametrize("module", [data, measure, tables])
def test_examples_in_docstrings(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_a_text_that_trains_does_not_test() -> None:
    train = [{"text": "Same words"}, {"question": "Which?"}]
    regime = data.apart(data.Regime(train, [{"text": "same words"}, {"text": "other"}, {"question": "which?"}]))
    assert regime.test == [{"text": "other"}]


def test_balanced_draws_as_many_of_each() -> None:
    rows = [{"label": "a"}] * 90 + [{"label": "b"}] * 10
    drawn = data.balanced(rows, "label", 10, random.Random(0))
    assert sorted(row["label"] for row in drawn) == ["a"] * 5 + ["b"] * 5


def test_specialisation_is_what_groups_tell_beyond_shuffled_ones() -> None:
    groups = ["a", "b"] * 200
    apart = torch.tensor([[[8, 0]], [[0, 8]]] * 200)
    alike = torch.tensor([[[4, 4]], [[4, 4]]] * 200)
    assert measure.specialisation(apart, groups)[0] == pytest.approx(0.693, abs=0.01)
    assert measure.specialisation(alike, groups) == [0.0]


def test_every_study_names_each_part_once_and_all_its_lines_are_algorithms() -> None:
    for make in study.STUDIES.values():
        parts = list(make())
        assert len({part.name for part in parts}) == len(parts)
        for part in parts:
            assert part.choices[0].settings[0].startswith("algorithm.name=")
            assert part.regime in study.REGIMES


def test_differences_are_taken_seed_by_seed() -> None:
    column = tables.Column("accuracy, %", lambda run: run.last("accuracy"), 100, 1)
    assert tables.told_difference({0: 0.6, 1: 0.7}, {0: 0.5, 1: 0.6}, column) == "**+10.0 ± 0.0**"
    assert tables.told_difference({0: 0.6, 1: 0.5}, {0: 0.5, 1: 0.6, 2: 0.9}, column).startswith("+0.0 ± 127")


def test_measured_runs_keep_their_numbers_and_lose_their_models(tmp_path: Path) -> None:
    for name in ("model", "best", "checkpoint", "clients", "health"):
        (tmp_path / name).mkdir()
    (tmp_path / measure.MEASURES).write_text(json.dumps({"first": {}}))
    measure.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["health", measure.MEASURES]
    assert measure.measure(tmp_path) == {"first": {}}


def test_merges_are_told_beside_the_first_alternative(tmp_path: Path) -> None:
    def line(label: str, accuracy: float, loss: float) -> dict[str, object]:
        scores = {"accuracy": accuracy, "loss_nats": loss, "uploaded_share": 0.5, "change_norm": loss}
        return {"round": 1, "alternative": label, "about": "", **scores}

    for seed in (3, 4):
        lines = [line("fedavg", 0.5, 2.0), line("other", 0.51 + seed / 100, 1.0)]
        found = {"rate": "1e-3", "settings": ["data.max_train=10"], "lines": lines}
        (tmp_path / f"seed-{seed}.json").write_text(json.dumps(found))
    text = tables.merges(tmp_path)
    assert "rounds 1 to 1, seeds 3, 4 (data.max_train=10)" in text
    assert "|  | fedavg | 50.0 ± 0.0 |  | 2.000 ± 0.000 |  | 0.50 | 1.00 |" in text
    assert "|  | other | 54.5 ± 6.4 | +4.5 ± 6.4 | 1.000 ± 0.000 | **-1.000 ± 0.000** | 0.50 | 0.50 |" in text


def test_a_followed_plan_is_told_beside_whole_runs_of_the_same_seeds_and_rate(tmp_path: Path) -> None:
    def runs(*accuracy: float) -> dict[int, tables.Run]:
        return {seed: tables.Run([{}, {"accuracy": value}], {}) for seed, value in enumerate(accuracy, start=3)}

    whole = tables.Part(tmp_path)
    other = f"fedavg:{study.RATE}=1e-4"
    ours = f"{study.OURS}:{study.RATE}=1e-3"
    vars(whole)["runs"] = {other: runs(0.9, 0.9), f"fedavg:{study.RATE}=1e-3": runs(0.5, 0.6), ours: runs(0.6, 0.6)}
    (tmp_path / "tasks" / "a_plan").mkdir(parents=True)
    for seed, accuracy in ((3, 0.6), (4, 0.7)):
        found = {"rate": "1e-3", "settings": ["data.max_train=10"], "lines": [{"round": 1, "accuracy": accuracy}]}
        (tmp_path / "tasks" / "a_plan" / f"seed-{seed}.json").write_text(json.dumps(found))
    text = tables.followed(tmp_path / "tasks", whole)
    assert "| a plan | 2 | 65.0 ± 63.5 | **+10.0 ± 0.0** | +5.0 ± 63.5 |" in text


def test_a_line_that_brings_its_rate_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.Place, "rates", lambda self, part, lines: dict.fromkeys(lines, "1e-4"))
    part = study.Part("x", "tasks", ("fedavg", "fedmoe:training.learning_rate=3e-4"), rate="each")
    fitted = study.Place(tmp_path, tmp_path, "demo", 1).fitted(part)
    assert fitted.algorithms == ("fedavg:training.learning_rate=1e-4", "fedmoe:training.learning_rate=3e-4")
    assert fitted.rate == "1e-4"
    twice = replace(part, algorithms=("fedavg", "fedavg:training.learning_rate=1e-4"))
    assert study.Place(tmp_path, tmp_path, "demo", 1).fitted(twice).algorithms == fitted.algorithms[:1]


def test_the_figure_shows_differences_seed_by_seed_at_the_rate_asked_for() -> None:
    def run(*accuracy: float) -> tables.Run:
        return tables.Run([{"accuracy": value} for value in accuracy], {})

    class Made(tables.Part):
        baseline = f"fedavg:{study.RATE}=3e-4"

    part = Made(Path())
    vars(part)["runs"] = {
        part.baseline: {0: run(0.1, 0.5, 0.6), 1: run(0.1, 0.4, 0.5)},
        f"{study.OURS}:{study.RATE}=1e-4": {0: run(0.1, 0.9, 0.9), 1: run(0.1, 0.9, 0.9)},
        f"{study.OURS}:{study.RATE}=3e-4": {0: run(0.1, 0.6, 0.6), 1: run(0.1, 0.6, 0.5)},
    }
    axes = Figure().subplots()
    figures.draw(axes, part, "3e-4")
    (drawn,) = axes.containers
    points = drawn[0].get_ydata()
    assert points == pytest.approx([15, 0])
    assert drawn.get_label() == study.OURS


def test_the_figure_of_what_is_kept_shows_each_seed_and_their_mean() -> None:
    def line(name: str, seed: int, *accuracy: float) -> dict[str, Any]:
        return {"part": "tasks", "line": name, "seed": seed, "accuracy": accuracy}

    axes = Figure().subplots()
    ours = [line("fedalign_moe", 0, 0.5, 0.7), line("fedalign_moe", 1, 0.5, 0.5), line("fedalign_moe", 2, 0.5, 0.9)]
    figures.draw_kept(axes, [line("fedavg", 0, 0.5, 0.6), line("fedavg", 1, 0.5, 0.7), *ours])  # the last has no pair
    _, *seeds, mean = (one.get_ydata() for one in axes.lines)
    assert seeds == [pytest.approx([0, 10]), pytest.approx([0, -20])]
    assert mean == pytest.approx([0, -5])
    assert axes.lines[-1].get_label() == "the default, fedalign_moe, 2 seeds"


def test_finished_runs_are_kept_once_and_told_beside_fedavg(tmp_path: Path) -> None:
    scores = {
        ("fedavg", 0): (0.2, 0.4),
        ("fedavg", 1): (0.2, 0.6),
        ("by_use", 0): (0.2, 0.5),
        ("by_use", 1): (0.2, 0.7),
    }
    for (line, seed), accuracies in scores.items():
        folder = RunFolder(tmp_path / "runs" / "tasks" / "runs" / line / f"seed-{seed}")
        folder.path.mkdir(parents=True)
        folder.config.write_text(load_config(None, [f"run.seed={seed}", "training.learning_rate=1e-3"]).to_toml())
        rounds = [{"accuracy": accuracy, "loss_nats": 1 - accuracy, "bytes_up": 4} for accuracy in accuracies]
        folder.metrics.write_text("".join(json.dumps(one) + "\n" for one in rounds))
        if (line, seed) != ("by_use", 1):
            folder.summary.write_text("{}")  # it is finished
    file = tmp_path / "today.jsonl"
    assert by_round.keep(file, tmp_path / "runs") == 3
    folder.summary.write_text("{}")
    assert by_round.keep(file, tmp_path / "runs") == 1
    kept = by_round.read(file)
    assert [(line["part"], line["line"], line["seed"], line["rate"]) for line in kept] == [
        ("tasks", line, seed, 1e-3) for line, seed in (("by_use", 0), ("fedavg", 0), ("fedavg", 1), ("by_use", 1))
    ]
    rows = {row.split(" | ")[0].strip("| "): row for row in by_round.part_table(kept).splitlines()}
    assert rows["start"].endswith("| 20.0 ± 0.0 | 20.0 ± 0.0 (+0.0 ± 0.0) |")
    assert "(**+10.0 ± 0.0**)" in rows["round 1"]
    assert rows["bytes up"].endswith("| 1.00 | 1.00 |")
    with pytest.raises(SystemExit, match=r"runs of 1 rounds at 0\.001 and 1 rounds at 0\.1"):
        by_round.part_table([*kept, {**kept[0], "rate": 0.1}])


def test_token_rows_mixed_with_fedavgs() -> None:
    told = reports(3)
    plain, share_C = FedAlignMoE().plan(told, {}).token_weight_C_M_V, told.share_C[:, None, None]
    mixed = MixedRows(mixed=0.3).plan(told, {}).token_weight_C_M_V
    assert plain is not None
    assert mixed is not None
    torch.testing.assert_close(mixed, 0.7 * plain + 0.3 * share_C)
