"""The material of a report: the runs of a comparison, or run folders, finished or still at work."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedalign.compare.folder import ComparisonFolder
from fedalign.compare.plan import Cell, Choice, Design, cells, line_name
from fedalign.compare.tables import Finished, faults, notes
from fedalign.compare.tune import Choices
from fedalign.config.run import Config
from fedalign.config.toml import flat, read_config
from fedalign.errors import UserError
from fedalign.files import LOCK, held_by
from fedalign.protocol import Metrics
from fedalign.server.health import DamagedError
from fedalign.server.results import RunFolder, read_history
from fedalign.server.scores import Spent, epsilon_spent, is_scored, spent

UNTOLD = (
    "run.seed",
    "run.device",
    "run.threads",
    "run.workers",
    "run.check",
    "evaluation.answers",
    "evaluation.leaving",
    "tracking.",
    "federation.",
    "server.min_clients",
    "server.memory_gb",
    "wire.piece_mb",
)
NUMBERS = (  # that tables and figures are made of
    "accuracy",
    "bytes_up",
    "client_accuracy_mean",
    "client_accuracy_spread",
    "client_accuracy_weighted",
    "client_accuracy_worst",
    "client_loss_mean_nats",
    "loss_nats",
    "routing_divergence_nats",
    "train_loss_nats",
    "uploaded_share",
)
TABLES = ("client_accuracies", "client_losses_nats")  # and numbers by client


@dataclass(frozen=True)
class Held:
    """The data that a client holds."""

    examples: int
    labels: Mapping[str, int]


@dataclass(frozen=True)
class Run:
    """One run, as far as it is."""

    cell: Cell
    folder: Path
    history: Sequence[Metrics]
    finished: bool
    versions: Mapping[str, str]
    held: Mapping[str, Held]  # empty: the run did not record it
    health: Sequence[Path]  # a file a round, in order; may be none
    spent: Spent | None = None  # by noise, in all rounds, those that broke off too; None: not told

    @property
    def label(self) -> str:
        """Which line of the tables it belongs to."""
        return self.cell.choice.label

    @property
    def round(self) -> int:
        """The last complete one."""
        return int(self.history[-1]["round"])

    @property
    def stopped(self) -> str | None:
        """Why it took fewer rounds than it might have."""
        options, by = self.cell.config.run, self.cell.config.evaluation.best
        return spent(self.history, options.patience, by) if self.round < options.rounds else None


@dataclass(frozen=True)
class Material:
    """Everything that a page shows, before anything is computed from it."""

    name: str
    design: Design
    runs: Sequence[Run]
    said: Sequence[str]  # what a reader of the tables has to know
    missing: Sequence[str]
    again: Sequence[str]  # commands
    comparison: bool

    @property
    def tabled(self) -> list[Finished]:
        """The runs that the tables are made of: the finished ones; if none is, all as they stand."""
        return _tabled(self.runs)


def read_material(folders: Sequence[Path]) -> Material:
    """Read run folders, or one comparison.

    Raises:
        UserError: There is nothing to report, or the folders do not go together.
    """
    comparisons = [folder for folder in folders if ComparisonFolder(folder).design.exists()]
    if comparisons and len(folders) > 1:
        raise UserError(
            f"fedalign report {str(comparisons[0])!r}: is a comparison. Give it alone, or give run folders only."
        )
    return _of_comparison(comparisons[0]) if comparisons else _of_runs(folders)


def _of_comparison(path: Path) -> Material:
    folder = ComparisonFolder(path)
    design = folder.read()
    tuned = {one.line: one.settings for one in Choices.load(folder.tuned).tuned} if design.tune else None
    runs, missing = _read_cells([(cell, folder.run(cell, "runs").path) for cell in cells(design, tuned)])
    if not runs:
        raise UserError(f"{str(path)!r}: none of its runs can be shown yet. {' '.join(missing)}".rstrip())
    again = [f"fedalign compare --resume {shlex.quote(str(path))}", _run_again(runs[0])]
    said = _said(design, runs)
    return Material(path.resolve().name, design, runs, said, missing, again, comparison=True)


def _of_runs(folders: Sequence[Path]) -> Material:
    configs = {}
    for path in folders:
        if path in configs:
            raise UserError(f"fedalign report: {str(path)!r} is given twice. Give each folder once.")
        configs[path] = RunFolder(path).read_config("fedalign report")
    design, planned = _as_comparison(list(configs.values()))
    _refuse_repetitions(planned, list(configs))
    runs, missing = _read_cells(list(zip(planned, configs, strict=True)))
    if not runs:
        raise UserError(f"fedalign report: nothing can be shown yet. {' '.join(missing)}".rstrip())
    said = _said(design, runs)
    name = runs[0].folder.resolve().name if len(runs) == 1 else f"{len(runs)} runs"
    return Material(name, design, runs, said, missing, [_run_again(run) for run in runs], comparison=False)


def _said(design: Design, runs: Sequence[Run]) -> list[str]:
    """The notes of a comparison, as far as they hold for these runs."""
    first, *others = notes(design, runs=_tabled(runs))
    if not any(run.finished for run in runs):
        rounds = " to ".join(str(n) for n in sorted({min(r.round for r in runs), max(r.round for r in runs)}))
        first = f"No run is finished: these are scores after round {rounds} of {design.base.run.rounds}."
    elif "run.rounds" in design.grid:
        first = "Runs of one seed share start, partition and order of batches if nothing but the algorithm differs."
    return [first, *others]


def _as_comparison(configs: Sequence[Config]) -> tuple[Design, list[Cell]]:
    """Differences between algorithms of one name become part of their label, all else a grid point."""
    tables = [flat(config.model_dump(mode="json"), ".") for config in configs]
    own = [{key: value for key, value in table.items() if key.startswith("algorithm.")} for table in tables]
    shared = [
        {key: value for key, value in table.items() if not key.startswith(("algorithm.", *UNTOLD))} for table in tables
    ]
    grid_keys = _differing(shared)
    varied: dict[str, list[str]] = {
        name: _differing([options for options in own if options["algorithm.name"] == name])
        for name in {options["algorithm.name"] for options in own}
    }
    planned = []
    for config, options, common in zip(configs, own, shared, strict=True):
        name = options["algorithm.name"]
        shown = [f"{key.partition('.')[2]}={options.get(key, 'default')}" for key in varied[name]]
        choice = Choice(label=":".join([name, *shown]), settings=(f"algorithm.name={name}",))
        point = tuple((key, str(common.get(key, "default"))) for key in grid_keys)
        planned.append(Cell(choice, point, config.run.seed, config))
    design = Design(
        base=configs[0],
        choices=tuple({cell.choice.label: cell.choice for cell in planned}.values()),
        grid={key: tuple(dict.fromkeys(dict(cell.point)[key] for cell in planned)) for key in grid_keys},
        seeds=tuple(sorted({cell.seed for cell in planned})),
    )
    return design, planned


def _differing(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that not all tables have with the same value."""
    values: defaultdict[str, list[str]] = defaultdict(list)
    for table in tables:
        for key, value in table.items():
            values[key].append(json.dumps(value))
    return [key for key, found in values.items() if len(found) < len(tables) or len(set(found)) > 1]


