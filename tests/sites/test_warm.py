"""Sites that keep their model loaded: the same model, loaded once; without the trainer each message loads it anew."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.sites.conftest import READY, SITES, Deployment, Run, deployed, on_one_machine, settings, share

pytestmark = pytest.mark.sites

COUNTED = """
import os
from pathlib import Path
from fedalign.federation.service import Service
make = Service.__init__

def init(self, name, memory, open_client):
    def opened():
        with Path(__file__).with_name("loads").open("a") as file:
            print(os.getpid(), file=file)
        return open_client()
    make(self, name, memory, opened)

Service.__init__ = init
"""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, olmoe: Path) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("warm") / "deployed", settings(olmoe)) as running:
        for site in SITES:
            running.prepare(site, share(site), change=COUNTED)
            running.serve(site)
        for site in SITES:
            said = f"{site} is ready for {running.loopback.address}"
            running.loopback.wait(lambda site=site, said=said: said in running.loopback.log(site), said, needs=site)  # type: ignore[misc] # mypy infers no lambda with defaults
        running.wait_online()
        yield running


def trainer(deployment: Deployment, site: str) -> int:
    """The pid of a site's trainer, as it says itself."""
    return int(json.loads((deployment.sites[site] / "trainer.json").read_text())["pid"])


def loads(deployment: Deployment, site: str) -> list[int]:
    """The pids of the processes that have loaded the site's model, one for each time."""
    return [int(line) for line in (deployment.sites[site] / "change" / "loads").read_text().splitlines()]


def in_process(olmoe: Path, folder: Path, rounds: int) -> Run:
    return on_one_machine(folder / "one", "in_process", settings(olmoe), run__rounds=rounds)


def test_the_model_is_loaded_once_and_the_run_is_the_same(deployment: Deployment, olmoe: Path, tmp_path: Path) -> None:
    run, _ = deployment.run("warm", run__rounds=2)
    for site in SITES:
        assert loads(deployment, site) == [trainer(deployment, site)]
    one = in_process(olmoe, tmp_path, 2)
    assert run.model == one.model
    assert run.measured == one.measured
    assert run.summary["failures"] == []


def test_a_trainer_killed_in_mid_round_is_done_without(deployment: Deployment, olmoe: Path, tmp_path: Path) -> None:
    assert deployment.loopback.processes("north")
    victim = trainer(deployment, "north")
    with deployment.started("cold") as (run, command):
        command.wait(lambda: run.reached(1, "training", 0), "round 1 has begun")
        os.kill(victim, signal.SIGSTOP)  # it must not answer before it is killed
        command.wait(lambda: run.reached(1, "training", 2), "the other sites have trained")
        command.wait(lambda: bool(deployment.apps("north")), "its SuperNode, which looks each 3 s, has the message")
        (app,) = deployment.apps("north")  # asks the trainer
        assert READY in psutil.Process(app).cmdline()  # and was forked
        os.kill(victim, signal.SIGKILL)
        assert command.finish() == 0, command.said
    assert "no warm trainer" in deployment.loopback.log("north")
    cold = [pid for pid in loads(deployment, "north") if pid != victim]
    assert len(cold) == len(set(cold)) == 2  # to train and to be scored, in processes of their own
    one = in_process(olmoe, tmp_path, 1)
    assert run.model == one.model
    assert run.measured == one.measured
    assert run.summary["failures"] == []


def test_sigterm_ends_all_of_a_site(deployment: Deployment) -> None:
    for site in ("south", "west"):
        assert len(deployment.loopback.processes(site)) > 1
        os.kill(trainer(deployment, site), signal.SIGTERM)
    for site in ("south", "west"):
        deployment.loopback.wait(lambda site=site: not deployment.loopback.processes(site), f"{site} to end", 40)  # type: ignore[misc] # mypy infers no lambda with defaults
        assert not (deployment.sites[site] / "trainer.json").exists()
