"""Numbers behind the figures that need nothing but metrics: curves over seeds, bytes, and each client's data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from fedalign.compare.plan import Point
from fedalign.compare.statistics import mean_interval
from fedalign.protocol import Metrics
from fedalign.report.material import Material, Run

Json = dict[str, Any]
T = TypeVar("T")
CLIENTS = 60  # that a figure shows at most


@dataclass(frozen=True)
class Panel:
    """One small figure: a number that a round has."""

    title: str
    of: Callable[[Metrics], float | None]


@dataclass(frozen=True)
class Group:
    """Panels that share an axis."""

    title: str
    unit: str
    factor: float
    panels: tuple[Panel, ...]


def _plain(key: str) -> Callable[[Metrics], float | None]:
    return lambda line: line.get(key)


def _worst_loss(line: Metrics) -> float | None:
    """Of all clients: where only some were asked, it is told of no round, as their mean is of none."""
    return max(line.get("client_losses_nats", {}).values(), default=None) if "client_loss_mean_nats" in line else None


def _weighted(line: Metrics) -> float | None:
    """The stand-in for a global test set where there is none."""
    return None if "loss_nats" in line else line.get("client_accuracy_weighted")


GROUPS = (
    Group(
        "Accuracy",
        "%",
        100,
        (
            Panel("Global test set", _plain("accuracy")),
            Panel("All held-out examples", _weighted),
            Panel("Mean client (each alike)", _plain("client_accuracy_mean")),
            Panel("Worst client", _plain("client_accuracy_worst")),
        ),
    ),
    Group(
        "Loss",
        "nats per answer token",
        1,
        (
            Panel("Global test set", _plain("loss_nats")),
            Panel("All held-out examples", _plain("client_loss_mean_nats")),
            Panel("Worst client", _worst_loss),
        ),
    ),
    Group("Spread of accuracy between clients", "points", 100, (Panel("Spread", _plain("client_accuracy_spread")),)),
    Group("Training loss", "nats per answer token", 1, (Panel("Training loss", _plain("train_loss_nats")),)),
    Group("Share of the model uploaded", "%", 100, (Panel("Share uploaded", _plain("uploaded_share")),)),
)
DIVERGENCE = Group("Routing divergence", "nats", 1, (Panel("Routing divergence", _plain("routing_divergence_nats")),))


def lines_of(material: Material) -> dict[tuple[Point, str], list[Run]]:
    """The runs of each algorithm at each grid point, in the order of the design."""
    lines: dict[tuple[Point, str], list[Run]] = {
        (point, choice.label): [] for point in material.design.points for choice in material.design.choices
    }
    for run in material.runs:
        lines[run.cell.point, run.label].append(run)
    return {line: runs for line, runs in lines.items() if runs}


def representatives(material: Material, has: Callable[[Run], object]) -> dict[tuple[Point, str], Run]:
    """Of each line the first seed that has what is to be shown, a finished run if there is one; no line without any."""
    there = {line: [run for run in runs if has(run)] for line, runs in lines_of(material).items()}
    return {line: min(runs, key=lambda run: (not run.finished, run.cell.seed)) for line, runs in there.items() if runs}


def seed_counts(material: Material) -> list[int]:
    """Seeds of each line that has several runs."""
    return [len(runs) for runs in lines_of(material).values() if len(runs) > 1]


def curves(material: Material, group: Group) -> Json | None:
    """A group's panels, without those that no run has anything for; None without any."""
    panels = [{"title": panel.title, "series": _series(material, panel, group.factor)} for panel in group.panels]
    panels = [panel for panel in panels if panel["series"]]
    return {"title": group.title, "unit": group.unit, "panels": panels} if panels else None


def _series(material: Material, panel: Panel, factor: float) -> list[Json]:
    """Rows of round, mean, low, high, number of seeds: the 95 % interval, of few seeds the lowest and highest run."""
    found = []
    for (point, label), runs in lines_of(material).items():
        values: defaultdict[int, list[float]] = defaultdict(list)
        for run in runs:
            for line in run.history:
                value = panel.of(line)
                if value is not None:
                    values[line["round"]].append(factor * value)
        rows = [[number, *_row(values[number])] for number in sorted(values)]
        if rows:
            found.append({"point": point_index(material, point), "label": label_index(material, label), "rows": rows})
    return found


