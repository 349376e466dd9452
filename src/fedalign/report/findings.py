"""What the numbers say, in sentences and tables that need no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedalign.algorithms import ABLATION
from fedalign.compare.plan import Point, Request
from fedalign.compare.statistics import Interval, mean_interval, paired_interval
from fedalign.compare.tables import Column, Finished, qualities
from fedalign.report.material import Material

ONE_SEED = "One seed: these are single runs, and no ground for saying which algorithm is better."


@dataclass(frozen=True)
class Step:
    """A row of the ablation."""

    label: str
    settings: tuple[str, ...]
    score: str
    gain: str


@dataclass(frozen=True)
class Ablation:
    """Steps towards the whole method at one grid point."""

    title: str
    column: str
    steps: tuple[Step, ...]


def verdicts(material: Material) -> list[str]:
    """A sentence for each grid point: the best mean, and whether its difference to the baseline could be chance."""
    runs, request = material.tabled, material.request
    columns = qualities(runs)
    if not columns:
        return ["No run has been scored yet."]
    said = [_verdict(request, runs, columns[0], point) for point in request.points]
    return [sentence for sentence in said if sentence]


def _verdict(request: Request, runs: Sequence[Finished], column: Column, point: Point) -> str:
    values = {choice.label: _by_seed(runs, column, point, choice.label) for choice in request.choices}
    values = {label: by_seed for label, by_seed in values.items() if by_seed}
    if not values:
        return ""
    where = f"{_title(point)}: " if point else ""
    intervals = {label: mean_interval(list(by_seed.values())) for label, by_seed in values.items()}
    best = (max if column.higher_is_better else min)(intervals, key=lambda label: intervals[label].mean)
    name, _, unit = column.title.partition(", ")
    score = f"{name} {_shown(column, intervals[best])}\N{NO-BREAK SPACE}{unit}, {_seeds(intervals[best].count)}"
    if len(values) == 1:
        return f"{where}{best}: {score}."
    sentence = f"{where}{best} is best on average: {score}."
    others = sorted((label for label in values if label != best), key=lambda label: intervals[label].mean)
    runner_up = others[-1] if column.higher_is_better else others[0]
    other = runner_up if best == request.baseline or request.baseline not in values else request.baseline
    if values[best] == values[other]:
        return f"{sentence} {other} scores the same with every seed."
    pair = paired_interval(values[best], values[other])
    if pair is None or pair.half is None:
        return f"{sentence} {ONE_SEED}"
    by = f"{_difference(column, pair)}\N{NO-BREAK SPACE}{unit.replace('%', 'points')}"
    chance = "excludes zero" if pair.excludes_zero else "includes zero, so this may be chance"
    return f"{sentence} Seed by seed it differs from {other} by {by}; the interval {chance}."


def ablations(material: Material) -> list[Ablation]:
    """For each grid point the paper's rows and what each gains on the one before, seed by seed; none if incomplete."""
    labels = [choice.label for choice in material.request.choices]
    if labels != list(ABLATION):
        return []
    runs = material.tabled
    columns = qualities(runs)
    return [_ablation(material.request, runs, columns[0], point) for point in material.request.points if columns]


def _ablation(request: Request, runs: Sequence[Finished], column: Column, point: Point) -> Ablation:
    steps: list[Step] = []
    before: Mapping[int, float] = {}
    for choice in request.choices:
        values = _by_seed(runs, column, point, choice.label)
        pair = paired_interval(values, before) if steps else None
        score = _shown(column, mean_interval(list(values.values()))) if values else "-"
        gain = f"{_difference(column, pair)}{' †' if pair.excludes_zero else ''}" if pair is not None else "-"
        settings = tuple(setting.removeprefix("algorithm.") for setting in choice.settings[1:])
        steps.append(Step(choice.label, settings, score, gain))
        before = values
    return Ablation(_title(point), column.title, tuple(steps))


def facts(material: Material) -> list[tuple[str, str]]:
    """The frame of the runs, a name and a value each."""
    config, request = material.request.base, material.request
    varied = {key: ", ".join(values) for key, values in request.grid.items()}
    held_by = config.clients.partition + (
        (", alpha" if "clients.alpha" in request.grid else f", alpha {config.clients.alpha:g}")
        if config.clients.partition == "dirichlet"
        else ""
    )
    shown = {
        "algorithms": ", ".join(choice.label for choice in request.choices),
        "model": config.model.path,
        "data": config.data.train,
        "clients": f"{_client_count(material)}, {held_by}",
        "rounds": str(config.run.rounds),
        "seeds": ", ".join(map(str, request.seeds)),
    }
    own = {"clients.alpha": "clients", "run.rounds": "rounds", "model.path": "model", "data.train": "data"}
    for key, values in varied.items():
        shown[own.get(key, key)] = f"{shown['clients']}: {values}" if key == "clients.alpha" else values
    return list(shown.items())


def versions(material: Material) -> list[tuple[str, str]]:
    """Of everything that the finished runs were made with; several if they differ."""
    found: dict[str, list[str]] = {}
    for run in material.runs:
        for name, version in run.versions.items():
            found.setdefault(name, [])
            if version not in found[name]:
                found[name].append(version)
    return [(name, " and ".join(several)) for name, several in found.items()]


def _client_count(material: Material) -> str:
    counts = sorted({len(run.history[-1].get("client_accuracies", {}) or run.held) for run in material.runs} - {0})
    return " to ".join(dict.fromkeys(str(count) for count in counts[:: max(1, len(counts) - 1)])) or str(
        material.request.base.clients.count
    )


def _by_seed(runs: Sequence[Finished], column: Column, point: Point, label: str) -> dict[int, float]:
    mine = [run for run in runs if run.cell.point == point and run.cell.choice.label == label]
    return {run.cell.seed: value for run in mine if (value := column.of(run)) is not None}


def _shown(column: Column, interval: Interval) -> str:
    mean = column.format(interval.mean)
    return mean if interval.half is None else f"{mean} ± {column.format(interval.half)}"


def _difference(column: Column, pair: Interval) -> str:
    sign = "−" if pair.mean < 0 else "+"
    return sign + _shown(column, Interval(abs(pair.mean), pair.half, pair.count))


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"95 % interval over {count} seeds"


def _title(point: Point) -> str:
    return ", ".join(f"{key} = {value}" for key, value in point)
