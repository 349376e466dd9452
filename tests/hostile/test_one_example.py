"""One example cannot be read: what a coordinator asks for neither chooses nor moves what a site trains on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from fedalign.client import evaluation, fit
from fedalign.client.forward import AnswerLogits
from fedalign.client.log import Entry, SiteLog
from fedalign.client.memory import Keeping, Kept
from fedalign.client.open import open_site
from fedalign.client.parts import Parts
from fedalign.client.trainer import Trainer
from fedalign.config.run import AlgorithmConfig, Config
from fedalign.data.batches import Batch
from fedalign.data.encode import Encoded
from fedalign.errors import TrainingFailedError, UserError
from fedalign.federation.messages import VERBS as EVERY_VERB
from fedalign.federation.site import withdraw
from fedalign.moe.model import MoEModel
from fedalign.protocol import Evaluation, Failure, Hello, Piece, Statistics
from tests.conftest import Command, changed, rows, write_jsonl
from tests.hostile.conftest import VERBS, Attack, Coordinator

TOO_FEW = "it holds fewer examples than it takes part with"


def parts(site: Coordinator, config: Config) -> tuple[list[list[int]], list[list[int]]]:
    """What is trained and what is scored, as tokens."""

    def tokens(encoded: list[Encoded]) -> list[list[int]]:
        return sorted(one.input_ids for one in encoded)

    client = open_site(site.site, config, "night").data
    assert client.held_out is not None
    return tokens(list(client.train)), tokens(list(client.held_out.encoded))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("most", [1, 2, 31])
def test_a_coordinator_cannot_have_a_run_train_on_few_examples(attack: Attack, verb: str, most: int) -> None:
    reason = attack().refused(verb, max_train=most)
    if verb != "update":
        assert f"data.max_train = {most}: this site trains on 32 examples or more" in reason


@pytest.mark.parametrize("verb", ["hello", "start", "train", "evaluate"])
def test_of_a_site_with_few_examples_nothing_leaves_and_not_their_number(attack: Attack, verb: str) -> None:
    reasons = {attack(rows()[:count]).refused(verb) for count in (1, 2, 20, 40, 63)}
    assert len(reasons) == 1
    assert reasons.pop().startswith(TOO_FEW)


def test_of_a_site_whose_rows_were_taken_away_nothing_leaves(attack: Attack) -> None:
    """What is held out was drawn when there were more, and stays drawn."""
    site = attack()
    assert isinstance(site.ask("hello"), Hello)
    write_jsonl(site.site.path / "data.jsonl", rows()[:20])
    for verb in ("hello", "start", "train", "evaluate"):
        assert site.refused(verb).startswith(TOO_FEW)


def test_a_held_out_part_takes_at_least_what_may_be_scored(attack: Attack) -> None:
    hello = attack().ask("hello")
    assert isinstance(hello, Hello)
    assert (hello.examples, hello.held_out) == (120 - 32, 32)  # not a tenth, which is twelve


def test_neither_seed_nor_share_nor_size_nor_template_moves_the_line(attack: Attack) -> None:
    site = attack()
    train, held = parts(site, site.config)
    for section, values in (
        ("run", {"seed": 5}),
        ("clients", {"held_out": 0.5}),
        ("clients", {"held_out": 0.0}),
        ("training", {"batch_examples": 1}),
    ):
        assert parts(site, changed(site.config, section, **values)) == (train, held), (section, values)
    smaller, the_same = parts(site, changed(site.config, "data", max_train=50))
    assert the_same == held
    assert len(smaller) == 32
    assert {*map(tuple, smaller)} < {*map(tuple, train)}
    client = open_site(site.site, site.config, "night").data
    other = open_site(site.site, changed(site.config, "data", template="{label}: {text}"), "night").data
    assert client.held_out is not None
    assert other.held_out is not None
    assert client.held_out.right_N.tolist() == other.held_out.right_N.tolist()


def test_the_order_of_training_is_not_the_coordinators_to_say(attack: Attack) -> None:
    site = attack(limits="seed = 3")
    first, second = (open_site(site.site, changed(site.config, "run", seed=seed), "night").data.seed for seed in (0, 7))
    assert first == second == 3


@pytest.mark.parametrize(("every", "least"), [(100, 32), (64, 32), (63, 32), (1000, 32), (50, 1), (7, 3)])
def test_what_two_runs_train_on_is_the_same_or_differs_by_many(every: int, least: int) -> None:
    parts = Parts(0.1, (), tuple(map(str, range(every))))
    sets = {parts.trained(asked, least) for asked in range(least, every + 2)}
    for one in sets:
        for other in sets:
            assert one <= other or other <= one
            assert one == other or len(one ^ other) >= least


def test_a_length_cannot_choose_among_examples(attack: Attack) -> None:
    for verb in ("hello", "train", "evaluate"):
        assert 'data.too_long = "drop"' in attack().refused(verb, too_long="drop", max_length=8)


@pytest.mark.parametrize("verb", ["hello", "start", "train", "evaluate"])
def test_labels_cannot_choose_among_examples(attack: Attack, verb: str) -> None:
    assert 'data.on_bad_row = "skip"' in attack().refused(verb, on_bad_row="skip", labels=("food",))


def test_whether_rows_fit_is_told_in_few_ways_alone(attack: Attack) -> None:
    """One row has a label of its own, and one text is the longest: each way to read them tells a yes or a no."""
    site = attack([*rows(), {"text": "short of breath", "label": "rare"}], limits="readings = 3")
    labels = (*site.config.data.labels, "rare")
    assert site.refused("hello").startswith("its data cannot be used")
    assert isinstance(site.ask("hello", labels=labels), Hello)
    assert site.refused("hello", run="another").startswith("its data cannot be used")  # the same way again
    assert site.refused("train", run="another", labels=labels, max_length=8).startswith("its data cannot be used")
    spent = "its rows have been read in as many ways as they will be (limits.readings = 3 in its site.toml)"
    for verb in ("hello", "start", "train", "evaluate"):
        assert site.refused(verb, run="a third", labels=labels, max_length=9) == spent
        assert not isinstance(site.ask(verb, run="a third", labels=labels), Failure)
    assert "rare" not in (site.site.path / "readings.json").read_text()
    assert (site.site.path / "readings.json").stat().st_mode & 0o077 == 0


def test_new_rows_leave_the_others_where_they_are_and_come_in_many_at_a_time(attack: Attack) -> None:
    new = [{"text": f"a new text {i}", "label": "food"} for i in range(40)]
    site = attack(rows()[:90], "held_out = 0.3\nmin_held_out = 16")  # so that one may be missed on either side
    train, held = parts(site, site.config)
    write_jsonl(site.site.path / "data.jsonl", [new[0], *rows()[:90], new[1]])  # two, which would stand out
    assert parts(site, site.config) == (train, held)
    write_jsonl(site.site.path / "data.jsonl", [*new, *reversed(rows()[:90])])
    more, the_same = parts(site, site.config)
    assert the_same == held
    assert len(more) == len(train) + 40
    assert {*map(tuple, train)} < {*map(tuple, more)}
    write_jsonl(site.site.path / "data.jsonl", rows()[:89])  # one has been taken away: it is gone
    less, still = parts(site, site.config)
    assert len(less) + len(still) == 89


def test_the_draw_is_the_sites_own_secret(attack: Attack) -> None:
    site = attack()
    train, held = parts(site, site.config)
    text = (site.site.path / "parts.json").read_text()
    assert not any(row["text"] in text for row in rows())
    (site.site.path / "parts.json").unlink()
    assert parts(site, site.config) == (train, held)  # by the seed that stays
    (site.site.path / "parts.json").unlink()
    (site.site.path / "seed").unlink()
    assert parts(site, site.config) != (train, held)


# ------------------------------------------------------------------------------------------------------ how often


def test_scores_are_counted_over_runs_and_restarts(attack: Attack) -> None:
    """A model for each class, and the accuracy of each: with enough of them every label could be read."""
    site = attack(limits="evaluations = 2\nall_evaluations = 3")
    assert isinstance(site.ask("evaluate"), Evaluation)
    assert isinstance(site.ask("evaluate"), Evaluation)
    assert "(limits.evaluations = 2 in its site.toml)" in site.refused("evaluate")
    assert isinstance(site.ask("evaluate", run="another"), Evaluation)
    assert "(limits.all_evaluations = 3 in its site.toml)" in site.refused("evaluate", run="a third")
    assert isinstance(site.ask("hello", run="a third"), Hello)


def test_training_that_is_scored_counts_as_a_score_and_is_no_score_when_there_are_none_left(
    attack: Attack, fedalign: Command
) -> None:
    site = attack(limits="evaluations = 2\nall_evaluations = 3")
    site.broadcast = replace(site.broadcast, score=True)
    scored = site.ask("train")
    assert scored.held_out > 0
    assert scored.held_out_loss is not None
    assert isinstance(site.ask("evaluate"), Evaluation)
    assert "(limits.evaluations = 2 in its site.toml)" in site.refused("evaluate")
    without = site.ask("train")  # it goes on to train
    assert isinstance(without, Statistics)
    assert (without.held_out, without.held_out_loss, without.held_out_accuracy) == (0, None, None)
    assert torch.equal(without.norm_G, scored.norm_G)
    assert site.ask("train", run="another").held_out == scored.held_out
    assert site.ask("train", run="a third").held_out == 0
    entries = list(SiteLog(site.site.path).entries())
    assert [(entry.verb, entry.scored) for entry in entries if not entry.refused] == [
        ("train", True),
        ("evaluate", False),
        ("train", False),
        ("train", True),
        ("train", False),
    ]
    code, text, _ = fedalign("site", "log", site.site.path)
    assert code == 0
    assert text.count("train,") == 2


def test_scored_training_that_fails_counts_as_a_score(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    site = attack(limits="evaluations = 1")
    site.broadcast = replace(site.broadcast, score=True)

    def breaks(*_: object) -> None:
        raise TrainingFailedError("its loss is nan at step 7")

    monkeypatch.setattr(Trainer, "train", breaks)
    assert site.refused("train") == "its loss is nan at step 7"
    assert "limits.evaluations = 1" in site.refused("evaluate")


def test_a_score_does_not_leave_where_another_process_has_given_the_last(
    attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = attack(limits="evaluations = 1")
    site.broadcast = replace(site.broadcast, score=True)
    train = Trainer.train

    def meanwhile(*arguments: Any) -> Statistics:
        SiteLog(site.site.path).append(Entry("night", "evaluate", counted=True))
        return train(*arguments)

    monkeypatch.setattr(Trainer, "train", meanwhile)
    assert "limits.evaluations = 1" in site.refused("train")


def test_rounds_are_counted_however_they_are_numbered(attack: Attack) -> None:
    site = attack(limits="rounds = 1")
    assert isinstance(site.ask("train"), Statistics)
    assert "(limits.rounds = 1 in its site.toml)" in site.refused("train")
    first, again = site.ask("update"), site.ask("update")  # a round may be summed again without a liar
    assert isinstance(first, Piece)
    assert torch.equal(first.data, again.data)


def test_no_weights_are_taken_that_the_site_neither_trains_nor_scores(attack: Attack) -> None:
    site = attack(limits="rounds = 1\nevaluations = 1")
    site.ask("train")
    assert site.refused("offer").startswith("unexpected message")  # it would be looked at, since a score is left
    site.ask("evaluate")
    assert "(limits.rounds = 1 in its site.toml)" in site.refused("offer")


def test_rounds_below_0_are_not_trained(attack: Attack) -> None:
    """Of the others the last few are kept; these would stay on the site's disk, one beside the other."""
    site = attack()
    site.broadcast = replace(site.broadcast, round=-1)
    for verb in ("train", "evaluate"):
        assert site.refused(verb) == "round = -1: must be 0 or more"
    assert not list(site.site.memory("night").glob("round*"))


