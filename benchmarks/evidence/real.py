"""A real pretrained model under LoRA: the most valuable runs first, stopped by the clock, gone on with later.

    python benchmarks/base_model.py --out runs/smollm2-moe        # the model, from a file or downloaded once
    python benchmarks/evidence/data.py DATA                       # the data
    python benchmarks/evidence/real.py --scan --minutes 10        # which learning rate, and whether anything is learnt
    python benchmarks/evidence/real.py --minutes 60 --jobs 4      # cells; call it again for more

SmolLM2-135M-Instruct, upcycled (six of its layers get four experts), on AG News dealt out by label (Dirichlet 0.1) and
on CLINC150, a client a domain: 2,000 examples, 10 clients, 25 rounds, LoRA. A cell is a data set, a line and a seed.
Cells of seed 0 come first, the lines in turn on both data sets, then the next seed. A cell that is finished is never
made again; one that the clock cut off goes on after its last complete round. A new one begins only if what is known of
rounds like its own says that it will be finished in time, or with --partial. Nothing is downloaded.

The lines are spelt out in LINES, with every option that tells them apart. Embeddings are frozen under LoRA, so there
are no token rows here: `by_use` is FedAvg with experts by load, and `vocabulary` says nothing. Learning rates are those
that --scan found best for FedAvg, else --rate. A regime counts only if FedAvg gains something over the start there,
and pooled training at least 15 points; --scan says so.

Disks stay small: adapters travel and lie on disk in bfloat16, two rounds of them, and a finished cell keeps its numbers
alone. --checks runs what `checks.py` has: what only a GPU shows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from tables import table

from fedalign.compare.statistics import Interval, mean_interval, paired_interval
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.federation.in_process import prepare
from fedalign.files import write_text
from fedalign.moe.load import quiet
from fedalign.protocol import Layout, Metrics, Plan, Statistics
from fedalign.server.checkpoint import ServerState
from fedalign.server.results import RunFolder, read_history, versions
from fedalign.server.run import execute

LINES: Mapping[str, tuple[str, ...]] = {  # every option that tells the lines apart, whatever the defaults are
    "fedavg": ("name=fedavg",),
    "by_use": ("name=by_use", "min_holders=2", "gate=average", "reg_strength=0.0", "experts=load", "vocabulary=tokens"),
    "fedalign_moe": (
        *("name=fedalign_moe", "gate=rows", "gate_weights=consistency", "size_weighted=true"),
        *("reg_strength=0.1", "granularity=batch", "form=bregman"),
        *("experts=semantic", "min_agreement=0.0", "vocabulary=tokens"),
    ),
    "fedalign_paper": (
        *("name=fedalign_paper", "gate=rows", "gate_weights=consistency", "size_weighted=false"),
        *("reg_strength=0.1", "granularity=token", "form=kl"),
        *("experts=semantic", "min_agreement=0.5", "vocabulary=average"),
    ),
    "centralised": ("name=centralised",),  # the upper bound: of the scan, and of the cells if it is asked for
}
MAIN = ("fedavg", "by_use", "fedalign_moe", "fedalign_paper")
BASELINE = "fedavg"
DATA: Mapping[str, tuple[str, ...]] = {  # the folder that data.py wrote, and what is set
    "ag_news": ("label_skew", "clients.partition=dirichlet", "clients.alpha=0.1", "clients.count=10"),
    "clinc150": ("domain", "clients.partition=natural"),
}
COMMON = (
    "data.kind=classification",
    "clients.min_examples=5",
    "clients.held_out=0.0",
    "evaluation.clients=false",
    "training.batch_examples=32",
    "tuning.kind=lora",
    "tuning.dtype=bfloat16",
    "wire.dtype=bfloat16",  # no float32 copies of updates on the disk
    "tracking.loggers=[]",
    "tracking.health=off",
    "run.threads=1",
)
RATES = ("3e-4", "1e-3", "3e-3")
SCAN_SEED = 1000  # used for nothing else
LEAST_POOLED_GAIN = 0.15  # what pooled training has to gain over the start for a regime to count
ABOUT, SCAN = "about.json", "scan.json"
LOOK, GRACE = 0.5, 5.0  # seconds between two looks at the clock; and before its end, to stop what runs


@dataclass(frozen=True)
class Cell:
    """One run."""

    data: str
    line: str
    rate: str
    seed: int
    config: Config
    folder: RunFolder

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.data}, {self.line}, {self.rate}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        """Whether it has nothing left to do."""
        return self.folder.summary.exists()

    @property
    def history(self) -> Sequence[Metrics]:
        """Its rounds so far, of those that are asked for; the first entry is the start."""
        return read_history(self.folder)[: self.config.run.rounds + 1]

    @property
    def complete(self) -> bool:
        """Whether all rounds that are asked for are there; it may have been made for more."""
        return len(self.history) > self.config.run.rounds

    @property
    def rounds_left(self) -> int:
        """How many are still to be made."""
        return self.config.run.rounds - max(0, len(self.history) - 1)

    @property
    def about(self) -> dict[str, Any]:
        """What it was made on."""
        file = self.folder.path / ABOUT
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return found


@dataclass(frozen=True)
class Study:
    """What all cells have in common."""

    model: str
    data: Path
    out: Path
    rounds: int
    examples: int
    tests: int
    device: str
    more: tuple[str, ...] = ()

    def cell(self, place: str, data: str, line: str, rate: str, seed: int, *settings: str) -> Cell:
        """A run in OUT/PLACE; later settings win."""
        folder, *own = DATA[data]
        overrides = [
            f'model.path="{self.model}"',
            f'data.train="{self.data / folder / "train.jsonl"}"',
            f'data.test="{self.data / folder / "test.jsonl"}"',
            f"data.max_train={self.examples}",
            f"data.max_test={self.tests}",
            *COMMON,
            *own,
            f"run.device={self.device}",
            f"run.rounds={self.rounds}",
            f"run.seed={seed}",
            f"training.learning_rate={rate}",
            *(f"algorithm.{option}" for option in LINES[line]),
            *self.more,
            *settings,
        ]
        path = self.out / place / data / line / f"rate-{rate}" / f"seed-{seed}"
        return Cell(data, line, rate, seed, load_config(None, overrides), RunFolder(path))

    def cells(self, data: Sequence[str], lines: Sequence[str], seeds: int, rates: Mapping[str, str]) -> Iterator[Cell]:
        """The most valuable first."""
        for seed in range(seeds):
            for line in lines:
                for name in data:
                    yield self.cell("cells", name, line, rates[name], seed)

    def scan(self, data: Sequence[str], rates: Sequence[str]) -> Iterator[Cell]:
        """FedAvg at each rate and pooled training at the middle one, scored on a validation part."""
        look = (f"data.max_train={self.examples * 3 // 2}", f"data.validation={1 / 3}", "evaluation.part=validation")
        tried = [*((BASELINE, rate) for rate in rates), ("centralised", rates[len(rates) // 2])]
        for line, rate in tried:
            for name in data:
                yield self.cell("scan", name, line, rate, SCAN_SEED, *look)


def settings_of(config: Config) -> dict[str, Any]:
    """What must be the same for a cell to be gone on with; the device may change."""
    tables: dict[str, Any] = config.model_dump(mode="json")
    for key in ("device", "threads"):
        del tables["run"][key]
    return tables


def refuse_others(cells: Iterable[Cell]) -> None:
    """Cells that are there must be what is asked for.

    Raises:
        SystemExit: One was made with other settings.
    """
    for cell in cells:
        if cell.folder.config.exists():
            before, now = settings_of(load_config(cell.folder.config)), settings_of(cell.config)
            for section, values in now.items():
                if before[section] != values:
                    raise SystemExit(
                        f"{cell.folder.path}: was made with [{section}] {before[section]}, asked for is {values}. "
                        "Give another --out, or the settings of before."
                    )


# ---------------------------------------------------------------------------------------------------------- the clock


@dataclass
class Clock:
    """What is left of the minutes that were given."""

    minutes: float
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - (time.monotonic() - self.started)


@dataclass
class Pace:
    """How long rounds take here: what was seen since this call began, data set by data set."""

    start_seconds: float = 0.0  # of a process, until its first round
    round_seconds: dict[str, float] = field(default_factory=dict)

    def saw(self, cell: Cell) -> None:
        """Learn from a cell that has run."""
        rounds = [line["round_seconds"] for line in cell.history if "round_seconds" in line]
        if rounds:
            self.round_seconds[cell.data] = max(statistics.median(rounds), self.round_seconds.get(cell.data, 0.0))
        self.start_seconds = max(self.start_seconds, cell.about.get("start_seconds", 0.0))

    def needs(self, cell: Cell) -> float:
        """Seconds until a cell is finished; 0 if nothing is known.

        >>> Pace().needs(Cell("a", "fedavg", "1", 0, load_config(), RunFolder(Path("/nowhere"))))
        0.0
        """
        known = self.round_seconds.get(cell.data)
        return 0.0 if known is None else self.start_seconds + known * cell.rounds_left


@dataclass
class Worker:
    """A cell that runs in a process of its own."""

    cell: Cell
    process: subprocess.Popen[bytes]


def begin(cell: Cell) -> Worker:
    """Start a cell, or go on with it."""
    folder = cell.folder
    folder.path.mkdir(parents=True, exist_ok=True)
    if not folder.config.exists():
        write_text(folder.config, cell.config.to_toml())
    command = [sys.executable, str(Path(__file__).resolve()), "--cell", str(folder.path)]
    command += ["--device", cell.config.run.device]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (folder.path / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return Worker(cell, process)


def stop(workers: Sequence[Worker]) -> None:
    """End what runs; complete rounds are on the disk."""
    for worker in workers:
        worker.process.terminate()
    deadline = time.monotonic() + GRACE
    for worker in workers:
        try:
            worker.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


def run_all(cells: Sequence[Cell], clock: Clock, jobs: int, partial: bool) -> list[str]:
    """Make cells in their order until all are there or the clock says stop; what failed, and why."""
    refuse_others(cells)
    waiting = [cell for cell in cells if not cell.finished]
    running: list[Worker] = []
    failed: list[str] = []
    pace = Pace()
    try:
        while True:
            for cell in list(waiting):
                if len(running) < jobs and clock.left > GRACE and (partial or pace.needs(cell) <= clock.left - GRACE):
                    waiting.remove(cell)
                    running.append(begin(cell))
                    print(f"{60 * clock.minutes - clock.left:6.0f} s: {cell.name}", flush=True)
            if not running or clock.left <= GRACE:
                break
            time.sleep(LOOK)
            for worker in list(running):
                pace.saw(worker.cell)
                if worker.process.poll() is not None:
                    running.remove(worker)
                    failed += conclude(worker)
    finally:
        stop(running)
    cut = [worker.cell for worker in running if not worker.cell.finished]
    for cell in (*cut, *waiting):
        print(f"not finished: {cell.name}, {cell.rounds_left} of {cell.config.run.rounds} rounds to go")
    return failed


def conclude(worker: Worker) -> list[str]:
    """Keep a finished cell's numbers alone; of one that failed, say why."""
    if worker.process.returncode == 0 and worker.cell.finished:
        prune(worker.cell.folder)
        return []
    lines = (worker.cell.folder.path / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = f"{worker.cell.name}: exit code {worker.process.returncode}: {lines[-1] if lines else 'it said nothing'}"
    print(reason, flush=True)
    return [reason]


def prune(folder: RunFolder) -> None:
    """Drop all that a finished cell needs no more."""
    for part in (folder.model, folder.best, folder.checkpoint, folder.clients):
        shutil.rmtree(part, ignore_errors=True)


# --------------------------------------------------------------------------------------------------- one cell's process


class Watch:
    """A `server.Observer` that prints a line a round."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.began = time.monotonic()
        self.start_seconds = 0.0

    def progress(self, round: int, stage: str, done: int, total: int) -> None:
        """When training begins, all is loaded and compiled."""
        if not self.start_seconds and round:
            self.start_seconds = time.monotonic() - self.began

    def planned(self, round: int, reports: Sequence[Statistics], plan: Plan, layout: Layout) -> None:
        """Nothing to see."""

    def completed(self, state: ServerState, improved: bool) -> None:
        """Say how it goes."""
        line = state.history[-1]
        seconds = line.get("round_seconds", 0.0)
        print(f"round {state.round}/{self.rounds}: accuracy {line.get('accuracy')}, {seconds:.1f} s", flush=True)


def work(path: Path, device: str) -> None:
    """Make a cell's rounds in this process, and keep beside them what they were made on."""
    quiet()
    folder = RunFolder(path)
    config = load_config(folder.config, [f"run.device={device}"])
    watch = Watch(config.run.rounds)
    prepared = prepare(config, folder.clients)
    tokens = sum(example.tokens for client in prepared.clients.values() for example in client.train)
    used = prepared.bench.moe.device
    gpu = used.type == "cuda"

    def keep() -> None:
        about = {
            "machine": torch.cuda.get_device_name(used) if gpu else platform.processor() or platform.machine(),
            "versions": versions(),
            "epoch_tokens": tokens,
            "start_seconds": watch.start_seconds,
            "peak_gpu_mib": torch.cuda.max_memory_allocated(used) / 2**20 if gpu else None,
        }
        write_text(path / ABOUT, json.dumps(about, indent=1) + "\n")

    keep()  # a machine may be gone before the end
    try:
        execute(prepared, folder, watch)
    finally:
        keep()


def _interrupt(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


# ----------------------------------------------------------------------------------------------------------- the tables


def accuracy_at(cell: Cell, round: int) -> float | None:
    """After a round; None if it is not there."""
    history = cell.history
    value: float | None = history[round].get("accuracy") if round < len(history) else None
    return value


def late(cell: Cell, name: str) -> float | None:
    """Mean over the second half of the rounds."""
    values = [line[name] for line in cell.history[1:] if name in line]
    return statistics.fmean(values[len(values) // 2 :]) if values else None


def bytes_up(cell: Cell) -> float:
    """A round, clients to server."""
    return statistics.fmean(line["bytes_up"] for line in cell.history[1:])


def pace_of(cell: Cell) -> tuple[float, float | None]:
    """Seconds a round, and tokens a second of training, padding not counted; None: how many there are was not kept."""
    rounds = cell.history[1:]
    tokens = cell.about.get("epoch_tokens")
    trained = statistics.median(line["client_train_seconds"] for line in rounds)
    pace = tokens * cell.config.training.epochs / trained if tokens else None
    return statistics.median(line["round_seconds"] for line in rounds), pace


def told(found: Interval | None, scale: float, digits: int, sign: bool = False) -> str:
    """Mean and half-width, bold where a difference excludes zero.

    >>> told(Interval(0.01, 0.002, 3), 100, 1, sign=True)
    '**+1.0 ± 0.2**'
    """
    if found is None:
        return ""
    text = f"{scale * found.mean:{'+' if sign else ''}.{digits}f}"
    text += f" ± {scale * found.half:.{digits}f}" if found.half is not None else ""
    return f"**{text}**" if sign and found.excludes_zero else text


def marks(rounds: int) -> list[int]:
    """The rounds that tables show: the start, the last, and some between.

    >>> marks(25), marks(2)
    ([0, 1, 5, 10, 15, 20, 25], [0, 1, 2])
    """
    step = max(1, rounds // 5)
    return sorted({0, 1, *range(step, rounds, step), rounds})


def report(cells: Sequence[Cell], rounds: int) -> str:
    """Finished cells in tables, one a data set, then what they were made on; and how far the others are."""
    done = [cell for cell in cells if cell.complete]
    text = []
    for data in dict.fromkeys(cell.data for cell in done):
        text += [f"**{data}**, learning rate {next(c.rate for c in done if c.data == data)}", ""]
        text += [scores([cell for cell in done if cell.data == data], rounds), ""]
    cut = [cell for cell in cells if not cell.complete and len(cell.history) > 1]
    for cell in cut:
        shares = ", ".join(
            f"{100 * value:.1f}" for value in (accuracy_at(cell, mark) for mark in marks(rounds)) if value is not None
        )
        text.append(f"Cut off after {len(cell.history) - 1} rounds: {cell.name}; accuracy {shares}.")
    if done or cut:
        text += ["", provenance([*done, *cut])]
    return "\n".join(text)


def scores(cells: Sequence[Cell], rounds: int) -> str:
    """One data set: a row a line, means over seeds, differences to FedAvg seed by seed."""
    by_line: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        by_line.setdefault(cell.line, {})[cell.seed] = cell
    base = by_line.get(BASELINE, {})
    shown = marks(rounds)
    header = ["", "seeds", *(f"round {mark}" if mark else "start" for mark in shown)]
    header += ["late mean, %", "to FedAvg", "last, to FedAvg", "test loss, late", "to FedAvg"]
    header += ["bytes up", "s a round", "tokens/s", "peak GPU MiB"]
    rows = []
    for line, runs in by_line.items():
        row = [f"`{line}`", ", ".join(map(str, sorted(runs)))]
        row += [told(_mean(accuracy_at(cell, mark) for cell in runs.values()), 100, 1) for mark in shown]
        other = base if line != BASELINE else {}
        row.append(told(_mean(late(cell, "accuracy") for cell in runs.values()), 100, 1))
        row.append(told(_paired(runs, other, lambda cell: late(cell, "accuracy")), 100, 1, sign=True))
        row.append(told(_paired(runs, other, lambda cell: accuracy_at(cell, rounds)), 100, 1, sign=True))
        row.append(told(_mean(late(cell, "loss_nats") for cell in runs.values()), 1, 3))
        row.append(told(_paired(runs, other, lambda cell: late(cell, "loss_nats")), 1, 3, sign=True))
        shares = [bytes_up(cell) / bytes_up(base[seed]) for seed, cell in runs.items() if seed in base]
        row.append(f"{statistics.fmean(shares):.2f}" if shares else "")
        seconds, tokens = zip(*map(pace_of, runs.values()), strict=True)
        known = [pace for pace in tokens if pace is not None]
        peaks = [peak for cell in runs.values() if (peak := cell.about.get("peak_gpu_mib"))]
        row += [f"{statistics.fmean(seconds):.1f}", f"{statistics.fmean(known):,.0f}" if known else ""]
        rows.append([*row, f"{max(peaks):,.0f}" if peaks else ""])
    return table(header, rows)


def _mean(values: Iterable[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return mean_interval(known) if known else None


def _paired(mine: Mapping[int, Cell], base: Mapping[int, Cell], of: Any) -> Interval | None:
    ours, theirs = (
        {seed: value for seed, cell in runs.items() if (value := of(cell)) is not None} for runs in (mine, base)
    )
    return paired_interval(ours, theirs)


def provenance(cells: Sequence[Cell]) -> str:
    """Machines, versions and seeds."""
    known = [cell for cell in cells if cell.about]
    machines = ", ".join(sorted({cell.about["machine"] for cell in known}))
    used = {name: version for cell in known for name, version in cell.about["versions"].items()}
    parts = ", ".join(f"{name} {used[name]}" for name in ("python", "torch", "transformers", "peft") if name in used)
    seeds = ", ".join(map(str, sorted({cell.seed for cell in cells})))
    config = cells[0].config
    part = f"global {config.evaluation.part} set"
    made_on = f"Machine: {machines}; {parts}; seeds" if known else "Machine and versions were not kept; seeds"
    return (
        f"{made_on} {seeds}. {config.data.max_train} examples, {config.run.rounds} rounds, "
        f"batches of {config.training.batch_examples}, base in {config.tuning.dtype}, "
        f"updates in {config.wire.dtype}. Accuracy in %, of the {part}; late: mean over the second half of "
        "the rounds; m ± h: mean over seeds and half-width of the 95 % interval. Seconds are of cells that shared the "
        "machine."
    )


def chosen(cells: Sequence[Cell], study: Study) -> str:
    """A table of the scan; and scan.json, with each data set's learning rate and whether its regime counts."""
    found: dict[str, Any] = {}
    rows = []
    for data in dict.fromkeys(cell.data for cell in cells):
        ends = {
            (cell.line, cell.rate): (accuracy_at(cell, 0), accuracy_at(cell, len(cell.history) - 1), cell)
            for cell in cells
            if cell.data == data and len(cell.history) > 1
        }
        for (line, rate), (start, end, cell) in ends.items():
            if start is not None and end is not None:
                losses = cell.history[0]["loss_nats"], cell.history[-1]["loss_nats"]
                row = [data, f"`{line}`", rate, str(len(cell.history) - 1), f"{100 * start:.1f}", f"{100 * end:.1f}"]
                rows.append([*row, f"{losses[0]:.3f}", f"{losses[1]:.3f}"])
        gains = {key: end - start for key, (start, end, _) in ends.items() if start is not None and end is not None}
        mine = {rate: gain for (line, rate), gain in gains.items() if line == BASELINE}
        pooled = [gain for (line, _), gain in gains.items() if line != BASELINE]
        if mine:
            rate = max(mine, key=lambda one: mine[one])
            counts = mine[rate] > 0 and max(pooled, default=0.0) >= LEAST_POOLED_GAIN
            best = {"rate": rate, "fedavg_gain": mine[rate], "pooled_gain": max(pooled, default=None)}
            found[data] = best | {"counts": counts}
    if found:
        write_text(study.out / SCAN, json.dumps(found, indent=1) + "\n")
    lines = [
        f"{data}: learning rate {about['rate']}; FedAvg {100 * about['fedavg_gain']:+.1f} points"
        + (f", pooled {100 * about['pooled_gain']:+.1f}" if about["pooled_gain"] is not None else "")
        + ("." if about["counts"] else ". The regime does not count.")
        for data, about in found.items()
    ]
    header = ["scan", "", "rate", "rounds", "start, %", "end, %", "loss, start", "end"]
    text = "\n".join([table(header, rows), "", *lines])
    started = [cell for cell in cells if len(cell.history) > 1]
    return f"{text}\n\n{provenance(started)}" if started else text


def rates_of(out: Path, data: Sequence[str], given: str | None, default: str = RATES[1]) -> dict[str, str]:
    """What --rate says, else the scan, else the middle of those it would try."""
    file = out / SCAN
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: given or found.get(name, {}).get("rate", default) for name in data}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  real.py --scan --minutes 5 --jobs 8              # six rounds: FedAvg at three rates, pooled training at one
  real.py --minutes 9 --jobs 8 --seeds 2           # cells; call it again until all are there
  real.py --minutes 9 --only 'ag_news/*' --partial # begin what will not be finished, too
  real.py --table --seeds 2                        # what there is so far
  real.py --table --rounds 15                      # of cells that have as many rounds, those and no more
  real.py --checks                                 # what only a GPU shows; --checks step,qlora for some of it
  real.py --minutes 1 --model demo --rounds 2 --examples 60 --tests 40   # a rehearsal on a CPU""",
    )
    found.add_argument("--minutes", type=float, help="stop by then")
    found.add_argument("--scan", action="store_true", help="learning rates, and whether the regimes count")
    found.add_argument("--table", action="store_true", help="make nothing, print what there is")
    found.add_argument(
        "--checks", nargs="?", const="all", metavar="NAMES", help="run checks.py: all, or some by commas"
    )
    found.add_argument("--model", default="runs/smollm2-moe", help='a folder that base_model.py wrote, or "demo"')
    found.add_argument("--data", type=Path, default=Path("runs/evidence/data"), help="what data.py wrote")
    found.add_argument("--out", type=Path, default=Path("runs/evidence/real"), help="in memory where disks are slow")
    found.add_argument("--device", default="auto")
    found.add_argument("--jobs", type=int, default=1, help="cells side by side; a GPU can take several")
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--lines", default=",".join(MAIN), help=f"some of: {', '.join(LINES)}")
    found.add_argument("--only", default="*", help="cells whose DATA/LINE fits the pattern")
    found.add_argument("--partial", action="store_true", help="begin cells that will not be finished in time, too")
    found.add_argument("--rate", help="instead of what the scan found")
    found.add_argument("--rates", default=",".join(RATES), help="that the scan tries")
    found.add_argument("--rounds", type=int, help="25, of the scan 6")
    found.add_argument("--examples", type=int, default=2000)
    found.add_argument("--tests", type=int, default=1200, help="at most")
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every run; may be repeated")
    found.add_argument("--cell", type=Path, help=argparse.SUPPRESS)  # what it calls itself with
    return found


def main() -> None:
    """Do what is asked for."""
    args = parser().parse_args()
    if args.cell is not None:
        signal.signal(signal.SIGTERM, _interrupt)  # so that what the rounds were made on is kept
        work(args.cell, args.device)
        return
    if args.checks is not None:
        import checks  # noqa: PLC0415 - only they need torch's profiler and process groups

        checks.run(args.checks, args.model, args.device, args.out / "checks")
        return
    lines = args.lines.split(",")
    if unknown := [line for line in lines if line not in LINES]:
        raise SystemExit(f"--lines {unknown[0]}: unknown. Choose some of: {', '.join(LINES)}.")
    if args.minutes is None and not args.table:
        raise SystemExit("--minutes: how long? Or --table to see what there is, or --checks.")
    rounds = args.rounds or (6 if args.scan else 25)
    study = Study(args.model, args.data, args.out, rounds, args.examples, args.tests, args.device, tuple(args.set))
    if args.scan:
        cells = list(study.scan(list(DATA), args.rates.split(",")))
    else:
        cells = list(study.cells(list(DATA), lines, args.seeds, rates_of(args.out, list(DATA), args.rate)))
    cells = [cell for cell in cells if fnmatch(f"{cell.data}/{cell.line}", args.only)]
    failed = [] if args.table else run_all(cells, Clock(args.minutes), args.jobs, args.partial)
    print(f"\n{chosen(cells, study) if args.scan else report(cells, rounds)}")
    if failed:
        raise SystemExit("\n".join(["", "failed:", *failed]))


if __name__ == "__main__":
    main()
