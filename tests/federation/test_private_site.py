"""A site in a private run: what leaves it, what its budget refuses, and that nobody gets more by asking again."""

import json
import re
from pathlib import Path

import pytest

from fedalign.client.open import open_site
from fedalign.client.spent import PrivacyLedger
from fedalign.config.run import Config
from fedalign.config.site import SiteFolder
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.federation.messages import decode
from fedalign.federation.service import Service
from fedalign.federation.site import answer_at
from fedalign.maths.rounding import pack
from fedalign.moe.model import MoEModel
from fedalign.protocol import Broadcast, Failure, Hello, Statistics
from tests.conftest import SUBJECTS, make_site, site_toml, write_jsonl
from tests.federation.test_service import NOTHING, ask, fails

PRIVATE = ["algorithm.name=fedavg", "privacy.noise_multiplier=1.5", "evaluation.clients=false", "run.rounds=2"]


def private(settings: list[str], *more: str) -> Config:
    mine = [setting for setting in settings if not setting.startswith(("data.", "training.epochs"))]
    labels = f"data.labels={json.dumps(sorted(SUBJECTS))}"
    return load_config(None, [*mine, labels, "federation.engine=flower", *PRIVATE, *more])


def site(folder: Path, texts: Path, olmoe: Path, privacy: str = "") -> SiteFolder:
    return make_site(folder, site_toml("ward 3", texts / "train.jsonl", olmoe) + f"[privacy]\n{privacy}")


def serve(here: SiteFolder, config: Config, run: str = "night") -> Service:
    return Service(here.config.name, here.memory(run), lambda: open_site(here, config, run))


def broadcast(moe: MoEModel, round: int = 1) -> Broadcast:
    return Broadcast(round, {group: pack(v.cpu(), "float32", 0) for group, v in moe.read().items()}, score=True)


def test_a_private_round_of_a_site(settings: list[str], texts: Path, olmoe: Path, tmp_path: Path) -> None:
    here, config = site(tmp_path / "ward", texts, olmoe), private(settings)
    opened = serve(here, config)
    hello: Hello = ask(opened, "hello")
    assert hello.held_out == 0  # what is held out is told of no more than what is trained on
    report: Statistics = ask(opened, "train", broadcast(opened.client.trainer.moe))
    assert report.examples == report.tokens == hello.examples
    assert opened.client.data.examples == 90  # all: none is scored
    assert report.held_out == 0
    assert report.held_out_loss is None
    assert report.loss == 0
    assert not report.load_L_E.any()
    kinds = [line.kind for line in PrivacyLedger(here.path).lines("night")]
    assert kinds == ["count", "training"]
    assert fails(opened, "evaluate", broadcast(opened.client.trainer.moe)).stage == "evaluate"


def test_one_row_more_moves_no_other(settings: list[str], texts: Path, olmoe: Path, tmp_path: Path) -> None:
    """Neither before the first run, where the held-out part is drawn, nor after it, where rows wait to be enough."""
    every = [json.loads(line) for line in (texts / "train.jsonl").read_text().splitlines()]
    here, config = site(tmp_path / "ward", texts, olmoe, "epsilon_total = 1e6"), private(settings)
    data = here.path / "data.jsonl"
    toml = (here.path / "site.toml").read_text().replace(str(texts / "train.jsonl"), str(data))

    def trained(count: int) -> set[tuple[int, ...]]:
        write_jsonl(data, every[:count])
        opened = open_site(make_site(here.path, toml), config, "night")
        return {tuple(one.input_ids) for one in opened.data.train}

    sizes = (50, 51, 60, 61, 84, 85, 90)  # from 84 on as many are new as had waited
    before = {count: trained(count) for count in sizes}
    for count in sizes[:-1]:
        assert len(before[count]) == count
        assert before[count] < before[90]
    (here.path / "parts.json").unlink()
    assert [trained(count) == before[count] for count in reversed(sizes)] == [True] * len(sizes)


def test_two_sites_of_the_same_seed_have_other_noise(
    settings: list[str], texts: Path, olmoe: Path, tmp_path: Path
) -> None:
    config, norms = private(settings), []
    for name in ("one", "two"):  # the coordinator knows run.seed, and here even the site's own
        opened = serve(site(tmp_path / name, texts, olmoe), config)
        report: Statistics = ask(opened, "train", broadcast(opened.client.trainer.moe))
        norms.append(report.norm_G)
    trained = norms[0] > 0  # not so embeddings, for want of consent
    assert bool(trained.any())
    assert not bool((norms[0] == norms[1])[trained].any())


