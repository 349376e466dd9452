"""Real sites on loopback, `fedalign` as a user starts it, and what a run folder tells afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import tomli_w
from safetensors.torch import load_file
from torch import Tensor

from fedalign.federation.flower.keys import make_node_key
from fedalign.federation.flower.loopback import Loopback
from fedalign.server.results import RunFolder
from tests.conftest import rows, write_jsonl

PATIENCE = 420  # seconds for a whole run on a busy machine
SITES = ("north", "south", "west")
READY = "fedalign.federation.flower.ready"  # whose forks are the ClientApps of a site that is served
LABELS = sorted({row["label"] for row in rows()})
OPEN = {"seed": 0, "held_out": 0.2, "min_train": 2, "min_held_out": 1}  # draws as one process does, of few rows
MEASURED = ("seconds", "versions")  # what a clock measured, or what differs by installation


def share(site: str) -> list[dict[str, str]]:
    """A site's own third of the rows."""
    return rows()[SITES.index(site) :: len(SITES)]


def settings(model: Path) -> dict[str, Any]:
    """A configuration under which a round takes no longer than its messages."""
    return {
        "run": {"rounds": 1, "threads": 1},
        "model": {"path": str(model)},
        "data": {"labels": LABELS},
        "clients": {"held_out": 0.2, "min_examples": 5},
        "training": {"learning_rate": 1e-2},
        "statistics": {"min_tokens": 4, "min_examples": 1},
        "algorithm": {"name": "fedalign_paper", "vocabulary": "tokens"},  # sends most
        "server": {"robust": "none"},  # as in one process, which sites are held against
        "tracking": {"loggers": []},
        "federation": {"engine": "flower", "min_sites": 3, "wait_seconds": 180, "timeout_seconds": 200},
    }


