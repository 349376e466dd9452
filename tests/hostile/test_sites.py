"""One site of several cannot decide the model, whatever it claims, sends, or does not send."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.federation.flower import launch
from fedalign.maths.robust import CenteredSum
from fedalign.protocol import SHARED, Packed, Update
from fedalign.server.checkpoint import Checkpoints, ServerState
from tests.conftest import Command
from tests.server.test_checks import begin, serve
from tests.server.test_rounds import LAYOUT, Scripted, run, shared

MANY = 10**9
HONEST = {f"site-{number}": (10, 1.0) for number in range(4)}
RULES = ["clip", "centered_clip", "trimmed_mean", "median", "krum"]


def moved(tmp_path: Path, federation: Scripted, *overrides: str) -> float:
    state, _ = run(tmp_path, federation, *overrides)
    return float(shared(state)[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("examples", "move", "most"),
    [
        (MANY, -1.0, 1.0),  # half the weight at most
        (10, 1e6, 0.05),  # 1.25 medians at most, at a fifth of the weight, beside four that move by 1
        (MANY, 1e6, 0.125),  # 1.25 medians at half the weight
    ],
)
def test_no_lie_moves_the_model_far(tmp_path: Path, rule: str, examples: int, move: float, most: float) -> None:
    """Without the liar the model moves by 1."""
    federation = Scripted(HONEST | {"liar": (examples, move)})
    with_it = moved(tmp_path / "a", federation, f"server.robust={rule}")
    assert abs(with_it - 1.0) <= most + 1e-5
    without = moved(tmp_path / "b", federation, "server.robust=none", "server.max_norm_ratio=0")
    assert abs(without - 1.0) > 1.9


@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "krum"])
def test_rules_that_outvote_do_not_move_at_all(tmp_path: Path, rule: str) -> None:
    federation = Scripted(HONEST | {"liar": (MANY, -100.0)})
    assert moved(tmp_path, federation, f"server.robust={rule}", "server.hostile=0.2") == pytest.approx(1.0)


@pytest.mark.parametrize("rule", RULES)
def test_a_site_that_announces_much_and_sends_nothing_does_not_freeze_the_model(tmp_path: Path, rule: str) -> None:
    silent = Scripted(HONEST | {"liar": (MANY, 1.0)}, lost={"liar"})
    state, _ = run(tmp_path, silent, f"server.robust={rule}", "run.rounds=4")
    assert float(shared(state)[0]) == pytest.approx(4.0)
    told = [[(f["client"], f["stage"]) for f in past.get("failures", ())] for past in state.history[1:]]
    assert told == [[("liar", "update")]] * 2 + [[("liar", "train"), ("liar", "update")]] * 2
    assert state.history[3]["failures"][0]["reason"] == (
        "its word counts for nothing until it delivers: 2 times no update of it could be used"
    )
    assert ["liar" in past["clients"] for past in state.history[1:]] == [True, True, False, False]
    assert state.history[3]["on_trial"] == ["liar"]


def test_it_counts_again_when_it_delivers_also_after_a_resume(tmp_path: Path) -> None:
    federation = Scripted(HONEST | {"late": (10, 1.0)}, lost={"late"})
    settings = ("server.robust=clip", "run.rounds=2")
    state, _ = run(tmp_path, federation, *settings)
    federation.lost.clear()
    kept = Checkpoints(tmp_path, {}).load()
    assert kept is not None
    state, _ = run(tmp_path, federation, "server.robust=clip", "run.rounds=4", state=kept)
    third, fourth = state.history[3:]
    assert [f["stage"] for f in third["failures"]] == ["train"]  # asked for a group, which came
    assert "late" not in third["clients"]
    assert fourth["failures"] == []
    assert "late" in fourth["clients"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1.0, 1e3])
def test_an_opposite_update_is_left_out_and_the_round_summed_again(tmp_path: Path, rule: str, length: float) -> None:
    federation = Scripted(HONEST | {"liar": (MANY, -length)})
    state, _ = run(tmp_path, federation, f"server.robust={rule}", "run.rounds=4")
    assert shared(state).tolist() == pytest.approx([4.0] * 2)
    first, second, third, fourth = state.history[1:]
    (failure,) = first["failures"]
    assert (failure["client"], failure["stage"]) == ("liar", "update")
    assert failure["reason"] == (
        "a part of its update was opposite to the others', by a median cosine of -1.00: summed again without it"
    )
    assert "liar" not in first["clients"]
    for past in (second, third, fourth):
        (failure,) = past["failures"]
        assert failure["reason"] == (
            "its word counts for nothing for 10 rounds: a part of its update was opposite to the others' in round 1"
        )
        assert past["on_trial"] == ["liar"]
        assert "liar" not in past["clients"]


def turn_first(*, rounds: Mapping[str, int]) -> Callable[[Update], Update]:
    """Updates of these clients are opposite in that round alone."""

    def turn(update: Update) -> Update:
        if rounds.get(update.client) != update.round:
            return update
        return replace(update, groups={group: Packed(-packed.values) for group, packed in update.groups.items()})

    return turn


def test_a_site_whose_update_was_opposite_is_not_heard_for_a_while_also_after_a_resume(tmp_path: Path) -> None:
    """Later rounds may not tell it: when honest updates have nothing in common an opposite one does not stand out."""
    federation = Scripted(HONEST | {"liar": (10, 0.5)}, corrupt=turn_first(rounds={"liar": 1}))
    run(tmp_path, federation, "server.robust=clip", "run.rounds=2")
    kept = Checkpoints(tmp_path, {}).load()
    assert kept is not None
    state, _ = run(tmp_path, federation, "server.robust=clip", "run.rounds=12", state=kept)
    assert ["liar" in past["clients"] for past in state.history[1:]] == [False] * 11 + [True]
    assert shared(state).tolist() == pytest.approx([11 + 4.5 / 5] * 2)


def test_of_more_opposite_sites_than_can_be_told_to_lie_none_is_remembered(tmp_path: Path) -> None:
    federation = Scripted(HONEST | {"other": (10, 1.0)}, corrupt=turn_first(rounds={"other": 1, "site-0": 2}))
    state, _ = run(tmp_path, federation, "server.robust=clip", "run.rounds=3")
    assert [len(past["clients"]) for past in state.history[1:]] == [4, 3, 5]


def test_what_a_site_claims_counts_for_three_equal_shares_at_most(tmp_path: Path) -> None:
    """Its update is no outlier, so that nothing but its weight is to be held: nine move by 1, the liar by 2."""
    honest = {f"site-{number}": (10, 1.0) for number in range(9)}
    federation = Scripted(honest | {"liar": (MANY, 2.0)})
    settings = ("server.robust=clip", "server.clip=2")
    assert moved(tmp_path, federation, *settings) == pytest.approx(0.7 + 0.3 * 2)
    assert moved(tmp_path, federation, *settings, "server.max_share_ratio=10") == pytest.approx(1.5)


def test_one_thing_more_that_a_site_alone_teaches_counts_for_its_share_of_a_quarter_more_than_the_median(
    tmp_path: Path,
) -> None:
    """So a trigger is taught: at right angles to the others' updates, not opposite, and not twice as long as theirs."""

    def beside(update: Update) -> Update:
        if update.client != "liar":
            return update
        own = update.groups[SHARED].values * torch.tensor([1.0, -1.0])
        return replace(update, groups={**update.groups, SHARED: Packed(own)})

    federation = Scripted(HONEST | {"liar": (10, 1.4)}, corrupt=beside)
    state, _ = run(tmp_path, federation, "server.robust=clip")
    assert state.history[-1]["failures"] == []
    alone = torch.tensor([1.0, -1.0]) / 2**0.5
    assert float(shared(state) @ alone) <= 1.25 * 2**0.5 / 5 + 1e-6  # the others' updates are √2 long


