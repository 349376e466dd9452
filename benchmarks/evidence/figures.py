"""Draw how far algorithms are from FedAvg after each round.

    python benchmarks/evidence/figures.py           # docs/evidence/rounds.svg, of the runs of study `defaults`
    python benchmarks/evidence/figures.py --kept    # docs/evidence/long.svg, of what is kept of study `today`

Differences in accuracy are taken seed by seed. In rounds.svg points are means, whiskers 95 % Student-t intervals over
seeds; in long.svg thin lines are seeds, and thick ones their means.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from by_round import BASELINE, RESULTS, Line, read
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import OURS, RATE
from tables import Column, Part

from fedalign.compare.statistics import paired_interval

REGIMES = {"label_skew": ("Different labels (Dirichlet 0.1)", "3e-4"), "tasks": ("Different tasks", "1e-3")}
KEPT_PARTS = {
    "domain": "Labels of their own",
    "label_skew": "Other shares of the same labels",
    "tasks": "Different tasks",
}
KEPT_LINES = {  # colour and name
    "fedalign_moe-reg_strength=0.1": ("#c8553d", "with a pull on routers"),
    "fedalign_moe": ("#0b6e4f", "the default, fedalign_moe"),
}
LINES = {OURS: ("#0b6e4f", "o"), "fedalign_paper": ("#c8553d", "s"), "fedmoe": ("#8d99ae", "^")}  # colour, marker


def draw(axes: Axes, part: Part, rate: str) -> None:
    """One regime: each line at FedAvg's learning rate if it was run at that, else at the only one that it has."""
    base = part.runs[part.baseline]
    rounds = range(1, len(next(iter(base.values())).history))
    axes.axhline(0, color="black", linewidth=0.8)
    for shift, (name, (colour, marker)) in enumerate(LINES.items()):
        labels = sorted(
            (label for label in part.runs if label.startswith(f"{name}:{RATE}=")),
            key=lambda label: label.endswith(f"={rate}"),
        )
        if not labels:
            continue
        label = labels[-1]
        pairs = []
        for number in rounds:
            column = Column("", lambda run, number=number: run.history[number].get("accuracy"))  # type: ignore[misc] # mypy infers no lambda with defaults
            pair = paired_interval(part.values(label, column), part.values(part.baseline, column))
            assert pair is not None
            pairs.append(pair)
        axes.errorbar(
            [number + 0.12 * (shift - 1) for number in rounds],
            [100 * pair.mean for pair in pairs],
            yerr=[100 * (pair.half or 0) for pair in pairs],
            color=colour,
            marker=marker,
            markersize=4,
            capsize=2,
            linewidth=1.2,
            elinewidth=0.8,
            label=name if label.endswith(f"={rate}") else f"{name} ({label.rpartition('=')[2]})",
        )
    axes.set_xticks(list(rounds))
    axes.set_xlabel("round")
    axes.legend(
        frameon=False,
        fontsize=7.5,
        columnspacing=1,
        handlelength=1.5,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=len(LINES),
    )


def draw_kept(axes: Axes, lines: Sequence[Line]) -> None:
    """One part of what is kept: each line's seeds to FedAvg's."""
    base = {line["seed"]: line["accuracy"] for line in lines if line["line"] == BASELINE}
    axes.axhline(0, color="black", linewidth=0.8)
    for name, (colour, label) in KEPT_LINES.items():
        seeds = [
            [100 * (mine - theirs) for mine, theirs in zip(line["accuracy"], base[line["seed"]], strict=True)]
            for line in lines
            if line["line"] == name and line["seed"] in base
        ]
        for points in seeds:
            axes.plot(points, color=colour, linewidth=0.6, alpha=0.45)
        if seeds:
            mean = [sum(of) / len(of) for of in zip(*seeds, strict=True)]
            axes.plot(mean, color=colour, linewidth=2, label=f"{label}, {len(seeds)} seed{'s' * (len(seeds) > 1)}")
    axes.set_xlabel("round")


def figure_of_kept(lines: Sequence[Line]) -> Figure:
    """All parts, side by side."""
    figure, panels = plt.subplots(1, len(KEPT_PARTS), figsize=(9, 3.2), layout="constrained")
    for axes, (part, title) in zip(panels, KEPT_PARTS.items(), strict=True):
        draw_kept(axes, [line for line in lines if line["part"] == part])
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    panels[0].set_ylabel("accuracy, points to FedAvg")
    return figure


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--kept", action="store_true", help="of benchmarks/results/today.jsonl")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or Path("docs/evidence") / ("long.svg" if args.kept else "rounds.svg")
    mpl.use("svg")
    mpl.rc("svg", hashsalt="fedalign", fonttype="none")  # the same numbers give the same file
    mpl.rc("font", family="sans-serif", size=9)
    mpl.rc("axes.spines", top=False, right=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    (figure_of_kept(read(RESULTS / "today.jsonl")) if args.kept else figure_of_runs(args.runs)).savefig(
        out, metadata={"Date": None}
    )
    print(out)


def figure_of_runs(runs: Path) -> Figure:
    """Both regimes of study `defaults`."""
    figure, panels = plt.subplots(1, len(REGIMES), figsize=(9, 3.4), layout="constrained")
    for axes, (regime, (title, rate)) in zip(panels, REGIMES.items(), strict=True):
        part = Part(runs / "defaults" / regime)
        draw(axes, part, rate)
        axes.set_title(f"{title}: {len(part.runs[part.baseline])} seeds, FedAvg's rate {rate}", fontsize=10)
    panels[0].set_ylabel("accuracy, points to FedAvg")
    return figure


if __name__ == "__main__":
    main()
