"""No value that a client can send ends a round, and no plan goes through that would break the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fedalign.algorithms import ALGORITHMS
from fedalign.algorithms.fedavg import FedAvg
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.protocol import (
    SHARED,
    Accumulator,
    Algorithm,
    Ask,
    Broadcast,
    Failure,
    Moved,
    Packed,
    ParameterGroup,
    Plan,
    Reports,
    Request,
    State,
    Statistics,
    Update,
    Weights,
)
from fedalign.server.checkpoint import Checkpoints, ServerState
from fedalign.server.checks import WITHHELD
from fedalign.server.rounds import Server
from fedalign.testing import EVERYTHING, WIDTH, layout, reports

LAYOUT, CLIENTS, BAD = layout(1, 3), 4, "client-3"
WIDTHS = (f"statistics.centroid_width={WIDTH}", f"statistics.update_width={WIDTH}")
CHOSEN = {name: (f"algorithm.name={name}",) for name in sorted(ALGORITHMS)} | {
    "fedalign_moe, clients": ("algorithm.name=fedalign_moe", "algorithm.vocabulary=clients")
}
Spoil = Callable[[Statistics], Statistics]


def update_of(client: str) -> Weights:
    generator = torch.Generator().manual_seed(int(client.removeprefix("client-")))
    return {group: 0.01 * torch.randn(LAYOUT.sizes[group], generator=generator) for group in LAYOUT.groups}


UPDATES = {f"client-{number}": update_of(f"client-{number}") for number in range(CLIENTS)}
NORMS = {client: torch.stack([update[g].norm() for g in LAYOUT.groups]) for client, update in UPDATES.items()}


@dataclass
class InMemory:
    """Clients that say what `fedalign.testing` makes up, each with an update of that length; one may be spoilt."""

    honest: Sequence[Statistics]
    spoil: Spoil = lambda report: report

    def members(self) -> Sequence[str]:
        return list(UPDATES)

    def labels(self) -> tuple[int, ...]:
        return ()

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Statistics | Failure]:
        for report in self.honest:
            mine = replace(report, round=broadcast.round, norm_G=NORMS[report.client])
            yield self.spoil(mine) if report.client == BAD else mine

    def collect(self, requests: Sequence[Request], accumulator: Accumulator) -> list[Failure]:
        updates = [
            Update(request.client, request.round, {g: Packed(UPDATES[request.client][g]) for g in request.groups})
            for request in requests
        ]
        return [failure for update in updates if (failure := accumulator.add(update))]

    def evaluate(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Failure]:
        return iter(())

    def faults(self) -> list[Failure]:
        return []

    def moved(self, round: int) -> Moved:
        return Moved()


class Nobody:
    """Watches, and keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def mapped(self, state: ServerState) -> ServerState:
        return state


def said(asks: Set[Ask]) -> Sequence[Statistics]:
    """What they say: the last one alone holds the last expert."""
    return reports(CLIENTS, 1, 3, asks=asks, min_tokens=70).of


def serve(*overrides: str, algorithm: Algorithm | None = None, checkpoints: Checkpoints | None = None) -> Server:
    config = load_config(None, ["evaluation.clients=false", "training.learning_rate=1e-3", *WIDTHS, *overrides])
    honest = said(config.asks)
    made = algorithm or config.algorithm.build()
    nobody: Any = Nobody()
    return Server(InMemory(honest), made, LAYOUT, config, checkpoints or nobody, lambda number, weights: None, nobody)


def begin() -> ServerState:
    return ServerState(0, {group: torch.zeros(LAYOUT.sizes[group]) for group in LAYOUT.groups}, {}, ({"round": 0},))


def one_more(server: Server, state: ServerState, spoil: Spoil) -> ServerState:
    """A round with a spoilt client: the others went on, and the model is one."""
    federation: Any = server.federation
    federation.spoil = spoil
    after = server._round(state)
    assert after.round == state.round + 1
    assert all(bool(value.isfinite().all()) for value in after.weights.values())
    assert all(bool(value.isfinite().all()) for value in after.algorithm.values())
    assert set(UPDATES) - {BAD} <= set(after.history[-1]["clients"])
    assert {failure["client"] for failure in after.history[-1]["failures"]} <= {BAD}
    return after


