"""Sites that come, go, differ, are late, silent or wrong: what becomes of each, on a scripted link and clock."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedalign.config.run import FederationConfig
from fedalign.errors import UserError
from fedalign.federation.flower import carrier, talks
from fedalign.federation.flower import sites as federation
from fedalign.federation.flower.carrier import Cargo
from fedalign.federation.flower.sites import Agreement, FlowerFederation
from fedalign.federation.messages import Message, Parcel, decode, encode
from fedalign.protocol import (
    PROTOCOL,
    SHARED,
    Broadcast,
    Evaluation,
    Failure,
    Fetch,
    Lacking,
    Packed,
    Piece,
    Request,
    Start,
    Statistics,
    Update,
)
from tests.federation.flower.scripted import Clock, Node, Script, ScriptedLink, handed
from tests.federation.test_messages import hello, packed, statistics

OTHER = PROTOCOL + 1
FOLDER = Path(tempfile.mkdtemp(prefix="fedalign-tests-"))  # also of tests elsewhere that federate
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
AGREEMENT = Agreement("a" * 64, "c" * 64, "d" * 64, layers=2, experts=3, weights="b" * 64)


def site(name: str, *, delay: float = 0.0, since: float = 0.0, held_out: int = 4, **script: Any) -> Node:
    """A site in order; `script` replaces answers: a message, or a function of what was asked."""

    def train(parcel: Parcel) -> Message:
        return statistics(name, decode(parcel, Broadcast).round)

    def update(parcel: Parcel) -> Message:
        fetch = decode(parcel, Fetch)
        return handed(name, fetch, {one: Packed(torch.randn(3)) for one in fetch.names})

    answers = {
        "hello": hello(name, held_out=held_out),
        "start": Start(name, packed({SHARED: 3}, "float32"), {}),
        "update": update,
        "finish": Lacking(name, 0, "", ()),
        "train": train,
        "evaluate": Evaluation(name, 4, 1.0, 0.5),
    }
    answers |= script
    return Node({kind: script_of(answer) for kind, answer in answers.items()}, delay=delay, since=since)


def script_of(answer: Any) -> Script:
    return answer if callable(answer) else lambda _: answer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (federation, talks, carrier):
        monkeypatch.setattr(module, "time", clock)
    return clock


def federate(clock: Clock, *nodes: Node, agreement: Agreement = AGREEMENT, **policy: Any) -> FlowerFederation:
    options = FederationConfig(**({"wait_seconds": 60, "timeout_seconds": 100} | policy))
    link = ScriptedLink(clock, dict(enumerate(nodes, start=1)))
    cargo = Cargo(FOLDER / f"transfers-{len(list(FOLDER.iterdir()))}", {SHARED: 3}, "float32", 64_000_000)
    cargo.folder.mkdir()
    return FlowerFederation(link, options, agreement, cargo)


def link_of(sites: FlowerFederation) -> ScriptedLink:
    assert isinstance(sites.link, ScriptedLink)
    return sites.link


def train(sites: FlowerFederation, round: int, clients: Sequence[str] | None = None) -> dict[str, str]:
    """One round's training of all members: name -> "" or the reason of its failure."""
    replies = list(sites.train(Broadcast(round, {}), sites.members() if clients is None else clients))
    return {reply.client: reply.reason if isinstance(reply, Failure) else "" for reply in replies}


def told(sites: FlowerFederation) -> dict[str, str]:
    faults = sites.faults()
    assert len({fault.client for fault in faults}) == len(faults)
    return {fault.client: fault.reason for fault in faults}


class Collected:
    """An accumulator that remembers, and refuses some."""

    def __init__(self, refused: str = "") -> None:
        self.refused = refused
        self.updates: list[Update] = []

    def add(self, update: Update) -> Failure | None:
        self.updates.append(update)
        return Failure(update.client, "update", "not finite") if update.client == self.refused else None


# ------------------------------------------------------------------------------------------------------ who is there


def test_members_are_those_that_fit_by_name(clock: Clock) -> None:
    sites = federate(clock, site("ward"), site("lab"), site("odd", hello=hello("odd", layers=9)))
    assert sites.members() == ["lab", "ward"]
    assert clock.now == 1000.0  # nothing to wait for
    assert sites.members() == ["lab", "ward"]
    assert [kind for kind, _ in link_of(sites).order] == ["hello"] * 3  # each is greeted once
    assert sites.sites["lab"].hello.examples == 40


