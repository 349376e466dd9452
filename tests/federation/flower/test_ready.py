"""A task is taken by a fork of the process that is ready, or else by Flower's own program."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedalign.federation.flower import hand_over
from fedalign.federation.flower.ready import BOUND, BOUND_NBYTES, PROGRAM, ready

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
FORKED = """
import json, os, sys
from pathlib import Path
from fedalign.federation.flower.ready import _task
task = _task(sys.argv[1])
Path(task[0]).write_text(json.dumps([os.getppid(), sys.stdin.read(), *task[1:]]))
"""


@pytest.fixture
def original(tmp_path: Path) -> dict[str, str]:
    """An environment whose `flwr-clientapp` writes its arguments to its first one."""
    folder = tmp_path / "stock programs"
    folder.mkdir()
    program = folder / PROGRAM
    program.write_text('#!/bin/sh\nfile="$1"\nshift\nfor one in "$@"; do printf "%s\\n" "$one" >> "$file"; done\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() or (file.is_file() and not file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_task_that_nobody_is_ready_for_starts_flowers_own_program(original: dict[str, str], tmp_path: Path) -> None:
    with ready(original) as (environment, _):
        told = tmp_path / "told"
        subprocess.run([PROGRAM, str(told), "--token", "a b"], env=environment, check=True, timeout=30)
        assert told.read_text().splitlines() == ["--token", "a b"]
        folder = environment["PATH"].split(os.pathsep)[0]
        assert Path(folder).stat().st_mode & 0o077 == 0  # who could write there would be given tasks
    assert not Path(folder).exists()


def test_what_is_set_already_stays(original: dict[str, str]) -> None:
    with ready(original) as (environment, _):
        assert environment[BOUND] == str(BOUND_NBYTES)
    with ready({**original, BOUND: "7"}) as (environment, _):
        assert environment[BOUND] == "7"


@linux
def test_each_task_is_a_fork_with_its_own_arguments(tmp_path: Path) -> None:
    place = tmp_path / "socket"
    alive, held = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", FORKED, str(place)], stdin=alive)
    try:
        wait_for_socket(place)
        for number in range(2):
            told = tmp_path / f"{number}"
            command = [
                sys.executable,
                "-IS",
                hand_over.__file__,
                str(place),
                "/bin/false",
                str(told),
                f"--token={number}",
            ]
            subprocess.run(command, check=True, timeout=30)
            wait_for(told)
            assert json.loads(told.read_text()) == [process.pid, "", f"--token={number}"]
        with socket.socket(socket.AF_UNIX) as stranger:  # says nothing that is a task
            stranger.connect(str(place))
            stranger.sendall(b'{"not": "a task"}')
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(8) == b""
        assert process.poll() is None
        assert psutil.wait_procs(psutil.Process(process.pid).children(), timeout=30)[1] == []  # no zombies either
    finally:
        os.close(held)  # as when the SuperNode has ended
        os.close(alive)
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()


@linux
def test_a_task_that_is_not_taken_starts_flowers_own_program(original: dict[str, str], tmp_path: Path) -> None:
    told, place = tmp_path / "told", tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        program = f"{original['PATH'].split(os.pathsep)[0]}/{PROGRAM}"
        command = [sys.executable, "-IS", hand_over.__file__, str(place), program, str(told), "--insecure"]
        process = subprocess.Popen(command)
        listener.accept()[0].close()  # dies with the task in its hands
        assert process.wait(30) == 0
    assert told.read_text().splitlines() == ["--insecure"]


def wait_for_socket(place: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(place))
            except OSError:
                time.sleep(0.05)
            else:
                return
    pytest.fail("nobody listens")
