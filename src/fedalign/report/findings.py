"""Findings in sentences and tables that need no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedalign.algorithms import ABLATION
from fedalign.compare.plan import Design, Point, point_title
from fedalign.compare.statistics import FEW, mean_interval, paired_interval
from fedalign.compare.tables import (
    Column,
    Finished,
    by_label,
    difference_text,
    in_points,
    interval_text,
    judged_by,
    qualities,
    rows_scored,
    same_seeds,
    values_by_seed,
)
from fedalign.report.material import Material, Run
from fedalign.server.scores import beside, held_out_rows

ONE_SEED = "One seed: these are single runs, and no ground for saying which algorithm is better."


@dataclass(frozen=True)
class Variant:
    """A row of the ablation."""

    label: str
    settings: tuple[str, ...]
    score: str
    gain: str


@dataclass(frozen=True)
class Ablation:
    """The way to the whole method at one grid point."""

    title: str
    column: str
    variants: tuple[Variant, ...]


def score(material: Material) -> tuple[str, str]:
    """The measure that runs are judged by, and its better side: "accuracy" and "higher", or "loss" and "lower"."""
    by = judged_by(material.tabled)
    return by, "higher" if by == "accuracy" else "lower"


def verdicts(material: Material) -> list[str]:
    """A sentence for each grid point: the best mean, and whether its difference to the baseline could be chance."""
    runs, design = material.tabled, material.design
    columns = qualities(runs)
    if not columns:
        scored = "No score: these runs have no test set, and no client's held-out rows were scored."
        said = [scored if any(run.finished for run in material.runs) else "No round is scored yet."]
    else:
        said = [_verdict(design, runs, columns[0], point) for point in design.points]
    return [sentence for sentence in (*said, privacy_spent(material.runs)) if sentence]


def privacy_spent(runs: Sequence[Run]) -> str:
    """A sentence on private runs: the most that one of them cost an example; empty: nobody told.

    Rounds that broke off count, and those after the last score.
    """
    costs = [(run.spent, run.spent.most(run.cell.config.privacy.epsilon)) for run in runs if run.spent is not None]
    if not costs:
        return ""
    epsilon = max(spent.epsilon if most is None else most for spent, most in costs)
    delta = max(spent.delta for spent, _ in costs)
    more = "" if all(most is not None for _, most in costs) else " and more, since clients trained after they told"
    return (
        f"Runs with noise: epsilon up to {epsilon:.3g}{more}, at delta {delta:g} for an example at one site and one "
        "run, by Poisson sampling; runs on the same data add up, and the choice among them is not covered."
    )


def _verdict(design: Design, runs: Sequence[Finished], column: Column, point: Point) -> str:
    values = {label: values_by_seed(group, column) for label, group in by_label(runs, point).items()}
    values = {choice.label: by_seed for choice in design.choices if (by_seed := values.get(choice.label))}
    if not values:
        return ""
    where = f"{point_title(point)}: " if point else ""
    intervals = {label: mean_interval(list(by_seed.values())) for label, by_seed in values.items()}
    best = (max if column.higher_is_better else min)(intervals, key=lambda label: intervals[label].mean)
    name, _, unit = column.title.partition(", ")
    if name.startswith("all held-out"):
        name = f"accuracy on {name}"
    shown, count = interval_text(intervals[best], column.format), intervals[best].count
    rows = _rows(runs, column)
    score = f"{name} {shown}\N{NO-BREAK SPACE}{unit}, {_seeds(count)}{rows}"
    if len(values) == 1:
        group = by_label(runs, point)[best].values()
        starts = [Finished(run.cell, [beside(run.history[0], run.history[-1])]) for run in group]
        begun = [value for start in starts if (value := column.of(start)) is not None]
        before = f"{interval_text(mean_interval(begun), column.format)}\N{NO-BREAK SPACE}{unit}" if begun else ""
        rounds = " or ".join(str(number) for number in sorted({run.history[-1]["round"] for run in group}))
        start = f"{before} at the start, " if before and rounds != "0" else ""
        end = f"{shown}\N{NO-BREAK SPACE}{unit} {'at the start' if rounds == '0' else f'after round {rounds}'}"
        return f"{where}{best}: {name} {start}{end}, {_seeds(count)}{rows}."
    if not same_seeds(values.values()):
        each = "; ".join(
            f"{label} {interval_text(interval, column.format)}\N{NO-BREAK SPACE}{unit}, {_seeds(interval.count)}"
            for label, interval in intervals.items()
        )
        return f"{where}Not every algorithm has every seed, so no best is named: {name} {each}{rows}."
    level = sorted(
        label for label in values if column.format(intervals[label].mean) == column.format(intervals[best].mean)
    )
    if len(level) > 1:
        together = f"{', '.join(level[:-1])} and {level[-1]}"
        whose = "All score" if len(level) == len(values) else f"{together} score best, and"
        return f"{where}{whose} the same: {score}."
    sentence = f"{where}{best} is best on average: {score}."
    others = sorted((label for label in values if label != best), key=lambda label: intervals[label].mean)
    runner_up = others[-1] if column.higher_is_better else others[0]
    other = runner_up if best == design.baseline or design.baseline not in values else design.baseline
    pair = paired_interval(values[best], values[other])
    if pair is None or pair.half is None:
        return f"{sentence} {ONE_SEED}"
    if not pair.is_told:
        by = f"{difference_text(pair, column)}\N{NO-BREAK SPACE}{in_points(unit)}"
        return (
            f"{sentence} Seed by seed it differs from {other} by {by}: {pair.count} seeds are too few for an interval."
        )
    by = f"{difference_text(pair, column)}\N{NO-BREAK SPACE}{in_points(unit)}"
    chance = "excludes zero" if pair.excludes_zero else "includes zero, so this may be chance"
    return f"{sentence} Seed by seed it differs from {other} by {by}; the interval {chance}."


def ablations(material: Material) -> list[Ablation]:
    """For each grid point the paper's rows and what each gains on the one before, seed by seed; none if incomplete."""
    labels = [choice.label for choice in material.design.choices]
    if labels != list(ABLATION):
        return []
    runs = material.tabled
    columns = qualities(runs)
    return [_ablation(material.design, runs, columns[0], point) for point in material.design.points if columns]


