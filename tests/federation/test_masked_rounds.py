"""Masked rounds in one process: equal to plain ones but for rounding, and the server sees sums alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from fedalign.client.evaluation import TestSet
from fedalign.client.masked import held_out as client_held_out
from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.trainer import Trainer
from fedalign.config.toml import load_config
from fedalign.errors import TrainingFailedError, UserError
from fedalign.federation.in_process import InProcess, MaskedInProcess
from fedalign.maths.average import StreamingSum
from fedalign.maths.fixed_point import BLOCK, LEVELS, MOST_CLIENTS, limits
from fedalign.maths.rounding import pack
from fedalign.moe.model import MoEModel
from fedalign.protocol import (
    EXAMPLES,
    HEIGHTS,
    HELD_OUT,
    LOAD,
    MOST_LOSS,
    SCORED,
    UNIT,
    Broadcast,
    Concealed,
    Evaluation,
    Failure,
    HeldOut,
    ParameterGroup,
    Reports,
    Stage,
    Statistics,
    Totals,
    Weights,
)
from fedalign.server.checkpoint import Checkpoints, ServerState
from fedalign.server.masked import LOST, MaskedServer
from fedalign.server.scores import describe_clients, rows_of
from tests.client.test_trainer import examples
from tests.moe.tiny import build
from tests.server.test_rounds import Log

SIZES = {"a": 24, "b": 5, "c": 15, "d": 6, "e": 7}
MASKED = ["privacy.masked=true", "server.max_norm_ratio=0", "evaluation.clients=false", "run.rounds=1"]


@dataclass
class Seen:
    """A masked federation as the server meets it: what it is sent, written down; some of it may be lost."""

    inner: MaskedInProcess
    lost: Callable[[str, Concealed], bool] = lambda stage, message: False
    messages: list[Concealed] = field(default_factory=list)
    totals: list[Totals] = field(default_factory=list)
    asked: list[tuple[str, tuple[str, ...], int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def _pass(self, stage: str, told: Iterator[Concealed | Failure]) -> Iterator[Concealed | Failure]:
        gone = set[str]()
        for message in told:
            if isinstance(message, Concealed) and (message.client in gone or self.lost(stage, message)):
                gone.add(message.client)
                continue
            if isinstance(message, Concealed):
                self.messages.append(message)
            yield message
        yield from (Failure(name, "train", "gone") for name in sorted(gone))

    def count(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Concealed | Failure]:
        self.asked.append(("count", tuple(clients), 0))
        return self._pass("count", self.inner.count(broadcast, clients))

    def score(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Concealed | Failure]:
        self.asked.append(("score", tuple(clients), 0))
        return self._pass("score", self.inner.score(broadcast, clients))

    def recount(self, round: int, left: Sequence[str], stage: Stage) -> Iterator[Concealed | Failure]:
        verb = "rescore" if stage == "evaluate" else "recount"
        self.asked.append((verb, tuple(left), 0))
        return self._pass(verb, self.inner.recount(round, left, stage))

    def conceal(
        self, totals: Totals, among: Sequence[str], groups: Sequence[ParameterGroup]
    ) -> Iterator[Concealed | Failure]:
        self.totals.append(totals)
        again = any(verb == "conceal" for verb, _, _ in self.asked)
        self.asked.append(("conceal", tuple(among), len(groups)))
        return self._pass("conceal again" if again else "conceal", self.inner.conceal(totals, among, groups))


def held_out(name: str, choosing: str = "abcd") -> TestSet | None:
    """Examples of two choices each of some clients; of others they have none, and one holds none out."""
    encoded = examples(SIZES[name] // 2, seed=7)
    if name in choosing:
        others = [replace(one, input_ids=[*one.input_ids[:-1], 3], labels=[*one.labels[:-1], 3]) for one in encoded]
        both = [[one, other] for one, other in zip(encoded, others, strict=True)]
        return TestSet(encoded, both, torch.zeros(len(encoded), dtype=torch.int64))
    return None if name == "e" else TestSet(encoded, answers=[[0]] * len(encoded))


def federation(
    folder: Path,
    *more: str,
    seeds: dict[str, int] | None = None,
    held: Callable[[str], TestSet | None] = lambda name: None,
) -> MaskedInProcess:
    config = load_config(
        None,
        [
            "training.learning_rate=1e-2",
            "training.batch_examples=4",
            "statistics.min_tokens=20",
            "statistics.min_examples=1",
            "algorithm.name=by_use",
            *MASKED,
            *more,
        ],
    )
    trainer = Trainer(MoEModel.wrap(build("olmoe")), None, config.algorithm.build(), config)
    clients = {
        name: ClientData(
            name, examples(size, seed=(seeds or {}).get(name, size)), held(name), ClientMemory(folder / name)
        )
        for name, size in SIZES.items()
    }
    return MaskedInProcess(trainer, clients)


def one_round(folder: Path, seen: Seen) -> ServerState:
    moe, config = seen.inner.trainer.moe, seen.inner.trainer.config
    weights = {group: value.clone() for group, value in moe.read().items()}
    server = MaskedServer(
        seen,  # type: ignore[arg-type] # what it does not have itself is the inner one's
        config.algorithm.build(),
        moe.layout,
        config,
        Checkpoints(folder / "checkpoint", {}),
        lambda number, weights: None,
        Log(),
    )
    return server.run(ServerState(0, weights, {}, ()))


def counted(folder: Path) -> MaskedInProcess:
    """A federation in which all have been counted once, and nobody was told totals."""
    engine = federation(folder)
    start = {group: pack(value, "float32", 0) for group, value in engine.trainer.moe.read().items()}
    assert all(isinstance(one, Concealed) for one in engine.count(Broadcast(1, start), tuple(SIZES)))
    return engine


def by_hand(folder: Path, *more: str, lost: str = "") -> tuple[Weights, Weights]:
    """Old and new weights of the same round without masks, with the same rule for few holders.

    Of a client that is lost neither the update nor its weight is there.
    """
    masked = federation(folder, *more)
    engine = InProcess(masked.trainer, masked.clients)
    layout = engine.trainer.moe.layout
    old = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    broadcast = Broadcast(1, {group: pack(value, "float32", 0) for group, value in old.items()})
    reports = [one for one in engine.train(broadcast, engine.members()) if isinstance(one, Statistics)]
    seen = Reports(reports, layout, len(reports))
    plan = engine.trainer.algorithm.plan(seen, {})
    few_L_E = seen.held_C_L_E.sum(0) < 3
    shared_C, gate_C_L_E, expert_C_L_E = layout.split(plan.weight_C_G)
    if more != ("algorithm.name=fedavg",):
        assert bool(few_L_E.any())
        assert not bool(few_L_E.all())
        expert_C_L_E = torch.where(few_L_E, shared_C[:, None, None], expert_C_L_E)
    plan = replace(plan, weight_C_G=layout.table(shared_C, gate_C_L_E, expert_C_L_E))
    if plan.met_C_M_V is not None:
        few_M_V = plan.met_C_M_V.sum(0) < 3
        assert plan.token_weight_C_M_V is not None
        by_row = torch.where(few_M_V, shared_C[:, None, None], plan.token_weight_C_M_V)
        plan = replace(plan, token_weight_C_M_V=by_row)
    if lost:
        here_C = torch.tensor([client != lost for client in plan.clients])
        assert plan.token_weight_C_M_V is not None
        rows_C_M_V = plan.token_weight_C_M_V * here_C[:, None, None]
        plan = replace(plan, weight_C_G=plan.weight_C_G * here_C[:, None], token_weight_C_M_V=rows_C_M_V)
    total = StreamingSum(layout, plan, {report.client: report.norm_G for report in reports}, "float32")
    assert engine.collect([one for one in plan.requests(1, layout) if one.client != lost], total) == []
    return old, total.result(old)


def steps(totals: Totals, group: ParameterGroup, size: int) -> torch.Tensor:
    """The step of 16 bits at each value of a group."""
    return (limits(totals.counts[f"{HEIGHTS}{group}"]) / LEVELS).repeat_interleave(BLOCK)[:size]


@pytest.mark.parametrize("more", [("algorithm.name=fedavg",), (), ("algorithm.vocabulary=clients",)])
def test_the_model_differs_by_rounding_alone(tmp_path: Path, more: tuple[str, ...]) -> None:
    old, expected = by_hand(tmp_path / "plain", *more)
    seen = Seen(federation(tmp_path / "masked", *more))
    state = one_round(tmp_path, seen)
    for group, value in expected.items():
        off = (state.weights[group] - value).abs()
        assert bool((off <= len(SIZES) * steps(seen.totals[0], group, len(value)) + 1e-6).all()), group
        moved, error = (value - old[group]).norm(), (state.weights[group] - value).norm()
        assert len(value) == 0 or float(error / moved) < 0.01, group


SCORES = ("evaluation.clients=true", "run.rounds=2")


def test_scores_are_the_weighted_means_of_the_clients_and_of_no_client_alone(tmp_path: Path) -> None:
    seen = Seen(federation(tmp_path, *SCORES, held=held_out))
    state = one_round(tmp_path, seen)
    plain = InProcess(seen.inner.trainer, seen.inner.clients)
    assert [line["round"] for line in state.history] == [0, 1, 2]
    asked = Broadcast(2, {group: pack(value, "float32", 0) for group, value in state.weights.items()})
    scores = [one for one in plain.evaluate(asked, plain.members()) if isinstance(one, Evaluation)]
    expected, line = describe_clients(scores, all_asked=True), state.history[-1]
    assert len(scores) == 4
    assert line["client_loss_mean_nats"] == pytest.approx(expected["client_loss_mean_nats"], abs=1e-6)
    assert line["client_accuracy_weighted"] == pytest.approx(expected["client_accuracy_weighted"], abs=1e-12)
    assert line["held_out_examples"] == sum(expected["client_examples"].values()) == rows_of(line)
    assert not {"client_losses_nats", "client_accuracies", "client_examples", "client_accuracy_worst"} & line.keys()
    assert [verb for verb, _, _ in seen.asked] == ["count", "conceal", "count", "conceal", "score"]
    losses = [line["client_loss_mean_nats"] for line in state.history]
    assert len(set(losses)) == 3
    assert not any(HELD_OUT in totals.counts for totals in seen.totals)


def test_an_accuracy_that_may_be_of_one_client_is_not_told(tmp_path: Path) -> None:
    seen = Seen(federation(tmp_path, *SCORES, held=partial(held_out, choosing="a")))
    line = one_round(tmp_path, seen).history[-1]
    assert line["held_out_examples"] > 0
    assert "client_loss_mean_nats" in line
    assert not any("accuracy" in name for name in line)
    judged = f"accuracy of {SIZES['a'] // 2} of {line['held_out_examples']} held-out examples"
    assert line["unscored"] == f"{judged}: of how many clients is not counted, privacy.masked_min_holders = 3"


@pytest.mark.parametrize(
    ("lost", "asked", "told"),
    [
        ({"score": "b"}, ["score", "rescore"], {"held_out_examples": 12 + 7 + 3}),
        ({"score": "b", "rescore": "c"}, ["score", "rescore"], {"unscored": LOST}),
        ({"score": "bcd"}, ["score"], {"unscored": "2 clients can be summed"}),
        ({"score": "bc"}, ["score", "rescore"], {"unscored": "2 clients told a score"}),
    ],
)
def test_a_client_that_is_lost_while_it_scores_costs_no_round(
    tmp_path: Path, lost: dict[str, str], asked: list[str], told: dict[str, object]
) -> None:
    engine = federation(tmp_path, "evaluation.clients=true", held=held_out)
    seen = Seen(engine, lost=lambda stage, one: one.client in lost.get(stage, ""))
    line = one_round(tmp_path, seen).history[-1]
    assert [verb for verb, _, _ in seen.asked if "score" in verb] == asked
    (name, value), *_ = told.items()
    assert line[name] == value if isinstance(value, int) else str(value) in line[name]
    assert ("client_loss_mean_nats" in line) == (name != "unscored")
    assert {failure["stage"] for failure in line["failures"]} == {"evaluate"}
    assert {failure["client"] for failure in line["failures"]} == {*"".join(lost.values())}


def test_a_client_that_alone_was_asked_for_its_score_spoils_the_round_and_tells_nothing(tmp_path: Path) -> None:
    seen = Seen(federation(tmp_path, *SCORES, held=held_out))
    site = seen.inner.sites["c"]
    count = site.count
    site.count = lambda report, broadcast, among: count(report, f"{broadcast}, scored", among)  # type: ignore[method-assign] # as `seen_of` has it
    with pytest.raises(UserError, match="the totals of 5 clients are impossible"):
        one_round(tmp_path, seen)


def test_a_client_that_scored_other_weights_spoils_the_score_and_nothing_else(tmp_path: Path) -> None:
    seen = Seen(federation(tmp_path, "evaluation.clients=true", held=held_out))
    site = seen.inner.sites["c"]
    first = site._first

    def misled(round: int, told: dict[str, Tensor], update: Weights, broadcast: str, among: Sequence[str]) -> Concealed:
        return first(round, told, update, "others" if SCORED in told else broadcast, among)

    site.__dict__["_first"] = misled  # the hash alone differs
    line = one_round(tmp_path, seen).history[-1]
    assert line["round"] == 1
    assert "the scores of 5 clients together are impossible" in line["unscored"]
    assert not any(name.startswith("client_") for name in line)


@pytest.mark.parametrize(("loss", "counted"), [(1e9, MOST_LOSS), (float("nan"), MOST_LOSS), (-1e-9, 0.0), (0.5, 0.5)])
def test_a_loss_is_cut_to_what_everybody_knows(loss: float, counted: float) -> None:
    told = HeldOut(*client_held_out(Evaluation("a", 10, loss, None)).tolist())
    assert told == HeldOut(1, 10, 0, 0, int(10 * counted * UNIT))


def test_where_some_clients_train_all_are_scored_at_the_start_and_the_end(tmp_path: Path) -> None:
    seen = Seen(federation(tmp_path, *SCORES, "clients.sample=0.6", held=held_out))
    state = one_round(tmp_path, seen)
    assert [verb for verb, _, _ in seen.asked] == ["score", "count", "conceal", "count", "conceal", "score"]
    assert ["client_loss_mean_nats" in line for line in state.history] == [True, False, True]
    assert {len(among) for verb, among, _ in seen.asked if verb == "count"} == {3}


def test_other_keys_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = (Seen(federation(tmp_path / name)) for name in ("one", "two"))
    first, second = one_round(tmp_path / "one", one), one_round(tmp_path / "two", two)
    assert all(torch.equal(first.weights[group], second.weights[group]) for group in first.weights)
    assert first.history[-1]["train_loss_nats"] == second.history[-1]["train_loss_nats"]
    for mine, yours in zip(one.messages, two.messages, strict=True):
        name = next(iter(mine.residues))
        assert mine.client == yours.client
        assert mine.residues[name].numel() < 64 or not torch.equal(mine.residues[name], yours.residues[name])


def test_a_group_whose_values_all_came_is_asked_for_once_whatever_else_is_lost(tmp_path: Path) -> None:
    """Its values and the count of clipped ones may come in two pieces; two whole sums would tell of one client."""
    seen, cut = Seen(federation(tmp_path)), list[str]()
    conceal = seen.inner.conceal

    def without_clipped(
        totals: Totals, among: Sequence[str], groups: Sequence[ParameterGroup]
    ) -> Iterator[Concealed | Failure]:
        for message in conceal(totals, among, groups):
            if isinstance(message, Failure) or message.client != "b":
                yield message
            elif not cut:
                cut.extend(message.residues)
                yield replace(message, residues={cut[0]: message.residues[cut[0]]})  # the values of its first group
                yield Failure("b", "update", "gone")

    seen.inner.conceal = without_clipped  # type: ignore[method-assign] # a line that breaks
    state = one_round(tmp_path, seen)
    whole = [one for one in seen.messages if cut[0] in one.residues]
    assert sorted(one.client for one in whole) == sorted(SIZES)
    assert {one.among for one in whole} == {tuple(SIZES)}
    assert ("conceal", tuple(name for name in SIZES if name != "b")) in {one[:2] for one in seen.asked}
    assert 0 <= state.history[-1]["clipped_share"] <= 1


def test_what_one_client_sends_is_noise(tmp_path: Path) -> None:
    """Bytes of its messages are uniform over fresh keys, though the data is the same each time."""
    counted: dict[str, Counter[int]] = {"counts": Counter(), "update": Counter()}
    for turn in range(3):
        seen = Seen(federation(tmp_path / str(turn), *SCORES, held=held_out))
        one_round(tmp_path / str(turn), seen)
        for message in seen.messages:
            if message.client == "a":
                kind = "counts" if {EXAMPLES, SCORED} & message.residues.keys() else "update"
                for residues in message.residues.values():
                    counted[kind].update(residues.contiguous().view(-1).view(torch.uint8).tolist())
    for kind, counts in counted.items():
        assert sum(counts.values()) > 5 * 256, kind
        assert chisquare([counts[byte] for byte in range(256)]).pvalue > 1e-6, kind


def test_another_clients_data_shows_in_totals_alone(tmp_path: Path) -> None:
    """Of two runs that differ in the data of e, what a sends is noise in both, and only sums differ."""
    one = Seen(federation(tmp_path / "one"))
    two = Seen(federation(tmp_path / "two", seeds={"e": 99}))
    one_round(tmp_path / "one", one)
    one_round(tmp_path / "two", two)
    assert one.totals[0].counts.keys() == two.totals[0].counts.keys()
    assert any(not torch.equal(one.totals[0].counts[name], two.totals[0].counts[name]) for name in one.totals[0].counts)
    apart = Counter[int]()
    for mine, yours in zip(one.messages, two.messages, strict=True):
        assert (mine.client, mine.round, mine.among) == (yours.client, yours.round, yours.among)
        assert mine.residues.keys() == yours.residues.keys()
        for name, residues in mine.residues.items():
            assert residues.shape == yours.residues[name].shape
            assert residues.dtype == yours.residues[name].dtype
            apart.update((residues - yours.residues[name]).contiguous().view(-1).view(torch.uint8).tolist())
    assert chisquare([apart[byte] for byte in range(256)]).pvalue > 1e-6


def test_nothing_of_one_client_stands_in_a_rounds_line(tmp_path: Path) -> None:
    line = one_round(tmp_path, Seen(federation(tmp_path))).history[-1]
    by_client = [name for name, value in line.items() if isinstance(value, dict)]
    assert by_client == ["bytes_up_by_client", "bytes_down_by_client"]
    assert all(len(set(line[name].values())) == 1 for name in by_client)
    assert line["clients"] == list(SIZES)
    assert line["train_examples"] == sum(SIZES.values())
    assert line["failures"] == []


def test_counts_are_asked_for_once_more_among_those_left(tmp_path: Path) -> None:
    seen = Seen(federation(tmp_path), lost=lambda stage, message: (stage, message.client) == ("count", "b"))
    line = one_round(tmp_path, seen).history[-1]
    left = ("a", "c", "d", "e")
    assert [(verb, among) for verb, among, _ in seen.asked] == [
        ("count", tuple(SIZES)),
        ("recount", left),
        ("conceal", left),
    ]
    assert line["clients"] == list(left)
    assert line["train_examples"] == sum(SIZES[name] for name in left)
    assert [failure["client"] for failure in line["failures"]] == ["b"]


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (
            lambda stage, one: stage in ("count", "recount") and one.client == {"count": "b", "recount": "c"}[stage],
            "lost in",
        ),
        (lambda stage, one: stage == "count" and one.client in "bcd", "2 clients can be summed"),
        (lambda stage, one: stage == "conceal" and one.client in "bcd", "2 clients can be summed"),
        (lambda stage, one: {"conceal": "b", "conceal again": "c"}.get(stage) == one.client, "lost in"),
    ],
)
def test_a_round_that_cannot_be_summed_fails_and_none_of_it_is_kept(
    tmp_path: Path, lost: Callable[[str, Concealed], bool], said: str
) -> None:
    seen = Seen(federation(tmp_path), lost=lost)
    with pytest.raises(UserError, match=said) as failed:
        one_round(tmp_path, seen)
    assert "\n" not in str(failed.value)
    loaded = Checkpoints(tmp_path / "checkpoint", {}).load()
    assert loaded is not None
    assert loaded.round == 0


def test_only_groups_that_are_not_complete_are_summed_again(tmp_path: Path) -> None:
    """A client lost on the way: complete groups keep their sum, and its share of the others does not move them."""
    engine = federation(tmp_path / "masked")
    layout = engine.trainer.moe.layout
    asked = [group for group in layout.groups if layout.sizes[group]]
    early, late = asked[: len(asked) // 2], asked[len(asked) // 2 :]
    seen = Seen(
        engine, lost=lambda stage, one: (stage, one.client) == ("conceal", "b") and str(late[0]) in one.residues
    )
    state = one_round(tmp_path, seen)
    assert seen.asked[1:] == [("conceal", tuple(SIZES), len(asked)), ("conceal", ("a", "c", "d", "e"), len(late))]
    sums = Counter(name for message in seen.messages for name in message.residues if message.among == tuple(SIZES))
    assert all(sums[str(group)] == len(SIZES) for group in early)
    assert all(sums[str(group)] < len(SIZES) for group in late)
    for part, lost in ((early, ""), (late, "b")):
        _, expected = by_hand(tmp_path / f"plain{lost}", lost=lost)
        for group in part:
            off = (state.weights[group] - expected[group]).abs()
            assert bool((off <= len(SIZES) * steps(seen.totals[0], group, len(off)) + 1e-6).all()), group


def test_a_client_that_was_told_another_model_spoils_the_round_and_nothing_else(tmp_path: Path) -> None:
    """Its masks do not cancel, so that the totals are impossible, and no sum of the others' updates is asked for."""
    seen = Seen(federation(tmp_path))
    site = seen.inner.sites["c"]
    count = site.count
    site.count = lambda report, broadcast, among: count(report, "of another model", among)  # type: ignore[method-assign] # the hash alone differs
    with pytest.raises(UserError, match="the totals of 5 clients are impossible"):
        one_round(tmp_path, seen)
    assert [verb for verb, _, _ in seen.asked] == ["count"]


