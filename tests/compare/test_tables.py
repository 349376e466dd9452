"""Tables and results.csv from runs with known numbers."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedalign.compare.figure import check_figure, draw
from fedalign.compare.plan import Design, cells
from fedalign.compare.tables import (
    Finished,
    Table,
    faults,
    final_scores,
    judged_by,
    notes,
    paired_differences,
    qualities,
    rounds_to,
    start_line,
    to_latex,
    to_markdown,
    write_csv,
)
from fedalign.errors import UserError
from fedalign.report.findings import _verdict
from tests.compare.conftest import Ask, by_name, finished


def lines(table: Table) -> dict[str, list[str]]:
    """Texts by label, bold as **, marked as †."""
    return {
        line[0].text: [f"{'**' if cell.bold else ''}{cell.text}{'†' if cell.marked else ''}" for cell in line[1:]]
        for _, section in table.sections
        for line in section
    }


def test_scores_with_intervals_worked_by_hand(ask: Ask) -> None:
    design = ask("fedavg,fedprox", "4")
    cell = by_name(design)
    runs = [
        finished(cell["fedavg", seed], 0.1, 0.4, final, client_accuracy_worst=0.2)
        for seed, final in enumerate([0.50, 0.60, 0.60, 0.70])
    ] + [
        finished(cell["fedprox", seed], 0.1, fast, final, bytes_up=2_000_000, client_accuracy_worst=0.1)
        for seed, (fast, final) in enumerate([(0.55, 0.55), (0.60, 0.66), (0.60, 0.66), (0.65, 0.75)])
    ]
    table = final_scores(design, runs)
    assert table.header == ("algorithm", "seeds", "accuracy, %", "worst client, %", "sent up", "rounds to fedavg's end")
    # accuracy: s = .0816, h = 3.182 * .0816 / 2 = .130; differences .05 .06 .06 .05 are sure; rounds 1, 1, 1, 2
    assert lines(table) == {
        "fedavg": ["4", "60.0 ± 13.0", "**20.0 ± 0.0", "**2.0 MB ± 0 B", "2.0 ± 0.0"],
        "fedprox": ["4", "**65.5 ± 13.0†", "10.0 ± 0.0†", "4.0 MB ± 0 B†", "1.2 ± 0.8"],
    }
    pairs = paired_differences(design, runs)
    assert pairs.header == ("algorithm", "pairs", "accuracy, points", "worst client, points")
    assert lines(pairs) == {"fedprox": ["4", "+5.5 ± 0.9†", "-10.0 ± 0.0†"]}
    assert any("Student-t interval" in note for note in notes(design))


def test_few_seeds_are_told_one_by_one(ask: Ask) -> None:
    design = ask("fedavg,fedprox", "3")
    cell = by_name(design)
    runs = [finished(cell["fedavg", seed], 0.1, value) for seed, value in enumerate([0.5, 0.6, 0.7])]
    runs += [finished(cell["fedprox", seed], 0.1, value) for seed, value in enumerate([0.55, 0.58, 0.76])]
    table = lines(final_scores(design, runs))
    assert table["fedavg"][1] == "60.0 (50.0, 60.0, 70.0)"
    assert table["fedprox"][1] == "**63.0 (55.0, 58.0, 76.0)"
    assert lines(paired_differences(design, runs))["fedprox"] == ["3", "+3.0 (+5.0, -2.0, +6.0)"]
    said = " ".join(notes(design))
    assert "3 seeds are too few for an interval" in said
    assert "±" not in said


def test_who_is_level_is_not_best_alone_and_nobody_is_where_all_are(ask: Ask) -> None:
    design = ask("fedavg,fedprox,fedmoe", "1")
    cell = by_name(design)
    runs = [
        finished(cell[name, 0], 0.1, value) for name, value in (("fedavg", 0.5), ("fedprox", 0.50001), ("fedmoe", 0.4))
    ]
    table = lines(final_scores(design, runs))
    assert [table[name][1] for name in ("fedavg", "fedprox", "fedmoe")] == ["**50.0", "**50.0", "40.0"]
    assert not any(line[1].startswith("**") for line in lines(final_scores(design, runs[:2])).values())


def test_scores_say_on_how_many_rows(ask: Ask) -> None:
    design = ask("fedavg", "2")
    cell = by_name(design)
    overall: dict[str, Any] = {"test_examples": 500, "client_loss_mean_nats": 1.0}
    runs = [
        finished(cell["fedavg", seed], 0.1, 0.5, **overall, client_examples={"a": 20, "b": 13 + seed})
        for seed in (0, 1)
    ]
    (told,) = [note for note in notes(design, runs=runs) if "Scored on" in note]
    assert told == (
        "Scored on 500 rows of the global test set and 33 to 34 held-out rows of all clients together, 13 to 20 each."
    )
    assert not any("Scored on" in note for note in notes(design, runs=[finished(cell["fedavg", 0], 0.1, 0.5)]))


def test_without_a_global_test_set_the_accuracy_has_a_name_of_its_own(ask: Ask) -> None:
    design = ask("fedavg", "1")
    scores = {"client_accuracy_weighted": 0.6, "client_accuracy_mean": 0.5, "client_accuracy_worst": 0.3}
    table = final_scores(design, [Finished(by_name(design)["fedavg", 0], [{"round": 0}, {"round": 1, **scores}])])
    assert table.header[2:5] == ("all held-out examples, %", "mean client, %", "worst client, %")
    assert lines(table)["fedavg"][1:4] == ["60.0", "50.0", "30.0"]


def test_better_on_average_is_bold_but_not_marked_when_seeds_disagree(ask: Ask) -> None:
    design = ask("fedavg,fedprox", "4")
    cell = by_name(design)
    runs = [finished(cell["fedavg", seed], 0.1, value) for seed, value in enumerate([0.5, 0.6, 0.5, 0.6])]
    runs += [finished(cell["fedprox", seed], 0.1, value) for seed, value in enumerate([0.9, 0.55, 0.9, 0.55])]
    assert lines(final_scores(design, runs))["fedprox"][1].startswith("**72.5 ± ")
    assert not lines(final_scores(design, runs))["fedprox"][1].endswith("†")


def test_one_seed_has_no_interval_and_the_notes_say_so(ask: Ask) -> None:
    design = ask("fedavg,fedprox", "1")
    cell = by_name(design)
    runs = [finished(cell["fedavg", 0], 0.1, 0.5), finished(cell["fedprox", 0], 0.1, 0.9)]
    assert lines(final_scores(design, runs))["fedprox"] == ["1", "**90.0", "1.0 MB", "1.0"]
    assert lines(paired_differences(design, runs))["fedprox"] == ["1", "+40.0"]
    assert any("One seed: no interval can be given" in note for note in notes(design))
    assert not any("One seed" in note for note in notes(ask("fedavg", "2")))


def test_who_does_not_get_there_has_no_mean_number_of_rounds(ask: Ask) -> None:
    design = ask("fedavg,fedprox,fedmoe", "2")
    cell = by_name(design)
    runs = [finished(cell["fedavg", seed], 0.1, 0.4, 0.5) for seed in (0, 1)]
    runs += [finished(cell["fedprox", 0], 0.1, 0.6, 0.4), finished(cell["fedprox", 1], 0.1, 0.2, 0.4)]
    runs += [finished(cell["fedmoe", seed], 0.1, 0.2, 0.3) for seed in (0, 1)]
    table = lines(final_scores(design, runs))
    assert [table[label][-1] for label in ("fedavg", "fedprox", "fedmoe")] == [
        "2.0",
        "reached by 1 of 2 seeds",
        "not reached",
    ]
    assert (
        rounds_to([{"round": 0, "loss_nats": 2.0}, {"round": 1}, {"round": 2, "loss_nats": 1.0}], -1.5, "accuracy") == 2
    )


def test_by_the_loss_it_stands_first_and_tells_how_fast(ask: Ask) -> None:
    """Accuracy and loss disagree: what is bold, and when the baseline's end is reached, go by the loss."""
    design = ask("fedavg,fedprox", "2", ["evaluation.best=loss"])
    cell = by_name(design)
    runs = []
    for seed in (0, 1):
        for label, losses in (("fedavg", [2.0, 1.5, 1.2]), ("fedprox", [2.0, 1.1, 1.4])):
            run = finished(cell[label, seed], 0.1, 0.5, 0.6 if label == "fedprox" else 0.5)
            runs.append(
                replace(run, history=[line | {"loss_nats": x} for line, x in zip(run.history, losses, strict=True)])
            )
    table = final_scores(design, runs)
    assert table.header[2:4] == ("loss, nats", "accuracy, %")
    assert table.header[-1] == "rounds to fedavg's end"
    assert {name: [*row[1:3], row[-1]] for name, row in lines(table).items()} == {
        "fedavg": ["**1.200", "50.0", "2.0"],
        "fedprox": ["1.400", "**60.0", "1.0"],
    }
    assert judged_by(runs) == "loss"
    assert "whose loss is at most that of fedavg after its last round" in " ".join(notes(design, runs=runs))
    (verdict,) = _verdicts(design, runs)
    assert verdict.startswith("fedavg is best on average: loss 1.200")