# ------------------------------------------------------------------------------------------------------ bad reports

NUMBERS = ("examples", "tokens", "steps", "learning_rate", "loss", "round")
SAID = {"round": "of round", "frozen": "expert[9,9], which the model does not have"}  # else its name
TENSORS = [name for name, value in vars(said(EVERYTHING)[0]).items() if isinstance(value, Tensor)]
SIGNED = ("centroid_L_E_D", "update_L_E_S")
HUGE = {torch.float32: 3e38, torch.float16: 65504.0, torch.uint8: 255}
POSSIBLE_ZERO = set(TENSORS) - {"prob_L_E"}


def numbers(name: str) -> Iterator[tuple[Any, bool]]:
    """Values of a number, and whether they are impossible."""
    yield from ((value, True) for value in (-1, -1e-9, -(10**30), math.nan, math.inf, -math.inf, 10**30, 1e300))
    yield 0, name != "loss"
    if name in ("examples", "tokens", "steps"):
        yield 10**15, False
    if name in ("examples", "steps"):
        yield 1, False
    if name in ("loss", "learning_rate"):
        yield from ((1e15, name == "learning_rate"), (5e-324, name == "learning_rate"), (1e-14, name != "loss"))


def tensors(name: str, honest: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """A field's tensor with one entry and with all entries spoilt, and whether that is impossible."""
    least = torch.finfo(honest.dtype).smallest_normal if honest.is_floating_point() else 1
    yield honest.new_zeros((0,) * honest.ndim), name not in WITHHELD  # whoever does not consent sends none
    yield honest[..., :-1], True
    for value, impossible in [
        *(((math.nan, True), (math.inf, True), (-math.inf, True)) if honest.is_floating_point() else ()),
        *(((-0.5, name not in SIGNED),) if honest.is_floating_point() else ()),
        (HUGE[honest.dtype], honest.is_floating_point()),
        (0, name not in POSSIBLE_ZERO),
        (least, name == "prob_L_E"),
    ]:
        yield torch.full_like(honest, value), impossible
        one = honest.clone()
        one.view(-1)[-1] = value
        yield one, impossible


@pytest.mark.parametrize("chosen", CHOSEN)
def test_whatever_a_client_reports_the_others_go_on(chosen: str) -> None:
    server = serve(*CHOSEN[chosen])
    first = one_more(server, begin(), lambda report: report)  # so that there is a state
    assert first.history[-1]["failures"] == []
    honest = said(server.config.asks)[-1]
    cases: list[tuple[str, Any, bool]] = [(name, *case) for name in NUMBERS for case in numbers(name)]
    for name in TENSORS:
        given = NORMS[BAD] if name == "norm_G" else getattr(honest, name)
        if given.numel():
            cases += [(name, *case) for case in tensors(name, given)]
        else:  # nobody asked for it
            cases.append((name, getattr(said(EVERYTHING)[0], name), True))
    for value in (math.nan, math.inf, -math.inf, 1e300):
        cases.append(("metrics", {"train_seconds": value}, True))
    cases.append(("frozen", (ParameterGroup("expert", 9, 9),), True))
    cases.append(("frozen", tuple(group for group in LAYOUT.groups if group.kind == "expert"), False))
    for name, value, impossible in cases:
        after = one_more(server, first, lambda report, name=name, value=value: replace(report, **{name: value}))  # type: ignore[misc] # a lambda with defaults
        if impossible:
            (failure,) = after.history[-1]["failures"]
            assert (failure["client"], failure["stage"]) == (BAD, "train"), (name, value)
            assert SAID.get(name, name) in failure["reason"]
            assert BAD not in after.history[-1]["clients"]


SCORE: dict[str, dict[Any, bool]] = {  # values, and whether they are impossible
    "held_out": {-1: True, -(10**30): True, 10**30: True, 1: False, 10**15: False},
    "held_out_loss": {
        math.nan: True,
        math.inf: True,
        -math.inf: True,
        1e300: True,
        None: True,
        0.0: False,
        1e15: False,
    },
    "held_out_accuracy": {math.nan: True, -1e-9: True, 1.1: True, math.inf: True, None: False, 0.0: False, 1.0: False},
}


@pytest.mark.parametrize("name", SCORE)
def test_whatever_a_client_scores_the_others_go_on(name: str) -> None:
    state = replace(begin(), history=(), pending={"round": 0, "failures": []})
    server, score = serve(), {"held_out": 10, "held_out_loss": 1.0, "held_out_accuracy": 0.5}
    federation: Any = server.federation
    federation.honest = [replace(report, **score) for report in federation.honest]
    for value, impossible in SCORE[name].items():
        after = one_more(server, state, lambda report, value=value: replace(report, **{name: value}))  # type: ignore[misc] # a lambda with defaults
        start, line = after.history
        assert line["failures"] == []  # its training counts
        assert set(start["client_losses_nats"]) == set(UPDATES) - ({BAD} if impossible else set())
        told = [(failure["client"], failure["stage"]) for failure in start["failures"]]
        assert told == ([(BAD, "evaluate")] if impossible else [])
        assert math.isfinite(start["client_loss_mean_nats"])


def test_every_field_is_tried() -> None:
    tried = {*NUMBERS, *TENSORS, "metrics", "frozen", *SCORE}
    assert tried == set(vars(said(EVERYTHING)[0])) - {"client"}
    assert [bool(report.held_L_E[0, -1]) for report in said(EVERYTHING)] == [False, False, False, True]


# -------------------------------------------------------------------------------------------------------- bad plans


@dataclass(frozen=True)
class Planned(FedAvg):
    """A plan of somebody's making."""

    make: Callable[[Plan], Plan] = lambda plan: plan

    def plan(self, reports: Reports, state: State) -> Plan:
        return self.make(reports.plan())


def with_entry(table: Tensor, value: float) -> Tensor:
    changed = table.clone()
    changed[1, 2] = value
    return changed


TOKEN_C_M_V = torch.full((CLIENTS, *LAYOUT.token_cells), 1 / CLIENTS)
BAD_PLANS: dict[str, tuple[Callable[[Plan], Any], str]] = {
    "nan": (lambda p: replace(p, weight_C_G=with_entry(p.weight_C_G, math.nan)), "has weights [4, 9] that are not"),
    "infinite": (lambda p: replace(p, weight_C_G=with_entry(p.weight_C_G, math.inf)), "has weights [4, 9] that are"),
    "negative": (
        lambda p: replace(p, weight_C_G=torch.stack([-p.weight_C_G[0], *(p.weight_C_G[1:] + p.weight_C_G[0] * 2 / 3)])),
        "has weights that are negative, or sum",
    ),
    "half": (lambda p: replace(p, weight_C_G=p.weight_C_G / 2), "sum over clients to neither 0 nor 1"),
    "double": (lambda p: replace(p, weight_C_G=p.weight_C_G * 2), "sum over clients to neither 0 nor 1"),
    "one column": (lambda p: replace(p, weight_C_G=with_entry(p.weight_C_G, 0)), "sum over clients to neither 0 nor 1"),
    "groups": (lambda p: replace(p, weight_C_G=p.weight_C_G[:, :-1]), "has weights [4, 8] that are not finite, or"),
    "rows": (lambda p: replace(p, weight_C_G=p.weight_C_G[:-1]), "or not [4, 9]"),
    "transposed": (lambda p: replace(p, weight_C_G=p.weight_C_G.T), "has weights [9, 4]"),
    "fewer clients": (lambda p: replace(p, clients=p.clients[:-1]), "has clients ('client-0', 'client-1', 'client-2')"),
    "other clients": (lambda p: replace(p, clients=(*p.clients[:-1], "who")), "'who'), asked were ('client-0',"),
    "another order": (lambda p: replace(p, clients=p.clients[::-1]), "has clients ('client-3',"),
    "factor": (lambda p: replace(p, factor_C_G=p.weight_C_G / 0 * 0), "has factors [4, 9] that are not finite"),
    "factor shape": (lambda p: replace(p, factor_C_G=torch.ones(9)), "has factors [9] that are not finite, or not"),
    "stream": (lambda p: replace(p, streams={"a": p.weight_C_G * math.inf}), "has stream a [4, 9] that are not"),
    "stream shape": (lambda p: replace(p, streams={"a": p.weight_C_G[:1]}), "has stream a [1, 9]"),
    "tokens": (lambda p: replace(p, token_weight_C_M_V=TOKEN_C_M_V * 2), "has token weights that are negative, or sum"),
    "tokens nan": (lambda p: replace(p, token_weight_C_M_V=TOKEN_C_M_V * math.nan), "has token weights [4, 1, 50]"),
    "state": (lambda p: replace(p, state={"a": torch.full((2,), math.nan)}), "has a state that is not finite: a"),
    "then": (lambda p: replace(p, then=lambda *_: {"b": torch.tensor(math.inf)}), "has a state that is not finite: b"),
    "no tensor": (lambda p: replace(p, state=dict[str, Any](a=3)), "has a state: 'a', a int and no tensor"),
    "state of a list": (
        lambda p: replace(p, state=cast("Any", [1])),
        "has a state: a list, and no tensors by their names",
    ),
    "then nothing": (
        lambda p: replace(p, then=lambda *_: cast("Any", None)),
        "has a state: a NoneType, and no tensors",
    ),
    "list": (lambda p: replace(p, weight_C_G=cast("Any", p.weight_C_G.tolist())), "has weights that are [[0."),
    "no streams": (
        lambda p: replace(p, streams=cast("Any", None)),
        "has streams: a NoneType, and no tensors by their names",
    ),
    "metric": (lambda p: replace(p, metrics={"accuracy": 0.99}), "has a metric accuracy, which each round has of its"),
    "nothing": (lambda _: None, "is None, and no Plan"),
    "tokens shape": (lambda p: replace(p, token_weight_C_M_V=TOKEN_C_M_V[..., :-1]), "has token weights [4, 1, 49]"),
}


def test_a_plan_that_the_rule_cannot_sum_ends_the_run_in_one_line() -> None:
    streaming = Planned(lambda p: replace(p, streams={"a": p.weight_C_G}))
    exact = ("tuning.kind=lora", "tuning.average=exact", "server.robust=none")
    for settings, told in [(exact, "factors or freeze_a"), (("server.robust=median",), 'use "clip"')]:
        with pytest.raises(UserError, match=r"^round 1: the plan of by_use has streams a: ") as caught:
            serve("algorithm.name=by_use", "run.rounds=1", *settings, algorithm=streaming).run(begin())
        assert told in str(caught.value)


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_plan_that_cannot_be_used_ends_the_run_in_one_line(case: str, tmp_path: Path) -> None:
    make, told = BAD_PLANS[case]
    checkpoints = Checkpoints(tmp_path, {})
    settings = ("algorithm.name=by_use", "run.rounds=1")
    kept = serve(*settings, algorithm=Planned(), checkpoints=checkpoints).run(begin())
    with pytest.raises(UserError) as caught:
        serve(*settings, "run.rounds=2", algorithm=Planned(make), checkpoints=checkpoints).run(kept)
    message = str(caught.value)
    assert message.startswith("round 2: the plan of by_use ")
    assert told in message
    assert message.endswith(". The last complete round is kept.")
    assert "\n" not in message
    left = checkpoints.load()
    assert left is not None
    assert left.round == 1
    assert torch.equal(left.weights[SHARED], kept.weights[SHARED])


def test_rounding_is_no_mistake_of_a_plan() -> None:
    server = serve("algorithm.name=fedavg", algorithm=Planned(lambda p: replace(p, weight_C_G=p.weight_C_G * 1.0005)))
    assert server._round(begin()).round == 1
    nobody = serve("algorithm.name=fedavg", algorithm=Planned(lambda p: replace(p, weight_C_G=p.weight_C_G * 0)))
    assert all(not value.any() for value in nobody._round(begin()).weights.values())