@pytest.mark.parametrize("rule", RULES)
def test_an_update_that_breaks_off_half_way_counts_for_nothing(tmp_path: Path, rule: str) -> None:
    """Its first groups are added before the last is looked at; nobody would have told that they are opposite."""

    def spoil(update: Update) -> Update:
        if update.client != "liar":
            return update
        last = max(update.groups, key=LAYOUT.groups.index)
        broken = Packed(torch.full_like(update.groups[last].values, torch.nan))
        return replace(update, groups={**update.groups, last: broken})

    federation = Scripted(HONEST | {"liar": (MANY, -1.0)}, corrupt=spoil)
    state, _ = run(tmp_path, federation, f"server.robust={rule}", "run.rounds=2")
    assert shared(state).tolist() == pytest.approx([2.0] * 2)
    for past in state.history[1:]:
        (failure,) = past["failures"]
        assert (failure["client"], failure["stage"]) == ("liar", "update")
        assert "not finite" in failure["reason"]
        assert past["clients"] == list(HONEST)


@pytest.mark.parametrize("rule", RULES)
def test_who_sends_another_update_when_asked_again_is_looked_at_again(tmp_path: Path, rule: str) -> None:
    asked: Counter[str] = Counter()

    def turn(update: Update) -> Update:
        asked[update.client] += 1
        if update.client != "sleeper" or asked["sleeper"] == 1:
            return update
        return replace(update, groups={group: Packed(-packed.values) for group, packed in update.groups.items()})

    federation = Scripted(HONEST | {"liar": (10, -1.0), "sleeper": (MANY, 1.0)}, corrupt=turn)
    state, _ = run(tmp_path, federation, f"server.robust={rule}")
    assert shared(state).tolist() == pytest.approx([1.0] * 2)
    assert state.history[-1]["clients"] == list(HONEST)
    assert [failure["client"] for failure in state.history[-1]["failures"]] == ["liar", "sleeper"]


