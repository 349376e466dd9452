"""Flower's stock programs: where they are, which environment they get, and ports for them on this machine."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w

from fedalign.errors import UserError
from fedalign.files import write_text

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
    return subprocess.run(
        [executable("flwr", environment), *arguments],
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
    """What the SuperLink at this address, which the home is connected to, answers to a command.

    Raises:
        UserError: It refuses, or cannot be reached.
    """
    done = flwr(environment, *arguments, "--format", "json")
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        answer = {"error-message": done.stderr or done.stdout}
    if done.returncode or not answer.get("success"):
        told = " ".join(str(answer.get("error-message", "")).split())[-400:]
        raise UserError(f"SuperLink {address}: `flwr {arguments[0]}` failed: {told}. Is it running there?")
    return answer


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
