"""Names and keys with real Flower programs: nobody takes another's name, and a key can be revoked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedalign.errors import UserError
from fedalign.federation.flower.keys import make_node_key
from tests.sites.conftest import Deployment, deployed, merged, settings, share

pytestmark = pytest.mark.sites


@pytest.fixture(scope="module")
def tables(olmoe: Path) -> dict[str, Any]:
    return merged(settings(olmoe), {"federation__min_sites": 2})


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, tables: dict[str, Any]) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("names") / "deployed", tables) as running:
        yield running


def test_a_name_is_its_keys_and_a_key_can_be_revoked(deployment: Deployment) -> None:
    loopback, nodes = deployment.loopback, deployment.nodes
    thief = deployment.add("thief", share("west"), claims="north")  # first of all, with a key that was registered
    deployment.wait_online(1)
    deployment.add("north")
    south = deployment.add("south")
    deployment.wait_online(3)
    run, said = deployment.run("first")
    assert run.lines[1]["clients"] == ["north", "south"]
    reason = "refused: it calls itself 'north', and its key was registered as 'thief'"
    assert [fault[1:] for fault in run.failures()] == [("thief", "join", reason)]
    assert f"thief, join: {reason}" in said
    assert "hello" in (thief / "log.jsonl").read_text()  # all that was asked of it
    assert "train" not in (thief / "log.jsonl").read_text()
    loopback.terminate("thief")

    loopback.revoke(nodes["south"])
    loopback.terminate("south")
    with pytest.raises(UserError, match="already"):
        loopback.register("south", south / "key.pub")  # what was revoked stays so
    deployment.start("south")
    loopback.wait(lambda: "305" in loopback.log("south") or not loopback.processes("south"), "it to be refused")
    loopback.terminate("south")
    for file in ("key", "key.pub"):
        (south / file).rename(south / f"old-{file}")
    loopback.register("south", make_node_key(south / "key"))
    deployment.start("south")
    deployment.wait_online(2)
    with deployment.started("second") as (run, command):
        command.wait(lambda: bool(run.lines), "the scores of the model that the run starts from")
    assert sorted(run.lines[0]["client_accuracies"]) == ["north", "south"]
    assert run.failures() == []