def test_a_run_waits_for_enough_sites(clock: Clock) -> None:
    sites = federate(clock, site("ward"), site("lab", since=1030.0), min_sites=2)
    assert sites.members() == ["lab", "ward"]
    assert 1030 <= clock.now <= 1032


def test_too_few_sites_end_the_run_and_say_why(clock: Clock) -> None:
    odd = hello("odd", tokenizer="e" * 64)
    sites = federate(clock, site("ward"), site("odd", hello=odd), site("far", since=9e9), min_sites=2)
    with pytest.raises(UserError) as caught:
        sites.members()
    assert 1060 <= clock.now <= 1063
    text = str(caught.value)
    assert "1 sites are connected and fit, federation.min_sites = 2 are needed; waited 60 s" in text
    assert "Refused: odd: its tokenizer differs: eeee" in text
    assert "fedalign doctor" in text


def test_a_site_that_loads_its_model_is_waited_for_though_there_are_enough(clock: Clock) -> None:
    sites = federate(clock, site("a"), site("b"), site("slow", delay=50.0), min_sites=2)
    assert sites.members() == ["a", "b", "slow"]
    assert 1050 <= clock.now <= 1052


def test_a_site_that_never_says_hello_does_not_hold_up_the_others_for_good(clock: Clock) -> None:
    mute = site("mute", hello=None)
    sites = federate(clock, site("a"), site("b"), mute)
    assert sites.members() == ["a", "b"]
    assert 1060 <= clock.now <= 1062
    before = clock.now
    assert sites.members() == ["a", "b"]
    assert clock.now == before


def test_a_site_that_goes_before_it_says_hello_is_not_waited_for_and_greeted_when_it_is_back(clock: Clock) -> None:
    shy = site("shy", hello=None)
    shy.until = 1005.0
    sites = federate(clock, site("a"), site("b"), shy)
    assert sites.members() == ["a", "b"]
    assert clock.now <= 1007
    shy.script = site("shy").script
    shy.until = float("inf")
    assert sites.members() == ["a", "b", "shy"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": 4}, "its MoE layout differs: 4 layers x 3 experts, the coordinator's is 2 layers x 3 experts"),
        ({"experts": 4}, "its MoE layout differs: 2 layers x 4 experts"),
        ({"architecture": "a" * 63 + "b"}, "its model architecture differs"),
        ({"weights": "b" * 63 + "a"}, "its model weights differ: bbbb"),
        ({"tokenizer": ""}, "its tokenizer differs"),
        ({"chat_template": "0" * 64}, "its chat template differs: 0000"),
        (
            {"protocol": PROTOCOL + 1},
            f"it speaks protocol {PROTOCOL + 1}, this is {PROTOCOL}: install the same version",
        ),
        ({"client": ""}, "a damaged hello: ValueError: client = '': must be 1 to 64 printable characters"),
    ],
)
def test_a_site_that_differs_is_refused_with_the_reason(clock: Clock, change: dict[str, Any], reason: str) -> None:
    odd = hello("odd")
    sites = federate(clock, site("a"), site("b"), site("odd", hello=replace(odd, **change)))
    assert sites.members() == ["a", "b"]
    (fault,) = sites.faults()
    assert fault.stage == "join"
    assert fault.reason.startswith(f"refused: {reason}")
    assert fault.client == {"protocol": "node 3", "client": "node 3"}.get(next(iter(change)), "odd")
    assert sites.faults() == []
    assert sites.members() == ["a", "b"]
    assert sites.faults() == []  # told once


@pytest.mark.parametrize(
    ("answer", "client", "reason"),
    [
        (Failure("odd", "join", "model.path = 'x': no such folder"), "odd", "model.path = 'x': no such folder"),
        ("its ClientApp failed", "node 3", "its ClientApp failed"),
        (statistics(), "node 3", "unexpected message 'statistics'"),
        (Parcel({}, {}), "node 3", "it speaks protocol None"),
        (Parcel({**encode(hello()).head, "layers": "2"}, {}), "node 3", "a damaged hello"),
    ],
)
def test_a_site_that_cannot_say_hello_is_refused_with_the_reason(
    clock: Clock, answer: Any, client: str, reason: str
) -> None:
    sites = federate(clock, site("a"), site("b"), site("odd", hello=answer))
    assert sites.members() == ["a", "b"]
    faults = told(sites)
    assert list(faults) == [client]
    assert faults[client].startswith(f"refused: {reason}")


