"""The convergence figure of a paper: a score by round, means over seeds, with their 95 % intervals or single runs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fedalign.compare.plan import Design, point_title
from fedalign.compare.statistics import mean_interval
from fedalign.compare.tables import Finished, by_label, judged_by
from fedalign.errors import UserError
from fedalign.files import replacing_file
from fedalign.server.scores import accuracy_of, loss_of

SUFFIXES = (".pdf", ".svg", ".png")
INCHES = 3.3, 2.5  # of one panel: a column of a two-column paper


def check_figure(path: Path) -> None:
    """Refuse what cannot be drawn before anything is trained.

    Raises:
        UserError: Another type of file, no such folder, or matplotlib is not there.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--figure {str(path)!r}: the name must end in one of: {', '.join(SUFFIXES)}.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--figure {str(path)!r}: no folder {str(path.absolute().parent)!r}. Make it first.")
    if find_spec("matplotlib") is None:
        raise UserError("--figure: needs matplotlib: pip install 'fedalign-moe[figure]'")


def draw(path: Path, design: Design, runs: Sequence[Finished]) -> None:
    """Draw accuracy by round, a panel a grid point; the loss where tables go by it: see `tables.judged_by`.

    Lines are means over seeds. Bands are 95 % Student-t intervals; of fewer than four seeds each run is a thin line.
    """
    import matplotlib as mpl  # noqa: PLC0415 - of an extra, and slow to load
    from matplotlib.figure import Figure  # noqa: PLC0415 - the same

    by_accuracy = judged_by(runs) == "accuracy"
    score, factor = (accuracy_of, 100.0) if by_accuracy else (loss_of, 1.0)
    with (
        mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}),
        replacing_file(path) as new,
    ):
        figure = Figure((INCHES[0] * len(design.points), INCHES[1]), layout="constrained")
        panels = figure.subplots(1, len(design.points), sharey=True, squeeze=False)[0]
        for axes, point in zip(panels, design.points, strict=True):
            for number, (label, by_seed) in enumerate(by_label(runs, point).items()):
                color, values = f"C{number % 10}", list[dict[int, float]]()
                for run in by_seed.values():
                    scores = {line["round"]: score(line) for line in run.history}
                    values.append({round: factor * value for round, value in scores.items() if value is not None})
                rounds = sorted(set.intersection(*map(set, values)))
                means = [mean_interval([each[round] for each in values]) for round in rounds]
                axes.plot(rounds, [one.mean for one in means], color=color, label=label, linewidth=1.4)
                if all(one.is_told for one in means):
                    low, high = ([one.mean + sign * (one.half or 0) for one in means] for sign in (-1, 1))
                    axes.fill_between(rounds, low, high, color=color, alpha=0.15, linewidth=0)
                elif len(values) > 1:
                    for each in values:
                        axes.plot(rounds, [each[round] for round in rounds], color=color, alpha=0.35, linewidth=0.6)
            axes.set_title(point_title(point))
            axes.set_xlabel("round")
        panels[0].set_ylabel("accuracy, %" if by_accuracy else "loss, nats a token")
        panels[-1].legend(frameon=False)
        figure.savefig(new, format=path.suffix.lower()[1:], dpi=300)