def _row(values: Sequence[float]) -> list[float | int | None]:
    interval = mean_interval(values)
    low = high = None
    if interval.half is not None:
        low, high = interval.mean - interval.half, interval.mean + interval.half
        low, high = (short(low), short(high)) if interval.is_told else (short(min(values)), short(max(values)))
    return [short(interval.mean), low, high, interval.count]


def uploads(material: Material) -> list[Json]:
    """Megabytes that all clients together have uploaded by each round, mean over seeds; one that is over stays."""
    found = []
    for (point, label), runs in lines_of(material).items():
        longest = max(len(run.history) for run in runs)
        totals: defaultdict[int, list[float]] = defaultdict(list)
        for run in runs:
            sent = [line.get("bytes_up", 0) for line in run.history]
            over = [0] * (longest - len(sent)) if run.finished else []
            for number, total in enumerate(accumulate([*sent, *over])):
                totals[number].append(total / 1e6)
        rows = [[number, short(sum(values) / len(values))] for number, values in totals.items()]
        found.append({"point": point_index(material, point), "label": label_index(material, label), "rows": rows})
    return found


def clients(material: Material) -> list[Json]:
    """For each grid point and seed: what each client holds, and each algorithm's last accuracy there."""
    groups: defaultdict[tuple[Point, int], list[Run]] = defaultdict(list)
    for run in material.runs:
        groups[run.cell.point, run.cell.seed].append(run)
    found = [_clients(material, point, seed, runs) for (point, seed), runs in groups.items()]
    return [one for one in found if one is not None]


def _clients(material: Material, point: Point, seed: int, runs: Sequence[Run]) -> Json | None:
    accuracies = {run.label: _last(run, "client_accuracies") for run in runs}
    has_accuracy = any(accuracies.values())
    scores = accuracies if has_accuracy else {run.label: _last(run, "client_losses_nats") for run in runs}
    held = next((run.held for run in runs if run.held), {})
    tested = next((found for run in runs if (found := _last(run, "client_examples"))), {})
    everyone = sorted({*held, *(name for scored in scores.values() for name in scored)})
    if not everyone:
        return None
    names = thinned(everyone, CLIENTS)
    labels = sorted({label for name in names if name in held for label in held[name].labels} - {""})
    factor = 100 if has_accuracy else 1
    return {
        "point": point_index(material, point),
        "seed": seed,
        "names": names,
        "of": len(everyone),
        "examples": [(held[name].examples or None) if name in held else None for name in names],  # masked: not told
        "tested": [tested.get(name) for name in names],
        "labels": labels,
        "counts": [[held[name].labels.get(label, 0) if name in held else None for label in labels] for name in names],
        "score": "accuracy" if has_accuracy else "loss",
        "scores": [
            {
                "label": label_index(material, label),
                "values": [short(factor * scored[name]) if name in scored else None for name in names],
            }
            for label, scored in scores.items()
            if scored
        ],
    }


def _last(run: Run, table: str) -> Mapping[str, float]:
    """Numbers by client as they were last told."""
    told = [line[table] for line in run.history if line.get(table)]
    return told[-1] if told else {}


def thinned(values: Sequence[T], most: int) -> list[T]:
    """At most `most` of them, evenly spaced, with the first and the last.

    >>> thinned([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 3, 6]
    """
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[-1]]
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def point_index(material: Material, point: Point) -> int:
    """Where the page finds the grid point."""
    return material.design.points.index(point)


def label_index(material: Material, label: str) -> int:
    """Where the page finds the algorithm."""
    return [choice.label for choice in material.design.choices].index(label)


def short(value: float) -> float:
    """Five digits are more than a figure shows.

    >>> short(71.234567)
    71.235
    """
    return float(f"{value:.5g}")
