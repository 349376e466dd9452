"""A whole Flower deployment on this machine's loopback, from the stock programs: a SuperLink and SuperNodes.

Programs start programs of their own (SuperLink -> SuperExec -> ServerApp, SuperNode -> SuperExec -> ClientApp), some
in sessions of their own. Each is found again by its ancestors or, once those are dead, by its process group.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import psutil

from fedalign.errors import UserError, unknown
from fedalign.federation.flower.keys import Certificates, make_certificates
from fedalign.federation.flower.programs import (
    HOST,
    ask_flwr,
    connect,
    environment,
    executable,
    flwr,
    free_port,
    mended,
)

CONNECTION = "loopback"  # what `flwr` calls this SuperLink
SUPERLINK = "superlink"
APPS = ("flwr-serverapp", "flwr-clientapp")
START_SECONDS = 90
STOP_SECONDS = 5


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    group: int
    command: str

    def runs(self, program: str) -> bool:
        return f"/{program} " in f"{self.command} "


@dataclass
class _Program:
    """One started program; `groups` are the process groups in which it and its descendants were last seen."""

    process: subprocess.Popen[bytes]
    groups: set[int]

    def members(self) -> list[_Process]:
        """The program and its descendants that live."""
        self.process.poll()  # else a dead one stays a zombie, which its SuperExec takes for alive
        table = _table()
        members = {p.pid: p for p in table if p.group in self.groups}
        grown = True
        while grown:
            found = {p.pid: p for p in table if p.parent in members and p.pid not in members}
            members |= found
            grown = bool(found)
        self.groups = {p.group for p in members.values()}  # the number of a group that died out may return elsewhere
        return list(members.values())


class Loopback:
    """A SuperLink and SuperNodes under one folder; leaving the `with` block ends them all, whatever happened in it.

    Inside the block SIGTERM and SIGHUP raise SystemExit, unless the caller handles them already.
    """

    def __init__(self, folder: Path, tls: bool = True, authenticate: bool = True, database: bool = True) -> None:
        self.folder = folder.resolve()
        self.authenticate = authenticate
        self.database = database  # else the SuperLink forgets everything when it ends
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.address = f"{HOST}:{self.port}"
        self.environment = environment(self.folder / "flwr") | {"OMP_NUM_THREADS": "1"}
        self.certificates: Certificates | None = make_certificates(self.folder / "certificates") if tls else None
        self._programs: dict[str, _Program] = {}
        self._ports: set[int] = {self.port}
        self._handlers: dict[int, Any] = {}
        ca = self.certificates.ca if self.certificates else None
        connect(Path(self.environment["FLWR_HOME"]), CONNECTION, self.address, ca)

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers; after a kill, on the same port and database.

        Raises:
            UserError: It runs already, or ended, or did not answer in time.
        """
        command = ["flower-superlink", "--host", HOST, "--port", str(self.port)]
        command += ["--disable-runtime-dependency-installation"]
        if self.database:
            command += ["--database", str(self.folder / "state.db")]
        if self.certificates:
            command += ["--ssl-ca-certfile", str(self.certificates.ca)]
            command += ["--ssl-certfile", str(self.certificates.certificate)]
            command += ["--ssl-keyfile", str(self.certificates.key)]
        else:
            command += ["--insecure"]
        if self.authenticate:
            command += ["--enable-supernode-auth"]
        self._start(SUPERLINK, mended(command))
        self.wait(self._answers, f"{SUPERLINK} to answer at {self.address}", needs=SUPERLINK)
        self.processes(SUPERLINK)  # its SuperExec has a session of its own: see it while its parent lives

    def _answers(self) -> bool:
        if self.certificates:
            trusted = ssl.create_default_context(cafile=str(self.certificates.ca))
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                HOST, self.port, timeout=5, context=trusted
            )
        else:
            connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def register(self, name: str, public_key: Path) -> int:
        """Let the site of this key take part; returns its node id, which it keeps as long as the database.

        Raises:
            UserError: The SuperLink does not accept the key.
        """
        answer = self._ask("supernode", "register", str(public_key.resolve()), CONNECTION, "--name", _checked(name))
        return int(answer["node-id"])

    def revoke(self, node: int) -> None:
        """Let a node's key take part no more, as `flwr supernode unregister` does.

        Raises:
            UserError: The SuperLink knows no such node.
        """
        self._ask("supernode", "unregister", str(node), CONNECTION)

    def nodes(self) -> list[dict[str, Any]]:
        """The SuperNodes that the SuperLink knows, as Flower's own `flwr supernode list` tells."""
        return list(self._ask("supernode", "list", CONNECTION)["nodes"])

    def _ask(self, *arguments: str) -> dict[str, Any]:
        return ask_flwr(self.environment, self.address, *arguments)

    def flwr(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run Flower's own command line against this deployment, for example `flwr("run", ".", "loopback")`."""
        return flwr(self.environment, *arguments, cwd=cwd or self.folder)

    def start_supernode(
        self, name: str, node_config: Mapping[str, str | int], key: Path | None, insecure: bool = False
    ) -> None:
        """Start a site's SuperNode; whether the SuperLink takes it is in `nodes()` and in its log a little later.

        A SuperNode killed by SIGKILL counts as online until its heartbeat is overdue: for about a minute its key is
        refused, and a new SuperNode waits. After `terminate` it may return at once.

        Raises:
            UserError: A program of this name runs already, or the name cannot be a file's.
        """
        if name == SUPERLINK:
            raise UserError(f"site {name!r}: the name of the server. Choose another.")
        port = free_port(self._ports)
        self._ports.add(port)
        command = ["flower-supernode", "--superlink", self.address, "--host", HOST, "--port", str(port)]
        if node_config:
            command += ["--node-config", node_config_text(node_config)]
        if insecure or not self.certificates:
            command += ["--insecure"]
        else:
            command += ["--root-certificates", str(self.certificates.ca)]
        if key:
            command += ["--auth-supernode-private-key", str(key.resolve())]
        self._start(name, mended(command))

    def _start(self, name: str, command: Sequence[str]) -> None:
        if name in self._programs:
            if self._programs[name].process.pid in self.processes(name):
                raise UserError(f"{name!r}: runs already. Kill or terminate it first.")
            self.kill(name)  # what a program that ended by itself has left
        program = executable(command[0], self.environment)
        with self._log_file(name).open("ab") as log:
            process = subprocess.Popen(
                [program, *command[1:]],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._programs[name] = _Program(process, {process.pid})  # a session's first group is its leader's pid

    def _log_file(self, name: str) -> Path:
        return self.folder / f"{_checked(name)}.log"

    def log(self, name: str) -> str:
        """All that a program and its descendants have printed, over all its starts."""
        file = self._log_file(name)
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def wait(
        self, until: Callable[[], bool], what: str, seconds: float = START_SECONDS, needs: str | None = None
    ) -> None:
        """Wait for something to become true while the program `needs` lives.

        Raises:
            UserError: It did not in that time, or the program ended.
        """
        deadline = time.monotonic() + seconds
        while not until():
            if needs and self._programs[needs].process.poll() is not None:
                raise UserError(f"{needs!r}: ended while waiting for {what}.{self._last_lines(needs)}")
            if time.monotonic() > deadline:
                raise UserError(f"waited {seconds:.0f} s for {what}.{self._last_lines(needs) if needs else ''}")
            time.sleep(0.2)

    def _last_lines(self, name: str) -> str:
        return f" {self._log_file(name)} ends with:\n" + "\n".join(self.log(name).splitlines()[-8:])

    def processes(self, name: str) -> list[int]:
        """The pids of a program and its descendants that live."""
        return [process.pid for process in self._members(name)]

    def _members(self, name: str) -> list[_Process]:
        if name not in self._programs:
            raise unknown("program", name, self._programs)
        return self._programs[name].members()

    def kill(self, name: str) -> None:
        """SIGKILL a program and all its descendants, and return when they are gone.

        Raises:
            UserError: They are not gone after some seconds.
        """
        if not self._end([name], signal.SIGKILL):
            raise UserError(
                f"{name!r}: still there after SIGKILL: {', '.join(self.leftovers())}. Look at them with ps."
            )

    def terminate(self, name: str) -> None:
        """SIGTERM a program and all its descendants, SIGKILL what is left after some seconds."""
        if not self._end([name], signal.SIGTERM):
            self.kill(name)

    def kill_app(self, name: str) -> bool:
        """SIGKILL only the ServerApps or ClientApps below a program; False where there is none at the moment."""
        apps = [process for process in self._members(name) if any(process.runs(app) for app in APPS)]
        _signal(apps, signal.SIGKILL)
        return bool(apps)

    def _end(self, names: Sequence[str], how: signal.Signals) -> bool:
        """Signal every member of these programs, those started meanwhile too; whether all are gone in the end."""
        signalled: set[int] = set()
        deadline = time.monotonic() + STOP_SECONDS
        while left := [process for name in names for process in self._members(name)]:
            if time.monotonic() > deadline:
                return False
            _signal([process for process in left if process.pid not in signalled], how)
            signalled |= {process.pid for process in left}
            time.sleep(0.1)
        for name in names:
            self._programs[name].process.wait()
        return True

    def leftovers(self) -> list[str]:
        """Processes started here that still live: found by descent, and by the ports in the command lines."""
        found = {p.pid: f"{name}: {p.pid}" for name in self._programs for p in self._members(name)}
        marks = [f"{HOST}:{port} " for port in self._ports] + [str(self.folder / "state.db")]
        for process in _table():
            if process.pid != os.getpid() and any(mark in f"{process.command} " for mark in marks):
                found.setdefault(process.pid, f"{process.command[:160]}: {process.pid}")
        return list(found.values())

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._handlers[number] = signal.signal(number, _leave)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end([name for name in self._programs if name != SUPERLINK], signal.SIGTERM)
            self._end(list(self._programs), signal.SIGTERM)
        finally:  # a second Ctrl-C arrives here as well
            self._end(list(self._programs), signal.SIGKILL)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()


def quoted(text: str) -> str:
    r"""A TOML string without a double quote inside, which Flower's own parsing of `--node-config` needs.

    >>> print(quoted('a "b" c'))
    "a \u0022b\u0022 c"
    """
    inner = json.dumps(text, ensure_ascii=False)[1:-1]
    return '"' + inner.replace('\\"', "\\u0022") + '"'


def node_config_text(values: Mapping[str, str | int]) -> str:
    """The text that `flower-supernode --node-config` reads these values from.

    >>> print(node_config_text({"site": "/srv/ward 3/site.toml", "partition-id": 0}))
    site="/srv/ward 3/site.toml" partition-id=0
    """
    return " ".join(f"{key}={quoted(v) if isinstance(v, str) else json.dumps(v)}" for key, v in values.items())


def _checked(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"site {name!r}: not a name for a file. Use letters, digits, '-', '_' and '.'.")
    return name


def _table() -> list[_Process]:
    """Every process of the machine that is not dead already."""
    found = []
    for process in psutil.process_iter(["pid", "ppid", "status", "cmdline"]):
        about = process.info
        if about["status"] != psutil.STATUS_ZOMBIE:
            with suppress(ProcessLookupError, PermissionError):
                command = " ".join(about["cmdline"] or ())  # None: another user's
                found.append(_Process(about["pid"], about["ppid"], os.getpgid(about["pid"]), command))
    return found


def _signal(processes: Iterable[_Process], how: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, how)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
