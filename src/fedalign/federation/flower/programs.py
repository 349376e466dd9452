"""Flower's stock programs: where they are, what they need and may do, and ports for them on this machine."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tomli_w
from packaging.requirements import Requirement

from fedalign.errors import UserError
from fedalign.files import folder_name, write_text

HOST = "127.0.0.1"
FLWR_SECONDS = 120
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # the package is installed, not fetched anew for each run
}


def environment(home: Path) -> dict[str, str]:
    """Of a Flower program that keeps its files in `home`: the scripts beside this Python first, loopback unproxied."""
    scripts = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    local = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), HOST, "localhost"]))
    return {
        **os.environ,
        **QUIET,
        "FLWR_HOME": str(home),
        "PYTHONUNBUFFERED": "1",  # a killed app has printed what it said
        "PATH": os.pathsep.join([*dict.fromkeys(scripts), os.environ.get("PATH", os.defpath)]),
        "NO_PROXY": local,
        "no_proxy": local,
    }


def executable(name: str, environment: Mapping[str, str]) -> str:
    """The path of one of Flower's programs.

    Raises:
        UserError: It is not there.
    """
    found = shutil.which(name, path=environment["PATH"])
    if not found:
        raise UserError(f"{name}: not found, and it comes with Flower. Run: pip install 'fedalign-moe[flower]'")
    return found


def mended(command: Sequence[str]) -> list[str]:
    """A command of Flower's SuperNode or SuperLink, by way of our own program: see `supernode` and `superlink`."""
    name = command[0].removeprefix("flower-")
    return [sys.executable, "-m", f"fedalign.federation.flower.{name}", *command[1:]]


def connect(
    home: Path, name: str, address: str, root_certificates: Path | None, options: Mapping[str, Any] | None = None
) -> None:
    """Let the `flwr` of this home know a SuperLink by a name, its only one."""
    trust = {"root-certificates": str(root_certificates.absolute())} if root_certificates else {"insecure": True}
    connection = {"address": address, **trust} | ({"options": dict(options)} if options else {})
    home.mkdir(parents=True, exist_ok=True)
    write_text(home / "config.toml", tomli_w.dumps({"superlink": {"default": name, name: connection}}))


def flwr(environment: Mapping[str, str], *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Flower's own command line."""
    return _finished([executable("flwr", environment), *arguments], environment, cwd)


def _finished(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=FLWR_SECONDS,
    )


def ask_flwr(environment: Mapping[str, str], address: str, *arguments: str) -> dict[str, Any]:
    """The answer of the SuperLink at this address, which the home is connected to, to a command.

    Raises:
        UserError: It refuses, or cannot be reached.
    """
    return _told(flwr(environment, *arguments, "--format", "json"), address, f"`flwr {arguments[0]}`")


def registered(address: str, root_certificates: str | None) -> list[dict[str, Any]]:
    """The keys that a SuperLink knows, each as `roster.Registered` has it.

    Raises:
        UserError: It refuses, or cannot be reached.
    """
    command = [sys.executable, "-m", "fedalign.federation.flower.roster", address, *filter(None, [root_certificates])]
    with TemporaryDirectory() as home:
        found: list[dict[str, Any]] = _told(_finished(command, environment(Path(home))), address, "the list")["nodes"]
    return found


def _told(done: subprocess.CompletedProcess[str], address: str, what: str) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        answer = {"error-message": done.stderr or done.stdout}
    if done.returncode or not answer.get("success"):
        told = " ".join(str(answer.get("error-message", "")).split())[-400:].rstrip(".")
        raise UserError(f"SuperLink {address}: {what} failed: {told}. Is it running there?")
    return answer


def register_command(name: str) -> str:
    """The coordinator's command that takes in a site, whose public key was saved as NAME.pub.

    >>> register_command("ward 3")
    "flwr supernode register ward%203.pub ours --name 'ward 3'"
    """
    return shlex.join(["flwr", "supernode", "register", f"{folder_name(name)}.pub", "ours", "--name", name])


def free_port(taken: AbstractSet[int] = frozenset()) -> int:
    """A port of the loopback that is free now, and below those that outgoing connections get."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(20_000, 32_000)
        if port in taken:
            continue
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port


def check_plaintext(address: str, root_certificates: str | None, insecure_anywhere: bool) -> None:
    """Refuse to talk in the clear beyond this machine by accident.

    Args:
        address: HOST:PORT of the SuperLink.
        root_certificates: what its certificate is checked with; None: plaintext.
        insecure_anywhere: the user asked for plaintext over a network, and was told what that risks.

    Raises:
        UserError: Plaintext where it was not asked for, or no such certificates.
    """
    if root_certificates and not Path(root_certificates).is_file():
        raise UserError(f"root_certificates = {root_certificates!r}: no such file. Give the CA's PEM file.")
    if not root_certificates and not is_loopback(address) and not insecure_anywhere:
        raise UserError(
            f"superlink = {address!r}: not on this machine, and without root_certificates weights, statistics and the "
            "code that sites run would travel in the clear. Give the CA's PEM file (docs/many-sites.md). "
            "--insecure-anywhere does without: whoever is on the way can then read and change all of it."
        )


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is on this machine.

    >>> is_loopback("127.0.0.1:8000"), is_loopback("[::1]:8000"), is_loopback("hospital.example:8000")
    (True, True, False)
    """
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_flower(engine: str) -> None:
    """Refuse to start what is not installed, or in a version that was not tried.

    Raises:
        UserError: Flower, or for a simulation Ray, is missing, or another Flower is there than is supported.
    """
    needed = {"flwr": "flower"} | ({"ray": "simulation"} if engine == "simulation" else {})
    for module, extra in needed.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"federation.engine = {engine!r}: {module} is not installed. pip install 'fedalign-moe[{extra}]'"
            )
    with suppress(metadata.PackageNotFoundError):  # without metadata nothing says which fits
        there = metadata.version("flwr")
        for requirement in map(Requirement, metadata.requires("fedalign-moe") or ()):
            if requirement.name == "flwr" and not requirement.specifier.contains(there, prereleases=True):
                rule = requirement.specifier
                raise UserError(f"flwr {there} is installed, {rule} is supported. Run: pip install 'flwr{rule}'")
