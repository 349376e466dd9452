"""Answers of models to rows of the global test set, and how each class fares: at the start and at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedalign.compare.plan import line_name
from fedalign.report.figures import Json, label_index, lines_of, point_index
from fedalign.report.material import Material, Run
from fedalign.server.results import read_answers

CLASSES = 40  # that a figure shows at most
Counts = Mapping[str, Mapping[str, int]]  # true class -> given class -> rows


@dataclass(frozen=True)
class Record:
    """The record kept after one round."""

    round: int
    examples: int  # of the test set
    rows: Sequence[tuple[str, str, str, bool | None]]  # prompt, expected, given, whether that is right
    counts: Counts  # empty: there are no classes

    @property
    def right(self) -> int:
        """Rows of the test set that were given their own class."""
        return sum(row.get(name, 0) for name, row in self.counts.items())


@dataclass(frozen=True)
class Row:
    """A test row; None: not recorded."""

    prompt: str
    expected: str
    start: str | None
    end: str | None
    right: tuple[bool | None, bool | None]


@dataclass(frozen=True)
class Class:
    """A class; shares in [0, 1], None: not recorded, or a share of nothing."""

    name: str
    examples: int
    start: float | None  # of its rows, those that were given its name
    end: float | None
    given: int  # rows that were given its name, at the end
    precision: float | None  # of these, its own


@dataclass(frozen=True)
class Sheet:
    """One run at its start and after its last complete round."""

    name: str
    seed: int
    start: Record | None
    end: Record | None
    rows: Sequence[Row]
    classes: Sequence[Class]
    figure: Json | None

    @property
    def examples(self) -> int:
        """Rows of the test set."""
        return next(one.examples for one in (self.end, self.start) if one is not None)


@dataclass(frozen=True)
class Sheets:
    """Those of all lines, what cannot be shown, and where there is none, why."""

    shown: Sequence[Sheet]
    problems: Sequence[str]
    why_empty: str


def sheets(material: Material) -> Sheets:
    """For each grid point and algorithm the first seed that has answers, a finished run if there is one."""
    shown, problems = [], []
    for runs in lines_of(material).values():
        for run in sorted(runs, key=lambda run: (not run.finished, run.cell.seed)):
            try:
                sheet = _sheet(material, run)
            except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
                problems.append(f"{run.folder}: answers.json is left out: damaged ({type(error).__name__}: {error}).")
                continue
            if sheet is not None:
                shown.append(sheet)
                break
    return Sheets(shown, problems, "" if shown or problems else _why_empty(material))


def _why_empty(material: Material) -> str:
    if not any("loss_nats" in line for run in material.runs for line in run.history):
        return "There is no global test set, and clients' own rows are theirs: none of them is kept or shown."
    if not material.design.base.evaluation.answers:
        return "Not kept: evaluation.answers = 0."
    return "Not recorded: runs of an older version, or plain text, which asks nothing."


def _sheet(material: Material, run: Run) -> Sheet | None:
    """The run's start and its latest complete round that was recorded; None: nothing was.

    Raises:
        OSError, KeyError, TypeError, ValueError, AttributeError: It is no record of ours, or not of this run.
    """
    told = read_answers(run.folder)
    records = {number: _record(run, number, told[number]) for number in sorted(told) if number <= run.round}
    start = records.pop(0, None)
    end = records[max(records)] if records else None
    rows, classes = _rows(start, end), _classes(start, end)
    if not rows and not classes:
        return None
    figure = _figure(material, run, [one for one in (start, end) if one is not None and one.counts])
    return Sheet(line_name(run.label, run.cell.point), run.cell.seed, start, end, rows, classes, figure)


def _record(run: Run, number: int, told: Mapping[str, Any]) -> Record:
    line = run.history[number]
    if line.get("test_examples", told["examples"]) != told["examples"]:
        raise ValueError(f"round {number} has another number of rows than in metrics.jsonl")
    rows = [(str(r["prompt"]), str(r["expected"]), str(r["given"]), r["right"]) for r in told["answered"]]
    counts = {
        str(true): {str(given): int(n) for given, n in row.items()} for true, row in told.get("confusion", {}).items()
    }
    record = Record(number, int(told["examples"]), rows, counts)
    if counts and sum(sum(row.values()) for row in counts.values()) != record.examples:
        raise ValueError(f"the confusion of round {number} has another number of rows than the test set")
    if counts and "accuracy" in line and abs(record.right / record.examples - line["accuracy"]) > 0.5 / record.examples:
        raise ValueError(f"the confusion of round {number} has another accuracy than metrics.jsonl")
    return record


def _rows(start: Record | None, end: Record | None) -> list[Row]:
    before, after = (one.rows if one is not None else () for one in (start, end))
    if before and after and [row[:2] for row in before] != [row[:2] for row in after]:
        raise ValueError("start and end are of different rows")
    found = []
    for i, (prompt, expected, *_) in enumerate(after or before):
        (said_before, right_before), (said_after, right_after) = (
            rows[i][2:] if rows else (None, None) for rows in (before, after)
        )
        found.append(Row(prompt, expected, said_before, said_after, (right_before, right_after)))
    return found


def _classes(start: Record | None, end: Record | None) -> list[Class]:
    last = end or start
    if last is None or not last.counts:
        return []
    found = []
    for name, row in last.counts.items():
        given = sum(one.get(name, 0) for one in last.counts.values())
        precision = row.get(name, 0) / given if given else None
        found.append(Class(name, sum(row.values()), _share(start, name), _share(end, name), given, precision))
    return found


def _share(record: Record | None, name: str) -> float | None:
    row = record.counts.get(name, {}) if record is not None else {}
    return row.get(name, 0) / sum(row.values()) if sum(row.values()) else None


def _figure(material: Material, run: Run, records: Sequence[Record]) -> Json | None:
    """Counts of the most frequent classes, as tables."""
    if not records:
        return None
    counts = records[-1].counts
    frequent = set(sorted(counts, key=lambda name: -sum(counts[name].values()))[:CLASSES])
    names = [name for name in counts if name in frequent]
    tables: list[dict[str, Any]] = [
        {"round": one.round, "counts": [[one.counts.get(true, {}).get(said, 0) for said in names] for true in names]}
        for one in records
    ]
    return {
        "point": point_index(material, run.cell.point),
        "label": label_index(material, run.label),
        "seed": run.cell.seed,
        "examples": records[-1].examples,
        "names": names,
        "of": len(counts),
        "tables": tables,
    }
