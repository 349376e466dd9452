"""Processes started for a run or a site, wherever Flower and Ray have put them: they are found again and ended.

Both start programs in sessions of their own, which outlive a signal to the group of the first one. An environment is
inherited by all of them; what overwrites its own is found by descent, and once found it is known.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

import psutil

MARK = "FEDALIGN_STARTED_FOR"  # names in a process's environment what it was started for
PATIENCE = 5.0  # seconds to end in good order


def offspring(mark: str) -> set[psutil.Process]:
    """The processes that live and were started for `mark`, with their descendants; not this one."""
    every = {process.pid: process for process in psutil.process_iter(["pid", "ppid", "status", "environ"])}
    living = {pid: p.info["ppid"] for pid, p in every.items() if p.info["status"] != psutil.STATUS_ZOMBIE}
    found = {pid for pid in living if (every[pid].info["environ"] or {}).get(MARK) == mark}  # None: another user's
    grown = True
    while grown:
        young = {pid for pid, parent in living.items() if parent in found} - found
        found |= young
        grown = bool(young)
    return {every[pid] for pid in found - {os.getpid()}}


def end_all(mark: str, patience: float = PATIENCE) -> None:
    """End the offspring of `mark` by SIGTERM, and after some seconds by SIGKILL; return when none is left."""
    known: set[psutil.Process] = set()
    deadline = time.monotonic() + patience
    try:
        while time.monotonic() < deadline and (left := _left(mark, known)):
            for process in left - known:
                with suppress(psutil.Error):
                    process.terminate()
            known |= left
            psutil.wait_procs(left, timeout=0.1)
    finally:  # a second Ctrl-C arrives here as well
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and (left := _left(mark, known)):
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            known |= left
            psutil.wait_procs(left, timeout=0.1)


def _left(mark: str, known: set[psutil.Process]) -> set[psutil.Process]:
    return offspring(mark) | {process for process in known if _lives(process)}


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