def _verdicts(design: Design, runs: list[Finished]) -> list[str]:
    return [_verdict(design, runs, qualities(runs)[0], point) for point in design.points]


def test_a_missing_run_is_left_out_and_named(ask: Ask) -> None:
    design = ask("fedavg,fedprox", "2")
    cell = by_name(design)
    runs = [finished(cell["fedavg", seed], 0.1, 0.5) for seed in (0, 1)] + [finished(cell["fedprox", 1], 0.1, 0.6)]
    assert lines(final_scores(design, runs))["fedprox"][:2] == ["1", "60.0"]  # of another seed's luck: not bold
    assert any(note.startswith("Not every algorithm has every seed") for note in notes(design, runs=runs))
    assert not any(note.startswith("Not every") for note in notes(design, runs=runs[1:]))
    assert lines(paired_differences(design, runs))["fedprox"] == ["1", "+10.0"]
    assert notes(design, [("fedprox, seed 0", "it broke")])[-1] == "Missing: fedprox, seed 0: it broke"
    without_baseline = lines(final_scores(design, runs[2:]))
    assert without_baseline == {"fedprox": ["1", "60.0", "1.0 MB", "-"]}


def test_without_accuracy_there_are_losses_and_less_is_better(ask: Ask) -> None:
    design = ask("fedavg,fedprox", "1")
    cell = by_name(design)
    runs = [
        Finished(cell["fedavg", 0], [{"round": 0, "loss_nats": 3.0}, {"round": 1, "loss_nats": 2.0}]),
        Finished(cell["fedprox", 0], [{"round": 0, "loss_nats": 3.0}, {"round": 1, "loss_nats": 1.5}]),
    ]
    table = final_scores(design, runs)
    assert table.header[2] == "loss, nats"
    assert lines(table) == {"fedavg": ["1", "2.000", "0 B", "1.0"], "fedprox": ["1", "**1.500", "0 B", "1.0"]}


