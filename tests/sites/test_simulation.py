"""A simulation that is broken off leaves no process of Flower's or Ray's behind, which have sessions of their own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import tomli_w

from tests.conftest import write_jsonl
from tests.sites.conftest import SITES, Command, Run, merged, settings, share

pytestmark = pytest.mark.sites


def marked(mark: str) -> list[str]:
    """The processes that have this in their environment now."""
    name, _, value = mark.partition("=")
    listing = psutil.process_iter(["cmdline", "environ"])
    return [str(one.info["cmdline"])[:200] for one in listing if (one.info["environ"] or {}).get(name) == value]


def test_nothing_goes_on_after_a_killed_coordinator_and_after_ctrl_c(olmoe: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Flower's simulation engine needs Ray: make test-sites installs it")
    data = tmp_path / "data"
    data.mkdir()
    for site in SITES:
        write_jsonl(data / f"{site}.jsonl", share(site))
    tables = merged(
        settings(olmoe), {"data__train": str(data), "clients__partition": "files", "run__rounds": 500, "run__seed": 1}
    )
    tables["federation"] = {"engine": "simulation"}
    (tmp_path / "run.toml").write_text(tomli_w.dumps(tables))
    mark = f"HOME_OF_THE_TEST={tmp_path}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME_OF_THE_TEST": str(tmp_path)}
    run = Run(tmp_path / "run")

    with Command(["run", tmp_path / "run.toml", "--out", run.path], tmp_path / "log", environment) as command:
        command.wait(lambda: run.reached(1, "training", 0), "round 1 has begun")
        coordinator = run.status["pid"]
        assert coordinator != command.process.pid
        os.kill(coordinator, signal.SIGKILL)
        killed = time.monotonic()
        assert command.finish(60) == 2, command.said
        assert time.monotonic() - killed < 30  # Flower alone takes a minute
        assert f"the coordinator (process {coordinator}) has ended without a word, killed or stopped" in command.said
        assert marked(mark) == []

    with Command(["run", "--resume", run.path], tmp_path / "log", environment) as command:
        command.wait(lambda: len(run.rounds) > 1, "a round is complete")
        os.kill(command.process.pid, signal.SIGINT)
        assert command.finish(60) == 130, command.said
        assert "Interrupted. Complete rounds are kept" in command.said
        assert marked(mark) == []
        rounds = run.rounds
    time.sleep(2)
    assert run.rounds == rounds
