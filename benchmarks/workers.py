"""Clients side by side: the demo with `run.workers = 2` against one worker, one thread each.

    OMP_NUM_THREADS=1 python benchmarks/workers.py                 # 4 minutes on two idle cores
    python benchmarks/workers.py --ceiling                         # and what the machine itself allows
    python benchmarks/workers.py --workers 4 --config my.toml
    python benchmarks/workers.py --evaluation                      # seconds, after the model and the data are loaded

Runs take turns, one worker first, each a command of its own. Told of each: median seconds of a round (round 1 and what
comes before it are not counted), CPU seconds of all of its processes, how busy the cores were while rounds went on, and
the highest sum of PSS of its processes, in which a page that several share counts once. `model/` and metrics.jsonl, but
for seconds, have to be the same byte for byte. Only ratios of runs on idle cores say anything about seconds.

`--ceiling` also makes as many runs of one worker at the same time, which share nothing but the machine's memory and
caches. No division of one run's work is faster than so many rounds in the seconds that one takes then.

`--evaluation` scores the first weights on the global test set, whose batches workers share, and tells how long cores
had nothing to do: no more than that is won where the next round trains meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from fedalign.config.toml import load_config
from fedalign.federation.in_process import prepare
from fedalign.maths.heap import Heap
from keeping import keep, keepable
from watching import machine


@dataclass(frozen=True)
class Taken:
    """One run: what it took, and what came out of it."""

    seconds: float  # median of its rounds
    whole: float  # seconds from start to end
    cpu: float  # seconds, of all processes
    busy: float  # cores, on average, while rounds went on
    peak: int  # bytes, sum of PSS
    result: str  # digest of model/ and metrics


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--ceiling", action="store_true", help="also runs that share nothing, side by side")
    parser.add_argument("--evaluation", action="store_true", help="only of the global test set, --repeats times")
    keepable(parser)
    args = parser.parse_args()
    print(machine("torch", "transformers"))
    print(f"load before: {os.getloadavg()[0]:.2f}; {args.config}, {args.rounds} rounds, one thread each\n")
    if args.evaluation:
        wall, idle = evaluation(args.config, args.workers, args.repeats)
        keep(args, __file__, {"seconds": wall, "idle": idle}, "torch", "transformers")
        return
    print(f"{'workers':>8}{'s/round':>9}{'whole s':>9}{'CPU s':>8}{'cores busy':>12}{'peak PSS MB':>13}")
    found: dict[int, list[Taken]] = {1: [], args.workers: []}
    apart: list[float] = []
    with tempfile.TemporaryDirectory(prefix="fedalign-workers-") as name:
        for repeat in range(args.repeats):
            for workers, all_of_them in found.items():
                taken = run(args.config, args.rounds, workers, Path(name) / f"{workers}-{repeat}")
                all_of_them.append(taken)
                print(
                    f"{workers:>8}{taken.seconds:>9.2f}{taken.whole:>9.1f}{taken.cpu:>8.1f}{taken.busy:>12.2f}"
                    f"{taken.peak / 1e6:>13,.0f}",
                    flush=True,
                )
                keep(args, __file__, {"workers": workers, **asdict(taken)}, "torch", "transformers")
            if args.ceiling:
                with ThreadPoolExecutor(args.workers) as pool:
                    outs = [Path(name) / f"apart-{repeat}-{number}" for number in range(args.workers)]
                    side = [*pool.map(lambda out: run(args.config, args.rounds, 1, out), outs)]
                apart += [taken.seconds for taken in side]
                once = {"workers": 1, "at_once": args.workers, "seconds": [taken.seconds for taken in side]}
                keep(args, __file__, once, "torch", "transformers")
    alone, together = (median(taken.seconds for taken in found[workers]) for workers in found)
    same = len({taken.result for runs in found.values() for taken in runs}) == 1
    print(f"\n{args.workers} workers: {alone / together:.2f} times as fast; model/ and metrics ", end="")
    print("the same byte for byte" if same else "DIFFER")
    if apart:
        told = f"{args.workers} runs of one worker at once, which share nothing: {median(apart):.2f} s a round"
        print(f"{told}, {args.workers * alone / median(apart):.2f} times as fast as one after the other")
    sys.exit(not same)


def evaluation(config: str, workers: int, repeats: int) -> tuple[float, float]:
    """Seconds of an evaluation, and of that how long a core was idle."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fedalign-workers-") as name:
        prepared = prepare(load_config(Path(config), [f"run.workers={workers}"]), Path(name))
        weights = prepared.initial_weights(Heap(None))
        found = []
        for _ in range(repeats):
            started, before = time.monotonic(), children() + time.process_time()
            prepared.evaluate(weights)
            wall, cpu = time.monotonic() - started, children() + time.process_time() - before
            found.append((wall, wall - cpu / workers))
    wall, idle = (median(row[i] for row in found) for i in (0, 1))
    print(f"evaluation, {workers} workers: {wall:.2f} s, {idle:.2f} s of it idle on average; {repeats} times, medians")
    return wall, idle


