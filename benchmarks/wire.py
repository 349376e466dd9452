"""Accuracy and bytes by the precision in which updates and broadcasts travel, with rounding fed back and without.

    python benchmarks/wire.py --out runs/wire --minutes 60    # goes on where it stopped
    python benchmarks/wire.py --out runs/wire --minutes 0     # the table of what is there

The demo, one run for each row and seed; runs of one seed share data, partition and start. Each run is a line of
runs.jsonl, with its settings: a folder with runs of other settings is refused. Clients are not scored, the global test
set is after the last round. Feedback is that of updates; of broadcasts in int8 and int4 it is always on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedalign.compare.statistics import Interval, mean_interval, paired_interval
from fedalign.errors import UserError
from keeping import keep, keepable
from watching import machine

WIRES = (  # of updates, of broadcasts, feedback
    ("float32", "float32", "off"),
    ("int8", "int8", "off"),
    ("int4", "int4", "on"),
    ("int8", "bfloat16", "off"),
    ("int4", "bfloat16", "on"),
    ("float32", "int4", "off"),
    ("float32", "int8", "off"),
    ("bfloat16", "bfloat16", "off"),
    ("int8", "int8", "on"),
    ("int4", "int4", "off"),
)
BASE = "float32, float32, off"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs of a folder have in common, beside wire and seed."""
    more = {"data.max_train": args.train, "clients.min_examples": 8} if args.train else {}
    return {
        "run.rounds": args.rounds,
        "algorithm.name": args.algorithm,
        "data.max_test": args.tests,
        "evaluation.clients": "false",
        "evaluation.every": args.rounds,
        "tracking.loggers": "[]",
    } | more


def run(wire: tuple[str, str, str], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Scores and bytes of one run."""
    kinds = dict(zip(("wire.dtype", "wire.down", "wire.error_feedback"), wire, strict=True))
    asked = settings(args) | {"run.seed": seed} | kinds
    overrides = [part for key, value in asked.items() for part in ("--set", f"{key}={value}")]
    out = Path(tempfile.mkdtemp(prefix="fedalign-wire-")) / "run"
    command = [sys.executable, "-m", "fedalign", "run", "demo", "--out", str(out), *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(out.parent)
    wanted = ("final_accuracy", "final_loss", "bytes_up", "bytes_down")
    about = {"wire": ", ".join(wire), "seed": seed, "settings": settings(args)}
    return about | {name: summary[name] for name in wanted}


def runs_in(file: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs that are there.

    Raises:
        UserError: They have other settings, or do not say which.
    """
    runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    if other := [one for one in runs if one.get("settings") != settings(args)]:
        there = other[0].get("settings", "settings that it does not say")
        raise UserError(
            f"--out {str(args.out)!r}: holds runs of {there}, not of {settings(args)}. Choose another folder."
        )
    return runs


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A row for each precision; differences to float32 are taken seed by seed."""
    lines = [
        "| updates, broadcasts, feedback | seeds | accuracy, % | to float32 | loss | to float32 | MB up | MB down |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for wire in dict.fromkeys(one["wire"] for one in runs):
        mine = [one for one in runs if one["wire"] == wire]
        cells = [wire, str(len(mine))]
        for name, scale, digits in (("final_accuracy", 100, 1), ("final_loss", 1, 3)):
            own, base = ({r["seed"]: scale * r[name] for r in runs if r["wire"] == w} for w in (wire, BASE))
            cells += [said(mean_interval(list(own.values())), digits), said(paired_interval(own, base), digits)]
        cells += [f"{sum(r[name] for r in mine) / len(mine) / 1e6:.1f}" for name in ("bytes_up", "bytes_down")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def said(interval: Interval | None, digits: int) -> str:
    """A mean, and half of its 95 % interval where there is one."""
    if interval is None:
        return ""
    half = "" if interval.half is None else f" ± {interval.half:.{digits}f}"
    return f"{interval.mean:.{digits}f}{half}"


def main(asked: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/wire"))
    parser.add_argument("--minutes", type=float, default=60, help="no run begins later")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", type=int, help="examples to train on; default: the demo's")
    parser.add_argument("--tests", type=int, default=2000)
    parser.add_argument("--algorithm", default="fedavg")
    keepable(parser)
    args = parser.parse_args(asked)
    args.out.mkdir(parents=True, exist_ok=True)
    file, end = args.out / "runs.jsonl", time.monotonic() + 60 * args.minutes
    try:
        runs = runs_in(file, args)
    except UserError as error:
        parser.error(str(error))
    done = {(one["wire"], one["seed"]) for one in runs}
    for seed in range(args.seeds):
        for wire in WIRES:
            if (", ".join(wire), seed) not in done and time.monotonic() < end:
                runs.append(run(wire, seed, args))
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(runs[-1]) + "\n")
                keep(args, __file__, runs[-1], "torch", "transformers")
    print(machine("torch", "transformers"))
    print(f"{args.algorithm}, {args.rounds} rounds, {args.train or 'all'} examples, {args.tests} test examples\n")
    print(table(runs))


if __name__ == "__main__":
    main()
