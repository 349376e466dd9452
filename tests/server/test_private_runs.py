"""Whole private runs in one process: their files, their report and their card say what they cost."""

import json
from pathlib import Path

import pytest

from fedalign.client.spent import PrivacyLedger
from fedalign.config.toml import load_config
from fedalign.doctor.estimate import statistics_nbytes
from fedalign.federation.in_process import prepare
from fedalign.moe.model import MoEModel
from fedalign.server.results import RunFolder
from fedalign.server.run import execute
from tests.conftest import Command
from tests.server.test_run import Silent

PRIVATE = ["evaluation.clients=false", "privacy.noise_multiplier=1.0", "training.epochs=1", "run.rounds=2"]


def begin(fedalign: Command, folder: Path, settings: list[str], *more: str) -> tuple[int, str, str]:
    given = [part for setting in [*settings, *PRIVATE, *more] for part in ("--set", setting)]
    return fedalign("run", "demo", "--out", folder, *given)


@pytest.mark.parametrize(
    "more", [["algorithm.name=fedavg"], ["algorithm.name=by_use", "algorithm.vocabulary=average", "tuning.kind=lora"]]
)
def test_a_private_run(fedalign: Command, settings: list[str], tmp_path: Path, more: list[str]) -> None:
    code, out, err = begin(fedalign, tmp_path / "run", settings, *more)
    assert code == 0, err
    assert "noise at each client hides any single example: noise of 1 a step, delta 1e-05" in out
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first, last = (line["privacy_epsilons"] for line in lines[1:])
    assert all(last[name] > first[name] > 0 for name in last)
    assert "train_loss_nats" not in lines[-1]
    assert "routing_divergence_nats" not in lines[-1]
    ledgers = sorted((tmp_path / "run" / "clients").glob("*/privacy.jsonl"))
    assert len(ledgers) == 3
    config = RunFolder(tmp_path / "run").read_config("")
    layout = MoEModel.skeleton(config.model.path, tuning=config.tuning).layout
    assert [line["bytes_up_statistics"] for line in lines[1:]] == [3 * statistics_nbytes(config, layout)] * 2
    kinds = ["training", "loads"] if "algorithm.name=by_use" in more else ["training"]
    assert [line.kind for line in PrivacyLedger(ledgers[0].parent).lines()] == ["count", *kinds, *kinds]
    assert not (tmp_path / "run" / "health").exists()  # nobody tells its routing
    known = json.loads((tmp_path / "run" / "clients.json").read_text())
    counted = {led.parent.name: PrivacyLedger(led.parent).lines()[0].told for led in ledgers}
    assert known == {name: {"examples": told, "labels": {}} for name, told in counted.items()}
    card, page = tmp_path / "exported", tmp_path / "report.html"
    code, _, err = fedalign("export", tmp_path / "run", "--to", card)
    assert code == 0, err
    told = f"({max(last.values()):.3g}, 1e-05)-differential privacy of one example at one site"
    assert f"epsilon up to {max(last.values()):.3g} at delta 1e-05 for one example" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["privacy_epsilon"], summary["privacy_delta"]) == (max(last.values()), 1e-5)
    assert (card / "README.md").read_text().count(told) == 2  # beside how it was trained, and under Privacy
    assert "No differential privacy" not in (card / "README.md").read_text()
    assert "an even share of their layer's tokens" not in (card / "README.md").read_text()
    code, _, err = fedalign("report", tmp_path / "run", "--out", page)
    assert code == 0, err
    assert f"Runs with noise: epsilon up to {max(last.values()):.3g}, at delta 1e-05" in page.read_text()


def test_without_noise_nothing_says_so(fedalign: Command, settings: list[str], tmp_path: Path) -> None:
    given = [part for setting in [*settings, "run.rounds=1"] for part in ("--set", setting)]
    code, out, err = fedalign("run", "demo", "--out", tmp_path / "run", *given)
    assert code == 0, err
    assert "noise at" not in out
    assert not list((tmp_path / "run").rglob("privacy.jsonl"))
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert not any(name.startswith("privacy") for name in last)


def test_a_fixed_seed_is_a_study(fedalign: Command, settings: list[str], tmp_path: Path) -> None:
    models = []
    for name in ("one", "two"):
        code, out, err = begin(fedalign, tmp_path / name, settings, "algorithm.name=fedavg", "privacy.seed=3")
        assert code == 0, err
        assert "it is a study and protects nobody" in out
        models.append(next((tmp_path / name / "model").glob("*.safetensors")).read_bytes())
    assert models[0] == models[1]