def run(config: str, rounds: int, workers: int, out: Path) -> Taken:
    """One `fedalign run`."""
    settings = (f"run.rounds={rounds}", f"run.workers={workers}", "run.threads=1", "tracking.loggers=[]")
    command = [sys.executable, "-m", "fedalign", "run", config, "--out", str(out), "--no-check"]
    before, started, peak, marks = children(), time.monotonic(), 0, [(0.0, 0.0)]
    with subprocess.Popen(
        [*command, *(part for setting in settings for part in ("--set", setting))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    ) as process:
        first = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, memory(first))
            if (out / "checkpoint" / "round-00001").exists() and not (out / "summary.json").exists():
                marks.append((time.monotonic(), used(first)))
            time.sleep(0.2)
        if process.returncode:
            raise SystemExit(f"it ended with exit code {process.returncode}")
    seconds = [line["round_seconds"] for line in lines(out) if line["round"] > 1]
    wall, cpu = (marks[-1][i] - marks[min(1, len(marks) - 1)][i] for i in (0, 1))
    return Taken(
        median(seconds), time.monotonic() - started, children() - before, cpu / max(wall, 1e-9), peak, digest(out)
    )


def memory(first: psutil.Process) -> int:
    """The sum of PSS of a process and those that it started, in bytes."""
    total = 0
    for process in (first, *offspring(first)):
        with suppress(OSError):  # it has just ended
            rows = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
            total += 1024 * sum(int(row.split()[1]) for row in rows if row.startswith("Pss:"))
    return total


def used(first: psutil.Process) -> float:
    """CPU seconds of a process and those that it started, ended ones too."""
    total = 0.0
    for process in (first, *offspring(first)):
        try:
            total += sum(process.cpu_times()[:4] if process is first else process.cpu_times()[:2])
        except psutil.Error:
            continue
    return total


def offspring(first: psutil.Process) -> list[psutil.Process]:
    """The processes that it started and that are still there."""
    found: list[psutil.Process] = []
    with suppress(psutil.Error):
        found += first.children(recursive=True)
    return found


def children() -> float:
    """CPU seconds of all ended children of this process, and theirs."""
    taken = resource.getrusage(resource.RUSAGE_CHILDREN)
    return taken.ru_utime + taken.ru_stime


def lines(out: Path) -> list[dict[str, Any]]:
    """The rounds of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def digest(out: Path) -> str:
    """Of all that a run with the same numbers has in common."""
    found = hashlib.sha256()
    for file in sorted(file for file in (out / "model").rglob("*") if file.is_file()):
        found.update(file.name.encode() + file.read_bytes())
    for line in lines(out):
        found.update(json.dumps({k: v for k, v in line.items() if not k.endswith("seconds")}).encode())
    return found.hexdigest()


if __name__ == "__main__":
    main()
