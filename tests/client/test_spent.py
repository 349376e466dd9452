"""A site's privacy ledger: written first, never forgotten, and the end of training when the budget is spent."""

import json
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from fedalign.client.accountant import Release, epsilon
from fedalign.client.spent import Line, Privacy, PrivacyLedger
from fedalign.config.toml import load_config
from fedalign.errors import TrainingFailedError, UserError

ONE = Line("run-1", 1, "training", 1.0, 0.1, 10)


def test_what_is_charged_is_on_disk_and_counts_over_all_runs(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path)
    ledger.charge([ONE])
    again = PrivacyLedger(tmp_path)
    again.charge([Line("run-2", 1, "training", 2.0, 0.1, 5)])
    assert [line.run for line in PrivacyLedger(tmp_path).lines()] == ["run-1", "run-2"]
    both = epsilon([Release(1.0, 0.1, 10), Release(2.0, 0.1, 5)], 1e-5)
    assert again.spent() == ledger.spent() == pytest.approx(both)
    assert again.spent(run="run-1") == pytest.approx(epsilon([ONE.release], 1e-5))
    assert both > again.spent(run="run-1")
    assert stat.S_IMODE(ledger.file.stat().st_mode) == 0o600


def test_a_budget_stops_before_it_is_overspent(tmp_path: Path) -> None:
    most = 1.5 * epsilon([ONE.release], 1e-5)
    ledger = PrivacyLedger(tmp_path, most)
    ledger.charge([ONE])
    with pytest.raises(TrainingFailedError, match="its privacy budget is spent: with this round epsilon would be"):
        ledger.charge([Line("run-2", 1, "training", 1.0, 0.1, 100)])
    assert len(ledger.lines()) == 1  # what was refused was not written
    assert ledger.spent() <= most
    with pytest.raises(TrainingFailedError):  # nor after a restart
        PrivacyLedger(tmp_path, most).charge([Line("run-2", 1, "training", 1.0, 0.1, 100)])


def test_half_a_line_is_no_release_and_is_cut_off(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path)
    ledger.charge([ONE])
    with ledger.file.open("a") as file:
        file.write('{"run": "run-1", "rou')
    assert len(ledger.lines()) == 1
    ledger.charge([ONE])
    assert len(ledger.lines()) == 2


@pytest.mark.parametrize("line", ["{}", "nonsense", '{"run": "r"}', json.dumps(vars(ONE) | {"noise": -1.0})])
def test_a_line_that_is_no_release_stops_everything(tmp_path: Path, line: str) -> None:
    ledger = PrivacyLedger(tmp_path)
    ledger.charge([ONE])
    ledger.file.write_text(f"{line}\n{ledger.file.read_text()}")
    with pytest.raises(UserError, match=r"line 1 is no release. Mend it"):
        ledger.charge([ONE])


def _charge_for_ever(folder: str) -> None:
    while True:
        PrivacyLedger(Path(folder)).charge([ONE])


def test_a_kill_never_loses_what_was_charged(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_charge_for_ever, args=(str(tmp_path),))
    process.start()
    ledger = PrivacyLedger(tmp_path)
    while len(ledger.lines()) < 5:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = len(ledger.lines())
    assert before >= 5
    ledger.charge([ONE])
    assert len(ledger.lines()) == before + 1


def private(folder: Path, run: str = "run-1", noise: str = "noise_multiplier=1", *more: str) -> Privacy:
    settings = [f"privacy.{noise}", "algorithm.name=fedavg", "evaluation.clients=false", *more]
    return Privacy(load_config(None, settings), PrivacyLedger(folder), run, folder / run, "c")


def test_the_number_of_examples_is_told_once_a_run_with_noise(tmp_path: Path) -> None:
    told = [private(tmp_path, f"run-{n}").told(1000) for n in range(30)]
    assert len(set(told)) > 10
    assert all(800 < one < 1200 for one in told)
    assert [private(tmp_path, f"run-{n}").told(1000) for n in range(30)] == told  # another process, the same answer
    assert len(PrivacyLedger(tmp_path).lines()) == 30  # each was paid for once


def test_it_is_never_none(tmp_path: Path) -> None:
    assert min(private(tmp_path, f"run-{n}").told(1) for n in range(20)) == 1


def test_a_round_is_paid_before_it_is_trained_also_when_it_is_asked_for_again(tmp_path: Path) -> None:
    mine = private(tmp_path)
    agreed = mine.terms(500)
    first = mine.pay(1, agreed)
    second = mine.pay(1, agreed)
    assert second["privacy_epsilon"] > first["privacy_epsilon"] > 0
    assert [line.kind for line in PrivacyLedger(tmp_path).lines()] == ["count", "training", "training"]


@pytest.mark.parametrize("more", [(), ("algorithm.name=by_use", "algorithm.vocabulary=average")])
def test_a_run_keeps_its_epsilon_also_when_a_round_is_asked_for_again(tmp_path: Path, more: tuple[str, ...]) -> None:
    """A round that broke off was released with noise of its own: it counts, and the last one is not made."""
    mine = private(tmp_path, "run-1", "epsilon=2", "run.rounds=3", *more)
    agreed = mine.terms(500)
    mine.pay(1, agreed)
    mine.pay(2, agreed)
    spent = mine.pay(2, agreed)["privacy_epsilon"]
    before = PrivacyLedger(tmp_path).lines()
    with pytest.raises(TrainingFailedError, match=r"round 3 would bring it to epsilon 2.*privacy\.epsilon = 2 is"):
        mine.pay(3, agreed)
    assert PrivacyLedger(tmp_path).lines() == before
    assert 1.9 < spent <= 2
    other = private(
        tmp_path, "run-2", "epsilon=2", "run.rounds=3", *more
    )  # a run that nothing broke has all of its own
    told = [other.pay(number, other.terms(500))["privacy_epsilon"] for number in (1, 2, 3)]
    assert told[-1] <= 2


def test_terms_are_kept_for_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agreed = private(tmp_path).terms(500)

    def again(*_: object) -> None:
        raise AssertionError("looked for again")

    monkeypatch.setattr("fedalign.client.spent.terms", again)
    assert private(tmp_path).terms(500) == agreed
