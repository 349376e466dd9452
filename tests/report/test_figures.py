"""Numbers behind the figures, against ones that can be worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedalign.config.toml import load_config
from fedalign.report.figures import GROUPS, clients, curves, short, thinned, uploads
from fedalign.report.findings import ablations, facts, verdicts
from fedalign.report.material import Material, read_material
from tests.report.made import Shape, make_comparison, make_run


def made(folder: Path, **lines: list[dict[str, Any]]) -> Material:
    """Runs `algorithm_seed=[metrics of each round]`."""
    paths = []
    for name, history in lines.items():
        algorithm, _, seed = name.rpartition("_")
        overrides = [f"algorithm.name={algorithm}", f"run.seed={seed}", f"run.rounds={max(1, len(history) - 1)}"]
        path = make_run(folder / name, load_config(None, overrides), rounds=len(history) - 1)
        text = "".join(json.dumps({"round": i, **line}) + "\n" for i, line in enumerate(history))
        (path / "metrics.jsonl").write_text(text)
        paths.append(path)
    return read_material(paths)


def test_bands_are_t_intervals_over_seeds(tmp_path: Path) -> None:
    finals = [0.5, 0.6, 0.5, 0.6]
    fedavg_runs = {f"fedavg_{i}": [{"accuracy": 0.1}, {"accuracy": final}] for i, final in enumerate(finals)}
    few = {f"fedmoe_{i}": [{"accuracy": 0.1}, {"accuracy": final}] for i, final in enumerate(finals[:3])}
    material = made(tmp_path, **fedavg_runs, **few, fedprox_0=[{"accuracy": 0.2}, {}])
    group = curves(material, GROUPS[0])
    assert group is not None
    (panel,) = group["panels"]  # neither mean nor worst client was scored
    fedavg, fedmoe, fedprox = panel["series"]
    half = 3.1824 * 5.7735 / 4**0.5  # t(3) and s of 50, 60, 50, 60
    assert fedavg["rows"][0] == [0, 10, 10, 10, 4]
    assert fedavg["rows"][1] == [1, 55, pytest.approx(55 - half, abs=0.01), pytest.approx(55 + half, abs=0.01), 4]
    assert fedmoe["rows"][1] == [1, pytest.approx(53.333, abs=0.001), 50, 60, 3]  # few: lowest and highest run
    assert fedprox["rows"] == [[0, 20, None, None, 1]]
    assert curves(material, GROUPS[1]) is None


def test_uploads_add_up(tmp_path: Path) -> None:
    sent = [{"bytes_up": 0}, {"bytes_up": 2_000_000}, {"bytes_up": 1_500_000}]
    material = made(tmp_path, fedavg_0=sent, fedavg_1=[{"bytes_up": 0}, {"bytes_up": 4_000_000}, {"bytes_up": 500_000}])
    assert uploads(material) == [{"point": 0, "label": 0, "rows": [[0, 0], [1, 3], [2, 4]]}]


def test_uploads_of_a_run_that_ended_early_stay(tmp_path: Path) -> None:
    sent = [{"bytes_up": 0}, {"bytes_up": 2_000_000}, {"bytes_up": 2_000_000}]
    material = made(tmp_path, fedavg_0=sent, fedavg_1=[{"bytes_up": 0}, {"bytes_up": 6_000_000}, {"bytes_up": 9}])
    whole, early = material.runs
    early = replace(early, history=early.history[:2])
    ended = uploads(replace(material, runs=[whole, early]))
    assert ended[0]["rows"] == [[0, 0], [1, 4], [2, 5]]  # it never falls
    going_on = uploads(replace(material, runs=[whole, replace(early, finished=False)]))
    assert going_on[0]["rows"] == [[0, 0], [1, 4], [2, 4]]


def test_clients_show_their_last_accuracies_and_what_they_hold(tmp_path: Path) -> None:
    material = made(
        tmp_path,
        fedavg_0=[{"client_accuracies": {"a": 0.5, "b": 0.25}}, {}],
        fedprox_0=[{"client_accuracies": {"a": 0.75}}, {}],
    )
    held = {"a": {"examples": 5, "labels": {"x": 2, "y": 3}}, "b": {"examples": 1, "labels": {"y": 1}}}
    for name in ("fedavg_0", "fedprox_0"):
        (tmp_path / name / "clients.json").write_text(json.dumps(held))
    (one,) = clients(read_material([tmp_path / "fedavg_0", tmp_path / "fedprox_0"]))
    assert one["names"] == ["a", "b"]
    assert (one["labels"], one["counts"], one["examples"]) == (["x", "y"], [[2, 3], [0, 1]], [5, 1])
    assert one["score"] == "accuracy"
    assert one["scores"] == [{"label": 0, "values": [50, 25]}, {"label": 1, "values": [75, None]}]
    assert material.runs[0].held.keys() == {f"client-{i:02d}" for i in range(6)}


def test_verdicts_say_how_sure_they_are(tmp_path: Path) -> None:
    def told(name: str, seeds: int, **finals: tuple[float, float]) -> str:
        runs = {
            f"{algorithm}_{seed}": [{"accuracy": 0.1}, {"accuracy": pair[seed % 2]}]
            for algorithm, pair in finals.items()
            for seed in range(seeds)
        }
        (sentence,) = verdicts(made(tmp_path / name, **runs))
        return sentence

    base, better, unsure = (0.5, 0.52), (0.6, 0.62), (0.5, 0.6)
    assert told("a", 4, fedavg=base, fedprox=better) == (
        "fedprox is best on average: accuracy 61.0 ± 1.8\N{NO-BREAK SPACE}%, 95 % interval over 4 seeds. "
        "Seed by seed it differs from fedavg by +10.0 ± 0.0\N{NO-BREAK SPACE}points; the interval excludes zero."
    )
    assert told("b", 4, fedavg=base, fedprox=unsure).endswith("the interval includes zero, so this may be chance.")
    assert "Seed by seed it differs from fedprox by +10.0" in told("d", 4, fedavg=better, fedprox=base)
    assert told("f", 2, fedavg=base, fedprox=better) == (
        "fedprox is best on average: accuracy 61.0 (60.0, 62.0)\N{NO-BREAK SPACE}%, 2 seeds. Seed by seed it differs "
        "from fedavg by +10.0\N{NO-BREAK SPACE}points: 2 seeds are too few for an interval."
    )
    assert told("e", 2, fedavg=base, fedprox=base).startswith("All score the same: accuracy 51.0")
    level = told("g", 1, fedavg=base, fedprox=base, fedmoe=(0.2, 0.2))
    assert level.startswith("fedavg and fedprox score best, and the same: accuracy 50.0")
    assert told("c", 1, fedavg=base, fedprox=better).endswith("no ground for saying which algorithm is better.")


def test_no_best_is_named_of_other_seeds(tmp_path: Path) -> None:
    low, high = [{"accuracy": 0.1}, {"accuracy": 0.5}], [{"accuracy": 0.1}, {"accuracy": 0.9}]
    (sentence,) = verdicts(made(tmp_path, fedavg_0=low, fedavg_1=low, fedprox_1=high))
    assert sentence.startswith("Not every algorithm has every seed, so no best is named: accuracy fedavg 50.0")
    assert "best on average" not in sentence


def test_a_single_line_has_its_start_beside_its_end(tmp_path: Path) -> None:
    rows: dict[str, Any] = {"client_examples": {"a": 4, "b": 1}, "client_loss_mean_nats": 1.0}
    own = [{"client_accuracy_weighted": value, **rows} for value in (0.2, 0.6)]
    told: dict[str, list[dict[str, Any]]] = {
        "start": [{"accuracy": 0.125, "test_examples": 8}],
        "end": [{"accuracy": 0.125, "test_examples": 8}, {"accuracy": 0.5, "test_examples": 8}],
        "own": own,
        "none": [{}, {}],
    }
    said = {name: verdicts(made(tmp_path / name, fedavg_0=lines))[0] for name, lines in told.items()}
    assert {name: text.replace("\N{NO-BREAK SPACE}", " ") for name, text in said.items()} == {
        "start": "fedavg: accuracy 12.5 % at the start, one seed, n = 8 rows.",
        "end": "fedavg: accuracy 12.5 % at the start, 50.0 % after round 1, one seed, n = 8 rows.",
        "own": "fedavg: accuracy on all held-out examples 20.0 % at the start, 60.0 % after round 1, one seed, n = 5 "
        "rows.",
        "none": "No score: these runs have no test set, and no client's held-out rows were scored.",
    }


def test_clients_without_accuracy_show_their_loss_and_of_how_many_rows(tmp_path: Path) -> None:
    lines = [{"client_losses_nats": {"a": 2.0, "b": 1.5}, "client_examples": {"a": 3, "b": 7}}]
    made(tmp_path, fedavg_0=lines)
    held = {"a": {"examples": 5, "labels": {"": 5}}, "b": {"examples": 1, "labels": {"": 1}}}
    (tmp_path / "fedavg_0" / "clients.json").write_text(json.dumps(held))
    (one,) = clients(read_material([tmp_path / "fedavg_0"]))
    assert (one["score"], one["scores"]) == ("loss", [{"label": 0, "values": [2.0, 1.5]}])
    assert (one["tested"], one["examples"], one["labels"]) == ([3, 7], [5, 1], [])  # a class without a name is none


def test_who_failed_is_named(tmp_path: Path) -> None:
    failures = [{"client": "a", "stage": "train", "reason": "x"}, {"client": "a", "stage": "update", "reason": "y"}]
    others = [{"client": f"c{i}", "stage": "train", "reason": "z"} for i in range(6)]
    lines: list[dict[str, Any]] = [{"accuracy": 0.1}, {"failures": failures}, {"failures": [*failures, *others]}]
    (told,) = made(tmp_path, fedavg_0=lines).missing
    assert told.startswith("Faults: fedavg, seed 0: a in 2 rounds, c0 in 1 round, ")
    assert told.endswith(", and 2 more. The reasons are in its metrics.jsonl.")


def test_an_ablation_tells_the_gain_of_each_step(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "a", None, seeds=[0, 1, 2, 3])
    levels = {"parameter-average": 0.5, "gate-alignment": 0.55, "consistency-weights": 0.55}
    for slug, level in levels.items():
        for seed, extra in enumerate((0.0, 0.02, 0.0, 0.02)):
            path = folder / "runs" / slug / f"seed-{seed}" / "metrics.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            lines[-1]["accuracy"] = level + extra
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (ablation,) = ablations(read_material([folder]))
    assert [variant.label for variant in ablation.variants][:3] == [
        "parameter average",
        "gate alignment",
        "+ consistency weights",
    ]
    assert ablation.variants[0].gain == "-"
    assert ablation.variants[1].gain == "+5.0 ± 0.0 †"
    assert ablation.variants[2].gain == "+0.0 ± 0.0"
    assert ablations(read_material([make_comparison(tmp_path / "b", "fedavg,fedprox", seeds=[0])])) == []


def test_facts_tell_what_varies(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "a", "fedavg", seeds=[0], grid={"clients.alpha": ["0.1", "1.0"]})
    told = dict(facts(read_material([folder])))
    assert told["clients"] == "6, dirichlet, alpha: 0.1, 1.0"
    assert (told["rounds"], told["seed"], told["algorithm"]) == ("4", "0", "fedavg")


def test_facts_of_sites_are_theirs(tmp_path: Path) -> None:
    """What the coordinator's [data] and [clients] say of it is not of them."""
    config = load_config(None, ["federation.engine=flower", 'data.labels=["a", "b"]'])
    told = dict(facts(read_material([make_run(tmp_path / "a", config, Shape(rounds=config.run.rounds))])))
    assert (told["data"], told["clients"]) == ("the sites' own", "6, sites")


def test_thinning_keeps_both_ends() -> None:
    assert thinned(range(25), 6) == [0, 5, 10, 14, 19, 24]
    assert thinned("abc", 1) == ["c"]
    assert short(0.123456789) == 0.12346