def test_a_refused_site_that_comes_back_is_greeted_again(clock: Clock) -> None:
    odd = site("odd", hello=hello("odd", layers=9))
    sites = federate(clock, site("a"), site("b"), odd)
    sites.members()
    odd.until = clock.now
    sites.members()
    odd.script = site("odd").script
    odd.until = float("inf")
    assert sites.members() == ["a", "b", "odd"]


def test_two_sites_of_one_name(clock: Clock) -> None:
    first, second = site("a"), site("a")
    sites = federate(clock, first, site("b"), second)
    assert sites.members() == ["a", "b"]
    assert sites.sites["a"].node == 1
    assert told(sites) == {"a": "refused: another connected site has the same name"}


def test_a_site_that_is_back_before_its_end_was_noticed_gets_in_once_it_is(clock: Clock) -> None:
    before, after = site("a"), site("a", since=1010.0)
    sites = federate(clock, before, site("b"), after)
    sites.members()
    clock.now = 1011.0
    sites.members()
    assert told(sites) == {"a": "refused: another connected site has the same name"}
    before.until = clock.now
    assert sites.members() == ["a", "b"]
    assert sites.sites["a"].node == 3
    assert told(sites) == {}


def test_a_site_that_is_back_under_another_node_is_the_same_site(clock: Clock) -> None:
    before, after = site("a"), site("a", since=1010.0)
    before.until = 1010.0
    sites = federate(clock, before, site("b"), after)
    assert sites.members() == ["a", "b"]
    sites.sites["a"].missed = 2
    clock.now = 1011.0
    assert sites.members() == ["a", "b"]
    assert (sites.sites["a"].node, sites.sites["a"].missed) == (3, 2)
    assert train(sites, 1) == {"a": "", "b": ""}
    assert "train" in after.asked
    assert "train" not in before.asked


# ------------------------------------------------------------------------------------------------- which weights


def weighing(name: str, weights: str) -> Node:
    return site(name, hello=hello(name, weights=weights))


def test_most_sites_settle_what_the_weights_are(clock: Clock) -> None:
    nodes = [weighing("a", "1" * 64), weighing("b", "2" * 64), weighing("c", "2" * 64)]
    sites = federate(clock, *nodes, agreement=replace(AGREEMENT, weights=None))
    assert sites.settle_weights() == "2" * 64
    assert sites.members() == ["b", "c"]
    assert told(sites) == {"a": f"refused: its model weights differ: {'1' * 24}, the coordinator's is {'2' * 24}"}
    link_of(sites).there[4] = weighing("d", "1" * 64)
    assert sites.members() == ["b", "c"]  # who comes later is held to it
    assert list(told(sites)) == ["d"]


def test_a_site_that_is_to_take_no_part_is_refused_and_told(clock: Clock) -> None:
    nodes = [site(name) for name in ("a", "b")]
    sites = federate(clock, *nodes, agreement=replace(AGREEMENT, only=("b",)), min_sites=1)
    assert list(sites.members()) == ["b"]
    assert told(sites) == {"a": "refused: it takes no part in this run: clients.only = b"}


def test_a_tie_about_the_weights_is_the_users_to_decide(clock: Clock) -> None:
    nodes = [weighing("a", "1" * 64), weighing("b", "2" * 64)]
    sites = federate(clock, *nodes, agreement=replace(AGREEMENT, weights=None))
    with pytest.raises(UserError, match=rf"a has {'1' * 64}; b has {'2' * 64}. Set model.weights_hash to one"):
        sites.settle_weights()


def test_weights_that_the_coordinator_knows_are_not_voted_on(clock: Clock) -> None:
    nodes = [site("a"), site("b"), *(weighing(name, "2" * 64) for name in "cde")]
    sites = federate(clock, *nodes)
    assert sites.settle_weights() == "b" * 64
    assert sites.members() == ["a", "b"]


# ------------------------------------------------------------------------------------------------- training