def test_grid_points_have_sections_of_their_own(ask: Ask) -> None:
    design = ask("fedavg", "1", ["clients.alpha=0.1,1.0"])
    runs = [finished(cell, 0.1, 0.2 + 0.1 * i) for i, cell in enumerate(cells(design))]
    table = final_scores(design, runs)
    assert [(title, section[0][2].text) for title, section in table.sections] == [
        ("clients.alpha = 0.1", "20.0"),
        ("clients.alpha = 1.0", "30.0"),
    ]


def test_results_are_tidy(ask: Ask, tmp_path: Path) -> None:
    design = ask("fedavg,fedprox:mu=0.5", "1", ["clients.alpha=0.1,1.0"])
    runs = [finished(cell, 0.1, 0.5, dead=3, by_client={"a": 1}) for cell in cells(design)]
    write_csv(tmp_path / "results.csv", design, runs)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "algorithm",
        "seed",
        "clients.alpha",
        "round",
        "accuracy",
        "loss_nats",
        "bytes_up",
        "dead",
        "failures",
    ]
    assert len(rows) == 2 * 2 * 2
    assert rows[-1] == {
        "algorithm": "fedprox:mu=0.5",
        "seed": "0",
        "clients.alpha": "1.0",
        "round": "1",
        "accuracy": "0.5",
        "loss_nats": "1.0",
        "bytes_up": "1000000",
        "dead": "3",
        "failures": "0",
    }
    assert rows[0]["dead"] == ""


def test_markdown_and_latex_keep_odd_names_whole(ask: Ask) -> None:
    design = ask("fedavg,fedalign_moe:gate=average", "4", ["clients.alpha=0.1"])
    cell = by_name(design)
    runs = [finished(cell["fedavg", seed], 0.1, 0.5) for seed in range(4)]
    runs += [finished(cell["fedalign_moe:gate=average", seed], 0.1, 0.6) for seed in range(4)]
    tables, said = (final_scores(design, runs), paired_differences(design, runs)), notes(design)
    markdown = to_markdown(tables, said)
    assert "| fedalign_moe:gate=average | 4 | **60.0 ± 0.0** † | 1.0 MB ± 0 B |" in markdown
    assert "95 % Student-t interval" in markdown
    latex = to_latex(tables, said)
    assert r"fedalign\_moe:gate=average & 4 & \textbf{60.0 $\pm$ 0.0}$^\dagger$" in latex
    assert r"accuracy, \% &" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{table}") == 2


