"""The folder of a comparison: what was asked for, a run folder for each run, and the tables.

comparison.toml   what was asked for       results.csv            one line a run and round
runs/             finished runs, kept      table.md, table.tex    final scores
logs/             what each run printed    tune/ tune.csv tuned.toml   how hyper-parameters were chosen
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import ValidationError

from fedalign.compare.plan import Cell, Design, cells, differences
from fedalign.config.toml import read_config
from fedalign.errors import UserError
from fedalign.files import LOCK, check_free, holds, is_bare, locked, refuse_source, rounds_in, take, write_text
from fedalign.moe.load import model_path
from fedalign.protocol import Metrics
from fedalign.server.checkpoint import whole_rounds
from fedalign.server.results import WRITTEN as OF_RUN
from fedalign.server.results import RunFolder, read_history

Part = Literal["runs", "tune"]
PARTS: tuple[Part, ...] = get_args(Part)
BELOW = ("*/", "*/*/", "*/*/*/")  # the algorithm, the point of the grid, what is tried out
WRITTEN = {  # to a comparison's folder; the folder of each run is marked itself
    "comparison": (
        *("comparison.toml", "results.csv", "table.md", "table.tex", "tune.csv", "tuned.toml", "report.html"),
        *(f"{part}/{below}seed-#{end}/" for part in PARTS for below in BELOW for end in ("", ".damaged-#")),
        *(f"logs/{part}/{below}seed-#.log" for part in PARTS for below in BELOW),
    ),
    **OF_RUN,
}


class ComparisonFolder:
    """One comparison's output folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.design = path / "comparison.toml"
        self.results = path / "results.csv"
        self.markdown = path / "table.md"
        self.latex = path / "table.tex"
        self.tune_results = path / "tune.csv"
        self.tuned = path / "tuned.toml"

    def run(self, cell: Cell, part: Part) -> RunFolder:
        """Where a run is kept."""
        return RunFolder(self.path / part / cell.path)

    def log(self, cell: Cell, part: Part) -> Path:
        """The file that holds a run's output."""
        return self.path / "logs" / part / f"{cell.path}.log"

    def read(self) -> Design:
        """The comparison's design, as it was asked for.

        Raises:
            UserError: The folder holds no comparison.
        """
        try:
            return Design.read(self.design.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"--resume {str(self.path)!r}: holds no comparison (no comparison.toml). Give the --out of one."
            ) from None
        except (OSError, ValueError, ValidationError, UserError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{str(self.design)!r}: cannot be read ({reason}). Give another --out, or --overwrite."
            ) from None

    def locked(self) -> AbstractContextManager[int]:
        """Hold the folder: the file descriptor is handed to runs, which may outlive who started them.

        Raises:
            UserError: Somebody else holds it.
        """
        return locked(self.path / LOCK, "a comparison, or runs that it left behind,")

    def check(self, design: Design, overwrite: bool) -> None:
        """Refuse a place where anything but this comparison would be lost.

        Raises:
            UserError: The folder holds another comparison and `overwrite` is not set, or holds something else.
        """
        if overwrite:
            check_free(self.path, "comparison", overwrite, written=WRITTEN)
            for path in sorted({cell.config.model.path for cell in cells(design)}):
                refuse_source(self.path, model_path(path), "model.path =")
        if overwrite or not holds(self.path, "comparison"):
            return
        if not self.design.exists():
            raise UserError(
                f"--out {str(self.path)!r}: holds a comparison without what was asked for ({self.design.name}). "
                "Give another --out, or replace it: --overwrite."
            )
        found = differences(self.read(), design)
        if found:
            raise UserError(
                f"--out {str(self.path)!r}: holds another comparison: {'; '.join(found)}. "
                "Give another --out, or replace it: --overwrite."
            )

    def begin(self, design: Design, overwrite: bool) -> None:
        """Write down what is asked for; call it while `locked`."""
        if overwrite or not self.design.exists():
            take(self.path, "comparison", WRITTEN)
        write_text(self.design, design.to_toml())


@dataclass(frozen=True)
class Standing:
    """How far a run folder is."""

    state: Literal["waiting", "begun", "finished", "damaged"]
    history: Sequence[Metrics] = ()
    reason: str = ""  # of the damage


def standing(cell: Cell, folder: RunFolder) -> Standing:
    """Look at what an earlier comparison left of a run.

    Raises:
        UserError: The folder belongs to another configuration.
    """
    if is_bare(folder.path):
        return Standing("waiting")
    try:
        config = read_config(folder.config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Standing("damaged", reason="it has no config.toml")
    except (OSError, ValueError, UserError) as error:
        return Standing("damaged", reason=f"config.toml: {error}")
    if config != cell.config:
        raise UserError(
            f"{str(folder.path)!r}: is a run with another configuration than {cell.name}. "
            "Give another --out, or replace the whole comparison: --overwrite."
        )
    try:
        if not folder.summary.exists():
            _check_checkpoint(folder.checkpoint)
            return Standing("begun", read_history(folder))
        json.loads(folder.summary.read_text(encoding="utf-8"))
        history = read_history(folder, strict=True)
    except (OSError, ValueError) as error:
        return Standing("damaged", reason=str(error))
    rounds = [line.get("round") for line in history]
    if rounds != list(range(cell.config.run.rounds + 1)):
        return Standing(
            "damaged", reason=f"metrics.jsonl holds {len(rounds)} lines, not rounds 0 to {config.run.rounds}"
        )
    return Standing("finished", history)


def set_aside(folder: RunFolder) -> Path:
    """Rename a damaged run, so that nothing of it is lost when it is done anew."""
    names = (folder.path.with_name(f"{folder.path.name}.damaged-{number}") for number in range(1, 10_000))
    free = next(name for name in names if not name.exists())
    return folder.path.rename(free)


def _check_checkpoint(folder: Path) -> None:
    """That a complete round can be read, if there is one."""
    if rounds_in(folder) and not whole_rounds(folder):
        raise ValueError("no kept round of its checkpoint is whole")
