"""What a simulation has started ends with it, however it ends; a program takes the place of Flower's SuperLink."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fedalign.errors import UserError
from fedalign.federation.flower import launch, programs
from fedalign.federation.flower.launch import Flower
from tests.conftest import Command
from tests.federation.flower.test_offspring import living

SUPERLINK = f"""#!{sys.executable}
import os, socket, subprocess, sys, time
from pathlib import Path

sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
child = subprocess.Popen(sleep, start_new_session=True)  # as Flower starts its SuperExec
Path(__file__).with_name("started").write_text(f"{{os.getpid()}} {{child.pid}}")
if Path(__file__).with_name("broken").exists():
    sys.exit(1)
with socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))):
    time.sleep(300)
"""


def refuse(*_: Any) -> NoReturn:
    raise UserError("the SuperLink refuses the run")


def fail(*_: Any) -> NoReturn:
    raise RuntimeError("a fault of ours")


def signalled(number: int) -> Callable[..., None]:
    return lambda *_: signal.raise_signal(number)


@pytest.mark.parametrize(
    ("where", "act", "code", "told"),
    [
        ("watch", signalled(signal.SIGTERM), 143, "Ended by SIGTERM. Complete rounds are kept"),
        ("watch", signalled(signal.SIGHUP), 129, "Ended by SIGHUP. Complete rounds are kept"),
        ("watch", signalled(signal.SIGINT), 130, "Interrupted. Complete rounds are kept"),
        ("watch", fail, 3, "RuntimeError: a fault of ours"),
        ("submit", refuse, 2, "the SuperLink refuses the run"),
        ("start", None, 2, "flower-superlink did not start"),
    ],
    ids=["SIGTERM", "SIGHUP", "SIGINT", "fault", "refused", "no-start"],
)
def test_a_simulation_leaves_no_process_behind(
    fedalign: Command,
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    act: Callable[..., Any] | None,
    code: int,
    told: str,
) -> None:
    program = tmp_path / "superlink"
    program.write_text(SUPERLINK)
    program.chmod(0o700)
    if where == "start":
        (tmp_path / "broken").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where reports of faults of ours go
    monkeypatch.setattr(programs, "require_flower", lambda _: None)
    monkeypatch.setattr(launch, "executable", lambda *_: str(program))
    monkeypatch.setattr(Flower, "submit", act if where == "submit" else lambda *_: "7")
    monkeypatch.setattr(launch, "watch_run", act if where == "watch" else None)
    words = [word for one in [*settings, "federation.engine=simulation"] for word in ("--set", one)]
    found, text, errors = fedalign("run", os.devnull, "--out", tmp_path / "run", *words)
    assert (found, told in " ".join(f"{text} {errors}".split())) == (code, True), errors
    started = [int(pid) for pid in (tmp_path / "started").read_text().split()]
    assert len(started) == 2
    assert living(started) == []