def test_two_of_five_against_three_is_a_split_and_nobody_is_left_out(tmp_path: Path) -> None:
    federation = Scripted({"a": (10, 1.0), "b": (10, 1.0), "c": (10, 1.0), "d": (10, -1.0), "e": (10, -1.0)})
    state, _ = run(tmp_path, federation, "server.robust=clip")
    assert shared(state).tolist() == pytest.approx([0.2] * 2)
    assert state.history[-1]["failures"] == []


def test_without_defences_nobody_looks_at_directions(tmp_path: Path) -> None:
    state, _ = run(tmp_path, Scripted(HONEST | {"other": (10, -1.0)}), "server.robust=none")
    assert state.history[-1]["clients"] == [*HONEST, "other"]


def test_where_nobody_delivers_it_is_the_network(tmp_path: Path) -> None:
    federation = Scripted(HONEST, lost=set(HONEST))
    state, _ = run(tmp_path, federation, "server.robust=clip", "run.rounds=3")
    assert state.history[-1]["clients"] == list(HONEST)
    assert state.history[-1]["groups_unchanged"] == len(LAYOUT.groups)


def test_a_long_update_is_clipped_and_its_site_stays(tmp_path: Path) -> None:
    federation = Scripted(HONEST | {"long": (10, 1e6)})
    state, _ = run(tmp_path / "clip", federation, "server.robust=clip")
    assert shared(state).tolist() == pytest.approx([(4 * 1 + 1.25) / 5] * 2)
    assert state.history[-1]["failures"] == []
    state, _ = run(tmp_path / "two", federation, "server.robust=clip", "server.clip=2")
    assert shared(state).tolist() == pytest.approx([(4 * 1 + 2) / 5] * 2)
    state, _ = run(tmp_path / "none", federation)
    assert [f["client"] for f in state.history[-1]["failures"]] == ["long"]


def test_the_step_of_fedexp_does_not_grow_with_a_lie(tmp_path: Path) -> None:
    federation = Scripted(HONEST | {"liar": (10, 1e6)})
    fedexp = moved(tmp_path, federation, "server.robust=clip", "server.optimizer=fedexp")
    assert fedexp == pytest.approx(1.05, rel=0.01)


