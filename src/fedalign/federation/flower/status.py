"""How the coordinator's process tells whoever watches the run folder how it goes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fedalign.errors import UserError
from fedalign.files import LOCK, write_text
from fedalign.protocol import Layout, Plan, Statistics
from fedalign.server.checkpoint import ServerState

PATIENCE = 1.0  # seconds that a run folder may be held before another coordinator is said to run it


@dataclass(frozen=True)
class Status:
    """What a run is doing."""

    state: Literal["starting", "running", "failed", "complete"] = "starting"
    pid: int = 0
    round: int = 0
    stage: str = "waiting for sites"
    done: int = 0
    total: int = 1
    error: str = ""
    note: str = ""  # what a person should know of the run's sites


class Beacon:
    """A `server.rounds.Observer` that writes what happens to `status.json`."""

    def __init__(self, folder: Path) -> None:
        self.path = status_file(folder)
        self.note = ""

    def begin(self) -> None:
        """The run is on."""
        self._write(Status("running", os.getpid(), note=self.note))

    def progress(self, round: int, stage: str, done: int, total: int) -> None:
        """Say so at once: who watches waits for the last of them, and wants to know how many are missing."""
        self._write(Status("running", os.getpid(), round, stage, done, total, note=self.note))

    def planned(self, round: int, reports: Sequence[Statistics], plan: Plan, layout: Layout) -> None:
        """Nothing: the health files have it."""

    def completed(self, state: ServerState, improved: bool) -> None:
        """Nothing: metrics.jsonl has it."""

    def end(self) -> None:
        """The run is complete."""
        self._write(Status("complete", os.getpid(), note=self.note))

    def fail(self, error: str) -> None:
        """The run has ended before its time."""
        self._write(Status("failed", os.getpid(), error=error))

    def _write(self, status: Status) -> None:
        write_text(self.path, json.dumps(asdict(status)))


def status_file(folder: Path) -> Path:
    """Where the status of a run stands."""
    return folder / "status.json"


def read_status(folder: Path) -> Status:
    """The latest status; that of a run not yet begun if there is none."""
    try:
        return Status(**json.loads(status_file(folder).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Status()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[None]:
    """Hold the run folder: one coordinator at a time.

    Raises:
        UserError: Another process runs it.
    """
    with (folder / LOCK).open("w") as lock:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # perhaps for a moment only: somebody looks whether it is held
                if time.monotonic() > deadline:
                    raise UserError(f"run {str(folder)!r}: another coordinator is running it. End it first.") from None
                time.sleep(0.02)
        yield


def is_running(folder: Path) -> bool:
    """Whether a coordinator holds the run folder."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
