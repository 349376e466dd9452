"""Flower's stock programs: where they are, which environment they get, and ports for them on this machine."""

from __future__ import annotations

import os
import random
import shutil
import socket
import sys
import sysconfig
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

from fedalign.errors import UserError

HOST = "127.0.0.1"
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