def _refuse_repetitions(planned: Sequence[Cell], folders: Sequence[Path]) -> None:
    counts = Counter(cell.name for cell in planned)
    for cell, folder in zip(planned, folders, strict=True):
        if counts[cell.name] > 1:
            raise UserError(
                f"fedalign report: {str(folder)!r} and another folder are both {cell.name}: the same run twice would "
                "count as two seeds. Give one of them."
            )


def _read_cells(planned: Sequence[tuple[Cell, Path]]) -> tuple[list[Run], list[str]]:
    """Every run that can be read, and what is to be said of the others."""
    runs, missing = [], []
    for cell, path in planned:
        try:
            run = _read_run(cell, path)
        except DamagedError as error:
            missing.append(f"Missing: {cell.name}: damaged ({error}).")
            continue
        if run is None:
            missing.append(f"Missing: {cell.name}: no round is complete yet.")
            continue
        if not run.finished:
            is_held = held_by(path / LOCK) is not None
            state = "Still at work" if is_held else "Broken off"
            go_on = "" if is_held else f" Go on with it: fedalign run --resume {shlex.quote(str(path))}"
            missing.append(f"{state}: {cell.name}: round {run.round} of {cell.config.run.rounds}.{go_on}")
        missing += faults([Finished(cell, run.history)])
        runs.append(run)
    return runs, missing


def _read_run(cell: Cell, path: Path) -> Run | None:
    folder = RunFolder(path)
    if not folder.metrics.exists():
        return None
    try:
        if read_config(folder.config.read_text(encoding="utf-8")) != cell.config:
            raise ValueError("its config.toml is that of another run")
        history = read_history(folder, strict=True)
        _check_history(history)
        cost = epsilon_spent(history, folder.last_asked())
        summary = _read_table(folder.summary)
        held = {
            name: Held(int(about["examples"]), {str(key): int(count) for key, count in about["labels"].items()})
            for name, about in _read_table(path / "clients.json").items()
        }
        versions = {str(name): str(version) for name, version in summary.get("versions", {}).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)) from None
    if not history:
        return None
    options, by = cell.config.run, cell.config.evaluation.best
    finished = bool(summary) and (history[-1]["round"] >= options.rounds or bool(spent(history, options.patience, by)))
    health = sorted((path / "health").glob("round-*.safetensors"))
    return Run(cell, path, history, finished, versions, held, health, cost)


def _read_table(path: Path) -> dict[str, Any]:
    """A JSON object, empty without a file."""
    if not path.exists():
        return {}
    table = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(table, dict):
        raise ValueError(f"{path.name} is not an object")
    return table


def _check_history(history: Sequence[Metrics]) -> None:
    """That rounds follow each other and numbers are numbers."""
    for number, line in enumerate(history):
        if line.get("round") != number:
            raise ValueError(f"line {number + 1} of metrics.jsonl is not round {number}")
        values = [(name, line[name]) for name in NUMBERS if name in line]
        for table in TABLES:
            values += [(f"{table} of {client}", value) for client, value in line.get(table, {}).items()]
        if not all(isinstance(failure, dict) and "client" in failure for failure in line.get("failures", ())):
            raise ValueError(f"failures in line {number + 1} of metrics.jsonl name no client")
        for name, value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} in line {number + 1} of metrics.jsonl is {value!r}")


def _tabled(runs: Sequence[Run]) -> list[Finished]:
    finished = [run for run in runs if run.finished]
    return [Finished(run.cell, _until_scored(run.history)) for run in finished or runs]


def _until_scored(history: Sequence[Metrics]) -> Sequence[Metrics]:
    """Without the rounds after the last evaluation."""
    scored = [i for i, line in enumerate(history) if is_scored(line)]
    return history[: scored[-1] + 1] if scored else history


def _run_again(run: Run) -> str:
    config = shlex.quote(str(RunFolder(run.folder).config))
    return f"fedalign run {config}  # {line_name(run.label, run.cell.point)}, seed {run.cell.seed}"