def test_training_asks_all_at_once_and_hands_on_what_comes_as_it_comes(clock: Clock) -> None:
    sites = federate(clock, site("a", delay=30.0), site("b", delay=2.0), site("c", delay=10.0))
    replies = sites.train(Broadcast(1, packed({SHARED: 3}, "float32")), sites.members())
    started = clock.now
    order = [reply.client for reply in replies]
    assert order == ["b", "c", "a"]
    assert clock.now - started <= 31.5


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Failure("c", "train", "its loss is nan at step 3"), "its loss is nan at step 3"),
        (Failure("", "join", "its site.toml is gone"), "its site.toml is gone"),
        ("its process ended before it could answer", "its process ended before it could answer"),
        (lambda _: statistics("a", 1), "it answers as 'a'"),
        (Evaluation("c", 1, 1.0, None), "unexpected message 'evaluation'"),
        (Parcel({"protocol": OTHER, "kind": "statistics"}, {}), f"it speaks protocol {OTHER}"),
        (Parcel({**encode(statistics("c", 1)).head}, {}), "a damaged statistics: KeyError"),
        (None, "no reply within 100 s (federation.timeout_seconds)"),
    ],
)
def test_what_is_no_statistics_is_a_failure_with_the_reason(clock: Clock, answer: Any, reason: str) -> None:
    sites = federate(clock, site("a"), site("b"), site("c", train=answer))
    replies = {reply.client: reply for reply in sites.train(Broadcast(1, {}), sites.members())}
    assert sorted(replies) == ["a", "b", "c"]
    assert isinstance(replies["a"], Statistics)
    failure = replies["c"]
    assert isinstance(failure, Failure)
    assert failure.stage == "train"
    assert failure.reason.startswith(reason)


@pytest.mark.parametrize(
    ("claimed", "reason"), [(12, ""), (1, ""), (10**9, "examples = 1000000000: when it joined it had 12")]
)
def test_a_site_has_no_more_examples_than_it_said(clock: Clock, claimed: int, reason: str) -> None:
    def lie(parcel: Parcel) -> Message:
        return replace(statistics("ward", decode(parcel, Broadcast).round), examples=claimed)

    sites = federate(clock, site("lab"), site("ward", train=lie, hello=replace(hello("ward"), examples=12)))
    assert train(sites, 1) == {"lab": "", "ward": reason}


@pytest.mark.parametrize(("claimed", "counts"), [(4, True), (10**9, False)])
def test_a_site_is_scored_on_no_more_examples_than_it_said(clock: Clock, claimed: int, counts: bool) -> None:
    sites = federate(clock, site("lab"), site("ward", evaluate=Evaluation("ward", claimed, 1.0, 1.0)))
    scores = {score.client: score for score in sites.evaluate(Broadcast(1, {}), sites.members())}
    assert isinstance(scores["lab"], Evaluation)
    assert isinstance(scores["ward"], Evaluation) == counts
    if not counts:
        assert scores["ward"] == Failure("ward", "evaluate", "examples = 1000000000: when it joined it had 4")


@pytest.mark.parametrize(
    ("held_out", "scored", "flaw"),
    [
        (4, 4, ""),
        (4, 3, ""),
        (0, 0, ""),
        (4, 10**9, "examples = 1000000000: when it joined it had 4"),
        (0, 1, "examples = 1: when it joined it had 0"),
        (4, 0, "it trained and sent no score: it may have answered all that its site.toml allows (limits.evaluations)"),
    ],
)
def test_a_score_beside_statistics_is_of_what_the_site_held_out(
    clock: Clock, held_out: int, scored: int, flaw: str
) -> None:
    said = replace(statistics("ward", 1), held_out=scored, held_out_loss=1.0, held_out_accuracy=0.5)
    sites = federate(clock, site("ward", train=said, held_out=held_out), min_sites=1)
    *flaws, report = sites.train(Broadcast(1, {}, score=True), sites.members())
    assert flaws == ([Failure("ward", "evaluate", flaw)] if flaw else [])
    assert isinstance(report, Statistics)  # it has trained all the same
    assert (report.score is not None) == (scored > 0 and not flaw)
    assert sites.sites["ward"].missed == 0
    assert not [one for one in sites.train(Broadcast(1, {}), ["ward"]) if isinstance(one, Failure)]  # nobody asked


