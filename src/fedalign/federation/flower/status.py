"""How the coordinator's process tells whoever watches the run folder how it goes."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from fedalign.files import LOCK, held_by, write_text
from fedalign.protocol import Layout, Plan, Statistics
from fedalign.server.checkpoint import ServerState

OVER = ("failed", "complete")


@dataclass(frozen=True)
class Status:
    """The state of a run."""

    state: Literal["starting", "running", "failed", "complete"] = "starting"
    pid: int = 0
    round: int = 0
    stage: str = "waiting for sites"
    done: int = 0
    total: int = 1
    error: str = ""
    transfer: str = ""  # how far it is that weights or updates travel, how fast, and how long it will take
    note: str = ""  # what a person should know of the run's sites


class Beacon:
    """A `server.rounds.Observer` that writes what happens to `status.json`."""

    def __init__(self, folder: Path) -> None:
        self.path = status_file(folder)
        self.note = ""
        self._last = Status()

    def begin(self) -> None:
        """The run is on."""
        self._write(Status("running", os.getpid(), note=self.note))

    def progress(self, round: int, stage: str, done: int, total: int) -> None:
        """Say so at once: who watches waits for the last of them, and wants to know how many are missing."""
        self._write(Status("running", os.getpid(), round, stage, done, total, note=self.note))

    def moving(self, line: str) -> None:
        """Say how a transfer goes; empty: it is over."""
        self._write(replace(self._last, transfer=line))

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
        self._last = status
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


def is_running(folder: Path) -> bool:
    """Whether a coordinator holds the run folder."""
    return held_by(folder / LOCK) is not None


def holder(folder: Path) -> int | None:
    """The pid of the coordinator that holds the run folder, if it is on this machine."""
    found = re.fullmatch(r"process (\d+) on (.*)", held_by(folder / LOCK) or "")
    return int(found[1]) if found and found[2] == socket.gethostname() else None
