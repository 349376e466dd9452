"""Masked sums over three real sites: the bytes of one process, and what becomes of a round when somebody is killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedalign.client.log import SiteLog
from tests.sites.conftest import (
    HOLDING,
    SITES,
    Deployment,
    Run,
    deployed,
    held,
    is_finite,
    merged,
    on_one_machine,
    settings,
    share,
)

pytestmark = pytest.mark.sites

HELD = HOLDING.format(module="masked_service", service="MaskedService", verb="conceal")
STATISTICS = {"prob_L_E", "load_L_E", "loss"}


@pytest.fixture(scope="module")
def tables(olmoe: Path) -> dict[str, Any]:
    changes = {
        "privacy__masked": True,
        "privacy__masked_min_holders": 2,
        "server__max_norm_ratio": 0,
        "wire__piece_mb": 0.06,  # counts fit, updates do not
    }
    return merged(settings(olmoe) | {"algorithm": {"name": "by_use"}}, changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tables: dict[str, Any]) -> Run:
    """The same in one process."""
    return on_one_machine(tmp_path_factory.mktemp("whole") / "run", "in_process", tables)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, tables: dict[str, Any]) -> Iterator[Deployment]:
    """Sites that take part in masked runs alone, and know each other's keys."""
    with deployed(tmp_path_factory.mktemp("masked") / "deployed", tables) as running:
        for site in SITES:
            running.prepare(site, share(site), change=HELD)
        keys = {site: (running.sites[site] / "key.pub").read_text().strip() for site in SITES}
        for site in SITES:
            others = {name: key for name, key in keys.items() if name != site}
            with (running.sites[site] / "site.toml").open("a") as file:
                file.write(tomli_w.dumps({"privacy": {"masked": True, "masked_min_holders": 2, "node_keys": others}}))
            running.serve(site)
        running.wait_online()
        yield running


def asked(deployment: Deployment, run: Run, site: str) -> list[str]:
    """The messages of a run that a site has answered, by verb."""
    key = (run.path / "run-key").read_text()
    return [one.verb for one in SiteLog(deployment.sites[site]).entries() if one.run == key]


def concealed(deployment: Deployment, run: Run, site: str) -> list[dict[str, Any]]:
    """The sums of updates that a site took part in."""
    key = (run.path / "run-key").read_text()
    lines = (deployment.sites[site] / "runs" / key / "masks.jsonl").read_text().splitlines()
    noted = [one for one in map(json.loads, lines[1:]) if "names" in one]
    return [one for one in noted if not {"examples", "scored"} & {*one["names"]}]


def test_a_masked_run_over_sites_is_the_run_in_one_process(
    deployment: Deployment, tables: dict[str, Any], tmp_path: Path
) -> None:
    run, said = deployment.run("two", run__rounds=2)
    whole = on_one_machine(tmp_path / "two", "in_process", tables, run__rounds=2)
    assert run.model == whole.model
    assert run.measured == whole.measured
    assert run.summary["failures"] == []
    assert run.lines[2]["clients"] == list(SITES)
    assert run.lines[2]["train_loss_nats"] < run.lines[1]["train_loss_nats"]
    assert all(line["held_out_examples"] == run.lines[0]["held_out_examples"] > 0 for line in run.lines)
    assert "masked sums: the server learns sums over clients alone" in said
    for site in SITES:
        log = SiteLog(deployment.sites[site])
        assert not any(STATISTICS & {*entry.fields} for entry in log.entries())
        assert {entry.verb for entry in log.entries()} >= {"hello", "train", "conceal", "update"}


def test_a_coordinator_that_is_killed_in_the_sum_goes_on_with_the_same_sum(deployment: Deployment, whole: Run) -> None:
    with deployment.started("resumed") as (run, command), held(deployment, "north"):
        command.wait(
            lambda: run.reached(1, "summing", 1) and "update" in asked(deployment, run, "west"),
            "west has sent its update",
        )
        assert deployment.loopback.kill_app("superlink")
        assert command.finish() == 2, command.said
    deployment.resume(run)
    assert run.model == whole.model
    assert run.summary["failures"] == []
    assert len(concealed(deployment, run, "west")) == 1


def test_a_site_killed_between_totals_and_update_costs_its_share(deployment: Deployment, whole: Run) -> None:
    with deployment.started("killed", federation__min_sites=2) as (run, command):
        with held(deployment, "north"):
            command.wait(lambda: run.reached(1, "summing", 1), "the totals have been told")
            command.wait(lambda: bool(deployment.apps("north")), "north is asked for its share")
            deployment.loopback.kill("north")
        assert command.finish() == 0, command.said
    assert run.rounds == [0, 1]
    assert run.lines[1]["clients"] == list(SITES)  # all were counted
    assert run.failures()[0][:3] == (1, "north", "update")
    assert {fault[1] for fault in run.failures()} == {"north"}  # it is not back when the round is scored
    assert run.lines[1]["train_loss_nats"] == whole.lines[1]["train_loss_nats"]
    assert run.model != whole.model
    assert is_finite(run.weights)
    for site in ("south", "west"):
        first, second = concealed(deployment, run, site)
        assert (first["among"], second["among"]) == (list(SITES), ["south", "west"])
        assert first["names"] == second["names"]  # nothing of north had come