def test_a_site_cannot_fill_the_metrics_with_its_reasons(clock: Clock) -> None:
    sites = federate(clock, site("a"), site("b", train=Failure("b", "train", "x" * 10**6)))
    assert len(train(sites, 1)["b"]) <= 500


def test_a_site_that_is_gone_when_it_is_asked_fails_at_once(clock: Clock) -> None:
    gone = site("b")
    sites = federate(clock, site("a"), gone, site("c"))
    members = sites.members()
    gone.known = False
    assert train(sites, 1, members) == {"a": "", "b": "not connected", "c": ""}
    assert clock.now - 1000 < 5


def test_a_late_reply_is_named_and_thrown_away(clock: Clock) -> None:
    slow = site("b", train=lambda p: statistics("b", decode(p, Broadcast).round))
    sites = federate(clock, site("a"), slow)
    sites.members()
    slow.delay = 150.0
    assert train(sites, 1) == {"a": "", "b": "no reply within 100 s (federation.timeout_seconds)"}
    assert 1100 <= clock.now <= 1102
    assert told(sites) == {}
    slow.delay = 0.0
    assert train(sites, 2) == {"a": "", "b": ""}  # late = "ask_again"
    clock.now = 1151.0
    sites.members()
    assert told(sites) == {"b": "its reply of round 1 came after 151 s and was discarded"}
    assert not link_of(sites).outstanding


def test_a_late_reply_that_flower_gives_up_is_named_too(clock: Clock) -> None:
    slow = site("b", train="its SuperNode is gone")
    sites = federate(clock, site("a"), slow)
    sites.members()
    slow.delay = 150.0
    train(sites, 1)
    clock.now = 1151.0
    slow.delay = 0.0
    sites.members()
    assert told(sites) == {"b": "its late reply of round 1 will not come: its SuperNode is gone"}


def test_a_late_site_can_be_left_out_until_its_reply_is_there(clock: Clock) -> None:
    slow = site("c")
    sites = federate(clock, site("a"), site("b"), slow, late="leave_out")
    sites.members()
    slow.delay = 250.0
    train(sites, 1)
    slow.delay = 0.0
    assert train(sites, 2) == {"a": "", "b": ""}
    assert told(sites) == {"c": "left out until its reply of round 1 is there (federation.late)"}
    clock.now = 1251.0
    assert train(sites, 3) == {"a": "", "b": "", "c": ""}
    assert told(sites) == {"c": "its reply of round 1 came after 251 s and was discarded"}


def a_round(sites: FlowerFederation, round: int) -> tuple[dict[str, str], dict[str, str]]:
    """Training and evaluation, as the server goes about it, and what was told of it."""
    trained = train(sites, round)
    list(sites.evaluate(Broadcast(round, {}), sites.members()))
    faults: dict[str, str] = {}
    for fault in sites.faults():
        faults[fault.client] = f"{faults[fault.client]}; {fault.reason}" if fault.client in faults else fault.reason
    return trained, faults


def test_a_site_that_fails_too_often_is_left_out_for_good(clock: Clock) -> None:
    broken = site("c", train=Failure("c", "train", "no"))
    sites = federate(clock, site("a"), site("b"), broken, max_missed=2)
    for number in (1, 2):
        assert a_round(sites, number) == ({"a": "", "b": "", "c": "no"}, {})
    gone = {"c": "left out for good: missed 3 rounds in a row, federation.max_missed = 2"}
    assert a_round(sites, 3) == ({"a": "", "b": "", "c": "no"}, gone)
    assert a_round(sites, 4) == ({"a": "", "b": ""}, {})
    link_of(sites).there[4], broken.until = site("c"), clock.now  # restarted as another node
    assert a_round(sites, 5) == ({"a": "", "b": ""}, {})


