"""What the other benchmarks here share: peak memory of Flower's processes by role, and the machine in words."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self

ROLES = {
    "flwr-serverapp": "coordinator (ServerApp)",
    "flwr-clientapp": "site (ClientApp)",
    "flwr-simulation": "simulation (ServerApp and engine)",
    "ClientAppActor": "simulated clients (Ray actor)",
    "ray": "Ray's own processes",
    "flower-superlink": "SuperLink",
    "flower-supernode": "SuperNode",
    "flower.supernode": "SuperNode",
    "flower.ready": "site (ClientApp)",
    "fedalign site serve": "site (warm trainer)",
}


class PeakMemory:
    """While the block runs: the highest resident memory of any process of each role below `roots`, in bytes."""

    def __init__(self, roots: Callable[[], Iterable[int]], seconds: float = 0.3) -> None:
        self.roots = roots
        self.seconds = seconds
        self.by_role: dict[str, int] = {}
        self.anonymous_by_role: dict[str, int] = {}  # of these, what is no page of a file
        self.together = 0  # of all of them at one moment; shared pages count for each
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self.seconds):
            self._look()

    def _look(self) -> None:
        listing = subprocess.run(
            ["ps", "-axww", "-opid=,ppid=,rss=,command="], capture_output=True, text=True, check=True
        ).stdout
        rows = [line.split(None, 3) for line in listing.splitlines()]
        table = {int(row[0]): (int(row[1]), 1024 * int(row[2]), row[3]) for row in rows if len(row) == 4}
        members, grown = set(self.roots()) & table.keys(), True
        while grown:
            found = {pid for pid, (parent, _, _) in table.items() if parent in members} - members
            members |= found
            grown = bool(found)
        self.together = max(self.together, sum(table[pid][1] for pid in members))
        for pid in members:
            _, resident, command = table[pid]
            role = next((name for mark, name in ROLES.items() if mark in command), None)
            if role:
                self.by_role[role] = max(self.by_role.get(role, 0), resident)
                self.anonymous_by_role[role] = max(self.anonymous_by_role.get(role, 0), anonymous(pid))


def anonymous(pid: int) -> int:
    """Bytes of a process's memory that belong to no file; 0 where the kernel does not tell, or it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def descendants_of_this() -> list[int]:
    """The roots of a benchmark that starts everything itself."""
    return [os.getpid()]


def machine(*packages: str) -> str:
    """Machine and versions, for the head of a table."""
    model = "unknown CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"