def _ablation(design: Design, runs: Sequence[Finished], column: Column, point: Point) -> Ablation:
    variants: list[Variant] = []
    before: Mapping[int, float] = {}
    groups = by_label(runs, point)
    for choice in design.choices:
        values = values_by_seed(groups.get(choice.label, {}), column)
        pair = paired_interval(values, before) if variants else None
        score = interval_text(mean_interval(list(values.values())), column.format) if values else "-"
        gain = (
            f"{difference_text(pair, column)}{' †' if pair.is_told and pair.excludes_zero else ''}"
            if pair is not None
            else "-"
        )
        settings = tuple(setting.removeprefix("algorithm.") for setting in choice.settings[1:])
        variants.append(Variant(choice.label, settings, score, gain))
        before = values
    return Ablation(point_title(point), column.title, tuple(variants))


def facts(material: Material) -> list[tuple[str, str]]:
    """The frame of the runs, a name and a value each."""
    config, design = material.design.base, material.design
    varied = {key: ", ".join(values) for key, values in design.grid.items()}
    held_by = config.clients.partition + (
        (", alpha" if "clients.alpha" in design.grid else f", alpha {config.clients.alpha:g}")
        if config.clients.partition == "dirichlet"
        else ""
    )
    at_sites = config.federation.engine == "flower"  # where they are dealt out is not what [clients] says
    shown = {
        "algorithms": ", ".join(choice.label for choice in design.choices),
        "model": config.model.path,
        "data": "the sites' own" if at_sites else config.data.train,
        "clients": f"{_client_count(material)}, {'sites' if at_sites else held_by}",
        "rounds": _rounds(material),
        "seed" if len(design.seeds) == 1 else "seeds": ", ".join(map(str, design.seeds)),
    }
    if len(design.choices) == 1:
        shown = {"algorithm" if name == "algorithms" else name: value for name, value in shown.items()}
    if scored := rows_scored(material.tabled):
        shown["scored on"] = scored
    own = {"clients.alpha": "clients", "run.rounds": "rounds", "model.path": "model", "data.train": "data"}
    for key, values in varied.items():
        shown[own.get(key, key)] = f"{shown['clients']}: {values}" if key == "clients.alpha" else values
    return list(shown.items())


def _rounds(material: Material) -> str:
    """How many were asked for; also how many are complete, of a single run and where runs ended early."""
    asked, runs = material.design.base.run.rounds, [run for run in material.runs if run.finished] or material.runs
    short = any(run.stopped for run in runs) or (len(material.runs) == 1 and not runs[0].finished)
    done = sorted({run.round for run in runs})
    return f"{' to '.join(map(str, dict.fromkeys((done[0], done[-1]))))} of {asked}" if short else str(asked)


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
    counts = sorted({len(run.held or run.history[-1].get("client_accuracies", {})) for run in material.runs} - {0})
    return " to ".join(dict.fromkeys(str(count) for count in counts[:: max(1, len(counts) - 1)])) or str(
        material.design.base.clients.count
    )


def _rows(runs: Sequence[Finished], column: Column) -> str:
    """Of how many rows a score is, where all runs have as many."""
    lines = [run.history[-1] for run in runs]
    overall = column.title.startswith(("accuracy", "loss"))
    counts = {line.get("test_examples") if overall else held_out_rows(line) for line in lines}
    (count,) = counts if len(counts) == 1 else (None,)
    return f", n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{count:,} rows" if count else ""


def _seeds(count: int) -> str:
    if count == 1:
        return "one seed"
    return f"{count} seeds" if count < FEW else f"95 % interval over {count} seeds"
