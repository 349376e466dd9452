"""What a report cannot truly say is refused, by name, and what it can truly say is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedalign import testing
from fedalign.algorithms.fedavg import FedAvg
from fedalign.config.run import TrainingConfig
from fedalign.errors import UserError
from fedalign.protocol import SHARED, Plan, Reports, State, Statistics, asked_shapes
from fedalign.server.checkpoint import Checkpoints
from fedalign.server.checks import check_statistics
from tests.server.test_checks import BAD, begin, one_more, serve

SEEN = testing.reports(clients=1, min_tokens=1)
(USUAL,) = SEEN.of  # 128 tokens, each to 2 of 4 experts; 20 examples, 10 steps
SHAPES = asked_shapes(SEEN.layout, testing.EVERYTHING, testing.WIDTH, testing.WIDTH)
TRAINING = TrainingConfig(learning_rate=1e-3)


def flaw(layout: Any = SEEN.layout, training: TrainingConfig = TRAINING, chats: bool = False, **changes: Any) -> Any:
    return check_statistics(replace(USUAL, **changes), layout, SHAPES, 1, training, chats)


def cell(name: str, value: float) -> Tensor:
    table: Tensor = getattr(USUAL, name).clone()
    table.view(-1)[-1] = value
    return table


def test_a_token_goes_to_so_many_experts_and_no_more() -> None:
    assert SEEN.layout.top_k_L == (2, 2)
    full_L_E = torch.tensor([[128.0, 128, 0, 0], [64, 64, 64, 64]])
    assert flaw(load_L_E=full_L_E) is None
    assert flaw(load_L_E=full_L_E * 0.2) is None  # withheld, dropped, or fewer experts a token
    assert flaw(load_L_E=full_L_E * 0) is None
    over_L_E = torch.tensor([[64.0, 64, 64, 64], [128, 128, 1, 0]])
    assert flaw(load_L_E=over_L_E) == "load_L_E of layer 1 sums to 257: 128 tokens go to 2 experts each"
    assert flaw(replace(SEEN.layout, top_k_L=()), load_L_E=over_L_E) is None  # nobody knows


@pytest.mark.parametrize("value", [3e38, 1e15, 129.0])
def test_a_token_is_met_no_more_often_than_there_are_tokens(value: float) -> None:
    reason = "token_count_M_V is negative or impossibly large: must lie between 0 and 128"
    assert flaw(token_count_M_V=cell("token_count_M_V", value)) == reason


def test_tokens_are_met_as_often_as_there_are_tokens() -> None:
    assert float(USUAL.token_count_M_V.sum()) == 128
    assert flaw(token_count_M_V=USUAL.token_count_M_V * 0.5) is None
    twice_M_V = USUAL.token_count_M_V + USUAL.token_count_M_V
    assert flaw(token_count_M_V=twice_M_V) == "token_count_M_V sums to 256, of 128 tokens"
    assert flaw(replace(SEEN.layout, two_sided=True), token_count_M_V=twice_M_V) is None  # no router need see them


def test_no_token_lies_beyond_the_vocabulary() -> None:
    for bit in range(8):
        met_M_B = USUAL.token_met_M_B.clone()
        met_M_B[0, -1] |= 1 << bit  # bits 0 and 1 are tokens 48 and 49
        reason = flaw(token_met_M_B=met_M_B)
        assert reason == (None if bit < 2 else "token_met_M_B has tokens beyond the last, 49")


def test_a_step_takes_an_example() -> None:
    assert flaw(steps=20) is None
    assert flaw(steps=21) == "steps = 21: with 20 examples and 1 epochs at most 20"
    assert flaw(training=TrainingConfig(learning_rate=1e-3, epochs=2), steps=40) is None
    assert flaw(chats=True, steps=128) is None  # a conversation may be several sequences
    assert flaw(chats=True, steps=129) is not None


@pytest.mark.parametrize("rate", [1e-15, 0.9e-3, 1.0])
def test_the_learning_rate_is_the_coordinators(rate: float) -> None:
    assert flaw(learning_rate=rate) == f"learning_rate = {rate}: training.learning_rate = 0.001 was asked for"


IMPOSSIBLE: dict[str, Callable[[Statistics], Statistics]] = {
    "load_L_E": lambda r: replace(r, load_L_E=torch.full_like(r.load_L_E, r.tokens)),
    "token_count_M_V": lambda r: replace(r, token_count_M_V=torch.full_like(r.token_count_M_V, 1e15)),
    "steps": lambda r: replace(r, steps=10**15),
    "learning_rate": lambda r: replace(r, learning_rate=1e-14),
}


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [*(("fedalign_moe", name) for name in IMPOSSIBLE), ("scaffold", "steps"), ("scaffold", "learning_rate")],
)
def test_a_report_that_passed_before_leaves_its_site_out_and_the_round_goes_on(name: str, algorithm: str) -> None:
    server = serve(f"algorithm.name={algorithm}")
    after = one_more(server, begin(), IMPOSSIBLE[name])
    (failure,) = after.history[-1]["failures"]
    assert (failure["client"], failure["stage"]) == (BAD, "train")
    assert name in failure["reason"]
    assert BAD not in after.history[-1]["clients"]


# -------------------------------------------------------------------------------------------- what a lie may not break


@dataclass(frozen=True)
class Trusting(FedAvg):
    """An algorithm that multiplies updates by what clients say."""

    def plan(self, reports: Reports, state: State) -> Plan:
        plan = reports.plan()
        factor_C = torch.tensor([report.loss for report in reports.of]) ** 2.5
        return replace(plan, factor_C_G=factor_C.unsqueeze(1).expand_as(plan.weight_C_G))


def test_an_update_that_would_break_the_weights_is_left_out_and_the_round_goes_on() -> None:
    server = serve("algorithm.name=fedavg", algorithm=Trusting())
    after = one_more(server, begin(), lambda report: replace(report, loss=1e15))
    (failure,) = after.history[-1]["failures"]
    assert (failure["client"], failure["stage"]) == (BAD, "update")
    assert "shared: the plan would make its update" in failure["reason"]
    assert all(float(value.abs().max()) < 1 for value in after.weights.values() if len(value))
    assert bool(after.weights[SHARED].any())


def test_weights_that_are_not_finite_are_never_checkpointed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {})
    settings = ("algorithm.name=fedavg", "server.optimizer=sgd", "server.momentum=0.0")
    server = serve(*settings, "run.rounds=1", checkpoints=checkpoints)
    kept = server.run(begin())
    broken = serve(*settings, "run.rounds=2", "server.learning_rate=1e300", checkpoints=checkpoints)
    with pytest.raises(UserError, match="round 2: the plan of fedavg leads to weights that are not finite: shared"):
        broken.run(kept)
    left = checkpoints.load()
    assert left is not None
    assert left.round == 1
    assert math.isfinite(float(left.weights[SHARED].sum()))