def merged(tables: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Tables with the keys changed that `changes` names as section__key."""
    result = {section: dict(keys) for section, keys in tables.items()}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        result.setdefault(section, {})[key] = value
    return result


class Command:
    """`fedalign ...` as a user starts it, and what it prints."""

    def __init__(self, arguments: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        with log.open("wb") as target:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedalign", *map(str, arguments)],
                env={**environment, "COLUMNS": "200"},
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """All that it has printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def finish(self, seconds: float = PATIENCE) -> int:
        """Its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s; it said:\n{self.said}")

    def wait(self, until: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        """Wait for something to become true while it runs."""
        deadline = time.monotonic() + seconds
        while not until():
            if self.process.poll() is not None:
                pytest.fail(f"it ended before {what}; it said:\n{self.said}")
            if time.monotonic() > deadline:
                pytest.fail(f"not within {seconds} s: {what}; it said:\n{self.said}")
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def kill(self) -> None:
        """SIGKILL it and what it started in its own session."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __exit__(self, *_: object) -> None:
        self.kill()


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    path: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl; empty before it is there."""
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def rounds(self) -> list[int]:
        """The rounds of metrics.jsonl."""
        return [line["round"] for line in self.lines]

    def failures(self, client: str | None = None) -> list[tuple[int, str, str, str]]:
        """Round, client, stage and reason of all faults, or of one client's."""
        return [
            (line["round"], fault["client"], fault["stage"], fault["reason"])
            for line in self.lines
            for fault in line["failures"]
            if client in (None, fault["client"])
        ]

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        return summary

    @property
    def status(self) -> dict[str, Any]:
        """status.json; empty before it is there."""
        file = self.path / "status.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def reached(self, round: int, stage: str, done: int) -> bool:
        """Whether the coordinator says that it is in this stage, with so many clients done."""
        status = self.status
        return (status.get("round"), status.get("stage")) == (round, stage) and status["done"] >= done

    @property
    def model(self) -> bytes:
        """The final weights."""
        return (self.path / "model" / "model.safetensors").read_bytes()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The final weights, by name."""
        return weights_of(self.path / "model")

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without what a clock measured."""
        return [{k: v for k, v in line.items() if not k.endswith(MEASURED)} for line in self.lines]


@dataclass
class Deployment:
    """A SuperLink, some sites, and the coordinator's configuration."""

    loopback: Loopback
    settings: dict[str, Any]
    sites: dict[str, Path] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)  # of those that are registered
    warm: set[str] = field(default_factory=set)  # sites that keep their model loaded
    _said: dict[str, int] = field(default_factory=dict)  # characters of a site's log before it was last started

    def prepare(
        self,
        name: str,
        lines: Sequence[dict[str, str]],
        *,
        model: Path | None = None,
        limits: Mapping[str, Any] | None = None,
        change: str = "",
        register: bool = True,
        claims: str = "",
    ) -> Path:
        """A site's folder with its data; `change` is a module that its own processes import first.

        With `claims` it calls itself so, though it is registered as `name`.
        """
        folder = self.loopback.folder / "sites" / name
        folder.mkdir(parents=True)
        write_jsonl(folder / "data.jsonl", list(lines))
        about: dict[str, Any] = {
            "name": claims or name,
            "data": {"train": "data.jsonl"},
            "model": {"path": str(model or self.settings["model"]["path"])},
            "limits": {"min_tokens": 4, "min_examples": 1, "threads": 1, **OPEN, **(limits or {})},
            "consent": {"token_counts": True, "embeddings": True},
            "coordinator": {"superlink": self.loopback.address},
        }
        if self.loopback.certificates:
            about["coordinator"]["root_certificates"] = str(self.loopback.certificates.ca)
        (folder / "site.toml").write_text(tomli_w.dumps(about))
        if change:
            (folder / "change").mkdir()
            (folder / "change" / "sitecustomize.py").write_text(IN_CLIENT_APPS)
            (folder / "change" / "changed.py").write_text(change)
        if self.loopback.authenticate:
            public = make_node_key(folder / "key")
            if register:
                self.nodes[name] = self.loopback.register(name, public)
        self.sites[name] = folder
        return folder

    def start(self, name: str, *, insecure: bool = False) -> None:
        """Start, or start again, a site's SuperNode; an insecure one has neither TLS nor key."""
        self.warm.discard(name)
        folder = self.sites[name]
        key = folder / "key" if self.loopback.authenticate and not insecure else None
        self._said[name] = len(self.loopback.log(name))
        with self._changed(folder):
            self.loopback.start_supernode(name, {"site": str(folder / "site.toml")}, key, insecure)

    def serve(self, name: str) -> None:
        """Start, or start again, a site that keeps its model loaded, with its SuperNode."""
        self.warm.add(name)
        self._said[name] = len(self.loopback.log(name))
        with self._changed(self.sites[name]):
            self.loopback._start(name, [sys.executable, "-m", "fedalign", "site", "serve", str(self.sites[name])])

    @contextmanager
    def _changed(self, folder: Path) -> Iterator[None]:
        environment, usual = self.loopback.environment, self.loopback.environment.get("PYTHONPATH")
        if (folder / "change").exists():
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder / "change"), usual]))
        try:
            yield
        finally:
            environment.pop("PYTHONPATH", None)
            environment |= {"PYTHONPATH": usual} if usual else {}

    def wait_online(self, *sites: str) -> None:
        """Until these sites, or all that were started, are connected, as their SuperNodes say."""
        for site in sites or tuple(self._said):
            self.loopback.wait(lambda site=site: self._is_online(site), f"{site} to connect", seconds=180, needs=site)  # type: ignore[misc] # mypy infers no lambda with defaults

    def _is_online(self, site: str) -> bool:
        return "SuperNode ID" in self.loopback.log(site)[self._said[site] :]

    def again(self, name: str) -> None:
        """Start a site that has ended, as it was started."""
        if name in self.warm:
            self.serve(name)
        else:
            self.start(name)

    def add(
        self, name: str, lines: Sequence[dict[str, str]] | None = None, *, warm: bool = False, **options: Any
    ) -> Path:
        """A site, prepared and started; a warm one imports torch once, another for each message."""
        folder = self.prepare(name, share(name) if lines is None else lines, **options)
        if warm:
            self.serve(name)
        else:
            self.start(name)
        return folder

    def apps(self, site: str) -> list[int]:
        """The pids of a site's ClientApps, those that answer a message now."""
        found = []
        for pid in self.loopback.processes(site):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                forked = READY in process.cmdline() and READY in psutil.Process(process.ppid()).cmdline()
                if forked or any(word.endswith("/flwr-clientapp") for word in process.cmdline()):
                    found.append(pid)
        return found

    @contextmanager
    def command(self, *arguments: str | Path) -> Iterator[Command]:
        """`fedalign ...` at the coordinator."""
        log = self.loopback.folder / f"fedalign-{time.monotonic_ns()}.log"
        with Command(arguments, log, self.loopback.environment) as command:
            yield command

    @contextmanager
    def started(self, out: str, **changes: Any) -> Iterator[tuple[Run, Command]]:
        """`fedalign run` with this configuration; changes are named section__key."""
        tables = merged(self.settings, changes)
        tables["federation"]["superlink"] = self.loopback.address
        if self.loopback.certificates:
            tables["federation"]["root_certificates"] = str(self.loopback.certificates.ca)
        file, folder = self.loopback.folder / f"{out}.toml", self.loopback.folder / "runs" / out
        file.write_text(tomli_w.dumps(tables))
        with self.command("run", file, "--out", folder) as command:
            yield Run(folder), command

    def run(self, out: str, **changes: Any) -> tuple[Run, str]:
        """A whole run, which must succeed, and what the command printed."""
        with self.started(out, **changes) as (run, command):
            assert command.finish() == 0, command.said
            return run, command.said

    def resume(self, run: Run) -> str:
        """`fedalign run --resume`, which must succeed; what it printed."""
        with self.command("run", "--resume", run.path) as command:
            assert command.finish() == 0, command.said
            return command.said


