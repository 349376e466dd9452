"""Keep what a study's finished runs scored round by round, and print it as a table.

    python benchmarks/evidence/by_round.py today --keep    # of runs/evidence/today into benchmarks/results/today.jsonl
    python benchmarks/evidence/by_round.py today           # the table of what is kept; no run is needed
    python benchmarks/evidence/by_round.py today --lines fedavg fedalign_moe    # these columns alone, in this order
    python benchmarks/evidence/by_round.py candidates --beside today/tasks    # with lines of another study's part

Runs are large and stay where they were made; a line of today.jsonl is one of them. Keep them on the machine that made
them: its name goes into the line. Differences to FedAvg are taken seed
by seed; ± is the half-width of a 95 % Student-t interval, bold where that excludes zero.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from real import marks, told
from study import STUDIES
from tables import table

from fedalign.compare.statistics import mean_interval, paired_interval
from fedalign.config.toml import load_config
from fedalign.server.results import RunFolder, read_history

sys.path.append(str(Path(__file__).parents[1]))
from watching import machine

RESULTS = Path(__file__).parents[1] / "results"
BASELINE = "fedavg"
Line = Mapping[str, Any]


def line_of(part: str, folder: RunFolder) -> Line:
    """A finished run in numbers: accuracy, test loss and divergence of routing after each round, bytes sent up in all.

    The start is first. Lines of before have no divergence.
    """
    config, history = load_config(folder.config), read_history(folder)
    return {
        "part": part,
        "line": folder.path.parent.name,
        "seed": config.run.seed,
        "rate": config.training.learning_rate,
        "accuracy": [scored["accuracy"] for scored in history],
        "loss_nats": [scored["loss_nats"] for scored in history],
        "divergence_nats": [scored.get("routing_divergence_nats") for scored in history],
        "bytes_up": sum(scored.get("bytes_up", 0) for scored in history),
        "machine": machine("torch", "transformers"),
    }


def read(file: Path) -> list[Line]:
    """What is kept."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def keep(file: Path, runs: Path) -> int:
    """Add the finished runs that are not there yet; how many there were."""
    known = {(line["part"], line["line"], line["seed"]) for line in read(file)}
    added = 0
    for summary in sorted(runs.glob("*/runs/*/seed-*/summary.json")):
        line = line_of(summary.parents[3].name, RunFolder(summary.parent))
        if (line["part"], line["line"], line["seed"]) not in known:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
            added += 1
    return added


def part_table(lines: Sequence[Line]) -> str:
    """One part: accuracy by round, then differences to FedAvg, then the best round, loss and bytes."""
    made = {(len(line["accuracy"]) - 1, line["rate"]) for line in lines}
    if len(made) > 1:
        raise SystemExit(f"not to be compared: runs of {' and '.join(f'{n} rounds at {r:g}' for n, r in sorted(made))}")
    ((rounds, _),) = made
    by_line: dict[str, dict[int, Line]] = {BASELINE: {}} if any(line["line"] == BASELINE for line in lines) else {}
    for line in lines:
        by_line.setdefault(line["line"], {})[line["seed"]] = line
    base = by_line.get(BASELINE, {})

    def all_of(runs: Mapping[int, Line], of: Callable[[Line], float]) -> dict[int, float]:
        return {seed: of(line) for seed, line in runs.items()}

    shown = marks(rounds)
    numbers: list[tuple[str, Callable[[Line], float], float, int]] = [
        *((f"round {mark}" if mark else "start", lambda one, r=mark: one["accuracy"][r], 100, 1) for mark in shown),
        ("best round's", lambda one: max(one["accuracy"]), 100, 1),
        *((f"loss, round {mark}", lambda one, r=mark: one["loss_nats"][r], 1, 3) for mark in shown[2:]),
        ("lowest loss", lambda one: min(one["loss_nats"]), 1, 3),
    ]
    header = ["", *by_line]
    rows = [["seeds", *(", ".join(map(str, sorted(runs))) for runs in by_line.values())]]
    for title, of, scale, digits in numbers:
        row = [title]
        for label, runs in by_line.items():
            mine = all_of(runs, of)
            text = told(mean_interval(list(mine.values())), scale, digits)
            apart = paired_interval(mine, all_of(base, of)) if label != BASELINE else None
            row.append(f"{text} ({told(apart, scale, digits, sign=True)})" if apart is not None else text)
        rows.append(row)
    shares = [
        [line["bytes_up"] / base[seed]["bytes_up"] for seed, line in runs.items() if seed in base]
        for runs in by_line.values()
    ]
    ends = [
        [end for one in runs.values() if (end := one.get("divergence_nats", [None])[-1]) is not None]
        for runs in by_line.values()
    ]
    if any(ends):
        told_ends = (told(mean_interval(of), 1, 3) if of else "" for of in ends)
        rows.append(["divergence of routing at the end, nats", *told_ends])
    rows.append(["bytes up", *(f"{sum(of) / len(of):.2f}" if of else "" for of in shares)])
    return table(header, rows)


def main() -> None:
    """Keep or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--keep", action="store_true", help="add finished runs to what is kept")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="where the runs of studies are")
    parser.add_argument(
        "--beside", metavar="STUDY/PART", help="its lines, beside parts whose names begin so: same data"
    )
    parser.add_argument("--lines", nargs="+", metavar="LINE", help="columns, as a line of what is kept calls them")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where what is kept lies")
    args = parser.parse_args()
    file = args.results / f"{args.study}.jsonl"
    if args.keep:
        print(f"{file}: {keep(file, args.out / args.study)} runs added")
    lines = read(file)
    if not lines:
        parser.error(f"{args.study}: nothing is kept in {file}. Run it with --keep where its runs are")
    if strange := {*(args.lines or ())} - {line["line"] for line in lines}:
        known = ", ".join(dict.fromkeys(line["line"] for line in lines))
        parser.error(f"--lines {min(strange)}: nothing is kept of it. Choose of: {known}")
    study, _, wanted = (args.beside or "").partition("/")
    beside = [line for line in read(args.results / f"{study}.jsonl") if line["part"] == wanted]
    if args.beside and not beside:
        parser.error(f"--beside {args.beside}: nothing is kept of it. Choose STUDY/PART of {args.results}/STUDY.jsonl")
    parts = [part for part in dict.fromkeys(line["part"] for line in lines) if part.startswith(wanted)]
    if not parts:
        parser.error(f"--beside {args.beside}: no part of {args.study} is of the same data, and begins with {wanted!r}")
    for part in parts:
        mine = [*beside, *(line for line in lines if line["part"] == part)]
        if args.lines:
            mine = [line for name in args.lines for line in mine if line["line"] == name]
        if not mine:
            continue
        print(f"\n**{part}**, learning rate {mine[0]['rate']:g}\n\n{part_table(mine)}")
    print("\n".join(["", *(f"Run on: {kind}." for kind in sorted({line["machine"] for line in lines}))]))


if __name__ == "__main__":
    main()
