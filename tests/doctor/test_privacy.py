"""What the doctor says of a private run before it begins."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedalign.client.accountant import Terms
from fedalign.client.spent import Line, PrivacyLedger
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.doctor.privacy import check_privacy, noise_ratio
from fedalign.doctor.report import Check, Examination
from fedalign.doctor.what_leaves import NOISED, what_leaves
from fedalign.moe.model import MoEModel
from fedalign.protocol import Concealed

TERMS = Terms(1000, 0.016, 100, 1.0, 16, None, 10, 1e-5)


def config(*more: str) -> Config:
    settings = ["algorithm.name=fedavg", "evaluation.clients=false", "privacy.noise_multiplier=1", *more]
    return load_config(None, settings)


def checks(
    asked: Config, examples: int = 1000, trained: int = 100, ledger: PrivacyLedger | None = None
) -> dict[str, Check]:
    found = Examination()
    check_privacy(found, asked, examples, trained, 4, ledger)
    return {check.name: check for check in found.checks}


def test_the_ratio_is_worked_out_by_hand() -> None:
    # one step: noise sqrt(400) * 1 / 16 = 1.25 long; of 1000 steps and 4 sites sqrt(4000) times less
    assert noise_ratio(TERMS, 400, 4) == pytest.approx(1.25 / 4000**0.5)
    assert noise_ratio(replace(TERMS, noise=2.0), 400, 4) == pytest.approx(2.5 / 4000**0.5)


def test_a_small_model_is_fine_and_a_large_one_is_hopeless() -> None:
    fine, loud, hopeless = (checks(config(), trained=count)["noise"] for count in (10**4, 10**7, 10**11))
    assert fine.verdict == "ok"
    assert loud.verdict == hopeless.verdict == "warning"
    assert loud.found.startswith("loud: ")
    assert hopeless.found.startswith("hopeless: of all 10 rounds, averaged over 4 sites, ")
    assert "100,000,000,000 values" in hopeless.found
    assert "tuning.kind" in hopeless.remedy


def test_the_cost_is_told() -> None:
    told = checks(config())["privacy"]
    assert told.found.startswith("epsilon 2.")
    assert "at delta 1e-05 for each example of a site that has, say, 1,000: 10 rounds of 63 steps" in told.found
    assert checks(config("privacy.noise_multiplier=0.3"))["privacy"].verdict == "warning"


def test_what_cannot_be_is_told() -> None:
    assert "privacy.delta = 0.01: must be below" in checks(config("privacy.delta=0.01"))["privacy"].found


def test_few_examples_are_mostly_noise() -> None:
    assert checks(config(), examples=50)["examples"].verdict == "warning"
    assert "examples" not in checks(config(), examples=500)


def test_a_budget_is_held_against_all_that_was_released(tmp_path: Path) -> None:
    assert checks(config(), ledger=PrivacyLedger(tmp_path))["budget"].verdict == "warning"  # there is none
    enough = PrivacyLedger(tmp_path, most=3.0)
    assert checks(config(), ledger=enough)["budget"].verdict == "ok"
    enough.charge([Line("run", 1, "training", 1.0, 0.016, 630)])
    spent = checks(config(), ledger=enough)["budget"]
    assert spent.verdict == "failed"
    assert "of 3 spent at delta 1e-05" in spent.found
    assert len(enough.lines()) == 1  # looking costs nothing


def test_nothing_is_said_of_other_runs() -> None:
    assert checks(Config()) == {}


def test_what_leaves_says_what_has_noise(olmoe: Path) -> None:
    asked = config(f"model.path={olmoe}")
    told = {sent.name: sent.tells for sent in what_leaves("ward", MoEModel.skeleton(str(olmoe)), asked)}
    assert all(told[name] == text for kind, text in NOISED.items() if (name := kind.__name__) in told)
    assert {kind.__name__ for kind in NOISED} - told.keys() == {"Concealed"}  # which is of masked runs
    plain = {sent.name: sent.tells for sent in what_leaves("ward", MoEModel.skeleton(str(olmoe)), Config())}
    assert "No noise is added" in plain["Piece"]
    both = config(f"model.path={olmoe}", "privacy.masked=true", "server.max_norm_ratio=0")
    told = {sent.name: sent.tells for sent in what_leaves("ward", MoEModel.skeleton(str(olmoe)), both)}
    assert told["Concealed"] == NOISED[Concealed]
    assert {"Statistics", "Evaluation"}.isdisjoint(told)
