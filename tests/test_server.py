from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedalign.algorithms.fedavg import FedAvg
from fedalign.checkpoint import Checkpoints, ServerState
from fedalign.config import Config, load_config
from fedalign.errors import UserError
from fedalign.protocol import (
    SHARED,
    Accumulator,
    Broadcast,
    Evaluation,
    Failure,
    Layout,
    Packed,
    ParameterGroup,
    Request,
    Statistics,
    Update,
    Weights,
)
from fedalign.server import Server, describe_scores, merit, routing_divergence, select

CELLS = [ParameterGroup(kind, 0, e) for kind in ("gate", "expert") for e in range(2)]
LAYOUT = Layout(1, 2, {SHARED: 2, **dict.fromkeys(CELLS, 1)})


def report(client: str, round: int, examples: int, update: Weights) -> Statistics:
    return Statistics(
        client=client,
        round=round,
        examples=examples,
        tokens=100,
        loss=1.0,
        prob_L_E=torch.tensor([[0.5, 0.5]]),
        load_L_E=torch.tensor([[50.0, 50.0]]),
        margin_L_E=torch.tensor([[0.1, 0.1]]),
        centroid_L_E_D=torch.ones(1, 2, 4, dtype=torch.float16),
        centroid_scale_L=torch.ones(1),
        update_L_E_S=torch.ones(1, 2, 4, dtype=torch.float16),
        norm_G=torch.stack([update[group].norm() for group in LAYOUT.groups]),
    )


@dataclass
class Scripted:
    """A federation whose clients move every value by a fixed amount; `spoil` and `lose` script the accidents."""

    moves: dict[str, tuple[int, float]]  # client -> examples, move
    order: Callable[[Sequence[str]], Sequence[str]] = list
    spoil: Callable[[Statistics], Statistics | Failure] = lambda statistics: statistics
    corrupt: Callable[[Update], Update] = lambda update: update
    lost: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    noticed: list[Failure] = field(default_factory=list)

    def members(self) -> Sequence[str]:
        return list(self.moves)

    def _update(self, client: str) -> Weights:
        return {group: torch.full((LAYOUT.sizes[group],), self.moves[client][1]) for group in LAYOUT.groups}

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Statistics | Failure]:
        for client in self.order(clients):
            self.asked.append(client)
            yield self.spoil(report(client, broadcast.round, self.moves[client][0], self._update(client)))

    def collect(self, requests: Sequence[Request], accumulator: Accumulator) -> list[Failure]:
        failures = []
        for request in requests:
            if request.client in self.lost:
                failures.append(Failure(request.client, "update", "gone"))
                continue
            groups = {group: Packed(self._update(request.client)[group]) for group in request.groups}
            problem = accumulator.add(self.corrupt(Update(request.client, request.round, groups)))
            failures += [problem] if problem else []
        return failures

    def evaluate(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Evaluation | Failure]:
        for client in clients:
            yield Evaluation(client, 10, 0.5, min(1.0, float(broadcast.weights[SHARED].values[0]) / 10))

    def faults(self) -> list[Failure]:
        return self.noticed


