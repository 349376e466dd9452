"""The ServerApp: what Flower starts at the coordinator. It runs the same rounds, and writes the same run folder."""

from __future__ import annotations

import contextlib
import ctypes
import secrets
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.federation.flower import waits
from fedalign.federation.flower.coordinator import Coordinator
from fedalign.federation.flower.link import GridLink, RunAbout
from fedalign.federation.flower.status import Beacon
from fedalign.federation.service import log, log_to_stderr
from fedalign.files import trouble, write_text
from fedalign.moe.load import quiet
from fedalign.server.results import RunFolder
from fedalign.server.run import execute

app = ServerApp()
M_MMAP_THRESHOLD = -3  # of mallopt(3)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds that the run folder does not hold yet.

    Reads from Flower's run configuration: `config`, the path of the configuration, and `out`, the run folder. A folder
    that holds the run already is gone on with.
    """
    log_to_stderr()
    quiet()
    return_what_is_freed()
    waits.shorten()
    waits.outlast_failures()
    folder = RunFolder(Path(str(context.run_config["out"])).expanduser().absolute())
    source = Path(str(context.run_config["config"])).expanduser()
    try:
        with folder.worked():
            _go(grid, source, folder, Beacon(folder.path))
    except UserError as error:
        log.error("%s", error)
        raise SystemExit(2) from None


def return_what_is_freed() -> None:
    """Have glibc give blocks of 1 MiB and more back to the system: it keeps those of up to 32, as groups are."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _go(grid: Grid, source: Path, folder: RunFolder, beacon: Beacon) -> None:
    try:
        config = load_config(source)
        if not folder.config.exists():
            folder.check_free(overwrite=False)
            folder.begin(config)
        beacon.begin()
        about = RunAbout(config.to_toml(), run_key(folder), str(folder.path))
        link = GridLink(grid, about, expiry=2.0 * config.federation.timeout_seconds + 60)
        coordinator = Coordinator.connect(link, config, folder)
        coordinator.federation.tell_transfers(beacon.moving)
        beacon.note = coordinator.consents()
        beacon.begin()
        execute(coordinator, folder, beacon)
        beacon.end()
    except UserError as error:
        beacon.fail(str(error))
        raise
    except Exception as error:
        told = trouble(error)
        with contextlib.suppress(OSError):  # the disk may be full
            beacon.fail(f"{told}. Complete rounds are kept" if told else f"{type(error).__name__}: {error}")
        raise


def run_key(folder: RunFolder) -> str:
    """The key under which sites keep their part of this run: the same when the run is resumed."""
    file = folder.path / "run-key"
    if not file.exists():
        write_text(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8")
