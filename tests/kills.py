"""Runs and exports killed by SIGKILL, or left without a disk: what they leave is made whole again.

`python -m tests.kills` kills 100 times at a random moment and 40 times at an operation on a file, and lets the disk be
full 20 times from some operation or size of a file on, which must be told in one line. Afterwards the same command, or
`--resume` where there is a run, ends; then `model/`, `best/` and what is exported of them, cards included, are byte for
byte those of a run that nothing happened to, and metrics.jsonl holds its numbers. Attempts are forked from a process
that has loaded the libraries and nothing else; the first is compared with one in a process of its own.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from fedalign.cli.main import main as fedalign
from fedalign.files import LOCK, MARK, WATCH
from fedalign.moe.load import quiet
from tests.conftest import rows, save_tokenizer, write_jsonl
from tests.moe.tiny import build

WRITING = ("open", "os.rename", "os.mkdir")  # as Python's audit hooks call operations
OPERATIONS = (*WRITING, "os.remove", "os.rmdir")
TRIES = 10  # to kill before the end
PATIENCE = 120.0  # seconds for one attempt
SETTINGS = (
    *("clients.count=2", "clients.alpha=1.0", "clients.min_examples=5", "data.max_train=40", "statistics.min_tokens=4"),
    *("training.learning_rate=1e-2", "run.rounds=3", "run.check=false", "algorithm.name=fedavg", "run.device=cpu"),
)
EXPORTS = ((), ("--best",))
IMPORTED = (  # before a fork
    *("fedalign.export.write", "fedalign.federation.in_process"),
    *("flwr_datasets.partitioner", "torch.utils.tensorboard", "jinja2.ext", "peft"),
)
Fate = Callable[[], object]  # what a child does before it begins


@dataclass(frozen=True)
class Attempt:
    """How one command ended."""

    killed: bool
    code: int
    said: str
    seconds: float


def attempt(
    arguments: Sequence[str | Path], log: Path, fate: Fate | None = None, after: float | None = None
) -> Attempt:
    """Run `fedalign` in a forked process, and kill it `after` so many seconds."""
    assert threading.active_count() == 1  # or the child would lack what the others hold
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _in_child([str(argument) for argument in arguments], log, fate)
    deadline = started + (PATIENCE if after is None else after)
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            found = os.waitpid(pid, 0)
            break
        time.sleep(0.001)
    killed = os.WIFSIGNALED(found[1]) and os.WTERMSIG(found[1]) == signal.SIGKILL
    if killed and after is None and fate is None:
        raise AssertionError(f"{arguments}: not done after {PATIENCE} s")
    code = -signal.SIGKILL if killed else os.waitstatus_to_exitcode(found[1])
    return Attempt(killed, code, log.read_text(), time.monotonic() - started)


def _in_child(arguments: list[str], log: Path, fate: Fate | None) -> None:
    code = 1
    try:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.argv = ["fedalign", *arguments]
        if fate is not None:
            fate()
        fedalign()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def at_operation(folder: Path, act: Callable[[int], object], kinds: Sequence[str] = OPERATIONS) -> Fate:
    """Before each operation on a file in `folder`, `act` is told its number; of `WRITING`, before those that write."""

    def begin() -> None:
        numbers = itertools.count(1)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            reads = event == "open" and kinds is WRITING and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in kinds and not reads and _concerns(folder, arguments):
                act(next(numbers))

        fsync = os.fsync

        def flushed(descriptor: int) -> None:
            act(next(numbers))
            fsync(descriptor)

        os.fsync = flushed  # type: ignore[assignment] # all of ours are descriptors
        sys.addaudithook(hook)

    return begin


def _concerns(folder: Path, arguments: tuple[Any, ...]) -> bool:
    """Whether a path is in the folder; relative ones are those of `shutil.rmtree`, which follows descriptors."""
    path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
    in_folder = path.startswith(str(folder)) and Path(path).name not in (LOCK, WATCH)
    return in_folder or (
        bool(path) and not path.startswith("/") and isinstance(arguments[-1], int) and arguments[-1] > 2
    )


def full_from(folder: Path, number: int) -> Fate:
    """From that operation on nothing can be written, made or renamed in `folder`."""

    def act(now: int) -> None:
        if now >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    return at_operation(folder, act, WRITING)


def small_from(size: int) -> Fate:
    """No file can be larger than so many bytes, which libraries in Rust hear too."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def kill_at(number: int) -> Callable[[int], None]:
    """End this process by SIGKILL before that operation."""

    def act(now: int) -> None:
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def content(folder: Path) -> dict[str, bytes]:
    """All that lies in a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def measured(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("seconds")} for line in lines]


@dataclass
class Ground:
    """Where it happens, and what an undisturbed run and its exports came to."""

    place: Path
    dice: random.Random
    whole: dict[str, dict[str, bytes]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.place / "base"
        build("olmoe", vocab_size=384).save_pretrained(model)
        save_tokenizer(model)
        every = rows()
        data = write_jsonl(self.place / "train.jsonl", every[1::2]), write_jsonl(self.place / "test.jsonl", every[::4])
        named = [f"model.path={model}", f"data.train={data[0]}", f"data.test={data[1]}"]
        self.settings = [word for setting in (*SETTINGS, *named) for word in ("--set", setting)]
        self.run = self.place / "whole" / "run"
        self._measure("run", self.fresh(self.run), self.run)
        self.whole |= {kind: content(self.run / kind) for kind in ("model", "best")}
        for flags in EXPORTS:
            to = self.run.parent / "exports" / "".join(("out", *flags))
            self._measure("export", self.export(self.run, to, flags), to.parent)
            self.whole["".join(("out", *flags))] = content(to)

    def fresh(self, run: Path) -> list[str | Path]:
        """The command that makes a run."""
        return ["run", os.devnull, "--out", run, *self.settings]

    def export(self, run: Path, to: Path, flags: Sequence[str]) -> list[str | Path]:
        """The command that exports it."""
        return ["export", run, "--to", to, *flags]

    def _measure(self, name: str, command: Sequence[str | Path], folder: Path) -> None:
        """How long it takes, and how many operations on files."""
        counted = self.place / "counted"

        def count(number: int) -> None:
            with open(counted, "w", encoding="ascii") as file:
                file.write(str(number))

        self.seconds[name] = self.go_on(command, at_operation(folder, count))
        self.operations[name] = int(counted.read_text())

    def go_on(self, command: Sequence[str | Path], fate: Fate | None = None) -> float:
        """Run a command that must not fail; how long it took."""
        if command[0] == "export" and Path(command[3]).exists():
            command = [*command, "--overwrite"]
        done = attempt(command, self.place / "log", fate)
        assert done.code == 0, f"{command}: {done.code}\n{done.said}"
        return done.seconds

    def kill(self, name: str, command: Sequence[str | Path], folder: Path, *, at_random: bool) -> bool:
        """Run a command and kill it, if it does not end first."""
        if at_random:
            moment = self.dice.uniform(0.0, self.seconds[name])
            done = attempt(command, self.place / "log", after=moment)
            if not done.killed:  # it took longer when it was measured
                self.seconds[name] = max(0.1, min(self.seconds[name], done.seconds))
            return done.killed
        number = self.dice.randint(1, self.operations[name])
        return attempt(command, self.place / "log", at_operation(folder, kill_at(number))).killed

    def run_and_kill(self, number: int, *, at_random: bool) -> bool:
        """A run that is killed, in two of three cases again when it is gone on with, and then ends."""
        run = self.place / f"{number}" / "run"
        killed = self.kill("run", self.fresh(run), run, at_random=at_random)
        if self.dice.random() < 0.66:
            killed |= self.kill("run", self.again(run), run, at_random=at_random)
        self.go_on_and_check(run)
        return killed

    def run_on_full_disk(self, number: int) -> bool:
        """A run that cannot write from some moment on, says so in a line, and ends when there is room again."""
        run = self.place / f"{number}" / "run"
        largest = max(map(len, self.whole["model"].values()))
        if self.dice.random() < 0.5:
            fate = small_from(self.dice.choice((10_000, largest // 4, largest - 1000)))  # what it says fits
        else:
            fate = full_from(run, self.dice.randint(1, self.operations["run"] // 2))
        done = attempt(self.fresh(run), self.place / "log", fate)
        assert "Traceback" not in done.said, done.said
        if done.code:
            told, *more = [line for line in done.said.splitlines() if line.startswith("Error: ")] or [""]
            again = (
                f"go on with: fedalign run --resume {run}" if (run / "config.toml").exists() else "Nothing was begun."
            )
            assert done.code == 2, done.code
            assert told.endswith(again), done.said
            assert not more, done.said
            assert os.strerror(errno.ENOSPC) in told or os.strerror(errno.EFBIG) in told, told
        self.go_on_and_check(run)
        return done.code != 0

    def go_on_and_check(self, run: Path) -> None:
        """It ends as if nothing had happened."""
        self.go_on(self.again(run))
        for kind in ("model", "best"):
            assert content(run / kind) == self.whole[kind], f"{run / kind} differs"
        assert measured(run) == measured(self.run), f"{run}: metrics.jsonl differs"
        hidden = {path.name for path in run.rglob(".*")}
        assert hidden <= {MARK, LOCK, WATCH}, f"{run}: {hidden}"
        for flags in EXPORTS:
            self.check_export(run, run.parent / "exports", flags)
        shutil.rmtree(run.parent)

    def again(self, run: Path) -> list[str | Path]:
        """What a person does after a kill."""
        return ["run", "--resume", run] if (run / "config.toml").exists() else self.fresh(run)

    def check_export(self, run: Path, place: Path, flags: Sequence[str]) -> None:
        """Export it, and compare."""
        to = place / "".join(("out", *flags))
        self.go_on(self.export(run, to, flags))
        assert content(to) == self.whole[to.name], f"{to} differs"

    def export_and_kill(self, number: int, *, at_random: bool) -> bool:
        """An export that is killed, over nothing or over another one; it leaves either, and can be repeated."""
        place, flags, over = self.place / f"{number}", self.dice.choice(EXPORTS), self.dice.random() < 0.5
        to = place / "".join(("out", *flags))
        if over:
            shutil.copytree(self.run.parent / "exports" / to.name, to)
            (to / "README.md").write_text("another card")
        there = content(to)
        command = [*self.export(self.run, to, flags), *(["--overwrite"] if over else [])]
        killed = self.kill("export", command, place, at_random=at_random)
        moved = place / f".{to.name}.old"
        assert content(to if to.exists() else moved) in (there, self.whole[to.name]), f"{to} is half of something"
        self.check_export(self.run, place, flags)
        left = {path.name for path in place.iterdir()} - {to.name, f".{to.name}{LOCK}"}
        assert not left, f"{place}: {left}"
        shutil.rmtree(place)
        return killed


def in_a_process_of_its_own(ground: Ground) -> None:
    """What is forked does what a command does."""
    run = ground.place / "own" / "run"
    command = [sys.executable, "-m", "fedalign", *map(str, ground.fresh(run))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for kind in ("model", "best"):
        assert content(run / kind) == ground.whole[kind], f"{kind} of a forked run is another"


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill as often as asked, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=100, help="kills at random moments")
    parser.add_argument("--operations", type=int, default=40, help="kills at file operations")
    parser.add_argument("--full", type=int, default=20, help="disks that are full")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    for module in IMPORTED:
        import_module(module)
    quiet()  # the bars have a thread of their own
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        ground = Ground(Path(place), random.Random(asked.seed))
        if asked.random + asked.operations > 50:
            in_a_process_of_its_own(ground)
        ways: list[tuple[str, Callable[[int], bool]]] = []
        for name, count, at_random in (("random", asked.random, True), ("operation", asked.operations, False)):
            for number in range(count):
                act = ground.export_and_kill if number % 4 == 3 else ground.run_and_kill
                ways.append((name, partial(act, at_random=at_random)))
        ways += [("full", ground.run_on_full_disk)] * asked.full
        counted: Counter[str] = Counter()
        failed: list[str] = []
        for number, (name, way) in enumerate(ways):
            try:
                counted[name] += any(way(number) for _ in range(TRIES))  # one that ends by itself is no kill
            except AssertionError as error:
                failed.append(f"{number} ({name}): {error}")
    if failed:
        sys.exit("\n".join([*failed, f"{len(failed)} of {len(ways)} attempts left something that was not whole."]))
    told = ", ".join(f"{name} {count}" for name, count in counted.items())
    print(f"{len(ways)} attempts, of which did not end by themselves: {told}. What they left was whole in all.")


if __name__ == "__main__":
    main()
