"""Names and keys with real Flower programs: nobody takes another's name, and a key can be revoked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedalign.errors import UserError
from fedalign.federation.flower.keys import make_node_key
from fedalign.federation.flower.programs import registered
from tests.sites.conftest import Deployment, deployed, merged, settings, share

pytestmark = pytest.mark.sites


@pytest.fixture(scope="module")
def tables(olmoe: Path, texts: Path) -> dict[str, Any]:
    """One round of two sites, scored by the coordinator alone: the fewest messages."""
    changes = {"data__test": str(texts / "test.jsonl"), "evaluation__clients": False, "federation__min_sites": 2}
    return merged(settings(olmoe), changes)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, tables: dict[str, Any]) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("names") / "deployed", tables) as running:
        running.add("thief", share("west"), claims="north")  # first of all, with a key that was registered
        running.wait_online()
        running.add("north")
        running.add("south")
        running.wait_online()
        yield running


def test_a_key_can_be_revoked(deployment: Deployment) -> None:
    loopback, south = deployment.loopback, deployment.sites["south"]
    loopback.revoke(deployment.nodes["south"])
    loopback.terminate("south")
    with pytest.raises(UserError, match="already"):
        loopback.register("south", south / "key.pub")  # what was revoked stays so
    deployment.start("south")
    loopback.wait(lambda: "refuses this site's key" in loopback.log("south"), "it to be refused", needs="south")
    loopback.terminate("south")
    for file in ("key", "key.pub"):
        (south / file).rename(south / f"old-{file}")
    loopback.register("south", make_node_key(south / "key"))
    deployment.start("south")
    deployment.wait_online("south")
    listed = {site["node"]: (site["name"], site["status"]) for site in registered(*address(deployment))}
    assert listed.pop(deployment.nodes["south"]) == ("south", "unregistered")
    assert sorted(listed.values()) == [("north", "online"), ("south", "online"), ("thief", "online")]


def address(deployment: Deployment) -> tuple[str, str]:
    """Of the SuperLink, and what its certificate is checked with."""
    assert deployment.loopback.certificates is not None
    return deployment.loopback.address, str(deployment.loopback.certificates.ca)


def test_a_name_is_its_keys(deployment: Deployment) -> None:
    """With the thief online, and south, if its key was revoked, under another."""
    run, said = deployment.run("run")
    assert run.lines[1]["clients"] == ["north", "south"]
    reason = "refused: it calls itself 'north', and its key was registered as 'thief'"
    assert [fault[1:] for fault in run.failures()] == [("thief", "join", reason)]
    assert f"thief, join: {reason}" in said
    answered = (deployment.sites["thief"] / "log.jsonl").read_text()
    assert "hello" in answered  # all that was asked of it
    assert "train" not in answered
