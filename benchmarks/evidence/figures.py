"""Draw docs/evidence/rounds.svg from the runs that there are: how far each algorithm is from FedAvg after each round.

    python benchmarks/evidence/figures.py

Differences in accuracy are taken seed by seed; points are means, whiskers 95 % Student-t intervals over seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from study import OURS, RATE
from tables import Column, Part

from fedalign.compare.statistics import paired_interval

REGIMES = {"label_skew": ("Different labels (Dirichlet 0.1)", "3e-4"), "tasks": ("Different tasks", "1e-3")}
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


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/rounds.svg"))
    args = parser.parse_args()
    mpl.use("svg")
    mpl.rc("svg", hashsalt="fedalign", fonttype="none")  # the same numbers give the same file
    mpl.rc("font", family="sans-serif", size=9)
    mpl.rc("axes.spines", top=False, right=False)
    figure, panels = plt.subplots(1, len(REGIMES), figsize=(9, 3.4), layout="constrained")
    for axes, (regime, (title, rate)) in zip(panels, REGIMES.items(), strict=True):
        part = Part(args.runs / "defaults" / regime)
        draw(axes, part, rate)
        axes.set_title(f"{title}: {len(part.runs[part.baseline])} seeds, FedAvg's rate {rate}", fontsize=10)
    panels[0].set_ylabel("accuracy, points to FedAvg")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, metadata={"Date": None})
    print(args.out)


if __name__ == "__main__":
    main()
