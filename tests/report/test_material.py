"""Which runs a report is made of, and what it says of those that it cannot show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.report import write_report
from fedalign.report.material import read_material
from tests.report.made import Shape, make_comparison, make_run
from tests.server.test_run import start


def run(folder: Path, *overrides: str, rounds: int | None = None) -> Path:
    return make_run(folder, load_config(None, ["run.rounds=4", *overrides]), rounds=rounds)


def test_a_comparison_has_its_own_lines(tmp_path: Path) -> None:
    made = make_comparison(
        tmp_path / "c", "fedavg,fedprox:mu=0.1", seeds=[3, 7], grid={"clients.alpha": ["0.1", "1.0"]}
    )
    material = read_material([made])
    assert len(material.runs) == 2 * 2 * 2
    assert {run.label for run in material.runs} == {"fedavg", "fedprox:mu=0.1"}
    assert {run.cell.seed for run in material.runs} == {3, 7}
    assert not material.missing
    assert material.again[0] == f"fedalign compare --resume {made}"


def test_run_folders_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    where = "run.workers=2", "server.memory_gb=1", "wire.piece_mb=8"  # none of it changes a number
    folders = [
        run(tmp_path / "a", "algorithm.name=fedavg"),
        run(tmp_path / "b", "algorithm.name=fedavg", "run.seed=1", "run.device=cpu", *where),
        run(tmp_path / "c", "algorithm.name=fedprox", "algorithm.mu=0.1"),
        run(tmp_path / "d", "algorithm.name=fedprox", "algorithm.mu=1.0"),
        run(tmp_path / "e", "algorithm.name=fedavg", "clients.alpha=1.0"),
    ]
    material = read_material(folders)
    assert [(run.label, run.cell.point, run.cell.seed) for run in material.runs] == [
        ("fedavg", (("clients.alpha", "0.1"),), 0),
        ("fedavg", (("clients.alpha", "0.1"),), 1),
        ("fedprox:mu=0.1", (("clients.alpha", "0.1"),), 0),
        ("fedprox:mu=1.0", (("clients.alpha", "0.1"),), 0),
        ("fedavg", (("clients.alpha", "1.0"),), 0),
    ]


def test_a_run_at_work_is_shown_but_not_in_the_tables_of_finished_ones(tmp_path: Path) -> None:
    done = run(tmp_path / "done", "algorithm.name=fedavg")
    begun = run(tmp_path / "begun", "algorithm.name=fedprox", rounds=2)
    material = read_material([done, begun])
    (missing,) = material.missing
    assert missing.startswith("Broken off: fedprox, seed 0: round 2 of 4. Go on with it: fedalign run --resume ")
    assert [finished.cell.choice.label for finished in material.tabled] == ["fedavg"]
    alone = read_material([begun])
    assert [finished.cell.choice.label for finished in alone.tabled] == ["fedprox"]
    assert alone.said[0] == "No run is finished: these are scores after round 2 of 4."


def test_a_damaged_run_in_the_middle_is_named_and_the_others_are_shown(tmp_path: Path) -> None:
    made = make_comparison(tmp_path / "c", "fedavg,fedprox", seeds=[0, 1])
    (made / "runs/fedavg/seed-1/metrics.jsonl").write_text('{"round": 0}\n{"round": 2}\n')
    (made / "runs/fedprox/seed-0/metrics.jsonl").write_text('{"round": 0, "accuracy": "high"}\n')
    config = made / "runs/fedprox/seed-1/config.toml"
    config.write_text(config.read_text().replace("rounds = 4", "rounds = 5"))
    material = read_material([made])
    assert [(run.label, run.cell.seed) for run in material.runs] == [("fedavg", 0)]
    assert material.missing == [
        "Missing: fedprox, seed 0: damaged (accuracy in line 1 of metrics.jsonl is 'high').",
        "Missing: fedavg, seed 1: damaged (line 2 of metrics.jsonl is not round 1).",
        "Missing: fedprox, seed 1: damaged (its config.toml is that of another run).",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"round": 0'),
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", '{"round": 0, "client_accuracies": [1]}\n'),
        ("metrics.jsonl", '{"round": 0, "loss_nats": NaN}\n'),
        ("summary.json", "[]"),
        ("clients.json", '{"a": 3}'),
        ("clients.json", '{"a": {"examples": 3}}'),
    ],
)
def test_no_damage_ends_in_a_traceback(tmp_path: Path, name: str, content: str) -> None:
    damaged = run(tmp_path / "a")
    (damaged / name).write_text(content)
    with pytest.raises(UserError, match=r"nothing can be shown yet.*damaged"):
        read_material([damaged])


def test_runs_without_anything_optional_are_shown(tmp_path: Path) -> None:
    bare = run(tmp_path / "bare")
    for path in (bare / "health").iterdir():
        path.unlink()
    (bare / "clients.json").unlink()
    write_report([bare], tmp_path / "report.html")
    assert "was not recorded in these runs" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["nowhere"], r"fedalign report '.*nowhere': holds no run"),
        (["run", "run"], "is given twice"),
        (["run", "comparison"], "is a comparison. Give it alone"),
        (["run", "again"], "are both fedavg, seed 0"),
        (["fresh"], "no round is complete yet"),
    ],
)
def test_folders_that_do_not_go_together_are_refused(tmp_path: Path, given: list[str], told: str) -> None:
    make_comparison(tmp_path / "comparison", seeds=[0])
    for name in ("run", "again", "fresh"):
        run(tmp_path / name, "algorithm.name=fedavg")
    (tmp_path / "fresh" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=told):
        read_material([tmp_path / name for name in given])


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    done, out = run(tmp_path / "run"), tmp_path / "out" / "report.html"
    write_report([done], out)
    write_report([done], out)
    out.write_text("My notes. Pages come from `fedalign report`.")
    with pytest.raises(UserError, match="is a file that is no report"):
        write_report([done], out)
    with pytest.raises(UserError, match="is a folder"):
        write_report([done], tmp_path)


def test_a_real_run_can_be_reported(tmp_path: Path, settings: list[str]) -> None:
    start(tmp_path / "run", settings)
    assert write_report([tmp_path / "run"], tmp_path / "report.html") == []
    page = (tmp_path / "report.html").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"{100 * summary['final_accuracy']:.1f}" in page
    assert "client-02" in page
    assert 'id="figure-routing"' in page


def test_shapes_are_as_large_as_asked_for(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", load_config(None, ["run.rounds=2"]), Shape(rounds=2, clients=("a", "b")))
    (one,) = read_material([made]).runs
    assert (one.round, one.finished, sorted(one.held), len(one.health)) == (2, True, ["a", "b"], 2)
