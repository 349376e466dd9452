"""`fedalign compare`: algorithms over seeds, with equal starts, and tables that say how sure they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedalign import parallel
from fedalign.compare.figure import check_figure, draw
from fedalign.compare.folder import ComparisonFolder, Part, set_aside, standing
from fedalign.compare.overview import Overview
from fedalign.compare.plan import Cell, Design, Point, cells, line_name
from fedalign.compare.schedule import Task, run_all, slots_for
from fedalign.compare.tables import (
    Finished,
    Spread,
    Table,
    faults,
    final_scores,
    notes,
    paired_differences,
    to_latex,
    to_markdown,
    write_csv,
)
from fedalign.compare.tune import Choices, Tuned, choose, record, tuning_cells, why_not
from fedalign.config.toml import flat
from fedalign.data.deal import split_among_clients
from fedalign.errors import UserError
from fedalign.files import write_text

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a comparison ended."""

    folder: Path
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    failed: dict[str, str]  # run or line -> reason
    rows: list[dict[str, Any]]  # of each finished run: algorithm, seed, values of the grid, folder, and its summary

    @property
    def table(self) -> str:
        """All tables and how to read them, in Markdown; a notebook shows it."""
        return to_markdown(self.tables, self.notes)

    def _repr_markdown_(self) -> str:
        return self.table


@dataclass(frozen=True)
class Comparison:
    """A design, where its results go, and how many runs go side by side."""

    design: Design
    folder: ComparisonFolder
    jobs: int | None
    console: Console
    tell: Tell
    spread: Spread = "ci"  # of table.tex
    figure: Path | None = None  # where the convergence figure of a paper goes

    def run(self, overwrite: bool = False) -> Outcome:
        """Make every run that is not there yet, then the tables.

        Raises:
            UserError: The folder holds something else.
            KeyboardInterrupt: It was broken off; calling again goes on.
        """
        if parallel.launched() > 1:
            raise UserError("fedalign compare: torchrun is for `fedalign run` alone. Leave it out.")
        if self.figure is not None:
            check_figure(self.figure)
        self.folder.check(self.design, overwrite)
        if overwrite or not self.folder.design.exists():
            self._check_data()
        with self.folder.locked() as lock:
            self.folder.begin(self.design, overwrite)
            tuned, untuned = self._tuned(lock) if self.design.tune else (None, {})
            chosen = None if tuned is None else {one.line: one.settings for one in tuned}
            tasks = self._run(cells(self.design, chosen), "runs", "Comparison", lock)
            missing = {task.cell.name: task.reason for task in tasks if task.state == "failed"}
            missing |= {line_name(*line): reason for line, reason in untuned.items()}
            said = [one.note for one in tuned or () if one.note]
            return self._publish([task for task in tasks if task.state == "finished"], missing, said)

    def _check_data(self) -> None:
        """Refuse data that no run could deal out, before the first of them begins."""
        first: UserError | None = None
        for cell in cells(self.design):
            try:
                split_among_clients(cell.config)
                return
            except UserError as error:
                first = first or error
        if first is not None:
            raise first

    def _tuned(self, lock: int) -> tuple[Sequence[Tuned], dict[tuple[str, Point], str]]:
        """The choice for each line that was tuned, and why others could not be; what was chosen once stays."""
        choices = Choices.load(self.folder.tuned)
        tasks = self._run(tuning_cells(self.design, [one.line for one in choices.tuned]), "tune", "Tuning", lock)
        untuned = why_not(tasks)
        new = choose(tasks)
        if new:
            record(self.folder.tune_results, [task for task in tasks if task.cell.line not in untuned])
            choices = Choices(tuned=(*choices.tuned, *new))
            choices.save(self.folder.tuned)
        return choices.tuned, untuned

    def _run(self, planned: Sequence[Cell], part: Part, title: str, lock: int) -> list[Task]:
        tasks = [self._task(cell, part) for cell in planned]
        with Overview(self.console, title, tasks) as overview:
            run_all(tasks, slots_for(self.design.base, self.jobs), overview, held=(lock,))
        return tasks

    def _task(self, cell: Cell, part: Part) -> Task:
        """A run as far as it is; a damaged one is told, kept beside and done anew."""
        folder = self.folder.run(cell, part)
        task = Task(cell, folder, self.folder.log(cell, part))
        found = standing(cell, folder)
        if found.state == "damaged":
            aside = set_aside(folder)
            self.tell(f"{cell.name}: damaged ({found.reason}). It is kept as {aside} and done anew.")
            return task
        task.history = found.history
        if found.state == "finished":
            task.state = "finished"
        return task

    def _publish(self, done: Sequence[Task], missing: dict[str, str], tuning: Sequence[str]) -> Outcome:
        """Everything that is made from finished runs."""
        runs = [Finished(task.cell, task.history) for task in done]
        write_csv(self.folder.results, self.design, runs)
        tables = (final_scores(self.design, runs), paired_differences(self.design, runs))
        shown = tuple(table for table in tables if table.sections and any(lines for _, lines in table.sections))
        said = (*notes(self.design, missing.items(), runs), *faults(runs), *tuning)
        write_text(self.folder.markdown, to_markdown(shown, said))
        self._for_a_paper(runs, shown, missing)
        return Outcome(self.folder.path, shown, said, missing, [_row(task) for task in done])

    def _for_a_paper(self, runs: Sequence[Finished], shown: Sequence[Table], missing: dict[str, str]) -> None:
        """table.tex, and the figure if one is wanted."""
        titles = {table.title for table in shown}
        tables = [table(self.design, runs, self.spread) for table in (final_scores, paired_differences)]
        said = [*notes(self.design, missing.items(), runs, self.spread), *faults(runs)]
        write_text(self.folder.latex, to_latex([table for table in tables if table.title in titles], said))
        if self.figure is not None:
            draw(self.figure, self.design, runs)


def _row(task: Task) -> dict[str, Any]:
    """A finished run in one record: what was chosen for it, then its summary."""
    cell, summary = task.cell, json.loads(task.folder.summary.read_text(encoding="utf-8"))
    values = flat(cell.config.model_dump(mode="json"), ".")
    chosen = {"algorithm": cell.choice.label, "seed": cell.seed} | {key: values[key] for key, _ in cell.point}
    return {**chosen, "folder": str(task.folder.path), **{k: v for k, v in summary.items() if k not in chosen}}


def open_comparison(path: Path, jobs: int | None, console: Console, tell: Tell) -> Comparison:
    """A comparison to go on with.

    Raises:
        UserError: There is none.
    """
    folder = ComparisonFolder(path)
    return Comparison(folder.read(), folder, jobs, console, tell)
