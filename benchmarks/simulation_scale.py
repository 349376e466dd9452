"""Many registered clients, few of them asked each round: Flower's simulation against the in-process engine.

The demo's model on the embedded docstrings, dealt to `--clients` clients. The same configuration, seed and machine, one
engine after the other; both give the same model, which is checked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from watching import PeakMemory, descendants_of_this, machine


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--sampled", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=15, help="of a client, on average")
    parser.add_argument("--workers", type=int, default=1, help="processes of the simulation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(machine("torch", "transformers", "flwr", "ray"))
    print(f"{args.clients} clients, {args.sampled} a round, {args.rounds} rounds, seed {args.seed}\n")
    print(f"{'engine':<12} {'s a round, median':>18} {'s in all':>9} {'peak MiB, all processes':>24}  model")
    out = Path(tempfile.mkdtemp(prefix="fedalign-scale-"))
    for engine in ("in_process", "simulation"):
        print(measure(args, engine, out / engine), flush=True)
    shutil.rmtree(out)


def measure(args: argparse.Namespace, engine: str, out: Path) -> str:
    """One row of the table."""
    settings = {
        "run.rounds": args.rounds,
        "run.seed": args.seed,
        "run.threads": 1,
        "data.max_train": args.clients * args.examples,
        "data.max_test": 50,
        "clients.count": args.clients,
        "clients.partition": "iid",
        "clients.min_examples": 2,
        "clients.sample": args.sampled / args.clients,
        "evaluation.clients": "false",
        "evaluation.every": args.rounds,
        "tracking.loggers": "[]",
        "federation.engine": engine,
        "federation.min_sites": args.clients,
        "federation.workers": args.workers,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    started = time.perf_counter()
    with PeakMemory(descendants_of_this) as peak:
        subprocess.run(
            [sys.executable, "-m", "fedalign", "run", "demo", "--out", str(out), *overrides],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    seconds = time.perf_counter() - started
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rounds = sorted(line["round_seconds"] for line in lines if "round_seconds" in line)
    digest = hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()[:12]
    return f"{engine:<12} {rounds[len(rounds) // 2]:>18.1f} {seconds:>9.0f} {peak.together / 2**20:>24.0f}  {digest}"


if __name__ == "__main__":
    main()
