"""A transfer whose SuperNode is killed in the middle, in each direction, goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sites.conftest import Deployment, Run, deployed
from tests.sites.transfers import SITE, assert_as_undisturbed, disturbed, tables_for

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


@pytest.mark.parametrize("way", [pytest.param("down", marks=pytest.mark.variant), "up"])
def test_a_supernode_killed_in_a_transfer_costs_a_piece(deployment: Deployment, whole: Run, way: str) -> None:
    assert_as_undisturbed(deployment, disturbed(deployment, f"killed-{way}", "SuperNode", way, after=1), whole)
