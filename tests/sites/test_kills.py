"""Sites killed by SIGKILL in mid-round: the round goes on without them, they are named, and they may come back.

Those that come back at once have no keys: Flower refuses a key for a minute after its SuperNode was killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sites.conftest import HELD, SITES, Deployment, Run, deployed, held, is_finite, merged, settings, weights_of

pytestmark = pytest.mark.sites

GONE = ("its SuperNode is gone", "not connected", "its process ended")


@pytest.fixture(scope="module")
def tables(olmoe: Path, texts: Path) -> dict[str, Any]:
    """Scored by the coordinator alone, so that a round has no other messages than those that may be interrupted."""
    return merged(settings(olmoe), {"data__test": str(texts / "test.jsonl"), "evaluation__clients": False})


def assert_named(run: Run, said: str, round: int, site: str, stage: str) -> None:
    """A fault in metrics, in the summary and in what the command said."""
    faults = [fault for fault in run.failures(site) if fault[:3] == (round, site, stage)]
    assert len(faults) == 1, run.failures()
    reason = faults[0][3]
    assert reason.startswith(GONE)
    assert f"round {round}: {site}, {stage}: {reason}" in said
    assert {"client": site, "stage": stage, "reason": reason, "round": round} in run.summary["failures"]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, tables: dict[str, Any]) -> Iterator[Deployment]:
    """Three sites, each of which can be held in training."""
    with deployed(tmp_path_factory.mktemp("killed") / "deployed", tables, secure=False) as running:
        for site in SITES:
            running.add(site, change=HELD)
        running.wait_online()
        yield running


@pytest.fixture(scope="module")
def killed(deployment: Deployment) -> tuple[Run, str]:
    """Two rounds; west is killed in training in the first, and started again at once."""
    with deployment.started("training", run__rounds=2, federation__min_sites=2) as (run, command):
        with held(deployment, "west"):
            command.wait(lambda: run.reached(1, "training", 2), "the other sites have trained")
            command.wait(lambda: bool(deployment.apps("west")), "west is in training")
            assert not list(deployment.sites["west"].glob("runs/*/round-*"))  # no update was kept
            deployment.loopback.kill("west")
        deployment.start("west")
        assert command.finish() == 0, command.said
    return run, command.said


def test_a_site_killed_in_training_costs_its_share_and_is_named(killed: tuple[Run, str]) -> None:
    run, said = killed
    assert run.rounds == [0, 1, 2]
    assert run.lines[1]["clients"] == ["north", "south"]
    assert_named(run, said, 1, "west", "train")


def test_a_killed_site_that_is_started_again_takes_part_in_the_next_round(killed: tuple[Run, str]) -> None:
    run, _ = killed
    assert run.lines[2]["clients"] == list(SITES)
    assert run.lines[2]["bytes_up_by_client"]["west"] > 0
    assert [fault[:3] for fault in run.failures()] == [(1, "west", "train")]


def test_a_site_killed_between_its_statistics_and_its_update(
    deployment: Deployment, killed: tuple[Run, str], olmoe: Path
) -> None:
    assert killed[0].rounds[-1] == 2  # west is back
    with deployment.started("update") as (run, command):
        with held(deployment, "north"):  # the plan must not be made before the kill
            command.wait(lambda: run.reached(1, "training", 2), "the others have sent their statistics")
            key = (run.path / "run-key").read_text()
            assert (deployment.sites["west"] / "runs" / key / "round-00001" / "update.safetensors").exists()
            deployment.loopback.kill("west")
        assert command.finish() == 0, command.said
    assert run.rounds == [0, 1]
    line = run.lines[1]
    assert line["clients"] == list(SITES)  # all of them are in the plan
    assert_named(run, command.said, 1, "west", "update")
    assert 0 < line["bytes_up_by_client"]["west"] < line["bytes_up_by_client"]["south"]  # statistics, no update
    assert is_finite(run.weights)
    start = weights_of(olmoe)
    assert any(not torch.equal(value, start[name]) for name, value in run.weights.items())
