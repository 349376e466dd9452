"""Each of three real sites trains an expert of its own; one that leaves leaves the model of a run without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedalign.export.leaving import Leaving, export_folder
from fedalign.export.write import Wanted, export
from fedalign.moe.load import load_plain
from fedalign.moe.model import MoEModel
from fedalign.moe.part import grown
from tests.conftest import save_tokenizer
from tests.moe.tiny import EXPERTS
from tests.sites.conftest import SITES, deployed, merged, on_one_machine, settings

pytestmark = pytest.mark.sites
STAY = ("north", "west")
CHANGES = {"algorithm": {"name": "site_experts"}, "server": {"robust": "auto"}}  # nobody's update is held to another's


@pytest.fixture(scope="module")
def model_of(olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def model(*sites: str) -> Path:
        folder = tmp_path_factory.mktemp("base")
        grown(MoEModel.wrap(load_plain(olmoe)), sites).model.save_pretrained(folder)
        save_tokenizer(folder)
        return folder

    return model


def test_without_a_site_it_is_the_run_in_which_it_never_was(model_of: Callable[..., Path], tmp_path: Path) -> None:
    with deployed(tmp_path / "deployed", merged(settings(model_of(*SITES)), {}) | CHANGES) as running:
        for site in SITES:
            running.add(site, warm=True)
        run, said = running.run("whole", run__rounds=2)
    assert run.summary["failures"] == []
    assert 'server.robust = "none"' in said
    everyone = on_one_machine(tmp_path / "everyone", "in_process", settings(model_of(*SITES)) | CHANGES, run__rounds=2)
    assert run.model == everyone.model
    left = tmp_path / "left"
    export_folder(run.path / "model", left, Leaving(without=["south"]))
    tables = settings(model_of(*STAY)) | CHANGES
    never = on_one_machine(tmp_path / "never", "in_process", tables, STAY, run__rounds=2)
    assert (left / "model.safetensors").read_bytes() == never.model
    record = json.loads((left / "config.json").read_text())["site_experts"]
    assert record == {"north": [EXPERTS], "west": [EXPERTS + 1]}


@pytest.mark.variant
def test_low_rank_experts_leave_as_if_they_never_were(model_of: Callable[..., Path], tmp_path: Path) -> None:
    low = CHANGES | {"tuning": {"kind": "lora", "targets": ["experts"], "rank": 2}}
    with deployed(tmp_path / "deployed", merged(settings(model_of(*SITES)), {}) | low) as running:
        for site in SITES:
            running.add(site, warm=True)
        run, _ = running.run("whole", run__rounds=2)
    assert run.summary["failures"] == []
    never = on_one_machine(tmp_path / "never", "in_process", settings(model_of(*STAY)) | low, STAY, run__rounds=2)
    left, whole = tmp_path / "left", tmp_path / "merged"
    export(Wanted(run.path, left, merge=True, leaving=Leaving(without=["south"])), print)
    export(Wanted(never.path, whole, merge=True), print)
    assert (left / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_site_trains_alone_while_others_are_connected(model_of: Callable[..., Path], tmp_path: Path) -> None:
    model = model_of(*SITES)
    tables = settings(model) | CHANGES
    known = MoEModel.load(model).weights_hash()  # a lone site says what it has, not what others' experts are
    alone = merged(tables, {"clients__only": ["south"], "federation__min_sites": 1, "model__weights_hash": known})
    with deployed(tmp_path / "deployed", alone) as running:
        for site in ("north", "south"):
            running.add(site, warm=True)
        run, _ = running.run("alone", run__rounds=2)
    assert {(failure["client"], failure["stage"]) for failure in run.summary["failures"]} <= {("north", "join")}
    here = on_one_machine(tmp_path / "here", "in_process", tables, clients__only=["south"], run__rounds=2)
    assert run.model == here.model