def test_a_spent_budget_stops_the_site_over_runs_and_restarts(
    settings: list[str], texts: Path, olmoe: Path, tmp_path: Path
) -> None:
    config = private(settings)
    first = serve(site(tmp_path / "ward", texts, olmoe), config)
    ask(first, "train", broadcast(first.client.trainer.moe))
    spent = PrivacyLedger(tmp_path / "ward").spent()
    here = site(tmp_path / "ward", texts, olmoe, f"epsilon_total = {1.02 * spent}")
    again = serve(here, config, "another night")
    before = len(PrivacyLedger(here.path).lines())
    refusal = fails(again, "train", broadcast(MoEModel.wrap(again.client.trainer.moe.model)))
    assert "its privacy budget is spent" in refusal.reason
    assert not re.search(r"(?<![\d.])81(?![\d.])", refusal.reason)  # the number of its examples
    assert len([line for line in PrivacyLedger(here.path).lines() if line.kind == "training"]) == 1
    assert len(PrivacyLedger(here.path).lines()) <= before + 1  # at most the number of examples of the new run
    assert not list((here.memory("another night")).glob("round-*"))


def test_a_site_with_a_budget_takes_no_part_in_other_runs(
    settings: list[str], texts: Path, olmoe: Path, tmp_path: Path
) -> None:
    here = site(tmp_path / "ward", texts, olmoe, "epsilon_total = 8.0")
    open_run = private(settings).model_copy(update={"privacy": Config().privacy})
    with pytest.raises(UserError, match="takes part only in runs with example-level differential privacy"):
        here.localise(open_run)


def test_the_door_hands_the_refusal_on(settings: list[str], texts: Path, olmoe: Path, tmp_path: Path) -> None:
    here, config = site(tmp_path / "ward", texts, olmoe, "epsilon_total = 0.001"), private(settings)
    opened = serve(here, config)
    answer = answer_at(here, "night", "hello", NOTHING, lambda parcel, _: opened.answer("hello", parcel))
    failure = decode(answer, (Failure,))
    assert "its privacy budget is spent" in failure.reason
    assert not PrivacyLedger(here.path).file.exists()


@pytest.mark.parametrize(("limit", "said"), [("max_experts = 2", "limits.max_experts"), ('device = "split"', "device")])
def test_limits_that_noise_cannot_keep_are_refused(
    limit: str, said: str, settings: list[str], texts: Path, olmoe: Path, tmp_path: Path
) -> None:
    here = make_site(tmp_path / "ward", site_toml("ward 3", texts / "train.jsonl", olmoe, limit))
    with pytest.raises(UserError, match=said):
        here.localise(private(settings))


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ('data.labels=["animals","food"]', range(1, 81)),
        ('data.labels=["a rare disease"]', range(1)),
        ("data.max_length=2", range(1)),
        ("data.max_train=64", range(90, 91)),
    ],
)
def test_no_row_can_be_asked_for_by_what_is_an_error(
    asked: str, left: range, settings: list[str], texts: Path, olmoe: Path, tmp_path: Path
) -> None:
    """Labels, lengths and sizes that a coordinator chooses choose rows: an error tells whether there are any."""
    opened = serve(site(tmp_path / "ward", texts, olmoe), private(settings, asked))
    hello: Hello = ask(opened, "hello")
    assert opened.client.data.examples in left
    report: Statistics = ask(opened, "train", broadcast(opened.client.trainer.moe))
    assert report.examples == hello.examples
    assert report.steps >= 1


def test_rows_themselves_are_too_few_whatever_is_read_of_them(
    settings: list[str], texts: Path, olmoe: Path, tmp_path: Path
) -> None:
    here, config = site(tmp_path / "ward", texts, olmoe), private(settings)
    ask(serve(here, config), "hello")
    rows = (texts / "train.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:3]) + "\n")
    few = make_site(here.path, site_toml("ward 3", tmp_path / "few.jsonl", olmoe))
    assert "how many they are stays there" in fails(serve(few, config, "later"), "hello").reason
