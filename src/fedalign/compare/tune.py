"""Hyper-parameters chosen for every algorithm in the same way, on the validation part alone.

Each algorithm is tried with the same learning rates and, where it has one, with a few values of its strength. The run
that is best on the validation part after its last round, by `evaluation.best`, decides; neither the test set nor the
clients' held-out parts are looked at. The validation part stays out of training in the comparison itself, so
partitions are the same.
"""

from __future__ import annotations

import csv
import itertools
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import tomli_w
from pydantic import Field, ValidationError

from fedalign.algorithms import STRENGTHS
from fedalign.compare.plan import Cell, Choice, Design, Point, Texts, configure, line_name
from fedalign.compare.schedule import Task
from fedalign.config.run import Section
from fedalign.errors import UserError
from fedalign.files import replacing_file, write_text
from fedalign.server.scores import merit

RATES = (1.0, 1 / 3, 3.0)  # times the configured learning rate; the first wins a tie


class Tuned(Section):
    """The choice for one algorithm at one grid point."""

    algorithm: str  # its label
    point: dict[str, str]
    seed: int
    settings: Texts
    validation_score: float  # accuracy; minus the loss in nats where there is none, or by it
    runs: int  # that were tried
    failed: str = ""  # why runs among them ended without a score, as one that diverges does

    @property
    def note(self) -> str:
        """A line on runs that had no score; empty: all had one."""
        return f"{line_name(*self.line)}: chosen on the validation part without {self.failed}" if self.failed else ""

    @property
    def line(self) -> tuple[str, Point]:
        """Which line of the tables it is for."""
        return self.algorithm, tuple(self.point.items())


class Choices(Section):
    """`tuned.toml`."""

    tuned: Annotated[tuple[Tuned, ...], Field(strict=False)] = ()

    @classmethod
    def load(cls, path: Path) -> Choices:
        """The choices so far.

        Raises:
            UserError: The file is damaged.
        """
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, ValidationError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{str(path)!r}: damaged ({reason}). Delete it to choose again.") from None

    def save(self, path: Path) -> None:
        """Write it."""
        write_text(path, tomli_w.dumps(self.model_dump(mode="json")))


def candidates(choice: Choice, rate: float) -> list[tuple[str, ...]]:
    """The settings to try: learning rates times strengths; what the choice itself sets is not varied.

    >>> fedprox = Choice(label="fedprox", settings=("algorithm.name=fedprox",))
    >>> len(candidates(fedprox, 1e-3)), candidates(fedprox, 1e-3)[0]
    (9, ('training.learning_rate=0.001', 'algorithm.mu=0.001'))
    """
    fixed = {setting.partition("=")[0] for setting in choice.settings}
    varied: list[list[str]] = []
    if "training.learning_rate" not in fixed:
        varied.append([f"training.learning_rate={_near(rate, factor)}" for factor in RATES])
    if choice.name in STRENGTHS:
        option, values = STRENGTHS[choice.name]
        if f"algorithm.{option}" not in fixed:
            varied.append([f"algorithm.{option}={value:g}" for value in values])
    return list(itertools.product(*varied))


def _near(rate: float, factor: float) -> str:
    """The configured rate as it is, its multiples in three digits."""
    return f"{rate:.12g}" if factor == 1 else f"{rate * factor:.3g}"


def tuning_cells(design: Design, done: Iterable[tuple[str, Point]] = ()) -> list[Cell]:
    """The runs to try, on the first seed; what is chosen already is not tried again."""
    seed, chosen = design.seeds[0], set(done)
    look = ("evaluation.part=validation", "evaluation.clients=false")
    return [
        Cell(choice, point, seed, configure(design, choice, point, seed, [*tried, *look]), tried)
        for point in design.points
        for choice in design.choices
        if (choice.label, point) not in chosen
        for tried in candidates(choice, design.base.training.learning_rate)
    ]


def choose(tasks: Sequence[Task]) -> list[Tuned]:
    """The best of each line; a line of which no run finished has none, nor one of which a run was killed."""
    chosen = []
    for (label, point), tried in _by_line(tasks).items():
        scored = [(value, task) for task in tried if (value := validation_score(task)) is not None]
        if scored and not any(task.killed for task in tried):
            value, best = max(scored, key=lambda pair: pair[0])
            chosen.append(
                Tuned(
                    algorithm=label,
                    point=dict(point),
                    seed=best.cell.seed,
                    settings=best.cell.tried,
                    validation_score=value,
                    runs=len(tried),
                    failed="; ".join(
                        f"{', '.join(task.cell.tried)} ({task.reason})"
                        for task in tried
                        if validation_score(task) is None
                    ),
                )
            )
    return chosen


def validation_score(task: Task) -> float | None:
    """Of a finished run, after its last round."""
    return merit(task.history[-1], task.cell.config.evaluation.best) if task.state == "finished" else None


def why_not(tasks: Sequence[Task]) -> dict[tuple[str, Point], str]:
    """Lines for which nothing could be chosen: no run finished, or one was killed, which goes on when asked again."""
    found = {}
    for line, tried in _by_line(tasks).items():
        if killed := next((task for task in tried if task.killed), None):
            found[line] = (
                f"a run on the validation part did not end by itself, so none is chosen; {killed.cell.name}: "
                f"{killed.reason}. The same command goes on with it"
            )
        elif all(validation_score(task) is None for task in tried):
            found[line] = (
                f"none of its {len(tried)} runs on the validation part finished; {tried[0].cell.name}: "
                f"{tried[0].reason}"
            )
    return found


def _by_line(tasks: Sequence[Task]) -> dict[tuple[str, Point], list[Task]]:
    lines: defaultdict[tuple[str, Point], list[Task]] = defaultdict(list)
    for task in tasks:
        lines[task.cell.line].append(task)
    return lines


def record(path: Path, tasks: Sequence[Task]) -> None:
    """Add every run that was tried, finished or failed, to tune.csv."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        rows = []
    for task in tasks:
        value = validation_score(task)
        pairs = [setting.partition("=")[::2] for setting in task.cell.tried]
        rows.append(
            {
                "algorithm": task.cell.choice.label,
                "seed": str(task.cell.seed),
                **dict(task.cell.point),
                **dict(pairs),
                "validation_score": "" if value is None else repr(value),
                "failed": task.reason,
            }
        )
    last = ("validation_score", "failed")
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in last]
    with replacing_file(path) as new, new.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*names, *last], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
