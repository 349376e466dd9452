"""The ServerApp: what Flower starts at the coordinator. It runs the same rounds, and writes the same run folder."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedalign.config import read_config
from fedalign.errors import UserError
from fedalign.federation.flower.coordinator import Coordinator
from fedalign.federation.flower.link import GridLink
from fedalign.federation.flower.status import Beacon, running
from fedalign.moe.model import quiet
from fedalign.results import RunFolder
from fedalign.run import execute
from fedalign.service import log_to_stderr

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds that the run folder does not hold yet."""
    log_to_stderr()
    quiet()
    settings = context.run_config
    folder = RunFolder(Path(str(settings["out"])).expanduser().absolute())
    folder.path.mkdir(parents=True, exist_ok=True)
    beacon = Beacon(folder.path)
    try:
        config = read_config(str(settings["config"]))
        expiry = 2.0 * config.federation.timeout_seconds + 60
        with running(folder.path):
            beacon.begin()
            centre = Coordinator.connect(GridLink(grid, expiry), config, folder)
            execute(centre, folder, beacon)
            beacon.end()
    except UserError as error:
        beacon.fail(str(error))
        raise SystemExit(2) from None
    except Exception as error:
        beacon.fail(f"{type(error).__name__}: {error}")
        raise