def test_a_run_that_was_broken_off_ends_before_it_spends_more_than_its_epsilon(
    fedalign: Command, settings: list[str], tmp_path: Path
) -> None:
    out, more = tmp_path / "run", ["algorithm.name=fedavg", "evaluation.clients=false", "privacy.epsilon=8"]
    config = load_config("demo", [*settings, *more, "training.epochs=1", "run.check=false"])
    folder = RunFolder(out)
    folder.begin(config)
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(config, folder.clients), folder, Silent(lambda *where: where == (2, "training", 2)))
    code, _, err = fedalign("run", "--resume", out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert code == 0, err  # one client was not at work, and has its last round
    assert (lines[2]["clients"], len(lines[3]["clients"])) == (["client-00", "client-01", "client-02"], 1)
    assert {failure["client"] for failure in lines[3]["failures"]} == {"client-00", "client-01"}
    assert "privacy.epsilon = 8 is what the run keeps" in lines[3]["failures"][0]["reason"]
    assert max(cost for line in lines[1:] for cost in line["privacy_epsilons"].values()) <= 8


def test_a_run_whose_clients_have_all_spent_its_epsilon_is_ended_in_one_line(
    fedalign: Command, settings: list[str], tmp_path: Path
) -> None:
    out, more = tmp_path / "run", ["algorithm.name=fedavg", "evaluation.clients=false", "privacy.epsilon=8"]
    config = load_config("demo", [*settings, *more, "training.epochs=1", "run.rounds=2", "run.check=false"])
    folder = RunFolder(out)
    folder.begin(config)
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(config, folder.clients), folder, Silent(lambda *where: where == (1, "summing", 1)))
    code, _, err = fedalign("run", "--resume", out)
    assert code == 2
    assert "round 2: 0 of 3 clients can be used" in err
    assert "would bring it to epsilon" in err
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2  # round 1 is complete
    code, _, err = fedalign("run", "--resume", out, "--set", "run.rounds=1")
    assert code == 0, err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rounds"] == 1
    assert 0 < summary["privacy_epsilon"] <= 8


@pytest.mark.parametrize("noise", ["privacy.epsilon=8", "privacy.noise_multiplier=1.0"])
def test_noise_that_keeps_an_epsilon_in_some_rounds_is_not_used_for_more(
    fedalign: Command, settings: list[str], tmp_path: Path, noise: str
) -> None:
    more = ["algorithm.name=fedavg", "evaluation.clients=false", "training.epochs=1", "run.rounds=1", noise]
    given = [part for setting in [*settings, *more] for part in ("--set", setting)]
    code, _, err = fedalign("run", "demo", "--out", tmp_path / "run", *given)
    assert code == 0, err
    kept = (tmp_path / "run" / "config.toml").read_text()
    code, _, err = fedalign("run", "--resume", tmp_path / "run", "--set", "run.rounds=2")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    if "epsilon" in noise:
        assert code == 2
        assert "run.rounds = 2: the noise of this run keeps privacy.epsilon = 8 in 1 round, and" in " ".join(
            err.split()
        )
        assert (len(lines), (tmp_path / "run" / "config.toml").read_text()) == (2, kept)
    else:  # no bound was asked for: what is spent is told
        assert code == 0, err
        assert len(lines) == 3


@pytest.mark.parametrize(("noise", "most"), [("privacy.epsilon=8", 8.0), ("privacy.noise_multiplier=1", None)])
def test_what_a_round_cost_that_broke_off_is_told(
    fedalign: Command, settings: list[str], tmp_path: Path, noise: str, most: float | None
) -> None:
    """Across sites the coordinator has seen it; `--resume --set run.rounds` ends the run without training it again."""
    out, more = tmp_path / "run", ["algorithm.name=fedavg", "evaluation.clients=false", noise]
    config = load_config("demo", [*settings, *more, "training.epochs=1", "run.rounds=2", "run.check=false"])
    folder = RunFolder(out)
    folder.begin(config)
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(config, folder.clients), folder, Silent(lambda *where: where == (2, "summing", 1)))
    code, text, err = fedalign("run", "--resume", out, "--set", "run.rounds=1")
    assert code == 0, err
    paid = max(PrivacyLedger(led.parent).spent() for led in (out / "clients").glob("*/privacy.jsonl"))
    told = max(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["privacy_epsilons"].values())
    assert paid > told
    assert json.loads((out / "summary.json").read_text())["privacy_epsilon"] == most
    assert paid <= (most or paid)
    assert fedalign("export", out, "--to", tmp_path / "card")[0] == 0
    card = " ".join((tmp_path / "card" / "README.md").read_text().split())
    assert f"({told:.3g}, 1e-05)-differential privacy" not in card
    assert fedalign("report", out, "--out", tmp_path / "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text()
    if most:
        assert "(8, 1e-05)-differential privacy" in card
        assert "epsilon up to 8 at delta 1e-05 for one example" in text
        assert "Runs with noise: epsilon up to 8, at delta 1e-05" in page
    else:
        assert f"({told:.3g}, 1e-05) by what clients told, which have trained since" in card
        assert "a client may have spent more epsilon than it told" in text
        assert f"epsilon up to {told:.3g} and more, since clients trained after they told" in page