IN_CLIENT_APPS = """
import importlib.abc, importlib.util, sys

class Afterwards(importlib.abc.MetaPathFinder):
    # `changed` comes once the app is there: Flower gives a ClientApp 30 s to report, and torch takes long to import
    def find_spec(self, name, path, target=None):
        if name not in ("fedalign.federation.flower.client_app", "fedalign.federation.flower.serve"):
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        honest = spec.loader.exec_module

        def exec_module(module):
            honest(module)
            import changed

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Afterwards())
"""


HOLDING = """
import time
from pathlib import Path
from fedalign.federation.{module} import {service}
honest = {service}._{verb}

def waiting(self, *asked, **how):
    while Path(__file__).with_name("hold").exists():
        time.sleep(0.1)
    return honest(self, *asked, **how)

{service}._{verb} = waiting
"""  # the change of a site that `held` holds at a message
HELD = HOLDING.format(module="service", service="Service", verb="train")


@contextmanager
def held(deployment: Deployment, site: str) -> Iterator[None]:
    """Meanwhile the site is at one message, its ClientApp alive: one that is stopped counts as dead after a minute."""
    hold = deployment.sites[site] / "change" / "hold"
    hold.touch()
    try:
        yield
    finally:
        hold.unlink()


@contextmanager
def deployed(folder: Path, tables: dict[str, Any], *, secure: bool = True) -> Iterator[Deployment]:
    """A SuperLink, to which sites can be added; whatever was started is gone afterwards."""
    with Loopback(folder, tls=secure, authenticate=secure) as loopback:
        loopback.start_superlink()
        yield Deployment(loopback, tables)
    assert loopback.leftovers() == []
    for config in folder.glob("runs/*/config.toml"):
        RunFolder(config.parent).check_free(overwrite=True)  # all of it is known as the run's


def on_one_machine(
    folder: Path, engine: str, tables: dict[str, Any], sites: Sequence[str] = SITES, **changes: Any
) -> Run:
    """The same run with the sites' data as files of one folder; nothing that it started may stay."""
    data = folder / "data"
    data.mkdir(parents=True)
    for site in sites:
        write_jsonl(data / f"{site}.jsonl", share(site))
    tables = merged(tables, changes)
    tables["data"]["train"] = str(data)
    tables["clients"]["partition"] = "files"
    tables["federation"] = {"engine": engine, "min_sites": len(sites), "wait_seconds": 180, "timeout_seconds": 200}
    (folder / "run.toml").write_text(tomli_w.dumps(tables))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME_OF_THE_TEST": str(folder)}
    with Command(["run", folder / "run.toml", "--out", folder / "run"], folder / "log", environment) as command:
        assert command.finish() == 0, command.said
    assert living(f"HOME_OF_THE_TEST={folder}") == []
    RunFolder(folder / "run").check_free(overwrite=True)  # all of it is known as the run's
    return Run(folder / "run")


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Those of a Hugging Face folder, by name."""
    return dict(load_file(folder / "model.safetensors"))


def is_finite(weights: Mapping[str, Tensor]) -> bool:
    """Whether all values are numbers."""
    return all(bool(value.isfinite().all()) for value in weights.values())


def living(mark: str) -> list[str]:
    """The processes that have this in their environment, but for those that are just ending: Ray's take their time."""
    name, _, value = mark.partition("=")
    deadline = time.monotonic() + 60
    while True:
        listing = psutil.process_iter(["cmdline", "environ"])
        found = [str(one.info["cmdline"])[:200] for one in listing if (one.info["environ"] or {}).get(name) == value]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)
