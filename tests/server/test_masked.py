"""The server's side of a masked round on residues by hand: what it adds, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.maths.fixed_point import MOST_CLIENTS, POWERS, encode, heights, limits
from fedalign.maths.heap import Heap
from fedalign.protocol import (
    CLIPPED,
    EXAMPLES,
    HEIGHTS,
    HELD_OUT,
    HOLDERS,
    LOSS,
    MET,
    MOST_LOSS,
    UNIT,
    Concealed,
    Failure,
    HeldOut,
    Layout,
    ParameterGroup,
    Stage,
    Totals,
)
from fedalign.server.checks import check_held_out
from fedalign.server.masked import MaskedServer, Sums
from fedalign.server.scores import Traffic

AMONG = ("a", "b", "c")
OFF = ("server.max_norm_ratio=0", "evaluation.clients=false")
SHARED = ParameterGroup("shared")
SHAPES = {"examples": ((1,), torch.int64), "shared": ((2,), torch.int16)}


def message(name: str, **changes: Any) -> Concealed:
    residues = {"examples": torch.tensor([2**63 - 1]), "shared": torch.tensor([2**15 - 1, -5]).short()}
    return replace(Concealed(name, 4, AMONG, residues), **changes)


def test_residues_are_added_modulo_their_width() -> None:
    sums = Sums(4, AMONG, SHAPES)
    for name in AMONG:
        assert not sums.complete("shared")
        assert sums.add(message(name)) is None
    assert sums.complete("examples")
    assert sums.of() == AMONG
    assert sums.sums["examples"].tolist() == [(3 * (2**63 - 1) + 2**63) % 2**64 - 2**63]
    assert sums.sums["shared"].tolist() == [(3 * (2**15 - 1) + 2**15) % 2**16 - 2**15, -15]


def test_what_is_added_is_a_copy() -> None:
    first, sums = message("a"), Sums(4, AMONG, SHAPES)
    sums.add(first)
    sums.add(message("b"))
    assert first.residues["shared"].tolist() == [2**15 - 1, -5]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"client": "d"}, "not a client of this round"),
        ({"round": 3}, "of round 3, not 4"),
        ({"among": ("a", "b")}, "its masks are among 2 clients, not the 3 asked"),
        ({"among": ("a", "b", "d")}, "its masks are among 3 clients"),
        ({"residues": {"head": torch.zeros(2).short()}}, "'head': sent but not requested"),
        ({"residues": {"shared": torch.zeros(3).short()}}, "shared: torch.int16 [3], expected torch.int16 [2]"),
        ({"residues": {"shared": torch.zeros(2)}}, "shared: torch.float32 [2], expected torch.int16 [2]"),
    ],
)
def test_what_was_not_asked_for_is_refused_whole(changes: dict[str, Any], said: str) -> None:
    sums = Sums(4, AMONG, SHAPES)
    failure = sums.add(message("a", **changes))
    assert failure is not None
    assert said in failure.reason
    assert sums.sums == {}


def test_nobody_is_added_twice() -> None:
    sums = Sums(4, AMONG, SHAPES)
    assert sums.add(message("a")) is None
    failure = sums.add(message("a"))
    assert failure is not None
    assert failure.reason == "examples: sent twice"
    assert sums.came == {"examples": ["a"], "shared": ["a"]}


def test_more_clients_than_a_sum_can_hold_are_refused() -> None:
    server = object.__new__(MaskedServer)
    server.config = load_config(None, ["privacy.masked=true", "algorithm.name=by_use", *OFF])
    server._enough(2, ["one"] * MOST_CLIENTS, [])
    with pytest.raises(
        UserError, match=r"^round 2: 1025 clients are to be summed, and a masked sum is of 1024 at most"
    ):
        server._enough(2, ["one"] * (MOST_CLIENTS + 1), [])


def test_who_sent_some_names_alone_did_not_send_all() -> None:
    sums = Sums(4, AMONG, SHAPES)
    sums.add(message("a"))
    sums.add(message("b", residues={"shared": torch.tensor([1, 2]).short()}))
    assert sums.of() == ("a",)
    sums.add(message("b", residues={"examples": torch.tensor([1])}))
    assert sums.of() == ("a", "b")
    sums.add(message("c", residues={"shared": torch.tensor([1, 2]).short()}))
    assert sums.complete("shared")
    assert not sums.complete("examples")


class Silent:
    """An observer that is told how far it is."""

    def __init__(self) -> None:
        self.told = list[tuple[int, str, int, int]]()

    def progress(self, *told: Any) -> None:
        self.told.append(told)


def server_of(*more: str) -> MaskedServer:
    """One without clients, of a model with 3 shared values."""
    server: Any = object.__new__(MaskedServer)
    server.config = load_config(None, ["privacy.masked=true", "algorithm.name=by_use", *OFF, *more])
    server.layout = Layout(1, 2, {SHARED: 3})
    server.observer = Silent()
    return cast("MaskedServer", server)


@pytest.mark.parametrize("stage", ["train", "update"])
def test_bytes_of_all_messages_are_counted_those_that_were_refused_too(stage: Stage) -> None:
    server, sums, traffic = server_of(), Sums(4, AMONG, SHAPES), Traffic(statistics=100, updates=1000)
    told: list[Concealed | Failure] = [
        message("a"),
        Failure("b", "evaluate", "gone"),
        message("a"),
        message("c"),
    ]
    failures = server._take(sums, told, stage, "summing", traffic)
    assert [(one.client, one.stage, one.reason) for one in failures] == [
        ("b", stage, "gone"),
        ("a", stage, "examples: sent twice"),
    ]
    each = 8 + 2 * 2  # one int64, two int16
    assert traffic.up_by_client == {"a": 2 * each, "c": each}
    counted = (100 + 3 * each, 1000) if stage == "train" else (100, 1000 + 3 * each)
    assert (traffic.statistics, traffic.updates) == counted
    assert server.observer.told == [(4, "summing", n, 3) for n in (1, 2, 2, 3)]  # type: ignore[attr-defined] # a Log


def totals_of(**changes: Any) -> dict[str, torch.Tensor]:
    """Sums of the counts of three clients."""
    marked = torch.zeros(1, POWERS, dtype=torch.int32)
    marked[0, :5] = 1
    good = {EXAMPLES: torch.tensor([30 * UNIT]), HOLDERS: torch.tensor([[3, 0]]), MET: torch.tensor([[1, 3]])}
    return good | {f"{HEIGHTS}{SHARED}": marked} | changes


def test_totals_that_may_be_are_taken() -> None:
    assert server_of()._totals(4, AMONG, totals_of())[0].counts[f"{HEIGHTS}{SHARED}"].tolist() == [5]


def test_totals_of_scores_are_told_to_nobody() -> None:
    scored = HeldOut(3, 12, 8, 8, 12 * UNIT)
    totals, held_out = server_of()._totals(4, AMONG, totals_of(**{HELD_OUT: torch.tensor(scored)}))
    assert HELD_OUT not in totals.counts
    assert held_out == scored


@pytest.mark.parametrize(
    ("scored", "sound"),
    [
        (HeldOut(3, 12, 12, 12, int(12 * MOST_LOSS) * UNIT), True),
        (HeldOut(0, 0, 0, 0, 0), True),
        (HeldOut(4, 12, 0, 0, 0), False),  # more clients than were summed
        (HeldOut(3, 2, 0, 0, 0), False),  # a client that scored nothing
        (HeldOut(0, 2, 0, 0, 0), False),
        (HeldOut(-1, 2, 0, 0, 0), False),
        (HeldOut(3, 12, 13, 0, 0), False),
        (HeldOut(3, 12, 4, 5, 0), False),
        (HeldOut(3, 12, 4, -1, 0), False),
        (HeldOut(3, 12, 0, 0, -1), False),
        (HeldOut(3, 12, 0, 0, int(12 * MOST_LOSS) * UNIT + 1), False),
        (HeldOut(1, 2**62, 0, 0, 0), False),
    ],
)
def test_sums_of_scores_that_cannot_be_are_not_used(scored: HeldOut, sound: bool) -> None:
    assert (check_held_out(scored, 3) is None) == sound
    told = server_of()._held_out(scored, 3)
    assert ("impossible" in told.get("unscored", "")) != sound
    assert ("client_loss_mean_nats" in told) == (sound and scored.clients > 0)


@pytest.mark.parametrize(
    "changes",
    [
        {EXAMPLES: torch.tensor([0])},
        {EXAMPLES: torch.tensor([-1])},
        {HOLDERS: torch.tensor([[4, 0]])},
        {HOLDERS: torch.tensor([[3, -1]])},
        {MET: torch.tensor([[1, 4]])},
        {LOSS: torch.tensor([-1])},
        {f"{HEIGHTS}{SHARED}": torch.ones(1, POWERS, dtype=torch.int32)},
    ],
)
def test_totals_that_cannot_be_end_the_run(changes: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match=r"^round 4: the totals of 3 clients are impossible"):
        server_of()._totals(4, AMONG, totals_of(**changes))


def test_a_share_of_clipped_values_is_of_all_clients_values() -> None:
    totals, name = Totals(4, AMONG, {}), f"{CLIPPED}{SHARED}"
    clipped = server_of()._clipped
    assert clipped(totals, {name: torch.tensor([9])}) == 1.0
    assert clipped(totals, {name: torch.tensor([0])}) == 0.0
    for count in (-1, 10):
        with pytest.raises(UserError, match=r"^round 4: the sum of 3 updates is impossible"):
            clipped(totals, {name: torch.tensor([count])})


@pytest.mark.parametrize("more", ["privacy.masked_min_holders=4", "server.min_clients=4"])
def test_too_few_clients_end_the_run_with_the_reasons(more: str) -> None:
    server = server_of(more)
    server._enough(2, "abcd", [])
    with pytest.raises(UserError, match=r"^round 2: 3 clients can be summed, .* ask for 4 \(d: gone\)\. The last"):
        server._enough(2, "abc", [Failure("d", "train", "gone")])


def test_a_group_without_a_sum_stays() -> None:
    server: Any = server_of()
    server.heap = Heap(None)
    other = ParameterGroup("head")
    old = {SHARED: torch.tensor([1.0, 2.0, 3.0]), other: torch.tensor([7.0])}
    height = heights(torch.tensor([0.5]))
    one = encode(torch.tensor([0.5, 0.0, -0.5]), torch.ones(3), limits(height), seed=0)[0]
    totals = Totals(4, AMONG, {f"{HEIGHTS}{SHARED}": height})
    new = server._stepped(old, totals, {str(SHARED): one})
    torch.testing.assert_close(new[SHARED], torch.tensor([1.5, 2.0, 2.5]), rtol=0, atol=1e-4)
    assert new[other] is old[other]
    assert old[SHARED].tolist() == [1.0, 2.0, 3.0]