def test_a_paper_may_want_standard_deviations(ask: Ask) -> None:
    design = ask("fedavg,fedprox", "2")
    cell = by_name(design)
    runs = [finished(cell["fedavg", seed], 0.1, value) for seed, value in enumerate([0.5, 0.6])]
    runs += [finished(cell["fedprox", seed], 0.1, value) for seed, value in enumerate([0.4, 0.54])]
    assert lines(final_scores(design, runs, "std"))["fedavg"][1] == "**55.0 ± 7.1"
    assert lines(paired_differences(design, runs, "std"))["fedprox"] == ["2", "-8.0 ± 2.8"]
    assert any("sample standard deviation" in note for note in notes(design, spread="std"))


@pytest.mark.parametrize("suffix", ["pdf", "svg", "png"])
@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_a_figure_for_a_paper(ask: Ask, tmp_path: Path, suffix: str, seeds: int) -> None:
    design = ask("fedavg,fedprox", str(seeds), ["clients.alpha=0.1,1.0"])
    runs = [finished(cell, 0.1, 0.4 + 0.01 * cell.seed, 0.5) for cell in cells(design)]
    file = tmp_path / f"rounds.{suffix}"
    check_figure(file)
    draw(file, design, runs)
    assert file.stat().st_size > 1000
    if suffix == "svg":
        text = file.read_text()
        assert text.count("<!-- fedprox -->") == 1
        assert text.count("<!-- clients.alpha = ") == 2


@pytest.mark.parametrize(
    ("name", "said"), [("a.jpg", "must end in one of: .pdf, .svg, .png"), ("no/a.pdf", "no folder")]
)
def test_a_figure_that_cannot_be_drawn_is_refused_before_training(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_figure(tmp_path / name)


def test_the_start_is_told_seed_by_seed_and_of_a_run_that_can_be_shown_beside_its_end(ask: Ask) -> None:
    design = ask("fedavg,fedprox", "2")

    def run(label: str, seed: int, start: float, *clients: str) -> Finished:
        line = {"round": 0, "client_accuracy_mean": start, "client_losses_nats": dict.fromkeys("ab", 1.0)}
        end = {"round": 1, "client_accuracy_mean": 0.9, "client_losses_nats": dict.fromkeys(clients, 1.0)}
        return Finished(by_name(design)[label, seed], [line, end])

    whole = [run(label, seed, (seed + 1) / 10, "a", "b") for label in ("fedavg", "fedprox") for seed in (0, 1)]
    (point,) = design.points
    assert [cell.text for cell in start_line(design, whole, point)][:3] == [
        "start, before training",
        "2",
        "15.0 (10.0, 20.0)",
    ]
    lost = [run("fedavg", 0, 0.1, "b"), *whole[1:]]  # of which a client failed
    assert start_line(design, lost, point) == start_line(design, whole, point)
    both = [run("fedavg", 0, 0.1, "b"), whole[1], run("fedprox", 0, 0.1, "b"), whole[3]]
    assert start_line(design, both, point)[2].text == "20.0, of 1 seed"


def test_runs_in_which_clients_failed_are_told_beside_the_tables_and_in_the_csv(ask: Ask, tmp_path: Path) -> None:
    design = ask("fedavg,fedprox", "1")
    lost = [{"client": "client-07", "stage": "train", "reason": "its loss is nan"}]
    runs = [
        finished(by_name(design)["fedavg", 0], 0.1, 0.4, 0.5, failures=lost),
        finished(by_name(design)["fedprox", 0], 0.1, 0.4, 0.5),
    ]
    assert faults(runs) == ["Faults: fedavg, seed 0: client-07 in 1 round. The reasons are in its metrics.jsonl."]
    write_csv(tmp_path / "results.csv", design, runs)
    with (tmp_path / "results.csv").open() as file:
        read = [(row["algorithm"], row["round"], row["failures"]) for row in csv.DictReader(file)]
    assert [row for row in read if row[2] != "0"] == [("fedavg", "2", "1")]
    assert len(read) == 6
