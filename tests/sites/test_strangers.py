"""Sites that do not fit are refused before round 1, and what a broken or hostile site sends does no harm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedalign.protocol import PROTOCOL
from tests.conftest import save_tokenizer
from tests.moe.tiny import build
from tests.sites.conftest import (
    Deployment,
    Run,
    deployed,
    is_finite,
    merged,
    on_one_machine,
    settings,
    share,
    weights_of,
)

pytestmark = pytest.mark.sites

GOOD = ("north", "south")
NEWER_PROTOCOL = """
import fedalign.protocol
fedalign.protocol.PROTOCOL += 1
import fedalign.federation.messages
fedalign.federation.messages.PROTOCOL = fedalign.protocol.PROTOCOL
"""
WRAPPED = """
import dataclasses
import torch
from fedalign.federation.service import Service

def wrap(verb, change):
    honest = getattr(Service, verb)
    setattr(Service, verb, lambda self, *asked, **how: change(honest(self, *asked, **how)))
"""
KEPT = """
import dataclasses
from contextlib import contextmanager

import torch
from fedalign.client.memory import ClientMemory
from fedalign.maths.rounding import count, shapes_of, wire_dtype

honest = ClientMemory.keeping

class Held:
    def __init__(self):
        self.update = {}

    def put(self, group, packed):
        self.update[group] = packed

    def save(self, kept):
        self.kept = kept

def wrap(change):
    @contextmanager
    def keeping(self, round, tensors):
        held = Held()
        yield held
        update = change(held.update)
        shapes = [t for g, p in update.items() for t in shapes_of(str(g), count(p), wire_dtype(p))]
        with honest(self, round, shapes) as inner:
            for group, packed in update.items():
                inner.put(group, packed)
            inner.save(held.kept)

    ClientMemory.keeping = keeping

def change_groups(update, change):
    return {g: dataclasses.replace(p, values=change(p.values)) for g, p in update.items()}
"""
IN_TRAINING = {
    "enormous": """
from fedalign.federation.service import Service
honest = Service._train

def train(self, *asked, **how):
    from fedalign.client.fit import LocalFit
    of = LocalFit.trained_of
    LocalFit.trained_of = lambda fit, group: of(fit, group) + 1e6 * (of(fit, group) - fit.local.start[group])
    return honest(self, *asked, **how)

Service._train = train
""",
    "statistics-nan": WRAPPED
    + "wrap('_train', lambda s: dataclasses.replace(s, prob_L_E=torch.full_like(s.prob_L_E, torch.nan)))",
    "statistics-shape": WRAPPED + "wrap('_train', lambda s: dataclasses.replace(s, norm_G=s.norm_G[:-1]))",
}
IN_UPDATE = {
    "update-shape": KEPT + "wrap(lambda u: change_groups(u, lambda values: values[:-1]))",
    "update-lacks": KEPT + "wrap(lambda u: dict(list(u.items())[1:]))",
    "update-nan": KEPT + "wrap(lambda u: change_groups(u, lambda values: values * torch.nan))",
    "update-enormous": KEPT + "wrap(lambda u: change_groups(u, lambda values: values * 1e6))",
}
REFUSED = {
    "other-weights": "its model weights differ: ",
    "other-layout": "its MoE layout differs: 2 layers x 8 experts, the coordinator's is 2 layers x 4 experts",
    "other-tokenizer": "its tokenizer differs: ",
    # its name cannot be read
    "node ": f"it speaks protocol {PROTOCOL + 1}, this is {PROTOCOL}: install the same version",
}
REASONS = {
    "enormous": "server.max_norm_ratio = 100",
    "statistics-nan": "prob_L_E is not finite",
    "statistics-shape": "norm_G is torch.float32 [18], expected torch.float32 [19]",
    "update-shape": "pieces in a row did not arrive as they were sent",
    "update-lacks": "its update of round 1 has no shared",
    "update-nan": "not finite",
    "update-enormous": "but its statistics said",
}


@pytest.fixture(scope="module")
def tables(olmoe: Path) -> dict[str, Any]:
    return merged(settings(olmoe), {"federation__min_sites": 2})


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, tables: dict[str, Any]) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("strangers") / "deployed", tables, secure=False) as running:
        for site in GOOD:
            running.add(site, warm=True)
        yield running


def other_tokenizer(model: Path, folder: Path) -> Path:
    """The same model with two words of its vocabulary exchanged."""
    shutil.copytree(model, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(tokenizer))
    return folder


def other_model(folder: Path, **changes: Any) -> Path:
    build("olmoe", vocab_size=384, **changes).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def refused(deployment: Deployment, olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run to which four sites come that do not fit, and three whose statistics cannot be used."""
    models = tmp_path_factory.mktemp("models")
    lines = share("west")
    deployment.add("other-weights", lines, model=other_model(models / "weights", seed=1), warm=True)
    deployment.add("other-layout", lines, model=other_model(models / "layout", num_experts=8), warm=True)
    deployment.add("other-tokenizer", lines, model=other_tokenizer(olmoe, models / "tokenizer"), warm=True)
    deployment.add("other-protocol", lines, change=NEWER_PROTOCOL)
    for site, change in IN_TRAINING.items():
        deployment.add(site, lines, change=change, warm=True)
    deployment.wait_online()
    done = deployment.run("refused")
    for site in deployment.sites.keys() - set(GOOD):
        deployment.loopback.terminate(site)
    return done