class Log:
    def __init__(self) -> None:
        self.improved: list[bool] = []

    def progress(self, round: int, stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total

    def planned(self, round: int, reports: object, plan: object, layout: object) -> None:
        pass

    def completed(self, state: ServerState, improved: bool) -> None:
        self.improved.append(improved)


def run(
    tmp_path: Path, federation: Scripted, *overrides: str, state: ServerState | None = None
) -> tuple[ServerState, Log]:
    config: Config = load_config(
        None, ["run.rounds=1", "statistics.centroid_width=4", "statistics.update_width=4", *overrides]
    )
    log = Log()
    server = Server(
        federation, FedAvg(), LAYOUT, config, Checkpoints(tmp_path, {}), lambda w: Evaluation(None, 5, 1.0, 0.5), log
    )
    zeros = {group: torch.zeros(LAYOUT.sizes[group]) for group in LAYOUT.groups}
    return server.run(state or ServerState(0, zeros, {}, ())), log


def shared(state: ServerState) -> Tensor:
    return state.weights[SHARED]


def test_a_round_of_fedavg_by_hand(tmp_path: Path) -> None:
    state, _ = run(tmp_path, Scripted({"a": (30, 1.0), "b": (10, 3.0)}))
    assert shared(state).tolist() == [1.5, 1.5]  # 3/4 * 1 + 1/4 * 3
    assert all(state.weights[cell].tolist() == [1.5] for cell in CELLS)
    line = state.history[-1]
    assert line["clients"] == ["a", "b"]
    assert line["failures"] == []
    assert line["uploaded_share"] == 1.0
    updates = 2 * 6 * 4  # clients, values, bytes
    assert line["bytes_up"] == line["bytes_up_statistics"] + updates
    assert sum(line["bytes_up_by_client"].values()) == line["bytes_up"]
    assert line["bytes_down"] == 2 * 2 * 6 * 4  # to train and to evaluate
    assert line["client_accuracies"] == {"a": 0.15, "b": 0.15}


def test_arrival_order_does_not_matter(tmp_path: Path) -> None:
    moves = {"a": (30, 0.1), "b": (10, 0.7), "c": (7, -0.3)}
    forward, _ = run(tmp_path / "1", Scripted(moves))
    backward, _ = run(tmp_path / "2", Scripted(moves, order=lambda clients: clients[::-1]))
    assert torch.equal(shared(forward), shared(backward))
    assert forward.history[-1]["clients"] == backward.history[-1]["clients"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"loss": float("nan")}, "loss is nan"),
        ({"loss": float("inf")}, "loss is inf"),
        ({"examples": 0}, "0 examples"),
        ({"round": 7}, "of round 7, not 1"),
        ({"prob_L_E": torch.tensor([[float("nan"), 1.0]])}, "prob_L_E is not finite"),
        ({"norm_G": torch.full((5,), torch.inf)}, "norm_G is not finite"),
        ({"norm_G": torch.ones(3)}, "norm_G is torch.float32"),
        ({"load_L_E": torch.ones(2, 2)}, "load_L_E is torch.float32"),
    ],
)
def test_unusable_statistics_leave_the_client_out_and_name_it(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    federation = Scripted(
        {"a": (30, 1.0), "bad": (10, 3.0)},
        spoil=lambda s: replace(s, **change) if s.client == "bad" else s,  # type: ignore[arg-type]
    )
    state, _ = run(tmp_path, federation)
    assert shared(state).tolist() == [1.0, 1.0]
    (failure,) = state.history[-1]["failures"]
    assert failure["client"] == "bad"
    assert reason in failure["reason"]


def test_a_nan_update_leaves_the_client_out(tmp_path: Path) -> None:
    def poison(update: Update) -> Update:
        if update.client == "bad":
            return replace(update, groups=dict.fromkeys(update.groups, Packed(torch.full((2,), torch.nan))))
        return update

    state, _ = run(tmp_path, Scripted({"a": (30, 1.0), "bad": (10, 3.0)}, corrupt=poison))
    assert shared(state).tolist() == [1.0, 1.0]
    assert [failure["client"] for failure in state.history[-1]["failures"]] == ["bad"]


def test_an_update_of_another_round_is_refused(tmp_path: Path) -> None:
    late = Scripted(
        {"a": (30, 1.0), "late": (10, 3.0)}, corrupt=lambda u: replace(u, round=9 if u.client == "late" else 1)
    )
    state, _ = run(tmp_path, late)
    assert shared(state).tolist() == [1.0, 1.0]
    assert state.history[-1]["failures"][0]["reason"] == "its update is of round 9, not 1"


def test_a_client_lost_after_its_statistics_costs_accuracy_not_the_round(tmp_path: Path) -> None:
    state, _ = run(tmp_path, Scripted({"a": (30, 1.0), "b": (10, 3.0)}, lost={"b"}))
    assert shared(state).tolist() == [1.0, 1.0]
    state, _ = run(tmp_path / "most", Scripted({"a": (30, 1.0), "b": (10, 3.0)}, lost={"a"}))
    assert shared(state).tolist() == [0.0, 0.0]  # a quarter of the planned weight arrived: unchanged
    assert state.history[-1]["groups_unchanged"] == len(LAYOUT.groups)


def test_nobody_left_stops_clearly_and_keeps_the_last_round(tmp_path: Path) -> None:
    moves = {"a": (30, 1.0), "b": (10, 3.0)}
    first, _ = run(tmp_path, Scripted(moves))
    broken = Scripted(moves, spoil=lambda s: Failure(s.client, "train", "its loss is nan at step 3"))
    with pytest.raises(UserError, match=r"round 2: 0 of 2 clients.*a: its loss is nan at step 3; b: "):
        run(tmp_path, broken, "run.rounds=2", state=first)
    kept = Checkpoints(tmp_path, {}).load()
    assert kept is not None
    assert kept.round == 1


def test_sampling_asks_a_share_and_is_repeatable(tmp_path: Path) -> None:
    members = [f"c{i}" for i in range(10)]
    chosen = [select(members, 0.3, seed=1, round=r) for r in range(20)]
    assert all(len(c) == 3 and c == sorted(c) for c in chosen)
    assert chosen == [select(members, 0.3, seed=1, round=r) for r in range(20)]
    assert len({tuple(c) for c in chosen}) > 5
    assert select(members, 0.01, seed=1, round=1)
    federation = Scripted(dict.fromkeys(members, (10, 1.0)))
    run(tmp_path, federation, "clients.sample=0.3")
    assert federation.asked == select(members, 0.3, seed=0, round=1)


def test_wire_precision_rounds_what_is_broadcast(tmp_path: Path) -> None:
    exact, _ = run(tmp_path / "1", Scripted({"a": (1, 1.0)}))
    short, _ = run(tmp_path / "2", Scripted({"a": (1, 1.0)}), "wire.dtype=bfloat16")
    assert short.history[-1]["bytes_down"] * 2 == exact.history[-1]["bytes_down"]


def test_best_is_announced_once(tmp_path: Path) -> None:
    _, log = run(tmp_path, Scripted({"a": (1, 1.0)}), "run.rounds=3")
    assert log.improved == [True, False, False, False]  # the global score never changes


def test_evaluation_can_be_rare_but_never_misses_the_end(tmp_path: Path) -> None:
    state, _ = run(tmp_path, Scripted({"a": (1, 1.0)}), "run.rounds=3", "evaluation.every=2")
    assert ["accuracy" in line for line in state.history] == [True, False, True, True]


def test_routing_divergence_by_hand() -> None:
    same = torch.tensor([[[0.3, 0.7]], [[0.3, 0.7]]])
    assert routing_divergence(same) == pytest.approx(0.0, abs=1e-7)
    apart = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert routing_divergence(apart) == pytest.approx(0.6931472)
    unused = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])  # an expert that nobody's router likes
    assert routing_divergence(unused) == 0.0


def test_scores_are_described_by_name() -> None:
    clients = [Evaluation("a", 30, 1.0, 0.9), Evaluation("b", 10, 2.0, 0.5)]
    line = describe_scores(Evaluation(None, 100, 0.5, 0.8), clients)
    assert line["accuracy"] == 0.8
    assert line["perplexity"] == pytest.approx(1.6487, abs=1e-4)
    assert line["client_accuracy_mean"] == pytest.approx(0.7)
    assert line["client_accuracy_worst"] == 0.5
    assert line["client_accuracy_spread"] == pytest.approx(0.2)
    assert line["client_loss_mean_nats"] == pytest.approx(1.25)
    assert merit(line) == 0.8
    assert merit(describe_scores(None, [Evaluation("a", 1, 2.0, None)])) == -2.0
    assert merit({"round": 1}) is None
