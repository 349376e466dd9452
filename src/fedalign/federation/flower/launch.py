"""`fedalign run` with a Flower engine: hand a thin app to the SuperLink, then watch the run folder.

The app is two lines that name our ServerApp and ClientApp; sites install the package. The SuperLink starts the
coordinator's process. It ends with the one that watches, but for a deployment whose watcher lost its terminal or was
killed: there `--resume` watches it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedalign.config.run import Config
from fedalign.data.deal import split_among_clients
from fedalign.errors import Stopped, UserError
from fedalign.federation.flower.offspring import MARK, end_all
from fedalign.federation.flower.programs import HOST, ask_flwr, connect, environment, executable, free_port
from fedalign.federation.flower.status import OVER, holder, is_running, read_status
from fedalign.files import write_text
from fedalign.server.checkpoint import ServerState
from fedalign.server.results import RunFolder, read_history
from fedalign.server.rounds import Observer

CONNECTION = "fedalign"
APP = Path(__file__).parent / "app" / "pyproject.toml"
NO_INSTALLS = ("--disable-runtime-dependency-installation",)
SILENCE = 20.0  # seconds without news after which Flower is asked whether the run still lives
UNSTARTED = (
    "The SuperLink has the run, and has not started it yet. If its log says that its SuperExec has ended, it starts no "
    "run: end this one (Ctrl-C), start the SuperLink anew, and go on with: fedalign run --resume {}"
)


@dataclass
class Flower:
    """The `flwr` command, with a home and a connection of its own."""

    home: Path
    address: str
    root_certificates: str | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ca = Path(self.root_certificates) if self.root_certificates else None
        connect(self.home, CONNECTION, self.address, ca, self.options)

    @property
    def environment(self) -> dict[str, str]:
        """Of the command, and of what it starts."""
        return environment(self.home)

    def submit(self, folder: RunFolder, config: Config) -> str:
        """Hand the app to the SuperLink; the id that Flower gives to the run."""
        app = self.home / "fedalign-moe-app"
        app.mkdir(exist_ok=True)
        resolved = self.home / "federation.toml"  # a resumed run's may differ from config.toml
        write_text(resolved, config.to_toml())
        settings = {"config": str(resolved), "out": str(folder.path.absolute())}
        shutil.copyfile(APP, app / "pyproject.toml")
        write_text(self.home / "run.toml", tomli_w.dumps(settings))
        answer = self._flwr("run", str(app), CONNECTION, "--run-config", str(self.home / "run.toml"))
        return str(answer["run-id"])

    def look(self, run_id: str) -> tuple[str | None, bool]:
        """Why the run is no longer alive, or None if it is; and whether it still waits to be started."""
        try:
            (about,) = self._flwr("list", CONNECTION, "--run-id", run_id)["runs"]
        except UserError as error:
            return str(error), False
        status = str(about["status"])
        if not status.startswith("finished"):
            return None, status == "pending"
        return f"Flower ended the run: {status} {about.get('status-details', '')}".strip(), False

    def stop(self, run_id: str) -> None:
        """End the run, if it is still there to be ended."""
        with contextlib.suppress(UserError, subprocess.TimeoutExpired):
            self._flwr("stop", run_id, CONNECTION)

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        return ask_flwr(self.environment, self.address, *arguments)


def run(config: Config, folder: RunFolder, watch: Observer, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run, or resume, what `folder` holds on Flower; returns the summary. `tell` says what a person should know.

    Raises:
        UserError: The SuperLink cannot be reached, or the run failed; the reason is the coordinator's.
        KeyboardInterrupt, Stopped: The run was stopped, complete rounds are kept; of a deployment's coordinator that
            lost its terminal (SIGHUP) the run goes on.
    """
    home = folder.path.absolute() / "flower"
    with superlink(config, home) as flower:
        if not is_running(folder.path):  # else the one that watched was ended, the coordinator was not
            with contextlib.suppress(FileNotFoundError):  # else sites stay busy with what a dead coordinator asked
                flower.stop((home / "run-id").read_text(encoding="utf-8"))
            folder.path.joinpath("status.json").unlink(missing_ok=True)
            write_text(home / "run-id", flower.submit(folder, config))
        run_id = (home / "run-id").read_text(encoding="utf-8")
        try:
            return watch_run(folder, watch, tell, flower, run_id)
        except BaseException as error:
            lost = isinstance(error, Stopped) and error.lost_terminal
            if config.federation.engine == "flower" and not lost:  # a simulation ends with its SuperLink
                stop_coordinator(folder.path, flower, run_id)
            raise


