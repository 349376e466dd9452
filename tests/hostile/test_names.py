"""Nobody takes another's name, and nothing that a site says steers the coordinator's terminal."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from flwr.app import Error

from fedalign.federation.flower import sites as federation
from fedalign.federation.flower.link import reason
from fedalign.federation.flower.sites import FlowerFederation
from fedalign.federation.messages import Parcel, encode
from fedalign.protocol import Broadcast, Failure
from fedalign.units import shown
from tests.federation.flower.scripted import Clock, Node
from tests.federation.flower.test_federation import federate, site, told, train
from tests.federation.test_messages import hello, statistics

STEER = "\x1b[2J\x1b]0;owned\x07\u202e"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(federation, "time", clock)
    monkeypatch.setattr(logging.getLogger("fedalign"), "propagate", True)
    return clock


def registered(name: str, claims: str | None = None, **more: float) -> Node:
    node = site(claims or name, **more)  # type: ignore[arg-type] # since, delay
    node.registered = name
    return node


def federated(clock: Clock, *nodes: Node) -> FlowerFederation:
    return federate(clock, *nodes, min_sites=1, root_certificates="ca.crt", engine="flower")


@pytest.mark.parametrize("first", [True, False])
def test_a_site_cannot_take_anothers_name_whoever_comes_first(clock: Clock, first: bool) -> None:
    real, false = registered("hospital-a"), registered("lab-c", claims="hospital-a")
    late = real if first else false
    late.since = 1010.0
    sites = federated(clock, real, false)
    seen = set(sites.members())
    clock.sleep(20)
    assert {*seen, *sites.members()} == {"hospital-a"}
    (node,) = [one.node for one in sites.sites.values()]
    assert node == 1  # the real one's
    reason = "refused: it calls itself 'hospital-a', and its key was registered as 'lab-c'"
    assert told(sites) == {"lab-c": reason}


def test_where_keys_are_checked_each_has_a_name(clock: Clock) -> None:
    sites = federated(clock, registered("a"), site("b"))
    assert sites.members() == ["a"]
    assert "its key was registered without a name" in told(sites)["node 2"]


def test_without_keys_names_are_what_sites_say(clock: Clock) -> None:
    assert federate(clock, site("a"), site("b")).members() == ["a", "b"]


def test_a_new_key_under_the_old_name_takes_the_place_of_one_that_was_revoked(clock: Clock) -> None:
    old, new = registered("a"), registered("a", since=1050.0)
    old.until = 1040.0  # `flwr supernode unregister`: the SuperLink lists it no more
    sites = federated(clock, old, new, registered("b"))
    assert sites.members() == ["a", "b"]
    clock.sleep(45)
    assert sites.members() == ["b"]
    clock.sleep(20)
    assert sites.members() == ["a", "b"]
    assert sites.sites["a"].node == 2


@pytest.mark.parametrize("name", ["", "w" * 65, "ward\x1b[31m", "ward\n", "\u202edraw"])
def test_a_name_is_short_and_can_be_shown(clock: Clock, name: str, caplog: pytest.LogCaptureFixture) -> None:
    sites = federate(clock, site("a"), site("b"), site("odd", hello=replace(hello("odd"), client=name)))
    assert sites.members() == ["a", "b"]
    (fault,) = sites.faults()
    assert "must be 1 to 64 printable characters" in fault.reason
    assert fault.client == "node 3"
    assert (fault.client + fault.reason + caplog.text.replace("\n", "")).isprintable()


def test_reasons_are_shown_with_their_escapes(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    rude = Failure("", "join", f"no{STEER}\n")
    raw = Parcel(encode(rude).head, {})
    wrong = statistics("b", 1)
    metrics = replace(wrong, metrics={STEER: 1.0})
    sites = federate(
        clock,
        site("a"),
        site("b", train=metrics),
        site("odd", hello=raw),
        site("c", train=Failure("c", "train", STEER)),
    )
    assert sites.members() == ["a", "b", "c"]
    (refused,) = sites.faults()
    assert refused.reason == "refused: no" + shown(f"{STEER}\n")
    assert train(sites, 1)["c"] == shown(STEER)
    assert (refused.reason + shown(STEER) + caplog.text.replace("\n", "")).isprintable()
    (report,) = [r for r in sites.train(Broadcast(2, {}), ["b"]) if not isinstance(r, Failure)]
    assert list(report.metrics) == [shown(STEER)]


def test_what_flower_hands_on_of_a_node_is_shown_with_its_escapes() -> None:
    assert reason(Error(99, f"went wrong{STEER}")).isprintable()
