"""From finished runs to results.csv and to tables for people: Markdown, LaTeX and the terminal.

Every mean comes with the 95 % Student-t interval over seeds, or of fewer than four seeds with the single runs. Bold is
the best mean of a column, as it is shown, unless all are alike; † says that the interval of the differences
to the baseline, taken seed by seed, excludes zero.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev
from typing import Literal

from fedalign.compare.plan import Cell, Design, Point, point_title
from fedalign.compare.statistics import FEW, Interval, mean_interval, paired_interval
from fedalign.config.run import Measure
from fedalign.files import replacing_file
from fedalign.protocol import Metrics
from fedalign.server.scores import beside, is_scored, merit
from fedalign.units import nats, size

MARK = "†"
BySeed = dict[int, float]
Spread = Literal["ci", "std"]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Finished:
    """A run with all its rounds."""

    cell: Cell
    history: Sequence[Metrics]


@dataclass(frozen=True)
class Column:
    """A number that each run has."""

    title: str
    of: Callable[[Finished], float | None]
    format: Format
    higher_is_better: bool


@dataclass(frozen=True)
class TableCell:
    """Text, and how it stands out."""

    text: str
    bold: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """Lines by grid point."""

    title: str
    header: tuple[str, ...]
    sections: tuple[tuple[str, tuple[tuple[TableCell, ...], ...]], ...]


def _last(metric: str) -> Callable[[Finished], float | None]:
    """A metric of the last round."""
    return lambda run: run.history[-1].get(metric)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _weighted(run: Finished) -> float | None:
    """The stand-in for a global test set where there is none."""
    line = run.history[-1]
    return None if "loss_nats" in line else line.get("client_accuracy_weighted")


ACCURACIES = (
    Column("accuracy, %", _last("accuracy"), _percent, True),
    Column("all held-out examples, %", _weighted, _percent, True),
    Column("mean client, %", _last("client_accuracy_mean"), _percent, True),
    Column("worst client, %", _last("client_accuracy_worst"), _percent, True),
)
LOSSES = (
    Column("loss, nats", _last("loss_nats"), nats, False),
    Column("clients' loss, nats", _last("client_loss_mean_nats"), nats, False),
)
MEANINGS = {
    "all held-out examples, %": "All held-out examples: each counts alike, of whichever client",
    "mean client, %": "Mean client: each client counts alike, however few its rows",
    "worst client, %": "Worst client: the lowest, which with few rows may be chance",
    "clients' loss, nats": "Clients' loss: each held-out row counts alike, of whichever client",
}
SENT = Column("sent up", lambda run: float(sum(line.get("bytes_up", 0) for line in run.history)), size, False)


def final_scores(design: Design, runs: Sequence[Finished], spread: Spread = "ci") -> Table:
    """Final scores, bytes and speed of every algorithm at every grid point."""
    columns = qualities(runs)
    baseline = design.baseline
    several = len(design.choices) > 1
    speeds = (f"rounds to {baseline}'s end",) if several else ()
    header = ("algorithm", "seeds", *(column.title for column in (*columns, SENT)), *speeds)
    sections = []
    for point in design.points:
        grouped = by_label(runs, point)
        measured = [[values_by_seed(grouped[label], column) for label in grouped] for column in (*columns, SENT)]
        shown = [
            _with_intervals(column, values, values_by_seed(grouped.get(baseline, {}), column), spread)
            for column, values in zip((*columns, SENT), measured, strict=True)
        ]
        speed = [_rounds(grouped[label], grouped.get(baseline, {}), judged_by(runs)) for label in grouped]
        lines = tuple(
            (TableCell(label), TableCell(str(len(grouped[label]))), *(c[i] for c in shown), *speed[i : i + several])
            for i, label in enumerate(grouped)
        )
        sections.append((point_title(point), lines))
    return Table("Final scores", header, tuple(sections))


def paired_differences(design: Design, runs: Sequence[Finished], spread: Spread = "ci") -> Table:
    """Differences to the baseline, seed by seed."""
    columns, baseline = qualities(runs), design.baseline
    header = ("algorithm", "pairs", *(in_points(column.title) for column in columns))
    sections = []
    for point in design.points:
        grouped = by_label(runs, point)
        base = grouped.pop(baseline, {})
        lines = []
        for label, group in grouped.items():
            pairs = [paired_interval(values_by_seed(group, column), values_by_seed(base, column)) for column in columns]
            count = max((pair.count for pair in pairs if pair is not None), default=0)
            cells = [_difference(pair, column, spread) for pair, column in zip(pairs, columns, strict=True)]
            lines.append((TableCell(label), TableCell(str(count)), *cells))
        if lines:
            sections.append((point_title(point), tuple(lines)))
    return Table(f"Differences to {baseline}, seed by seed", header, tuple(sections))


def start_line(design: Design, runs: Sequence[Finished], point: Point) -> tuple[TableCell, ...]:
    """The line of `final_scores` that all algorithms begin with, before any training; empty without scores of it.

    Runs of a seed have one start: its score is of the first that can be shown beside its end.
    """
    begun = [Finished(r.cell, [beside(r.history[0], r.history[-1])]) for r in runs if r.cell.point == point]
    seeds = sorted({run.cell.seed for run in begun})
    values = [_by_seed(begun, column) for column in qualities(runs)]
    if not any(values) or all(len(run.history) == 1 for run in runs):
        return ()
    cells = []
    for by_seed, column in zip(values, qualities(runs), strict=True):
        known = [by_seed[seed] for seed in seeds if seed in by_seed]
        plural = "s" if len(known) > 1 else ""
        fewer = f", of {len(known)} seed{plural}" if len(known) < len(seeds) else ""
        cells.append(TableCell(interval_text(mean_interval(known), column.format) + fewer if known else "-"))
    empty = (TableCell("-"),) * (2 if len(design.choices) > 1 else 1)
    return (TableCell("start, before training"), TableCell(str(len(seeds))), *cells, *empty)


def _by_seed(runs: Sequence[Finished], column: Column) -> dict[int, float]:
    """A number of each seed, of the first run that has it."""
    found = dict[int, float]()
    for run in runs:
        if (value := column.of(run)) is not None:
            found.setdefault(run.cell.seed, value)
    return found


def rows_scored(runs: Sequence[Finished]) -> str:
    """How many examples stand behind the scores, as far as runs say so."""
    scored = [next((line for line in reversed(run.history) if is_scored(line)), {}) for run in runs]
    tests = [line["test_examples"] for line in scored if "test_examples" in line]
    means = {"client_accuracy_mean", "client_loss_mean_nats"}  # told where all clients have scored
    held = [line["client_examples"].values() for line in scored if line.get("client_examples") and means & line.keys()]
    parts = [f"{_from_to(tests)} rows of the global test set"] if tests else []
    if held:
        each = _from_to([count for counts in held for count in counts])
        whose = f"all clients together, {each} each" if any(len(counts) > 1 for counts in held) else "the one client"
        parts.append(f"{_from_to([sum(counts) for counts in held])} held-out rows of {whose}")
    if together := [line["held_out_examples"] for line in scored if "held_out_examples" in line]:  # masked
        parts.append(f"{_from_to(together)} held-out rows of all clients together")
    return " and ".join(parts)


def _from_to(counts: Sequence[int]) -> str:
    """The least and the largest.

    >>> _from_to([30, 30]), _from_to([1, 1500])
    ('30', '1 to 1,500')
    """
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def notes(
    design: Design,
    missing: Iterable[tuple[str, str]] = (),
    runs: Sequence[Finished] = (),
    spread: Spread = "ci",
) -> list[str]:
    """Notes that a reader needs to read the tables."""
    several = len(design.choices) > 1
    rounds = _from_to([run.history[-1]["round"] for run in runs] or [design.base.run.rounds])
    seeds = f"seed{'s' if len(design.seeds) > 1 else ''} {', '.join(map(str, design.seeds))}"
    said = [f"After {rounds} round{'' if rounds == '1' else 's'}, {seeds}."]
    if several:
        said[0] += " Runs of one seed share start, partition and order of batches."
        said.append(
            "Bold: the best mean (highest accuracy, lowest loss, least sent up), unless all are the same. Differences "
            "are taken seed by seed."
        )
        points = [by_label(runs, point).values() for point in design.points]
        if not all(len({frozenset(group) for group in groups}) <= 1 for groups in points):
            said.append("Not every algorithm has every seed: means are of different seeds, so none of them is bold.")
    if spread == "std" and len(design.seeds) > 1:
        said.append("m ± s: mean and sample standard deviation over seeds, which is no interval of the mean.")
    elif len(design.seeds) >= FEW:
        said.append(
            "m ± h: mean over seeds and half-width of its 95 % Student-t interval. Differences have their own; "
            f"{MARK}: it excludes zero. No correction for many tests."
        )
    elif len(design.seeds) > 1:
        said.append(
            f"m (a, b): mean and single runs, seed by seed: {len(design.seeds)} seeds are too few for an interval, and "
            "hardly a ground for saying what is better."
        )
    elif several:
        said.append(
            "One seed: no interval can be given. These are single runs, and no ground for saying what is better."
        )
    else:
        said.append("One seed: a single run, and no interval can be given.")
    if several:
        reached = "accuracy is at least" if judged_by(runs) == "accuracy" else "loss is at most"
        said.append(
            f"Rounds to {design.baseline}'s end: the first round of a seed whose {reached} that of {design.baseline} "
            "after its last round with that seed; 0: the start's is."
        )
    explained = [told for column in qualities(runs) if (told := MEANINGS.get(column.title))]
    if explained:
        said.append(f"{'. '.join(explained)}.")
    if design.base.evaluation.generate and explained and "accuracy, %" in [c.title for c in qualities(runs)]:
        said.append("Accuracy: the share of answers that were generated word for word, where there are no choices.")
    if scored := rows_scored(runs):
        said.append(f"Scored on {scored}.")
    if design.tune and runs:  # only a line that was tuned has any
        share = f"{design.base.data.validation:.0%} of the training examples"
        said.append(
            f"Learning rate and strength of every algorithm were chosen on a validation part ({share}) with seed "
            f"{design.seeds[0]}: tune.csv has every run, tuned.toml what was chosen."
        )
    together: dict[str, list[str]] = {}
    for name, reason in missing:
        together.setdefault(reason, []).append(name)
    said += [f"Missing: {'; '.join(names)}: {reason}" for reason, names in together.items()]
    return said


def faults(runs: Sequence[Finished], most: int = 5) -> list[str]:
    """A note on each run in which clients failed: which, and in how many rounds."""
    said = []
    for run in runs:
        failed = [{str(one["client"]) for one in line.get("failures", ())} for line in run.history]
        counts = Counter(name for names in failed for name in names)
        worst = sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:most]
        told = [f"{name} in {count} round{'s' if count > 1 else ''}" for name, count in worst]
        more = f", and {len(counts) - most} more" if len(counts) > most else ""
        if told:
            said.append(f"Faults: {run.cell.name}: {', '.join(told)}{more}. The reasons are in its metrics.jsonl.")
    return said


def qualities(runs: Sequence[Finished]) -> list[Column]:
    """Accuracies that some run has, losses where there are none; where runs go by the loss, losses before accuracies.

    They do if all have `evaluation.best` = "loss". The first column is what they are judged by.
    """
    accuracies, losses = (
        [column for column in kind if any(column.of(run) is not None for run in runs)] for kind in (ACCURACIES, LOSSES)
    )
    by_loss = all(run.cell.config.evaluation.best == "loss" for run in runs)
    return [*losses, *accuracies] if by_loss else accuracies or losses


def judged_by(runs: Sequence[Finished]) -> Measure:
    """The measure of the first of `qualities`."""
    return "loss" if any(not column.higher_is_better for column in qualities(runs)[:1]) else "accuracy"


def rounds_to(history: Sequence[Metrics], target: float, by: Measure) -> int | None:
    """The first round whose merit by a measure is at least `target`; None if none is.

    >>> rounds_to([{"round": 0, "accuracy": 0.1}, {"round": 1, "accuracy": 0.6}], 0.5, "accuracy")
    1
    """
    return next((line["round"] for line in history if (score := merit(line, by)) is not None and score >= target), None)


def _rounds(group: Mapping[int, Finished], baseline: Mapping[int, Finished], by: Measure) -> TableCell:
    """A mean only if every seed gets there: the mean of those that do would flatter."""
    needed: list[int | None] = []
    for seed, run in group.items():
        target = merit(baseline[seed].history[-1], by) if seed in baseline else None
        if target is not None:
            needed.append(rounds_to(run.history, target, by))
    reached = [rounds for rounds in needed if rounds is not None]
    if not needed:
        return TableCell("-")
    if len(reached) < len(needed):
        return TableCell("not reached" if not reached else f"reached by {len(reached)} of {len(needed)} seeds")
    return TableCell(interval_text(mean_interval(reached), lambda value: f"{value:.1f}"))


def _with_intervals(column: Column, lines: Sequence[BySeed], baseline: BySeed, spread: Spread) -> list[TableCell]:
    intervals = [mean_interval(list(values.values())) if values else None for values in lines]
    means = [interval.mean for interval in intervals if interval is not None]
    shown = {column.format(mean) for mean in means}
    comparable = len(shown) > 1 and same_seeds(lines)
    best = column.format((max if column.higher_is_better else min)(means)) if comparable else None
    cells = []
    for values, interval in zip(lines, intervals, strict=True):
        if interval is None:
            cells.append(TableCell("-"))
            continue
        pair = paired_interval(values, baseline)
        differs = pair is not None and pair.is_told and pair.excludes_zero
        text = interval_text(interval, column.format, spread)
        cells.append(TableCell(text, column.format(interval.mean) == best, differs))
    return cells


def same_seeds(lines: Iterable[BySeed]) -> bool:
    """Whether means over these are of the same seeds; of other seeds they would not say what is better."""
    return len({frozenset(values) for values in lines if values}) <= 1


def interval_text(interval: Interval, format: Format, spread: Spread = "ci") -> str:
    """The mean and the half-width of its interval; of few seeds, the mean and each of them unless all are alike.

    With "std", the mean and the sample standard deviation over seeds.
    """
    mean = format(interval.mean)
    if spread == "std":
        return f"{mean} ± {format(stdev(interval.values))}" if interval.count > 1 else mean
    if interval.half is not None and interval.is_told:
        return f"{mean} ± {format(interval.half)}"
    each = [format(value) for value in interval.values]
    return f"{mean} ({', '.join(each)})" if len({*each, mean}) > 1 else mean


def _difference(pair: Interval | None, column: Column, spread: Spread) -> TableCell:
    if pair is None:
        return TableCell("-")
    return TableCell(difference_text(pair, column, spread), marked=pair.is_told and pair.excludes_zero)


def difference_text(pair: Interval, column: Column, spread: Spread = "ci") -> str:
    """An interval with the sign of each value."""

    def signed(value: float) -> str:
        return f"{'-' if value < 0 else '+'}{column.format(abs(value))}"

    if spread == "std" or pair.is_told:
        size = interval_text(replace(pair, mean=abs(pair.mean)), column.format, spread)
        return f"{'-' if pair.mean < 0 else '+'}{size}"
    return interval_text(pair, signed)


def in_points(title: str) -> str:
    """The unit of a difference: of percentages, points."""
    return title.replace("%", "points")


def by_label(runs: Sequence[Finished], point: Point) -> dict[str, dict[int, Finished]]:
    """The runs of each algorithm at a grid point, by seed."""
    grouped: dict[str, dict[int, Finished]] = {}
    for run in runs:
        if run.cell.point == point:
            grouped.setdefault(run.cell.choice.label, {})[run.cell.seed] = run
    return grouped


def values_by_seed(group: Mapping[int, Finished], column: Column) -> BySeed:
    """A number of each run that has it."""
    return {seed: value for seed, run in group.items() if (value := column.of(run)) is not None}


# ------------------------------------------------------------------------------------------------------------- writing


def write_csv(path: Path, design: Design, runs: Sequence[Finished]) -> None:
    """One line a run and round: algorithm, seed, grid keys, and every number of the round that is not by client.

    Last, how many clients' faults it had: sums and means are without them.
    """
    metrics = dict.fromkeys(
        name
        for run in runs
        for line in run.history
        for name, value in line.items()
        if isinstance(value, int | float) and name != "round"
    )
    with replacing_file(path) as new, new.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["algorithm", "seed", *design.grid, "round", *metrics, "failures"])
        for run in runs:
            about = [run.cell.choice.label, run.cell.seed, *(value for _, value in run.cell.point)]
            for line in run.history:
                told = [line.get(name, "") for name in metrics]
                writer.writerow([*about, line["round"], *told, len(line.get("failures", ()))])


def to_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables, then the notes."""
    parts = []
    for table in tables:
        parts.append(f"## {table.title}")
        for title, lines in table.sections:
            parts += [f"### {title}"] if title else []
            rule = [":--", *("--:" for _ in table.header[1:])]
            rows = [table.header, rule, *([_in_markdown(cell) for cell in line] for line in lines)]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join([*parts, *notes]) + "\n"


def _in_markdown(cell: TableCell) -> str:
    text = cell.text.replace("|", r"\|")
    return (f"**{text}**" if cell.bold else text) + (f" {MARK}" if cell.marked else "")


def to_latex(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables for a paper; they need `booktabs`."""
    return "\n".join(_latex_table(table, notes if i == 0 else ()) for i, table in enumerate(tables))


def _latex_table(table: Table, notes: Sequence[str]) -> str:
    width = len(table.header)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_in_latex(' '.join([f'{table.title}.', *notes]))}}}",
        rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        r"\toprule",
        " & ".join(_in_latex(title) for title in table.header) + r" \\",
    ]
    for title, rows in table.sections:
        lines.append(r"\midrule")
        if title:
            lines.append(rf"\multicolumn{{{width}}}{{l}}{{\textit{{{_in_latex(title)}}}}} \\")
        lines += [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _latex_cell(cell: TableCell) -> str:
    text = _in_latex(cell.text)
    return (rf"\textbf{{{text}}}" if cell.bold else text) + ("$^\\dagger$" if cell.marked else "")


def _in_latex(text: str) -> str:
    named = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        MARK: r"$^\dagger$",
    }
    return "".join(named.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)
