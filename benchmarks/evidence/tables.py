"""Write docs/evidence/tables.md from the runs that there are.

    python benchmarks/evidence/tables.py

Each part of each study becomes two tables: scores with differences to FedAvg seed by seed, and what routers and experts
did. m ± h is a mean over seeds with the half-width of its 95 % Student-t interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from measure import MEASURES, mean
from study import STUDIES

from fedalign.compare.folder import ComparisonFolder, read_history
from fedalign.compare.plan import cells
from fedalign.compare.statistics import Interval, mean_interval, paired_interval
from fedalign.compare.tables import rounds_to
from fedalign.protocol import Metrics
from fedalign.results import RunFolder

BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Run:
    """A finished run, read back."""

    history: Sequence[Metrics]
    measures: Mapping[str, Any]

    def last(self, name: str) -> float | None:
        """A number of the last round."""
        value: float | None = self.history[-1].get(name)
        return value

    @property
    def late_accuracy(self) -> float | None:
        """Mean over the second half of the rounds: under label skew single rounds jump."""
        scored = [line["accuracy"] for line in self.history[1:] if "accuracy" in line]
        half = scored[len(scored) // 2 :]
        return statistics.fmean(half) if len(half) > 1 else None

    @property
    def bytes_up(self) -> float:
        """Of all rounds."""
        return float(sum(line.get("bytes_up", 0) for line in self.history))

    def layer_mean(self, when: str, name: str) -> float | None:
        """Of a measure by layer."""
        layers = self.measures.get(when, {}).get(name)
        return mean(layers) if layers else None


@dataclass(frozen=True)
class Column:
    """A number that a run has, and how it is written."""

    title: str
    of: Callable[[Run], float | None]
    scale: float = 1.0
    digits: int = 3


SCORES = (
    Column("accuracy, %", lambda run: run.last("accuracy"), 100, 1),
    Column("mean of the later rounds, %", lambda run: run.late_accuracy, 100, 1),
    Column("mean client, %", lambda run: run.last("client_accuracy_mean"), 100, 1),
    Column("test loss, nats", lambda run: run.last("loss_nats")),
)
DOING = (
    Column("routing divergence, first round", lambda run: run.layer_mean("first", "routing_divergence_nats"), 1, 4),
    Column("last round", lambda run: run.layer_mean("last", "routing_divergence_nats"), 1, 4),
    Column("expert and client", lambda run: run.layer_mean("last", "expert_and_client_nats"), 1, 4),
    Column("expert and task", lambda run: run.layer_mean("model", "expert_and_task_nats"), 1, 4),
    Column("expert and label", lambda run: run.layer_mean("model", "expert_and_label_nats"), 1, 4),
    Column("cosine of updates", lambda run: run.layer_mean("last", "update_cosine")),
    Column("cosine of centroids", lambda run: run.layer_mean("last", "centroid_cosine")),
    Column("norm of an expert's update", lambda run: run.layer_mean("last", "expert_update_norm")),
    Column("of a router's", lambda run: run.layer_mean("last", "router_update_norm")),
)


@dataclass(frozen=True)
class Part:
    """A part of a study with all of its finished runs."""

    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        """What study.py wrote down."""
        found: dict[str, Any] = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
        return found

    @cached_property
    def runs(self) -> dict[str, dict[int, Run]]:
        """Label -> seed -> run, in the order they were asked for."""
        made = ComparisonFolder(self.folder)
        found: dict[str, dict[int, Run]] = {}
        for cell in cells(made.read()):
            folder = RunFolder(self.folder / "runs" / cell.path)
            measures = folder.path / MEASURES
            if folder.summary.exists() and measures.exists():
                run = Run(read_history(folder), json.loads(measures.read_text(encoding="utf-8")))
                found.setdefault(cell.choice.label, {})[cell.seed] = run
        return found

    @property
    def baseline(self) -> str:
        """FedAvg, or what comes first."""
        return ComparisonFolder(self.folder).read().baseline

    def text(self) -> str:
        """Heading, tables, and the settings behind them."""
        return "\n".join([f"### {self.title}", "", self.settings, "", self.scores(), "", self.doing(), ""])

    @property
    def title(self) -> str:
        """Which regime, what is trained, how many epochs."""
        part = self.about["part"]
        return f"{self.folder.parent.name}: {self.folder.name} ({part['kind']}, epochs {part['epochs']})"

    @property
    def settings(self) -> str:
        """What a reader needs to judge the numbers."""
        base = ComparisonFolder(self.folder).read().base
        seeds = sorted({seed for runs in self.runs.values() for seed in runs})
        count = sum(len(runs) for runs in self.runs.values())
        more = "; ".join(self.about["part"]["settings"])
        clients = base.clients.count if base.clients.partition not in ("natural", "files") else "as the data has"
        tuned = ", then tuned for each" if self.about["part"]["tune"] else ""
        return (
            f"Start {self.about['start']}, {base.data.max_train} examples, clients {clients}, "
            f"{base.run.rounds} rounds, learning rate {self.about['learning_rate']}{tuned}, "
            f"seeds {', '.join(map(str, seeds))}; {count} runs, {self.about['run_seconds'] / 60:.0f} minutes"
            f"{f' ({more})' if more else ''}."
        )

    def scores(self) -> str:
        """Scores, and differences to the baseline."""
        shown = [column for column in SCORES if any(self.values(label, column) for label in self.runs)]
        header = ["algorithm", "seeds"]
        for column in shown:
            header += [column.title, "difference"]
        header += ["bytes up", f"rounds to {self.baseline}'s end"]
        rows = []
        for label, runs in self.runs.items():
            row = [label, str(len(runs))]
            for column in shown:
                mine, base = self.values(label, column), self.values(self.baseline, column)
                row += [told(mine, column), "" if label == self.baseline else told_difference(mine, base, column)]
            rows.append([*row, self._bytes(label), self._rounds(label)])
        return table(header, rows)

    def doing(self) -> str:
        """Divergence, drift and specialisation, means over layers."""
        shown = [column for column in DOING if any(self.values(label, column) for label in self.runs)]
        rows = [[label, *(told(self.values(label, column), column) for column in shown)] for label in self.runs]
        return table(["algorithm", *(column.title for column in shown)], rows)

    def values(self, label: str, column: Column) -> dict[int, float]:
        """Seed -> number, where there is one."""
        runs = self.runs.get(label, {})
        return {seed: value for seed, run in runs.items() if (value := column.of(run)) is not None}

    def _bytes(self, label: str) -> str:
        """Share of the baseline's, mean over the seeds that both have."""
        base = self.runs.get(self.baseline, {})
        shares = [run.bytes_up / base[seed].bytes_up for seed, run in self.runs[label].items() if seed in base]
        return f"{statistics.fmean(shares):.2f}" if shares else ""

    def _rounds(self, label: str) -> str:
        """A mean only if every seed gets there."""
        base = self.runs.get(self.baseline, {})
        needed = [
            rounds_to(run.history, target)
            for seed, run in self.runs[label].items()
            if seed in base and (target := base[seed].last("accuracy")) is not None
        ]
        reached = [float(rounds) for rounds in needed if rounds is not None]
        if not needed:
            return ""
        return f"{statistics.fmean(reached):.1f}" if len(reached) == len(needed) else f"{len(reached)} of {len(needed)}"