def test_a_client_that_was_told_other_totals_spoils_the_round_and_nothing_else(tmp_path: Path) -> None:
    """Its masks do not cancel, and the number of clipped values, which is masked, too, is impossible."""
    seen = Seen(federation(tmp_path))
    site = seen.inner.sites["c"]
    conceal = site.conceal

    def misled(totals: Totals, among: Sequence[str], groups: Sequence[ParameterGroup]) -> Iterator[Concealed]:
        counts = {**totals.counts, EXAMPLES: totals.counts[EXAMPLES] + 1}
        return conceal(replace(totals, counts=counts), among, groups)

    site.conceal = misled  # type: ignore[method-assign] # the totals alone differ
    with pytest.raises(UserError, match="the sum of 5 updates is impossible"):
        one_round(tmp_path, seen)
    loaded = Checkpoints(tmp_path / "checkpoint", {}).load()
    assert loaded is not None
    assert loaded.round == 0


def test_no_value_is_clipped(tmp_path: Path) -> None:
    assert one_round(tmp_path, Seen(federation(tmp_path))).history[-1]["clipped_share"] == 0


def test_a_client_whose_update_has_no_limit_says_so(tmp_path: Path) -> None:
    """What cannot be summed is told by the client, and never wraps."""
    engine = federation(tmp_path)
    broadcast = Broadcast(1, {group: pack(value, "float32", 0) for group, value in engine.trainer.moe.read().items()})
    report = next(one for one in engine.train(broadcast, ["a"]) if isinstance(one, Statistics))
    site = engine.sites["a"]
    update = site._update(1)
    large = {group: torch.full_like(value, 2000.0) for group, value in update.items()}
    site._update = lambda *_: large  # type: ignore[method-assign] # an update as no training makes it
    with pytest.raises(TrainingFailedError, match="of 1,024 or more"):
        site.count(report, "seen", tuple(SIZES))
    with pytest.raises(TrainingFailedError, match="round 1: nothing was counted in it"):
        site.recount(1, tuple(SIZES))
    with pytest.raises(TrainingFailedError, match="a count that is not finite"):
        site.count(replace(report, loss=float("inf")), "seen", tuple(SIZES))


