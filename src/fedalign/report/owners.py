"""Whose expert answers for whose data: each site's tokens by the owners of the experts that they were sent to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedalign.compare.plan import line_name
from fedalign.errors import UserError
from fedalign.moe.site_experts import KEY, checked
from fedalign.report.figures import representatives
from fedalign.report.material import Material, Run
from fedalign.server.health import DamagedError, Round, read_round
from fedalign.server.results import RunFolder

PUBLIC = "public"


@dataclass(frozen=True)
class Matrix:
    """The shares of one round of a run."""

    name: str
    seed: int
    round: int
    owners: Sequence[tuple[str, str]]  # the public, then each site with an expert; and numbers of their experts
    rows: Sequence[tuple[str, Sequence[float | None]]]  # a site, and each owner's share in [0, 1]; None: no tokens


@dataclass(frozen=True)
class Matrices:
    """Those of all lines whose model has owned experts, and what cannot be shown."""

    shown: Sequence[Matrix]
    problems: Sequence[str]


def matrices(material: Material) -> Matrices:
    """For each grid point and algorithm the last round of its first seed that has loads, a finished run if there is."""
    shown, problems = [], []
    for run in representatives(material, lambda run: run.health).values():
        try:
            record = _record(run)
            matrix = _matrix(run, read_round(run.health[-1]), record) if record else None
        except (DamagedError, OSError, ValueError, AttributeError, UserError) as error:
            problems.append(f"{run.folder}: whose expert is whose is left out ({error}).")
            continue
        if matrix is not None:
            shown.append(matrix)
    return Matrices(shown, problems)


def shares(load_C_L_E: Any, experts: Sequence[Sequence[int]]) -> list[list[float | None]]:
    """Each client's tokens, over all layers, by groups of experts.

    Args:
        load_C_L_E: tokens that each expert got.
        experts: of each owner.

    >>> import numpy as np
    >>> shares(np.array([[[3.0, 0.0, 1.0]], [[0.0, 0.0, 0.0]]]), [[0, 1], [2]])
    [[0.75, 0.25], [None, None]]
    """
    load_C_E = load_C_L_E.sum(1)
    total_C = load_C_E.sum(1)
    return [
        [float(load_E[list(mine)].sum()) / float(total) if total > 0 else None for mine in experts]
        for load_E, total in zip(load_C_E, total_C, strict=True)
    ]


def _matrix(run: Run, one: Round, record: Any) -> Matrix:
    """The matrix of a round.

    Raises:
        UserError: The record is not of a model with so many experts.
    """
    load_C_L_E = one.tables["load_C_L_E"]
    count = load_C_L_E.shape[2]
    known = checked(record, count)
    owned = {expert for mine in known.values() for expert in mine}
    experts: Mapping[str, Sequence[int]] = {PUBLIC: [e for e in range(count) if e not in owned], **known}
    owners = [(name, _ranges(mine)) for name, mine in experts.items()]
    rows = list(zip(one.clients, shares(load_C_L_E, list(experts.values())), strict=True))
    return Matrix(line_name(run.label, run.cell.point), run.cell.seed, one.number, owners, sorted(rows))


def _record(run: Run) -> Any:
    """The record of the run's model, as it was saved or as it began; None: it has none, or is not on this machine.

    Raises:
        OSError, ValueError, AttributeError: It cannot be read.
    """
    folder = RunFolder(run.folder)
    for model in (folder.model, folder.best, Path(run.cell.config.model.path).expanduser()):
        if (file := model / "config.json").is_file():
            return json.loads(file.read_text(encoding="utf-8")).get(KEY)
    return None


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in short.

    >>> _ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