def stop_coordinator(folder: Path, flower: Flower, run_id: str, patience: float = 5.0) -> None:
    """End a run that is not over, and its coordinator's process if that does not go within some seconds."""
    if read_status(folder).state in OVER and not is_running(folder):
        return
    flower.stop(run_id)
    for how in (None, signal.SIGTERM, signal.SIGKILL):
        pid = holder(folder)
        if pid is not None and how is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, how)
        deadline = time.monotonic() + patience
        while is_running(folder) and time.monotonic() < deadline:
            time.sleep(0.1)


def watch_run(
    folder: RunFolder, watch: Observer, tell: Callable[[str], None], flower: Flower, run_id: str
) -> dict[str, Any]:
    """Show how the run goes until it ends.

    Raises:
        UserError: It failed, or its coordinator is no more.
    """
    shown, heard, last, noted, seen = 0, time.monotonic(), read_status(folder.path), "", False
    while True:
        alive = is_running(folder.path)  # asked before the status, which is written while the folder is held
        status = read_status(folder.path)
        history = read_history(folder)
        for index in range(shown, len(history)):
            past = tuple(history[: index + 1])
            watch.completed(ServerState(int(past[-1]["round"]), {}, {}, past), improved=False)
        if status.note and status.note != noted:
            tell(noted := status.note)
        if status != last or len(history) != shown:
            heard, last, shown = time.monotonic(), status, len(history)
            stage = f"{status.stage} ({status.transfer})" if status.transfer else status.stage
            watch.progress(status.round, stage, status.done, status.total)
        if status.state == "complete":
            summary: dict[str, Any] = json.loads(folder.summary.read_text(encoding="utf-8"))
            return summary
        if status.state == "failed":
            raise UserError(status.error)
        reason = None
        if seen and not alive and status.state == "running":  # a file system without locks never shows it alive
            reason = f"the coordinator (process {status.pid}) has ended without a word, killed or stopped"
        elif time.monotonic() - heard > SILENCE:
            heard = time.monotonic()
            reason, waits = (None, False) if is_running(folder.path) else flower.look(run_id)
            if waits and noted != (unstarted := UNSTARTED.format(shlex.quote(str(folder.path)))):
                tell(noted := unstarted)
        if reason and read_status(folder.path) == status:
            go_on = f"fedalign run --resume {shlex.quote(str(folder.path))}"
            raise UserError(f"{reason}. Complete rounds are kept; go on with: {go_on}")
        seen = alive
        time.sleep(0.5)


@contextlib.contextmanager
def superlink(config: Config, home: Path) -> Iterator[Flower]:
    """The configured SuperLink; a simulation gets one of its own, ended with the run."""
    options = config.federation
    if config.federation.engine == "flower":
        yield Flower(home, options.superlink, options.root_certificates)
        return
    clients = len(split_among_clients(config)[1])
    simulation = {
        "num-supernodes": clients,
        "backend": {
            "client-resources": {"num-cpus": 1, "num-gpus": 0.0},
            "init-args": {"num-cpus": options.workers},
        },
    }
    port = free_port()
    address = f"{HOST}:{port}"
    flower = Flower(home, address, None, simulation)
    mark = str(home)
    if not is_running(home.parent):
        end_all(mark)  # what a killed run has left
    process: subprocess.Popen[bytes] | None = None
    try:
        with (home / "superlink.log").open("ab") as log:
            command = [executable("flower-superlink", flower.environment), "--insecure", "--simulation", *NO_INSTALLS]
            process = subprocess.Popen(
                [*command, "--host", HOST, "--port", str(port)],
                env={**flower.environment, MARK: mark},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(address, process)
        yield flower
    finally:
        end_all(mark)
        if process is not None:
            process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Until something listens there.

    Raises:
        UserError: Nothing does.
    """
    host, _, port = address.partition(":")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.2)
    raise UserError(f"flower-superlink did not start at {address}; see flower/superlink.log in the run's folder")
