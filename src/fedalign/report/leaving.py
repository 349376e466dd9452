"""Losses when sites leave: changes of held-out rows' scores, by who left and by whose rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedalign.compare.plan import line_name
from fedalign.report.figures import representatives
from fedalign.report.material import Material, Run
from fedalign.server.results import RunFolder
from fedalign.units import moved, nats, percent


@dataclass(frozen=True)
class Losses:
    """Those of one run."""

    name: str
    seed: int
    round: int
    sites: Sequence[tuple[str, int]]  # whose rows, and how many
    whole: Sequence[tuple[str, str]]  # accuracy and loss of each site's rows before anybody leaves
    left: Sequence[tuple[str, Sequence[tuple[str, str]]]]  # who leaves, and by how much the two of each site change


@dataclass(frozen=True)
class AllLosses:
    """Those of all lines that have them, and what cannot be shown."""

    shown: Sequence[Losses]
    problems: Sequence[str]


def losses(material: Material) -> AllLosses:
    """For each grid point and algorithm those of the first seed that has them."""
    shown, problems = [], []
    for run in representatives(material, lambda run: RunFolder(run.folder).leaving.exists()).values():
        try:
            shown.append(_losses(run, json.loads(RunFolder(run.folder).leaving.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            problems.append(f"{run.folder}: leaving.json is left out: damaged ({type(error).__name__}: {error}).")
    return AllLosses(shown, problems)


def _losses(run: Run, told: Mapping[str, Any]) -> Losses:
    """As the run's folder tells it.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: It is damaged.
    """
    sites = [(str(name), int(count)) for name, count in told["rows"].items()]
    whole = told["whole"]
    before = [(percent(whole[name]["accuracy"]), nats(whole[name]["loss_nats"])) for name, _ in sites]
    left = [
        (str(owner), [_change(whole[name], scores[name]) for name, _ in sites])
        for owner, scores in told["without"].items()
    ]
    return Losses(line_name(run.label, run.cell.point), run.cell.seed, int(told["round"]), sites, before, left)


def _change(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> tuple[str, str]:
    """Points and nats.

    >>> _change({"accuracy": 0.5, "loss_nats": 1.0}, {"accuracy": 0.25, "loss_nats": 1.5})
    ('-25.0', '+0.500')
    """
    points, change = ("accuracy", 100, 1), ("loss_nats", 1, 3)
    one, other = (moved(before[name], after[name], times, decimals) for name, times, decimals in (points, change))
    return one, other