def test_a_round_is_counted_once_with_the_same_keys(tmp_path: Path) -> None:
    """Else two different updates would be hidden by the same mask, and their difference by none."""
    seen = Seen(federation(tmp_path))
    one_round(tmp_path / "first", seen)
    with pytest.raises(UserError, match="other counts and update of round 1 before: its masks are used up"):
        one_round(tmp_path / "second", seen)


def test_a_group_is_masked_part_by_part_as_in_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of a stream of masks is used twice."""
    seen = Seen(federation(tmp_path))
    one_round(tmp_path, seen)
    site, totals = seen.inner.sites["a"], seen.totals[0]
    group = max(site.terms.layout.sizes, key=lambda group: site.terms.layout.sizes[group])
    assert site.terms.layout.sizes[group] > BLOCK
    whole = next(site.conceal(totals, totals.among, [group])).residues[str(group)]
    monkeypatch.setattr("fedalign.federation.masked_site.PIECE", BLOCK)
    assert torch.equal(next(site.conceal(totals, totals.among, [group])).residues[str(group)], whole)


def test_random_marks_are_the_same_again_and_others_among_others(tmp_path: Path) -> None:
    """Else what is sent twice, or two sums over more and fewer clients, would tell the heights of one."""
    site = counted(tmp_path).sites["a"]
    site.masks.mask = lambda values, *_: values  # type: ignore[method-assign] # as the numbers are below the masks
    first, again, fewer = (site.recount(1, among).residues for among in (tuple(SIZES), tuple(SIZES), ("a", "b", "c")))
    for name, value in first.items():
        assert torch.equal(value, again[name])
        moved = bool((site.counts[name] > 0).any())
        assert torch.equal(value, fewer[name]) != (name.startswith(HEIGHTS) and moved), name


def test_a_client_refuses_what_would_tell_of_it(tmp_path: Path) -> None:
    seen = Seen(federation(tmp_path))
    one_round(tmp_path, seen)
    site, totals = seen.inner.sites["a"], seen.totals[0]
    group = next(group for group, size in site.terms.layout.sizes.items() if size)
    assert next(iter(site.conceal(totals, totals.among, [group]))).among == totals.among  # the same once more
    with pytest.raises(TrainingFailedError, match="2 clients: it takes part in sums of 3 to 1024"):
        next(site.conceal(totals, ("a", "b"), [group]))
    with pytest.raises(TrainingFailedError, match="1025 clients: it takes part in sums of 3 to 1024"):
        counted(tmp_path / "other").sites["a"].recount(1, ("a", *map(str, range(MOST_CLIENTS))))
    with pytest.raises(TrainingFailedError, match="itself among them"):
        next(site.conceal(totals, ("b", "c", "d"), [group]))
    less = replace(totals, counts={**totals.counts, EXAMPLES: totals.counts[EXAMPLES] * 0})
    with pytest.raises(TrainingFailedError, match="less than it counted itself"):
        next(site.conceal(less, totals.among, [group]))
    loads = totals.counts[LOAD].clone()
    cell = tuple(site.counts[LOAD].nonzero()[0].tolist())
    loads[cell] = site.counts[LOAD][cell] - 1  # of one expert alone
    with pytest.raises(TrainingFailedError, match="less than it counted itself"):
        next(site.conceal(replace(totals, counts={**totals.counts, LOAD: loads}), totals.among, [group]))
    with pytest.raises(TrainingFailedError, match="not of what it counted"):
        next(site.conceal(replace(totals, among=("a", "b", "c")), totals.among, [group]))
    counts = {**totals.counts, EXAMPLES: totals.counts[EXAMPLES] + 1}
    with pytest.raises(TrainingFailedError, match="other totals of round 1 before"):
        next(site.conceal(replace(totals, counts=counts), totals.among, [group]))
    with pytest.raises(TrainingFailedError, match="among others than were counted"):
        next(site.conceal(totals, ("a", "b", "c", "z"), [group]))
    next(site.conceal(totals, ("a", "b", "c"), [group]))
    with pytest.raises(TrainingFailedError, match="a further sum would tell of one client"):
        next(site.conceal(totals, ("a", "c", "d"), [group]))