def test_a_site_that_is_away_is_named_each_round_and_has_missed_it_once(clock: Clock) -> None:
    away = site("c")
    sites = federate(clock, site("a"), site("b"), away, max_missed=2)
    a_round(sites, 0)
    away.until = clock.now
    both = {"a": "", "b": ""}
    assert a_round(sites, 1) == (both, {"c": "not connected"})
    assert sites.sites["c"].missed == 1
    assert a_round(sites, 2) == (both, {"c": "not connected"})
    away.until = float("inf")
    assert a_round(sites, 3) == ({**both, "c": ""}, {})
    assert sites.sites["c"].missed == 0
    away.until = clock.now
    for number in (4, 5):
        assert a_round(sites, number) == (both, {"c": "not connected"})
    trained, faults = a_round(sites, 6)
    assert trained == both
    assert faults["c"].endswith("left out for good: missed 3 rounds in a row, federation.max_missed = 2")
    away.until = float("inf")
    assert a_round(sites, 7) == (both, {})


def test_rounds_may_be_missed_without_end(clock: Clock) -> None:
    sites = federate(clock, site("a"), site("b", train=Failure("b", "train", "no")), max_missed=0)
    for number in range(1, 9):
        assert train(sites, number) == {"a": "", "b": "no"}


def test_a_site_that_was_not_drawn_has_missed_nothing(clock: Clock) -> None:
    sites = federate(clock, site("a"), site("b"), max_missed=1)
    sites.members()
    for number in range(1, 5):
        assert train(sites, number, ["a"]) == {"a": ""}
    assert sites.sites["b"].missed == 0
    assert told(sites) == {}


def test_left_out_sites_do_not_count_and_are_named_when_there_are_too_few(clock: Clock) -> None:
    sites = federate(clock, site("a"), site("b", train=Failure("b", "train", "no")), max_missed=1)
    train(sites, 1)
    train(sites, 2)
    with pytest.raises(UserError, match=r"1 sites are connected and fit.*Left out: b\."):
        sites.members()


# ------------------------------------------------------------------------------------------------- updates


def requests(*clients: str, round: int = 1) -> list[Request]:
    return [Request(client, round, (SHARED,)) for client in clients]


def test_updates_are_added_in_the_order_of_the_requests(clock: Clock) -> None:
    sites = federate(
        clock, *(site(name, delay=delay) for name, delay in zip("abcdef", (9, 1, 7, 2, 8, 0), strict=True))
    )
    sites.members()
    for order in ("abcdef", "fdbeca"):
        total = Collected()
        assert sites.collect(requests(*order), total) == []
        assert [update.client for update in total.updates] == list(order)
        assert list(total.updates[0].groups) == [SHARED]


@pytest.mark.parametrize("in_flight", [1, 2, 4, 10])
def test_only_a_few_updates_are_on_their_way_at_a_time(clock: Clock, in_flight: int) -> None:
    names = [f"s{i}" for i in range(8)]
    sites = federate(clock, *(site(name, delay=float(i % 3)) for i, name in enumerate(names)), in_flight=in_flight)
    sites.members()
    total = Collected()
    sites.collect(requests(*names), total)
    assert len(total.updates) == 8
    assert link_of(sites).most["update"] == min(in_flight, 8)


def test_updates_that_do_not_come_cost_their_site_alone(clock: Clock) -> None:
    """The silent one uses up the time of all; what has come meanwhile is there nevertheless."""
    sites = federate(clock, site("a"), site("mute", update=None), site("c"), site("d"), site("e"), in_flight=3)
    sites.members()
    total = Collected()
    (failure,) = sites.collect(requests("mute", "a", "c", "d", "e"), total)
    assert failure == Failure("mute", "update", "no reply within 100 s (federation.timeout_seconds)")
    assert [update.client for update in total.updates] == ["a", "c", "d", "e"]
    assert clock.now <= 1102


def test_a_late_update_is_named_and_thrown_away(clock: Clock) -> None:
    slow = site("b")
    sites = federate(clock, site("a"), slow)
    sites.members()
    slow.delay = 120.0
    assert [failure.client for failure in sites.collect(requests("b", "a", round=5), Collected())] == ["b"]
    clock.now = 1121.0
    sites.members()
    assert told(sites) == {"b": "its reply of round 5 came after 121 s and was discarded"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Failure("b", "update", "it keeps no update of round 1"), "it keeps no update of round 1"),
        ("its SuperNode is gone", "its SuperNode is gone"),
        (lambda _: Piece("a", 1, "", (), torch.empty(0, dtype=torch.uint8), ""), "it answers as 'a'"),
        (Parcel({**encode(Piece("b", 1, "", (), torch.zeros(12, dtype=torch.uint8), "")).head}, {}), "a damaged piece"),
    ],
)
def test_what_is_no_update_is_a_failure_with_the_reason(clock: Clock, answer: Any, reason: str) -> None:
    sites = federate(clock, site("a"), site("b", update=answer))
    sites.members()
    total = Collected()
    (failure,) = sites.collect(requests("b", "a"), total)
    assert (failure.client, failure.stage) == ("b", "update")
    assert failure.reason.startswith(reason)
    assert [update.client for update in total.updates] == ["a"]