def test_the_centre_is_checkpointed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[Any, Any]] = []
    make = CenteredSum.__init__

    def watched(self: CenteredSum, *arguments: Any) -> None:
        seen.append(arguments[-2])
        make(self, *arguments)

    monkeypatch.setattr(CenteredSum, "__init__", watched)
    federation = Scripted(HONEST)
    straight, _ = run(tmp_path / "a", federation, "server.robust=centered_clip", "run.rounds=2")
    run(tmp_path / "b", federation, "server.robust=centered_clip", "run.rounds=1")
    kept = Checkpoints(tmp_path / "b", {}).load()
    assert kept is not None
    resumed, _ = run(tmp_path / "b", federation, "server.robust=centered_clip", "run.rounds=2", state=kept)
    assert [sorted(map(str, center)) for center in seen] == [[], sorted(map(str, LAYOUT.groups))] * 2
    assert torch.equal(seen[3][SHARED], torch.ones(2))
    assert torch.equal(shared(straight), shared(resumed))


def test_defences_are_on_across_sites_and_off_elsewhere() -> None:
    engines = ("in_process", "simulation", "flower")
    assert [load_config(None, [f"federation.engine={e}"]).robust for e in engines] == ["none", "none", "clip"]
    assert load_config(None, ["server.robust=krum"]).robust == "krum"
    assert load_config(None, ["server.robust=none", "federation.engine=flower"]).robust == "none"


@pytest.mark.parametrize("rule", ["centered_clip", "trimmed_mean", "median", "krum"])
def test_factors_of_products_are_not_compared(rule: str) -> None:
    exact = ["tuning.kind=lora", "tuning.average=exact"]
    with pytest.raises(UserError, match=f'server.robust = "{rule}": compares values, which are factors'):
        load_config(None, [*exact, f"server.robust={rule}"])
    assert load_config(None, [*exact, "server.robust=clip"]).robust == "clip"


def test_streams_are_refused_in_one_line_where_a_rule_cannot_have_them(tmp_path: Path) -> None:
    for rule in ("median", "centered_clip"):
        with pytest.raises(UserError, match=rf'round 1: the plan of scaffold has streams .*"{rule}" has none') as told:
            serve("algorithm.name=scaffold", f"server.robust={rule}").run(begin())
        assert "\n" not in str(told.value)
    after: ServerState = serve("algorithm.name=scaffold", "server.robust=clip", "run.rounds=1").run(begin())
    assert after.round == 1


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (
            "auto",
            "a site counts for at most 50 % or 3 equal shares of a group and 1.25 medians of its norms",
        ),
        ("none", 'server.robust = "none": a site counts for what it says'),
        (
            "median",
            "median of what sites send, for which every update of a round stays in memory, "
            "each at most 50 % or 3 equal shares of a group and 1.25 medians of its norms",
        ),
        (
            "centered_clip",
            "centered_clip of what sites send, each at most 50 % or 3 equal shares of a group "
            "and 1.25 medians of its norms",
        ),
    ],
)
def test_the_first_line_of_a_run_across_sites_says_what_holds_a_liar(
    fedalign: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, told: str
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("no SuperLink here")

    monkeypatch.setattr(launch, "run", refuse)
    settings = ("--set", "federation.engine=flower", "--set", f"server.robust={rule}")
    code, printed, _ = fedalign("run", write_nothing(tmp_path), "--out", tmp_path / "run", *settings)
    assert code == 2
    first = printed.split("sites behind Flower")[1]
    kept = "" if rule == "none" else "; embeddings of words that one site alone uses stay"
    assert " ".join(first.split()).endswith(f"at least 2 sites; {told}{kept}")


def write_nothing(folder: Path) -> Path:
    (folder / "all-defaults.toml").write_text("")
    return folder / "all-defaults.toml"
