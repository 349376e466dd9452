"""A transfer in the middle of which SuperNode, SuperLink or coordinator is killed goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sites.conftest import Deployment, Run, deployed
from tests.sites.transfers import SITE, Kill, assert_as_undisturbed, compared, disturbed, tables_for

pytestmark = pytest.mark.sites


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, olmoe: Path) -> Iterator[Deployment]:
    """One site without a key: Flower refuses a key for a minute after its SuperNode was killed."""
    with deployed(tmp_path_factory.mktemp("pieces") / "deployed", tables_for(olmoe), secure=False) as running:
        running.add(SITE, warm=True)
        running.wait_online()
        yield running


@pytest.fixture(scope="module")
def whole(deployment: Deployment) -> Run:
    run, _ = deployment.run("whole")
    assert run.failures() == []
    return run


@pytest.mark.parametrize(
    "kills",
    [
        [Kill("SuperNode", "up")],
        [Kill("coordinator", "down"), Kill("SuperLink", "up")],  # one run: each way is broken off once
        pytest.param([Kill("SuperNode", "down")], marks=pytest.mark.variant),
        pytest.param([Kill("SuperLink", "down")], marks=pytest.mark.variant),
        pytest.param([Kill("coordinator", "up")], marks=pytest.mark.variant),
    ],
    ids=lambda kills: "-then-".join(f"{kill.victim}-{kill.way}" for kill in kills),
)
def test_a_kill_in_a_transfer_costs_the_pieces_under_way(deployment: Deployment, whole: Run, kills: list[Kill]) -> None:
    run = disturbed(deployment, "-".join(f"{kill.victim}-{kill.way}" for kill in kills), *kills)
    assert_as_undisturbed(compared(deployment, run, whole))
