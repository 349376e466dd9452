"""What was started for a run is found and ended, wherever it went."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedalign.federation.flower.offspring import MARK, end_all, offspring

SLEEP = "import time; time.sleep(300)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
FAMILY = """
import subprocess, sys, time
from pathlib import Path
place, (sleep, deaf) = Path(sys.argv[1]), sys.argv[2:]
children = [
    subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True),  # as Flower starts its SuperExec
    subprocess.Popen([sys.executable, "-c", deaf]),
    subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True, env={}),  # as if its title lay over it
]
place.joinpath("children").write_text(" ".join(str(child.pid) for child in children))
if not place.joinpath("orphans").exists():
    time.sleep(300)
"""


def started(mark: str, place: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A process for `mark`, and the pids of its three children."""
    command = [sys.executable, "-c", FAMILY, str(place), SLEEP, DEAF]
    process = subprocess.Popen(command, env={**os.environ, MARK: mark}, start_new_session=True)
    deadline = time.monotonic() + 30
    while not (place / "children").exists() or len(pids := (place / "children").read_text().split()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, [int(pid) for pid in pids]


def living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_all_are_ended_in_sessions_of_their_own_and_deaf_ones_too(tmp_path: Path) -> None:
    mark = str(tmp_path)
    process, children = started(mark, tmp_path)
    try:
        assert {one.pid for one in offspring(mark)} == {process.pid, *children}
        end_all(mark, patience=1.0)
        assert living([process.pid, *children]) == []
    finally:
        for pid in living([process.pid, *children]):
            os.kill(pid, 9)
        process.wait()


def test_whose_parent_has_died_is_found_by_its_environment(tmp_path: Path) -> None:
    mark = str(tmp_path)
    (tmp_path / "orphans").touch()
    process, children = started(mark, tmp_path)
    try:
        process.wait(10)
        assert {one.pid for one in offspring(mark)} == set(children[:2])
        end_all(mark, patience=1.0)
        assert living(children[:2]) == []
    finally:
        for pid in living(children):
            os.kill(pid, 9)


def test_nobody_else_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "another")
    stranger = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        assert offspring(str(tmp_path)) == set()
        end_all(str(tmp_path))
        assert stranger.poll() is None
        assert os.getpid() not in {one.pid for one in offspring("another")}
    finally:
        stranger.kill()
        stranger.wait()