@pytest.mark.parametrize("site", REFUSED)
def test_a_site_that_does_not_fit_is_refused_before_round_1(refused: tuple[Run, str], site: str) -> None:
    run, said = refused
    (fault,) = [fault for fault in run.failures() if fault[1].startswith(site)]
    assert fault[0] == 0
    assert fault[2] == "join"
    assert fault[3].startswith(f"refused: {REFUSED[site]}")
    assert f"round 0: {fault[1]}, join: {fault[3]}" in said
    assert {"client": fault[1], "stage": "join", "reason": fault[3], "round": 0} in run.summary["failures"]
    assert not any(name.startswith(site) for line in run.lines for name in line.get("bytes_down_by_client", {}))


@pytest.mark.parametrize("site", IN_TRAINING)
def test_statistics_that_cannot_be_used_are_left_out(refused: tuple[Run, str], site: str) -> None:
    assert_left_out(*refused, site, "train")


def assert_left_out(run: Run, said: str, site: str, stage: str) -> None:
    ((round, _, at, reason),) = run.failures(site)
    assert (round, at) == (1, stage)
    assert REASONS[site] in reason
    assert f"round 1: {site}, {stage}: {reason}" in said
    assert (site in run.lines[1]["clients"]) == (stage == "update")  # those that sent good statistics are planned with


def test_the_model_is_that_of_the_others_alone(
    refused: tuple[Run, str], tables: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run, _ = refused
    alone = on_one_machine(tmp_path_factory.mktemp("alone") / "run", "in_process", tables, GOOD)
    assert run.lines[1]["clients"] == list(GOOD)
    assert run.model == alone.model


@pytest.fixture(scope="module")
def harmed(deployment: Deployment, refused: tuple[Run, str], texts: Path) -> tuple[Run, str]:
    """A run to which four sites come whose statistics are good and whose updates are not."""
    for site, change in IN_UPDATE.items():
        deployment.add(site, share("west")[:12], change=change, warm=True)
    deployment.wait_online(*IN_UPDATE)
    return deployment.run("harmed", data__test=str(texts / "test.jsonl"), evaluation__clients=False)


@pytest.mark.parametrize("site", IN_UPDATE)
def test_updates_that_cannot_be_used_are_left_out(harmed: tuple[Run, str], site: str) -> None:
    assert_left_out(*harmed, site, "update")


def test_the_model_moves_no_further_than_honest_sites_move_it(
    harmed: tuple[Run, str], refused: tuple[Run, str], olmoe: Path
) -> None:
    start, harmed_by, honest = weights_of(olmoe), harmed[0].weights, refused[0].weights
    assert is_finite(harmed_by)
    moved = {name: float((value - start[name]).norm()) for name, value in harmed_by.items()}
    would = {name: float((value - start[name]).norm()) for name, value in honest.items()}
    assert sum(moved.values()) > 0
    assert max(moved.values()) < 2 * max(would.values())