def test_training_that_fails_is_counted(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that breaks on some texts tells by the step where it breaks which batch held one."""
    site = attack(limits="rounds = 2")

    def breaks(*_: object) -> None:
        raise TrainingFailedError("its loss is nan at step 7")

    monkeypatch.setattr(Trainer, "train", breaks)
    assert [site.refused("train")[:18] for _ in range(3)] == [*["its loss is nan at"] * 2, "it has answered al"]
    assert "limits.rounds = 2" in site.refused("train")


def test_epochs_and_steps_of_a_round_have_a_limit(attack: Attack) -> None:
    site = attack(limits="epochs = 2\nsteps = 3")
    long = site.ask_with(changed(site.config, "training", epochs=3), "train")
    assert isinstance(long, Failure)
    assert long.reason == "training.epochs = 3: this site trains at most 2 epochs a round."
    many = site.ask_with(changed(site.config, "training", batch_examples=1), "train")
    assert isinstance(many, Failure)
    assert many.reason == "a round would take more than 3 steps (limits.steps)"
    assert isinstance(site.ask("update"), Failure)  # nothing was kept


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 22), (4, 6), (100, 2)])
def test_the_steps_of_a_mixture_count(
    attack: Attack, monkeypatch: pytest.MonkeyPatch, accumulate: int, steps: int
) -> None:
    """88 examples in batches of 8, once for what is sent and once for the mixture that stays."""
    config = changed(attack().config, "training", batch_examples=8, accumulate=accumulate)
    config = config.model_copy(update={"algorithm": AlgorithmConfig(name="pfl_moe")})
    taken: list[AdamW] = []
    step = AdamW.step

    def counted(self: AdamW) -> None:
        taken.append(self)
        step(self)

    monkeypatch.setattr(AdamW, "step", counted)
    assert isinstance(attack(limits=f"steps = {steps}").ask_with(config, "train"), Statistics)
    assert len(taken) == steps
    many = attack(limits=f"steps = {steps - 1}").ask_with(config, "train")
    assert isinstance(many, Failure)
    assert many.reason == "a round and its mixture would take more steps than limits.steps"


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_the_size_of_a_batch_has_a_limit(attack: Attack, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    site = attack(limits="batch_tokens = 64")
    site.broadcast = replace(site.broadcast, score=True)
    sizes: list[int] = []
    for module in (evaluation, fit):
        answer = module.answer_logits

        def noted(moe: MoEModel, batch: Batch, *more: Any, answer: Any = answer) -> AnswerLogits:
            sizes.append(batch.attention_mask_B_S.numel())
            return answer(moe, batch, *more)  # type: ignore[no-any-return] # it is either module's

        monkeypatch.setattr(module, "answer_logits", noted)
    config = changed(site.config, "training", batch_tokens=10**6, batch_examples=10**6)
    site.ask_with(changed(config, "evaluation", batch_tokens=10**6), verb)
    assert 32 < max(sizes) <= 64


@pytest.mark.parametrize("verb", ["train", "evaluate"])
@pytest.mark.parametrize("kept", [0, 2])
def test_a_broadcast_that_lacks_groups_is_neither_trained_nor_scored(attack: Attack, verb: str, kept: int) -> None:
    site = attack()
    some = list(site.broadcast.weights.items())
    site.broadcast = replace(site.broadcast, weights=dict(some[:kept]))
    assert site.refused(verb) == f"a broadcast without {some[kept][0]}, which this model trains"


def test_a_site_takes_part_in_runs_over_sites_alone(attack: Attack) -> None:
    site = attack()
    config = changed(changed(site.config, "federation", engine="in_process"), "tracking", health="full")
    answer = site.ask_with(config, "train")  # which would send sketches that no algorithm asked for
    assert isinstance(answer, Failure)
    assert "a site takes part in runs of" in answer.reason


# ------------------------------------------------------------------------------------------------- log, and leaving


def test_every_answer_is_in_the_sites_own_log(attack: Attack, fedalign: Command) -> None:
    site = attack(limits="rounds = 1")
    for verb in ("hello", "train", "train", "update"):
        site.ask(verb)
    site.ask("hello", max_train=1)
    entries = list(SiteLog(site.site.path).entries())
    assert [(entry.verb, entry.run, entry.round, entry.examples) for entry in entries] == [
        ("hello", "night", None, 88),
        ("train", "night", 1, 88),
        ("train", "night", 1, None),
        ("update", "night", 1, None),
        ("hello", "night", None, None),
    ]
    assert [bool(entry.refused) for entry in entries] == [False, False, True, False, True]
    assert "prob_L_E" in entries[1].fields
    assert entries[3].bytes > entries[0].bytes > 0
    assert (site.site.path / "log.jsonl").stat().st_mode & 0o077 == 0
    code, text, _ = fedalign("site", "log", site.site.path, "--json")
    assert code == 0
    assert [json.loads(line)["verb"] for line in text.splitlines()] == [entry.verb for entry in entries]
    code, text, _ = fedalign("site", "log", site.site.path)
    assert code == 0
    assert "prob_L_E" in text.replace("\n", "")
    assert "refused:" in text


def test_where_nothing_can_be_written_down_nothing_leaves(attack: Attack) -> None:
    site = attack()
    (site.site.path / "log.jsonl").mkdir()
    assert site.refused("hello") == "it cannot keep its own log"
    assert site.refused("train") == site.refused("evaluate") == "it cannot keep its own log"


def test_a_log_that_cannot_be_read_counts_nothing_and_answers_nothing(attack: Attack, fedalign: Command) -> None:
    site = attack()
    (site.site.path / "log.jsonl").write_text("[]\n")
    assert site.refused("train") == "it cannot read its own log"
    code, _, error = fedalign("site", "log", site.site.path)
    assert code == 2
    assert "line 1: not a line of a site's log" in error


def test_a_site_that_withdraws_forgets_and_answers_no_more(attack: Attack, fedalign: Command) -> None:
    site = attack()
    site.ask("train")
    kept = site.site.memory("night")
    assert list(kept.iterdir())
    code, text, _ = fedalign("site", "withdraw", site.site.path, "--run", "night")
    assert code == 0
    assert "has withdrawn from run night" in text
    assert f"take it out: fedalign export RUN --without {site.site.config.name} --to DIR" in " ".join(text.split())
    assert [path.name for path in kept.iterdir()] == ["withdrawn"]
    for verb in EVERY_VERB:
        assert site.refused(verb) == "this site withdrew from the run"
    assert isinstance(site.ask("hello", run="another"), Hello)
    assert [path.name for path in kept.iterdir()] == ["withdrawn"]
    assert "withdraw" in [entry.verb for entry in SiteLog(site.site.path).entries()]


def test_what_is_trained_while_a_site_withdraws_does_not_leave(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    site = attack()
    site.ask("hello")
    honest = Keeping.save

    def late(keeping: Keeping, kept: Kept) -> None:
        withdraw(site.site, "night")
        honest(keeping, kept)

    monkeypatch.setattr(Keeping, "save", late)
    assert site.refused("train") == "this site withdrew from the run"
    assert [path.name for path in site.site.memory("night").iterdir()] == ["withdrawn"]


def test_a_site_withdraws_also_while_a_piece_is_taken(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process gives a file its last name between two looks."""
    site = attack()
    site.ask("hello")
    kept = site.site.memory("night")
    (kept / "arriving.safetensors").touch()
    listed = Path.iterdir

    def renamed(folder: Path) -> Iterator[Path]:
        found = list(listed(folder))
        (kept / "arriving.safetensors").unlink()
        yield from found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", renamed)
        withdraw(site.site, "night")
    assert [path.name for path in kept.iterdir()] == ["withdrawn"]
    assert "withdraw" in [entry.verb for entry in SiteLog(site.site.path).entries()]


def test_what_a_site_keeps_of_a_run_only_its_owner_can_read(attack: Attack) -> None:
    site = attack()
    runs = site.site.memory("night").parent
    runs.mkdir(mode=0o755)  # by a version that left it open
    runs.chmod(0o755)
    before = os.umask(0o022)
    try:
        for verb in ("hello", "train", "update"):
            site.ask(verb)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    kept = [runs, *runs.rglob("*")]
    assert any(path.name == "update.safetensors" for path in kept)
    assert {path.name: path.stat().st_mode & 0o077 for path in kept if path.stat().st_mode & 0o077} == {}
    own = [path for path in site.site.path.iterdir() if path.name not in ("data.jsonl", "site.toml")]
    assert {path.name: path.stat().st_mode & 0o077 for path in own if path.stat().st_mode & 0o077} == {}


def test_a_run_that_a_site_does_not_know_is_not_withdrawn_from(attack: Attack, tmp_path: Path) -> None:
    site = attack()
    site.ask("hello", run="night")
    with pytest.raises(UserError, match=r"--run 'day': this site knows no such run. Choose one of: night"):
        withdraw(site.site, "day")
    assert not site.site.memory("day").exists()


@pytest.mark.parametrize("run", ["", "x" * 65, "night\x1b[2J"])
def test_a_run_is_known_by_a_short_key_that_can_be_shown(attack: Attack, run: str) -> None:
    assert attack().refused("hello", run=run) == "the run's key must be 1 to 64 printable characters"
