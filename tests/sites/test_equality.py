"""The same run by three engines gives the same model, bit for bit; and who is not registered has no part in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sites.conftest import SITES, Deployment, Run, deployed, merged, on_one_machine, settings, share

pytestmark = pytest.mark.sites

OWN = ("seconds", "versions", "checked")  # of a summary: what engines do not share
SIMULATED: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"wire__dtype": "int8"},
    "masked": {
        "algorithm__name": "by_use",
        "privacy__masked": True,
        "server__max_norm_ratio": 0,
    },
}
INTRUDERS = ("unregistered", "plaintext")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equality")


@pytest.fixture(scope="module")
def in_process(folder: Path, olmoe: Path) -> Run:
    return on_one_machine(folder / "in-process", "in_process", settings(olmoe), run__rounds=2)


@pytest.fixture(scope="module")
def deployment(folder: Path, olmoe: Path) -> Iterator[Deployment]:
    """Three registered sites under TLS, one whose key nobody registered, and one that speaks in the clear."""
    with deployed(folder / "deployed", settings(olmoe)) as running:
        running.prepare("unregistered", share("north"), register=False)
        running.start("unregistered")
        running.prepare("plaintext", share("north"))
        running.start("plaintext", insecure=True)
        for site in SITES:
            running.add(site)
        yield running


@pytest.fixture(scope="module")
def by_sites(deployment: Deployment) -> tuple[Run, str]:
    return deployment.run("float32", run__rounds=2)


def assert_equal(one: Run, other: Run) -> None:
    assert one.model == other.model
    assert one.measured == other.measured


def test_a_deployment_gives_the_model_of_one_process(by_sites: tuple[Run, str], in_process: Run) -> None:
    run, said = by_sites
    assert_equal(run, in_process)
    assert run.rounds == [0, 1, 2]
    assert run.lines[2]["clients"] == list(SITES)
    assert run.lines[2]["train_loss_nats"] < run.lines[1]["train_loss_nats"]  # it is training that is equal
    summary = run.summary
    assert summary["failures"] == []
    assert summary["checked"] == "names, shapes and values"  # a coordinator has no model that could run
    assert {k: v for k, v in summary.items() if k not in OWN} == {
        k: v for k, v in in_process.summary.items() if k not in OWN
    }
    assert run.status["state"] == "complete"
    assert "round 2 | accuracy" in said
    assert all(f"{site} " in said for site in SITES)


def test_intruders_have_no_part(deployment: Deployment, by_sites: tuple[Run, str]) -> None:
    run, said = by_sites
    told = said + (run.path / "metrics.jsonl").read_text() + (run.path / "summary.json").read_text()
    for name in INTRUDERS:
        assert name not in told
        assert "SuperNode ID" not in deployment.loopback.log(name)
        assert not (deployment.sites[name] / "runs").exists()
    assert "Failed to activate SuperNode" in deployment.loopback.log("unregistered")
    assert "Connection attempt failed" in deployment.loopback.log("plaintext")


@pytest.mark.parametrize("kind", [pytest.param("float32", marks=pytest.mark.variant), "int8", "masked"])
def test_a_simulation_gives_the_model_of_one_process(
    folder: Path, olmoe: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    pytest.importorskip("ray", reason="Flower's simulation engine needs Ray: make test-sites installs it")
    tables = merged(settings(olmoe), SIMULATED[kind])
    simulated = on_one_machine(folder / f"simulated-{kind}", "simulation", tables, run__rounds=2)
    if SIMULATED[kind]:
        expected = on_one_machine(folder / f"in-process-{kind}", "in_process", tables, run__rounds=2)
    else:
        expected = request.getfixturevalue("in_process")
    assert_equal(simulated, expected)
    assert simulated.summary["failures"] == []
