"""Who watches a run: a coordinator that was killed is noticed, and one that should end ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest

from fedalign.config.run import Config
from fedalign.errors import Stopped, UserError
from fedalign.federation.flower import launch
from fedalign.federation.flower.launch import Flower
from fedalign.federation.flower.status import Beacon, is_running, read_status
from fedalign.server.results import RunFolder
from fedalign.server.rounds import Observer

COORDINATOR = """
import signal, sys, time
from pathlib import Path
from fedalign.federation.flower.status import Beacon
from fedalign.server.results import RunFolder

folder = Path(sys.argv[1])
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with RunFolder(folder).worked():
    Beacon(folder).begin()
    (folder / "ready").touch()
    time.sleep(300)
"""


@dataclass
class Superlink:
    """Flower's part, which says no more than it must."""

    stopped: list[str] = field(default_factory=list)
    looks: list[tuple[str | None, bool]] = field(default_factory=list)  # what it tells, one after another

    def look(self, run_id: str) -> tuple[str | None, bool]:
        if not self.looks:
            pytest.fail("Flower was asked, and takes a minute to notice")
        return self.looks.pop(0)

    def stop(self, run_id: str) -> None:
        self.stopped.append(run_id)


class Watcher:
    """Sees nothing."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self.act = act

    def progress(self, *_: Any) -> None:
        self.act()

    def completed(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process that holds the run folder, as a coordinator does."""
    processes = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen([sys.executable, "-c", COORDINATOR, str(tmp_path), *words]))
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def watch(
    folder: Path, superlink: Superlink, watcher: Watcher | None = None, tell: Callable[[str], None] = lambda _: None
) -> Any:
    observer = cast("Observer", watcher or Watcher())
    return launch.watch_run(RunFolder(folder), observer, tell, cast("Flower", superlink), "7")


def test_a_killed_coordinator_is_noticed_by_its_lock(
    tmp_path: Path, coordinator: Callable[..., subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = coordinator()
    looks: list[None] = []

    def look(_: float) -> None:
        looks.append(None)
        if len(looks) == 2:
            process.kill()
            process.wait()
        assert len(looks) < 5, "it was not noticed at the next look"

    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", look)
        with pytest.raises(UserError, match=rf"\(process {process.pid}\) has ended.*go on with: fedalign run --resume"):
            watch(tmp_path, Superlink())


def test_a_run_that_fails_says_its_own_reason_although_its_lock_is_free(tmp_path: Path) -> None:
    with RunFolder(tmp_path).worked():
        Beacon(tmp_path).begin()
        Beacon(tmp_path).fail("too few sites")
    with pytest.raises(UserError, match="too few sites"):
        watch(tmp_path, Superlink())


def test_a_run_that_the_superlink_does_not_start_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SILENCE", -1.0)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    told: list[str] = []
    superlink = Superlink(looks=[(None, False), (None, True), (None, True), ("Flower ended the run", False)])
    with pytest.raises(UserError, match="Flower ended the run"):
        watch(tmp_path, superlink, tell=told.append)
    (line,) = told
    assert "has not started it yet" in line
    assert f"fedalign run --resume {tmp_path}" in line


@pytest.mark.parametrize(
    ("status", "look"),
    [
        ("pending", (None, True)),
        ("running", (None, False)),
        ("finished:failed", ("Flower ended the run: finished:failed no heartbeat", False)),
    ],
)
def test_what_flower_says_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, look: tuple[str | None, bool]
) -> None:
    details = {"status-details": "no heartbeat"} if "failed" in status else {}
    monkeypatch.setattr(launch, "ask_flwr", lambda *_: {"runs": [{"status": status, **details}]})
    assert Flower(tmp_path, "127.0.0.1:1", None).look("7") == look


@pytest.mark.parametrize("words", [(), ("deaf",)])
def test_a_coordinator_that_flower_does_not_end_is_ended(
    tmp_path: Path, coordinator: Callable[..., subprocess.Popen[bytes]], words: tuple[str, ...]
) -> None:
    process, superlink = coordinator(*words), Superlink()
    launch.stop_coordinator(tmp_path, cast("Flower", superlink), "7", patience=0.3)
    assert superlink.stopped == ["7"]
    assert process.wait(5) == (-signal.SIGKILL if words else -signal.SIGTERM)
    assert not is_running(tmp_path)


def test_a_run_that_is_over_is_not_stopped(tmp_path: Path) -> None:
    Beacon(tmp_path).end()
    superlink = Superlink()
    launch.stop_coordinator(tmp_path, cast("Flower", superlink), "7")
    assert superlink.stopped == []


@pytest.mark.parametrize(
    ("error", "goes_on"),
    [
        (KeyboardInterrupt(), False),
        (Stopped(signal.SIGTERM), False),
        (Stopped(signal.SIGHUP), True),  # the terminal is lost, the run is not
        (RuntimeError("a fault of ours"), False),
    ],
)
def test_a_deployment_ends_with_who_watches_unless_its_terminal_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, goes_on: bool
) -> None:
    superlink = Superlink()

    @contextmanager
    def connected(*_: Any) -> Iterator[Any]:
        yield superlink

    def fail() -> NoReturn:
        raise error

    monkeypatch.setattr(launch, "superlink", connected)
    with RunFolder(tmp_path).worked():
        Beacon(tmp_path).begin()
        (tmp_path / "flower").mkdir()
        (tmp_path / "flower" / "run-id").write_text("7")
        Beacon(tmp_path).progress(1, "training", 0, 3)
        monkeypatch.setattr(launch, "read_history", lambda _: [{"round": 0}])  # news, which is told
        monkeypatch.setattr(launch, "stop_coordinator", lambda folder, flower, run_id: flower.stop(run_id))
        config = Config.model_validate({"federation": {"engine": "flower"}})
        with pytest.raises(type(error)):
            launch.run(config, RunFolder(tmp_path), cast("Observer", Watcher(fail)), lambda _: None)
    assert superlink.stopped == ([] if goes_on else ["7"])
    assert read_status(tmp_path).pid == os.getpid()
