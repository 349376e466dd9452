"""Whatever of the coordinator's side is killed, `--resume` ends with the model of a run that nothing happened to."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from fedalign.federation.flower.status import is_running
from tests.sites.conftest import HELD, Deployment, Run, deployed, held, merged, on_one_machine, settings

pytestmark = pytest.mark.sites

PAIR = ("north", "south")


@pytest.fixture(scope="module")
def tables(olmoe: Path, texts: Path) -> dict[str, Any]:
    """Two rounds of two sites, scored by the coordinator alone: the fewest messages that can be interrupted."""
    return merged(
        settings(olmoe),
        {
            "run__rounds": 2,
            "data__test": str(texts / "test.jsonl"),
            "evaluation__clients": False,
            "federation__min_sites": 2,
        },
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tables: dict[str, Any]) -> Run:
    """What all of these runs must come to."""
    return on_one_machine(tmp_path_factory.mktemp("whole") / "run", "in_process", tables, PAIR)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, tables: dict[str, Any]) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("resume") / "deployed", tables) as running:
        for site in PAIR:
            running.add(site, warm=True, change=HELD)
        yield running


def kill_coordinator(deployment: Deployment) -> None:
    assert deployment.loopback.kill_app("superlink")


def told(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if "bytes_down" not in key} for line in run.measured]


def assert_whole(run: Run, whole: Run, said: str) -> None:
    assert run.model == whole.model
    assert run.rounds == [0, 1, 2]
    assert told(run) == told(whole)
    for mine, theirs in zip(run.lines, whole.lines, strict=True):  # a round that is begun again sends the weights again
        assert mine["bytes_down"] in (theirs["bytes_down"], 2 * theirs["bytes_down"])
    assert run.status["state"] == "complete"
    assert run.summary["failures"] == []
    assert "fedalign_paper after 2 rounds" in said


@pytest.mark.variant
def test_the_coordinator_killed_between_rounds(deployment: Deployment, whole: Run) -> None:
    with deployment.started("between") as (run, command):
        command.wait(lambda: run.rounds == [0, 1], "round 1 is complete")
        kill_coordinator(deployment)
        first = run.lines[1]
        assert command.finish() == 2, command.said  # who watches is told, and how to go on
        assert f"go on with: fedalign run --resume {run.path}" in command.said
        assert run.rounds == [0, 1]
    said = deployment.resume(run)
    assert run.lines[1] == first  # to the second: round 1 was not run again
    assert_whole(run, whole, said)


def test_the_coordinator_killed_in_mid_round(deployment: Deployment, whole: Run) -> None:
    with deployment.started("middle") as (run, command):
        command.wait(lambda: run.reached(2, "training", 1), "a site has trained in round 2")
        kill_coordinator(deployment)
        command.kill()  # as when the machine loses power
        assert run.rounds == [0, 1]
    assert_whole(run, whole, deployment.resume(run))


@pytest.mark.variant
def test_who_watches_killed_and_the_coordinator_goes_on(deployment: Deployment, whole: Run) -> None:
    with deployment.started("watched") as (run, command):
        command.wait(lambda: run.reached(1, "training", 0), "round 1 has begun")
        command.kill()
    flower_run, coordinator = (run.path / "flower" / "run-id").read_text(), run.status["pid"]
    with deployment.command("run", "--resume", run.path) as again:
        again.wait(lambda: run.rounds == [0, 1], "round 1 is complete")
        assert run.status["pid"] == coordinator  # it was found again, not started anew
        assert again.finish() == 0, again.said
    assert (run.path / "flower" / "run-id").read_text() == flower_run
    assert_whole(run, whole, again.said)


def test_a_lost_terminal_does_not_end_the_run(deployment: Deployment, whole: Run) -> None:
    with ExitStack() as stack:
        with held(deployment, "north"):
            with deployment.started("terminal") as (run, command):
                command.wait(lambda: run.reached(1, "training", 0), "round 1 has begun")
                with deployment.command("run", "--resume", run.path) as second:  # it is watched already
                    assert second.finish() == 2, second.said
                    assert f"a run is at work there (process {command.process.pid} on" in second.said
                os.kill(command.process.pid, signal.SIGHUP)
                assert command.finish(60) == 129, command.said
                assert f"The run goes on at the SuperLink; go on with: fedalign run --resume {run.path}" in command.said
            coordinator = run.status["pid"]
            with deployment.command("run", federation_file(run), "--out", run.path, "--overwrite") as anew:
                assert anew.finish() == 2, anew.said
                assert f"a run is at work there (process {coordinator} on" in anew.said
            again = stack.enter_context(deployment.command("run", "--resume", run.path))
            again.wait(lambda: "round 0" in again.said, "the run is watched again")
        assert again.finish() == 0, again.said
    assert run.status["pid"] == coordinator
    assert_whole(run, whole, again.said)


def federation_file(run: Run) -> Path:
    """The configuration that the coordinator was given."""
    return run.path / "flower" / "federation.toml"


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        pytest.param(signal.SIGINT, 130, "Interrupted", marks=pytest.mark.variant),
        (signal.SIGTERM, 143, "Ended by SIGTERM"),
    ],
)
def test_who_is_asked_to_end_stops_the_run_and_it_can_be_resumed(
    deployment: Deployment, whole: Run, number: int, code: int, told: str
) -> None:
    with deployment.started(f"asked-{code}") as (run, command):
        command.wait(lambda: run.rounds == [0, 1], "round 1 is complete")
        os.kill(command.process.pid, number)
        assert command.finish(60) == code, command.said
        assert f"{told}. Complete rounds are kept; go on with: fedalign run --resume {run.path}" in command.said
        assert not is_running(run.path)  # the coordinator's process has ended, too
    flower_run = (run.path / "flower" / "run-id").read_text()
    assert status_of(deployment, flower_run) == "finished:stopped"
    assert_whole(run, whole, deployment.resume(run))


def status_of(deployment: Deployment, flower_run: str) -> str:
    runs = deployment.loopback._ask("list", "loopback", "--run-id", flower_run)["runs"]
    return str(runs[0]["status"])


def test_the_superlink_killed_with_all_that_it_started(deployment: Deployment, whole: Run) -> None:
    with deployment.started("superlink") as (run, command):
        command.wait(lambda: run.reached(2, "training", 0), "round 2 has begun")
        deployment.loopback.kill("superlink")
        assert command.finish() == 2, command.said
        assert f"fedalign run --resume {run.path}" in command.said
        assert run.rounds == [0, 1]
    deployment.loopback.start_superlink()  # on the same port and database; the sites find it again
    assert_whole(run, whole, deployment.resume(run))


def test_a_database_that_is_locked_costs_time_alone(tables: dict[str, Any], whole: Run, tmp_path: Path) -> None:
    """For longer than Flower lets SQLite wait, again and again: while sites start, and all through a run."""
    over = threading.Event()

    def lock(database: Path) -> None:
        with closing(sqlite3.connect(database, isolation_level=None, timeout=60)) as connection:
            while not over.is_set():
                connection.execute("BEGIN IMMEDIATE")
                over.wait(8)
                connection.execute("ROLLBACK")
                over.wait(2)

    with deployed(tmp_path / "deployed", tables, secure=False) as running:
        thread = threading.Thread(target=lock, args=[running.loopback.folder / "state.db"])
        thread.start()
        try:
            for site in PAIR:
                running.add(site, warm=True)
            run, said = running.run("locked")
        finally:
            over.set()
            thread.join()
    assert_whole(run, whole, said)


def test_too_few_sites_are_told_at_once(deployment: Deployment) -> None:
    with deployment.started("few", federation__min_sites=3, federation__wait_seconds=5) as (run, command):
        assert command.finish(120) == 2
    found = re.search(
        r"(\d) sites are connected and fit, federation.min_sites = 3 are needed; waited 5 s", command.said
    )
    assert found, command.said
    unheard = re.search(r"Connected, but not heard yet: (\d)\.", command.said)
    assert int(found[1]) + (int(unheard[1]) if unheard else 0) == 2
    assert "Traceback" not in command.said
    assert run.status["state"] == "failed"
    assert found[0] in run.status["error"]
    assert run.rounds == []  # nothing is scored before they are there: the first line says how many consent
