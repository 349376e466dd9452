"""Whole masked runs in one process: their files tell of no client, and a resumed run is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedalign.errors import UserError
from fedalign.federation.in_process import check_masked
from fedalign.server.scores import best_of
from tests.conftest import Command

MASKED = [
    "privacy.masked=true",
    "evaluation.clients=false",
    "server.max_norm_ratio=0",
    "training.epochs=1",
    "run.rounds=2",
    "run.check=false",
]


def begin(fedalign: Command, folder: Path, settings: list[str], *more: str) -> tuple[int, str, str]:
    given = [part for setting in [*settings, *MASKED, *more] for part in ("--set", setting)]
    return fedalign("run", "demo", "--out", folder, *given)


def model(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "model").glob("*.safetensors")))


@pytest.mark.parametrize(
    "more",
    [
        ["algorithm.name=fedprox", "server.optimizer=adam", "server.learning_rate=0.01"],
        ["algorithm.name=by_use", "run.workers=2", "run.device=cpu"],
        ["algorithm.name=by_use", "algorithm.vocabulary=average", "tuning.kind=lora", "privacy.noise_multiplier=1"],
    ],
)
def test_a_masked_run(fedalign: Command, settings: list[str], tmp_path: Path, more: list[str]) -> None:
    code, out, err = begin(fedalign, tmp_path / "run", settings, *more)
    assert code == 0, err
    assert "masked sums: the server learns sums over clients alone" in out
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert ("train_loss_nats" in lines[-1]) == ("privacy.noise_multiplier=1" not in more)
    assert not any(name.startswith(("client_", "privacy_epsilons", "routing_")) for line in lines for name in line)
    assert not (tmp_path / "run/health").exists()
    code, _, err = fedalign("report", tmp_path / "run", "--out", tmp_path / "report.html")
    assert code == 0, err
    code, _, err = fedalign("export", tmp_path / "run", "--to", tmp_path / "exported")
    assert code == 0, err


def test_a_masked_run_that_is_scored_by_its_clients_alone(
    fedalign: Command, settings: list[str], tmp_path: Path
) -> None:
    """Without a test set the sum of scores is what the run is known by: the best model, patience, report and card."""
    run, scores = tmp_path / "run", ["evaluation.clients=true", "run.patience=1", "run.rounds=4"]
    given = [one for one in settings if not one.startswith("data.test")]
    code, out, err = begin(fedalign, run, given, "algorithm.name=by_use", "training.learning_rate=1.0", *scores)
    assert code == 0, err
    assert "accuracy and loss: clients' held-out parts, weighted by examples, n = " in out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["client_accuracy_weighted"] <= 1 for line in lines)
    assert not any("by_client" not in key and isinstance(value, dict) for line in lines for key, value in line.items())
    assert len(lines) < 5
    assert lines[-1]["stopped"].startswith("run.patience = 1: the highest accuracy is of round")
    summary = json.loads((run / "summary.json").read_text())
    best = max(lines, key=lambda line: line["client_accuracy_weighted"])
    assert summary["best_round"] == best["round"] == json.loads((run / "best/round.json").read_text())["round"]
    assert summary["scored_on"].endswith(f"n = {best['held_out_examples']:,}")
    surest = min(lines, key=lambda line: line["client_loss_mean_nats"])
    assert best_of(lines, "loss") == surest  # of masked scores, too
    assert (summary["client_accuracies"], summary["unscored"]) == ({}, None)
    code, _, err = fedalign("report", run, "--out", tmp_path / "report.html")
    assert code == 0, err
    code, _, err = fedalign("export", run, "--to", tmp_path / "exported")
    assert code == 0, err
    assert "accuracy, clients' held-out examples, together" in (tmp_path / "exported/README.md").read_text()


def test_a_resumed_run_has_other_keys_and_the_same_model(
    fedalign: Command, settings: list[str], tmp_path: Path
) -> None:
    for name, rounds in (("once", 2), ("twice", 1)):
        code, _, err = begin(fedalign, tmp_path / name, settings, "algorithm.name=by_use", f"run.rounds={rounds}")
        assert code == 0, err
    code, _, err = fedalign("run", "--resume", tmp_path / "twice", "--set", "run.rounds=2")
    assert code == 0, err
    once, twice = model(tmp_path / "once"), model(tmp_path / "twice")
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_too_few_clients_are_told_before_anything_is_trained(
    fedalign: Command, settings: list[str], tmp_path: Path
) -> None:
    code, _, err = begin(fedalign, tmp_path / "run", settings, "algorithm.name=fedavg", "clients.count=2")
    assert code == 2
    assert "2 clients can be summed, privacy.masked_min_holders and server.min_clients ask for 3" in err


@pytest.mark.parametrize(
    ("place", "made", "said"),
    [
        ("fedalign.federation.in_process.find_spec", lambda name: None, "pip install 'fedalign-moe[flower]'"),
        ("fedalign.parallel.launched", lambda: 2, "not under torchrun"),
    ],
)
def test_where_masks_cannot_be_made_it_is_said(
    monkeypatch: pytest.MonkeyPatch, place: str, made: Callable[..., object], said: str
) -> None:
    monkeypatch.setattr(place, made)
    with pytest.raises(UserError, match=r"privacy\.masked = true") as refused:
        check_masked()
    assert said in str(refused.value)


def test_without_masks_nothing_needs_cryptography_and_without_adapters_nothing_imports_peft() -> None:
    """Peft takes a second to import with all that it finds."""
    hidden = (
        "import sys; sys.modules['cryptography'] = None; import fedalign.federation.in_process; "
        "assert not {'peft', 'bitsandbytes'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", hidden], check=True)


def test_what_leaves_lists_what_is_concealed_and_nothing_beside_it(
    fedalign: Command, settings: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "masked.toml"
    tables = "[privacy]\nmasked = true\n[server]\nmax_norm_ratio = 0\n[evaluation]\nclients = false\n"
    file.write_text(f'{tables}[algorithm]\nname = "fedavg"\n')
    code, out, err = fedalign("doctor", file, "--what-leaves")
    assert code == 0, err
    told = " ".join(out.split())
    assert "tells nothing but in the sum over the sites of a round, 3 or more" in told
    assert "Whose mask keys this site is handed is the coordinator's word" in told
    assert said(out) == ["Hello", "Start", "Lacking", "Concealed", "Concealed", "Piece", "Failure"]
    code, out, err = fedalign("doctor", file, "--what-leaves", "--set", "evaluation.clients=true")
    assert code == 0, err
    assert said(out) == ["Hello", "Start", "Lacking", *["Concealed"] * 3, "Piece", "Failure"]


def said(out: str) -> list[str]:
    """The messages that are listed."""
    return [line.partition(":")[0] for line in out.splitlines() if line[:1].isupper() and ": " in line[:14]]