def told(values: BySeed, column: Column) -> str:
    """M ± h."""
    return interval(mean_interval(list(values.values())), column) if values else ""


def told_difference(values: BySeed, base: BySeed, column: Column) -> str:
    """Signed; bold where the interval excludes zero."""
    pair = paired_interval(values, base)
    if pair is None:
        return ""
    text = ("+" if pair.mean >= 0 else "") + interval(pair, column)
    return f"**{text}**" if pair.excludes_zero else text


def interval(found: Interval, column: Column) -> str:
    """Mean and half-width in the column's unit.

    >>> interval(Interval(0.5, 0.02, 3), SCORES[0])
    '50.0 ± 2.0'
    """
    text = f"{column.scale * found.mean:.{column.digits}f}"
    return text if found.half is None else f"{text} ± {column.scale * found.half:.{column.digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    rule = [":--", *("--:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def overview(parts: Sequence[Part], labels: Sequence[str]) -> str:
    """One line a part: the difference of each algorithm to FedAvg, later rounds."""
    column = SCORES[1]
    rows = []
    for part in parts:
        base = part.values(part.baseline, column)
        told_all = [told_difference(part.values(label, column), base, column) for label in labels]
        spread = part.runs.get(part.baseline, {}).values()
        divergence = [v for run in spread if (v := run.layer_mean("last", "routing_divergence_nats")) is not None]
        cosine = [v for run in spread if (v := run.layer_mean("last", "update_cosine")) is not None]
        rows.append(
            [
                part.folder.name,
                str(len(base)),
                told(base, column),
                *told_all,
                f"{statistics.fmean(divergence):.3f}" if divergence else "",
                f"{statistics.fmean(cosine):.3f}" if cosine else "",
            ]
        )
    header = ["regime-trained-epochs", "seeds", "fedavg, %", *labels, "routing divergence", "cosine of updates"]
    return table(header, rows)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/tables.md"))
    args = parser.parse_args()
    text = [
        "# The evidence: tables",
        "",
        "Generated by `benchmarks/evidence/tables.py`; see [evidence.md](../evidence.md).",
        "",
    ]
    for study in STUDIES:
        parts = [Part(file.parent) for file in sorted((args.runs / study).glob("*/about.json"))]
        if not parts:
            continue
        text += [f"## {study}", ""]
        if study == "regimes":
            text += [overview(parts, ("fedprox", "fedmoe", "fedalign_moe")), ""]
        text += [part.text() for part in parts]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(text), encoding="utf-8")
    print(f"{args.out}: {len(text)} pieces")


if __name__ == "__main__":
    main()