def test_what_the_sum_refuses_and_who_is_gone_is_told(clock: Clock) -> None:
    gone = site("b")
    sites = federate(clock, site("a"), gone, site("c"))
    sites.members()
    gone.known = False
    total = Collected(refused="c")
    failures = sites.collect(requests("a", "b", "c"), total)
    assert failures == [Failure("b", "update", "not connected"), Failure("c", "update", "not finite")]
    assert clock.now == 1000.0


# ------------------------------------------------------------------------------------- scores, beginning and end


def test_only_sites_that_hold_something_out_are_asked_for_scores(clock: Clock) -> None:
    none, broken = site("b", held_out=0), site("c", evaluate=Failure("c", "evaluate", "no"))
    sites = federate(clock, site("a"), none, broken)
    scores = list(sites.evaluate(Broadcast(1, {}), sites.members()))
    assert scores == [Evaluation("a", 4, 1.0, 0.5), Failure("c", "evaluate", "no")]
    assert none.asked == ["hello"]
    assert sites.sites["c"].missed == 0


def test_the_weights_to_start_from_come_from_the_first_site_that_has_them(clock: Clock) -> None:
    nodes = [site("a", start=Failure("a", "join", "busy")), site("b", start=lambda _: Start("c", {}, {})), site("c")]
    sites = federate(clock, *nodes)
    assert sites.start().client == "c"
    sites = federate(clock, *nodes[:2])
    with pytest.raises(UserError, match=r"no site could send.*: a: busy; b: it answers as 'c'"):
        sites.start()


def test_the_end_is_told_to_all_that_are_there_and_waited_for_a_little(clock: Clock) -> None:
    mute, gone, late = site("b", finish=None), site("c"), site("d")
    sites = federate(clock, site("a"), mute, gone, late)
    sites.members()
    gone.until, late.known = clock.now, False
    sites.finish()
    assert [kind for kind, _ in link_of(sites).order if kind == "finish"] == ["finish"] * 2
    assert clock.now <= 1032


@pytest.mark.parametrize(
    ("labels", "agreed", "about", "flaw"),
    [
        ((10, 30), 2, {}, ""),
        ((0, 0), 2, {}, ""),
        ((10, 31), 2, {}, "its counts of labels are none that 40 examples can have"),
        ((-1, 3), 2, {}, "its counts of labels are none that 40 examples can have"),
        (
            (10**16, 0),
            2,
            {"examples": 10**16},
            "its counts of labels are none that 10000000000000000 examples can have",
        ),
        ((1, 2, 3), 2, {}, "it tells 3 counts of labels, expected 2"),
        ((), 2, {}, "it tells 0 counts of labels, expected 2"),
        ((1, 2), 0, {}, "it tells 2 counts of labels, expected 0"),
        ((), 2, {"token_counts": False}, ""),
        ((1, 2), 2, {"token_counts": False}, "it tells 2 counts of labels, expected 0"),
    ],
)
def test_counts_of_labels_are_those_that_were_asked_for_and_can_be(
    labels: tuple[int, ...], agreed: int, about: dict[str, Any], flaw: str, clock: Clock
) -> None:
    odd = site("odd", hello=hello("odd", labels=labels, **about))
    others = [site(name, hello=hello(name, labels=(5, 3)[:agreed])) for name in ("ward", "lab")]
    sites = federate(clock, odd, *others, agreement=replace(AGREEMENT, labels=agreed))
    assert sites.members() == (["lab", "ward"] if flaw else ["lab", "odd", "ward"])
    assert told(sites) == ({"odd": f"refused: {flaw}"} if flaw else {})
    own = labels if labels and not flaw else (0,) * agreed
    assert sites.labels() == tuple(theirs + n for theirs, n in zip((10, 6), own, strict=False))
