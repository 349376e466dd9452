"""The server's side of a masked round on residues by hand: what it adds, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.maths.fixed_point import MOST_CLIENTS
from fedalign.protocol import Concealed
from fedalign.server.masked import MaskedServer, Sums

AMONG = ("a", "b", "c")
OFF = ("server.max_norm_ratio=0", "evaluation.clients=false")
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
