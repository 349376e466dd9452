"""Runs side by side: each an ordinary `fedalign run` in a process of its own, watched through its metrics.jsonl."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Literal, Protocol

import torch

from fedalign.compare.plan import Cell
from fedalign.config.run import Config
from fedalign.federation.workers import cores
from fedalign.parallel import SPLIT
from fedalign.protocol import Metrics
from fedalign.server.results import RunFolder, read_history

LOOK = 0.2  # seconds between two looks at the children
GRACE = 10.0  # seconds that a child has to end


@dataclass
class Task:
    """One run on its way."""

    cell: Cell
    folder: RunFolder
    log: Path
    state: Literal["waiting", "running", "finished", "failed"] = "waiting"
    history: Sequence[Metrics] = ()
    reason: str = ""  # why it failed
    killed: bool = False  # by a signal, which says nothing of its settings
    seconds: float = 0.0  # of this attempt
    started: float = field(default=0.0, repr=False)

    @property
    def rounds_left(self) -> int:
        """Rounds that are still to do."""
        done = int(self.history[-1]["round"]) if self.history else 0
        return self.cell.config.run.rounds - done


class Watcher(Protocol):
    """Whoever wants to know how the runs go."""

    def look(self) -> None:
        """Called a few times a second."""

    def ended(self, task: Task) -> None:
        """A run has finished or failed."""


Command = Callable[[Task], list[str]]
Slot = dict[str, str]  # what the environment of a run says about its place: which GPU


def run_command(task: Task) -> list[str]:
    """A new run and one that broke off alike: its folder has a configuration, and perhaps complete rounds."""
    return [sys.executable, "-m", "fedalign", "run", "--resume", str(task.folder.path)]


def run_all(
    tasks: Sequence[Task],
    slots: Sequence[Slot],
    watch: Watcher,
    held: Sequence[int] = (),
    command: Command = run_command,
) -> None:
    """Run what is waiting, as many at a time as there are slots; one that fails does not stop the others.

    Args:
        tasks: the runs; their state is kept up to date.
        slots: one for each run that may go on at a time.
        watch: told how it goes.
        held: file descriptors that the children keep open.
        command: what to start.

    Raises:
        KeyboardInterrupt: Ctrl-C, or somebody ended this process; no child is left.
    """
    waiting = deque(task for task in tasks if task.state == "waiting")
    free = list(reversed(slots))
    running: dict[subprocess.Popen[bytes], tuple[Task, Slot]] = {}
    with _ending(running):
        while waiting or running:
            while waiting and free:
                slot, task = free.pop(), waiting.popleft()
                running[_start(task, slot, held, command)] = (task, slot)
            time.sleep(LOOK)
            for process, (task, slot) in list(running.items()):
                code = process.poll()
                task.history = read_history(task.folder) or task.history
                if code is not None:
                    del running[process]
                    free.append(slot)
                    _conclude(task, code)
                    watch.ended(task)
            watch.look()


def slots_for(config: Config, jobs: int | None) -> list[Slot]:
    """As many runs at a time as there are GPUs or, with their threads and workers, cores; or `jobs`, GPUs in turns."""
    if config.run.device not in ("auto", "cuda") or not torch.cuda.is_available():
        busy = max(1, config.run.threads) * config.run.workers
        together = 1 if config.run.device.startswith(("cuda", SPLIT)) else cores() // busy
        return [{}] * max(1, jobs or together)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    return [{"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} for job in range(jobs or len(gpus))]


def _start(task: Task, slot: Slot, held: Sequence[int], command: Command) -> subprocess.Popen[bytes]:
    if not task.folder.config.exists():
        task.folder.begin(task.cell.config)
    task.log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, task.cell.config.run.threads)), "PYTHONUNBUFFERED": "1"}
    task.state, task.started = "running", time.monotonic()
    with task.log.open("wb") as log:
        return _popen(command(task), os.environ | threads | slot, log, held)


def _popen(
    command: list[str], environment: dict[str, str], log: IO[bytes], held: Sequence[int]
) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C in the terminal reaches this process alone."""
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=held,
        start_new_session=True,
    )


def _conclude(task: Task, code: int) -> None:
    task.seconds = time.monotonic() - task.started
    if code == 0 and task.folder.summary.exists():
        task.state = "finished"
    else:
        task.state, task.reason, task.killed = "failed", reason_of(code, task.log), code < 0


def reason_of(code: int, log: Path) -> str:
    """Why a run ended: its own message, or the signal that ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        memory = "; if memory ran out, give fewer --jobs" if code == -signal.SIGKILL else ""
        return f"ended by {name}{memory}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [i for i, line in enumerate(lines) if line.startswith("Error: ")]
    if told:
        return " ".join(lines[told[-1] :]).removeprefix("Error: ")
    return lines[-1] if lines else f"exit code {code}, and it said nothing"


@contextlib.contextmanager
def _ending(running: dict[subprocess.Popen[bytes], tuple[Task, Slot]]) -> Iterator[None]:
    """The children end with the block, however it ends; complete rounds are on disk."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    kinds = [kind for kind in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(kind) == signal.SIG_DFL]
    for kind in kinds:
        signal.signal(kind, interrupt)
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for kind in kinds:
            signal.signal(kind, signal.SIG_DFL)
