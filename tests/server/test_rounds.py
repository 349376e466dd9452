import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedalign import testing
from fedalign.algorithms.fedavg import FedAvg
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.protocol import (
    SHARED,
    WHOLE,
    Accumulator,
    Broadcast,
    Evaluation,
    Failure,
    Layout,
    Moved,
    Packed,
    ParameterGroup,
    Plan,
    Reports,
    Request,
    Shape,
    State,
    Statistics,
    Update,
    Weights,
    asked_shapes,
)
from fedalign.server.checkpoint import Checkpoints, ServerState
from fedalign.server.checks import check_evaluation, check_statistics, find_outliers
from fedalign.server.results import summarise
from fedalign.server.rounds import Server, select
from fedalign.server.scores import (
    Scores,
    Traffic,
    best_of,
    describe_clients,
    describe_test,
    is_scored,
    merit,
    routing_divergence,
)

CELLS = [ParameterGroup(kind, 0, e) for kind in ("gate", "expert") for e in range(2)]
LAYOUT = Layout(1, 2, {**dict.fromkeys(WHOLE, 1), SHARED: 2, **dict.fromkeys(CELLS, 1)})


def report(client: str, round: int, examples: int, update: Weights) -> Statistics:
    return Statistics(
        client=client,
        round=round,
        examples=examples,
        tokens=100,
        steps=1,
        learning_rate=0.1,
        loss=1.0,
        prob_L_E=torch.tensor([[0.5, 0.5]]),
        load_L_E=torch.tensor([[50.0, 50.0]]),
        margin_L_E=torch.zeros(0, 0),
        centroid_L_E_D=torch.zeros(0, 0, 0, dtype=torch.float16),
        centroid_scale_L=torch.zeros(0),
        update_L_E_S=torch.zeros(0, 0, 0, dtype=torch.float16),
        norm_G=torch.stack([update[group].norm() for group in LAYOUT.groups]),
        token_count_M_V=torch.zeros(0, 0),
        token_met_M_B=torch.zeros(0, 0, dtype=torch.uint8),
    )


@dataclass
class Scripted:
    """A federation whose clients move every value by a fixed amount; `spoil` and `lose` script the accidents."""

    moves: dict[str, tuple[int, float]]  # client -> examples, move
    order: Callable[[Sequence[str]], Sequence[str]] = list
    spoil: Callable[[Statistics], Statistics | Failure] = lambda statistics: statistics
    corrupt: Callable[[Update], Update] = lambda update: update
    grade: Callable[[Evaluation], Evaluation | Failure] = lambda evaluation: evaluation
    lost: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    scored: list[tuple[int, str, bool]] = field(default_factory=list)  # after which round, who, and whether by itself
    noticed: list[Failure] = field(default_factory=list)
    sent: dict[int, Moved] = field(default_factory=lambda: defaultdict(Moved))

    def _count(self, round: int, way: str, client: str, nbytes: int) -> None:
        by_client = getattr(self.sent[round], way)
        by_client[client] = by_client.get(client, 0) + nbytes

    def moved(self, round: int) -> Moved:
        return self.sent[round]

    def members(self) -> Sequence[str]:
        return list(self.moves)

    def _update(self, client: str) -> Weights:
        return {group: torch.full((LAYOUT.sizes[group],), self.moves[client][1]) for group in LAYOUT.groups}

    def labels(self) -> tuple[int, ...]:
        return ()

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Statistics | Failure]:
        for client in self.order(clients):
            self.asked.append(client)
            self._count(broadcast.round, "down", client, broadcast.nbytes)
            score = self._score(client, broadcast, broadcast.round - 1, alone=False) if broadcast.score else None
            if isinstance(score, Failure):
                yield score
            made = report(client, broadcast.round, self.moves[client][0], self._update(client))
            if isinstance(score, Evaluation):
                graded = {"held_out": score.examples, "held_out_loss": score.loss, "held_out_accuracy": score.accuracy}
                made = replace(made, **graded)  # type: ignore[arg-type] # each is of its field's type
            yield self.spoil(made)

    def collect(self, requests: Sequence[Request], accumulator: Accumulator) -> list[Failure]:
        failures = []
        for request in requests:
            if request.client in self.lost:
                failures.append(Failure(request.client, "update", "gone"))
                continue
            groups = {group: Packed(self._update(request.client)[group]) for group in request.groups}
            self._count(request.round, "up", request.client, sum(packed.nbytes for packed in groups.values()))
            problem = accumulator.add(self.corrupt(Update(request.client, request.round, groups)))
            failures += [problem] if problem else []
        return failures

    def evaluate(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Evaluation | Failure]:
        for client in clients:
            self._count(broadcast.round, "down", client, broadcast.nbytes)
            yield self._score(client, broadcast, broadcast.round, alone=True)

    def _score(self, client: str, broadcast: Broadcast, round: int, *, alone: bool) -> Evaluation | Failure:
        self.scored.append((round, client, alone))
        accuracy = min(1.0, float(broadcast.weights[SHARED].values[0]) / 10)
        return self.grade(Evaluation(client, 10, 0.5, accuracy))

    def faults(self) -> list[Failure]:
        noticed, self.noticed = self.noticed, []
        return noticed


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
    tmp_path: Path,
    federation: Scripted,
    *overrides: str,
    state: ServerState | None = None,
    scores: Callable[[int, Weights], Evaluation | None] = lambda n, w: Evaluation(None, 5, 1.0, 0.5),
    algorithm: FedAvg | None = None,
) -> tuple[ServerState, Log]:
    widths = ("statistics.centroid_width=4", "statistics.update_width=4")
    config: Config = load_config(
        None, ["algorithm.name=fedavg", "run.rounds=1", "training.learning_rate=0.1", *widths, *overrides]
    )
    log = Log()
    server = Server(federation, algorithm or FedAvg(), LAYOUT, config, Checkpoints(tmp_path, {}), scores, log)
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
    updates = 2 * 8 * 4  # clients, values, bytes
    assert line["bytes_up"] == line["bytes_up_statistics"] + updates
    assert sum(line["bytes_up_by_client"].values()) == line["bytes_up"]
    assert line["bytes_down"] == 2 * 2 * 8 * 4  # to train and to evaluate
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
        ({"examples": 0}, "examples = 0: must be above 0"),
        ({"examples": -5}, "examples = -5: must be above 0"),
        ({"tokens": -1}, "tokens = -1: must be above 0"),
        ({"steps": 0}, "steps = 0: must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan: must be above 0"),
        ({"metrics": {"train_seconds": float("nan")}}, "its metrics {'train_seconds': nan}: must be possible numbers"),
        ({"round": 7}, "of round 7, not 1"),
        ({"prob_L_E": torch.tensor([[float("nan"), 1.0]])}, "prob_L_E is not finite"),
        ({"norm_G": torch.full((7,), torch.inf)}, "norm_G is not finite"),
        ({"norm_G": torch.ones(3)}, "norm_G is torch.float32"),
        ({"load_L_E": torch.ones(2, 2)}, "load_L_E is torch.float32"),
    ],
)
def test_unusable_statistics_leave_the_client_out_and_name_it(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    federation = Scripted(
        {"a": (30, 1.0), "bad": (10, 3.0)},
        spoil=lambda s: replace(s, **change) if s.client == "bad" else s,
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


def test_an_algorithm_fills_in_no_number_that_a_round_has_of_its_own(tmp_path: Path) -> None:
    def said(metrics: dict[str, float]) -> str:
        class Boasting(FedAvg):
            def plan(self, reports: Reports, state: State) -> Plan:
                return replace(super().plan(reports, state), metrics=metrics)

        with pytest.raises(UserError) as error:
            run(tmp_path / "-".join(metrics), Scripted({"a": (30, 1.0)}), algorithm=Boasting())
        return str(error.value)

    state, _ = run(tmp_path, Scripted({"a": (30, 1.0)}), "server.robust=clip")
    for name in state.history[-1]:
        assert f"has a metric {name}, which each round has of its own" in said({name: 0.99})
    assert "has a metric mine = nan, which is no finite number" in said({"mine": math.nan})


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
    with pytest.raises(UserError, match=r"round 2: 0 of 2 clients.*\(a, b: its loss is nan at step 3\)"):
        run(tmp_path, broken, "run.rounds=2", state=first)
    kept = Checkpoints(tmp_path, {}).load()
    assert kept is not None
    assert kept.round == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_model_whose_answers_are_no_numbers_ends_the_run_and_is_not_kept(tmp_path: Path, loss: float) -> None:
    def broken(at: int) -> Callable[[int, Weights], Evaluation]:
        return lambda number, _: Evaluation(None, 5, loss if number == at else 1.0, 0.5)

    said = rf"round 2: the model cannot be scored on data.test: its loss is {loss} on 5 examples\. Try a lower training"
    with pytest.raises(UserError, match=said):
        run(tmp_path, Scripted({"a": (30, 1.0)}), "run.rounds=3", scores=broken(2))
    kept = Checkpoints(tmp_path, {}).load()
    assert kept is not None
    assert kept.round == 1
    with pytest.raises(UserError, match=rf"round 0: .* {loss} on 5 examples\. Nothing is trained yet: .* 'float32'\.$"):
        run(tmp_path / "start", Scripted({"a": (30, 1.0)}), scores=broken(0))


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
    line = describe_test(Evaluation(None, 100, 0.5, 0.8)) | describe_clients(clients, all_asked=True)
    assert line["accuracy"] == 0.8
    assert line["perplexity"] == pytest.approx(1.6487, abs=1e-4)
    assert line["client_accuracy_mean"] == pytest.approx(0.7)
    assert line["client_accuracy_worst"] == 0.5
    assert line["client_accuracy_spread"] == pytest.approx(0.2)
    assert line["client_loss_mean_nats"] == pytest.approx(1.25)
    assert (merit(line, "accuracy"), merit(line, "loss")) == (0.8, -0.5)
    alone = [Evaluation("a", 1, 2.0, None)]
    assert merit(describe_test(None) | describe_clients(alone, all_asked=True), "accuracy") == -2.0
    assert merit({"round": 1}, "accuracy") is merit({"round": 1}, "loss") is None


# ------------------------------------------------------------------------------------- what a client may not send

SEEN = testing.reports(clients=1, min_tokens=1)
(USUAL,) = SEEN.of
SHAPES = asked_shapes(SEEN.layout, testing.EVERYTHING, testing.WIDTH, testing.WIDTH)
TENSORS = [name for name, value in vars(USUAL).items() if isinstance(value, Tensor)]
SIGNED = ("centroid_L_E_D", "update_L_E_S")


def flaw(shapes: dict[str, Shape] = SHAPES, **changes: Any) -> str | None:
    return check_statistics(replace(USUAL, **changes), SEEN.layout, shapes, 1)


def test_usual_statistics_pass() -> None:
    assert flaw() is None
    assert set(TENSORS) == set(SHAPES)
    assert len(TENSORS) == 9


@pytest.mark.parametrize("name", TENSORS)
def test_each_tensor_must_have_its_shape_and_precision_and_be_finite(name: str) -> None:
    value = getattr(USUAL, name)
    other = torch.float32 if value.dtype == torch.float16 else torch.float64
    wrong = [
        (value[..., :-1], f"{name} is torch."),
        (value.unsqueeze(0), f"{name} is torch."),
        (torch.cat([value, value]), f"{name} is torch."),
        (value.flatten()[0], f"{name} is torch."),
        (value.to(other), f"{name} is {other}"),
        (value.to(torch.int64), f"{name} is torch.int64"),
    ]
    if value.is_floating_point():
        for bad in (math.nan, -math.inf, math.inf):
            spoilt = value.clone()
            spoilt.view(-1)[-1] = bad
            wrong.append((spoilt, f"{name} is not finite"))
    for tensor, reason in wrong:
        assert str(flaw(**{name: tensor})).startswith(reason)


@pytest.mark.parametrize("name", TENSORS)
def test_what_nobody_asks_for_is_empty_or_refused(name: str) -> None:
    shapes = asked_shapes(SEEN.layout, frozenset(), testing.WIDTH, testing.WIDTH)
    nothing = {key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in shapes.items()}
    given: dict[str, Any] = {
        key: getattr(USUAL, key) if 0 not in shape else nothing[key] for key, (shape, _) in shapes.items()
    }
    assert flaw(shapes, **given) is None
    if 0 in shapes[name][0]:
        value = getattr(USUAL, name)
        reason = f"{name} is {value.dtype} {list(value.shape)}, expected {value.dtype} {[0] * value.ndim}"
        assert flaw(shapes, **(given | {name: value})) == reason


@pytest.mark.parametrize("name", TENSORS)
def test_what_counts_or_measures_is_not_negative(name: str) -> None:
    value = getattr(USUAL, name)
    problem = flaw(**{name: -value})  # bytes have no sign: other bits
    if name == "token_met_M_B":
        assert problem == "token_met_M_B has tokens beyond the last, 49"
    elif name in SIGNED or not value.is_floating_point():
        assert problem is None
    else:
        assert str(problem).startswith(f"{name} is negative or impossibly large: must lie between 0 and ")


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("prob_L_E", "1.001"),
        ("load_L_E", "128"),
        ("norm_G", "1e+15"),
        ("margin_L_E", "1.001"),
        ("centroid_L_E_D", "1.001"),
        ("centroid_scale_L", "1e+15"),
        ("update_L_E_S", "1.001"),
        ("token_count_M_V", "128"),
    ],
)
def test_nothing_is_larger_than_it_can_be(name: str, most: str) -> None:
    value = getattr(USUAL, name)
    above: Any = torch.full_like(value, float(most) * 1.01)
    assert str(flaw(**{name: above})).endswith(f"and {most}")


def test_probabilities_sum_to_one() -> None:
    assert flaw(prob_L_E=USUAL.prob_L_E * 1.0005) is None  # rounding
    reason = "prob_L_E does not sum to one over the experts of each layer"
    assert flaw(prob_L_E=USUAL.prob_L_E * 0.9) == reason
    assert flaw(prob_L_E=torch.zeros_like(USUAL.prob_L_E)) == reason


def test_sketches_of_another_width_leave_the_client_out_and_the_round_goes_on(tmp_path: Path) -> None:
    sketches = {"centroid_L_E_D": (1, 2, 4), "centroid_scale_L": (1,), "update_L_E_S": (1, 2, 4)}
    usual = {
        name: torch.ones(shape) if name == "centroid_scale_L" else torch.ones(shape).half()
        for name, shape in sketches.items()
    }
    for field_name, width in (("update_L_E_S", 8), ("centroid_L_E_D", 2), ("update_L_E_S", 0)):
        wide = usual | {field_name: torch.ones(1, 2, width).half()}
        federation = Scripted(
            {"a": (30, 1.0), "wide": (10, 3.0)},
            spoil=lambda s, wide=wide: replace(s, **(wide if s.client == "wide" else usual)),  # type: ignore[misc] # mypy infers no lambda with defaults
        )
        state, _ = run(tmp_path / f"{field_name}{width}", federation, "tracking.health=full")
        (failure,) = state.history[-1]["failures"]
        assert failure["client"] == "wide"
        assert failure["reason"].endswith("expected torch.float16 [1, 2, 4]")
        assert state.history[-1]["clients"] == ["a"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"accuracy": None}, None),
        ({"accuracy": 0.0}, None),
        ({"accuracy": 1.0}, None),
        ({"examples": 0}, "its loss is 0.5 on 0 examples"),
        ({"examples": -1}, "its loss is 0.5 on -1 examples"),
        ({"loss": float("nan")}, "its loss is nan on 10 examples"),
        ({"loss": -1e-5}, None),
        ({"loss": -1e15}, "its loss is -1000000000000000.0 on 10 examples"),
        ({"loss": float("inf")}, "its loss is inf on 10 examples"),
        ({"accuracy": 1.1}, "its accuracy is 1.1"),
        ({"accuracy": -0.1}, "its accuracy is -0.1"),
        ({"accuracy": float("nan")}, "its accuracy is nan"),
    ],
)
def test_scores_are_checked(change: dict[str, Any], reason: str | None) -> None:
    score = replace(Evaluation("a", 10, 0.5, 0.5), **change)
    assert check_evaluation(score) == reason


def test_no_site_says_alone_which_round_is_the_best() -> None:
    """How many it holds out is its own word, and its loss what it tells."""
    scores = Scores()
    for name, examples, loss, accuracy in (("a", 10, 1.0, 0.2), ("b", 20, 1.0, 0.2), ("liar", 10**12, 1e9, 1.0)):
        scores.add(Evaluation(name, examples, loss, accuracy))
    told = describe_clients(scores.of, all_asked=True)
    assert told["client_accuracy_weighted"] == pytest.approx(1.0)
    assert told["client_losses_nats"]["liar"] == 1e9  # where nobody is suspected, numbers are as they were told
    told = describe_clients(scores.of, all_asked=True, ratio=3.0)
    assert told["client_examples"] == {"a": 10, "b": 20, "liar": 10**12}
    assert told["client_examples_counted"] == {"a": 10, "b": 20, "liar": 60}
    assert told["client_accuracy_weighted"] == pytest.approx((30 * 0.2 + 60) / 90)
    assert told["client_loss_mean_nats"] == pytest.approx((30 + 60 * 100) / 90)  # a loss counts as 100 nats at most


@pytest.mark.parametrize(
    ("norms", "ratio", "outside"),
    [
        ([1.0, 1.0, 1.0, 101.0], 100.0, ["c3"]),
        ([1.0, 1.0, 1.0, 99.0], 100.0, []),
        ([1.0, 1.0, 1.0, 1e6], 0.0, []),  # no limit
        ([1.0, 1000.0], 100.0, ["c1"]),  # of two, the smaller one is the measure
        ([1000.0], 100.0, []),
        ([], 100.0, []),
        ([1e-30, 1e-30, 1e30], 100.0, ["c2"]),
        ([0.0, 0.0, 1.0], 100.0, []),  # most did not move at all
        ([500.0, 1.0, 700.0, 2.0, 3.0], 100.0, ["c0", "c2"]),
    ],
)
def test_outliers_are_many_times_as_long_as_the_median(norms: list[float], ratio: float, outside: list[str]) -> None:
    share = torch.tensor([0.6, 0.0, 0.8, 0.0, 0.0])  # of length 1, spread over two groups
    reports = [replace(USUAL, client=f"c{i}", norm_G=norm * share) for i, norm in enumerate(norms)]
    assert [failure.client for failure in find_outliers(reports, ratio)] == outside


def test_an_outlier_is_left_out_and_named_with_its_measure(tmp_path: Path) -> None:
    federation = Scripted({"a": (30, 1.0), "b": (10, 2.0), "loud": (10, 1e6)})
    state, _ = run(tmp_path, federation)
    assert shared(state).tolist() == [1.25, 1.25]
    (failure,) = state.history[-1]["failures"]
    assert failure["client"] == "loud"
    assert "5e+05 times as long as the median one, server.max_norm_ratio = 100" in failure["reason"]
    wild, _ = run(tmp_path / "wild", federation, "server.max_norm_ratio=0")
    assert wild.history[-1]["clients"] == ["a", "b", "loud"]


def test_outliers_do_not_count_as_usable(tmp_path: Path) -> None:
    federation = Scripted({"a": (30, 1.0), "b": (10, 1.0), "loud": (10, 1e6)})
    with pytest.raises(UserError, match=r"round 1: 2 of 3 clients.*loud: its update is 1e\+06 times"):
        run(tmp_path, federation, "server.min_clients=3")


def test_fedexp_reads_updates_as_they_were_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates of 3 and -1, each stretched by 2: their mean is 2, their mean square 20, so the step is 20 / (2 * 4)."""
    plain = FedAvg.plan

    def stretched(self: FedAvg, reports: Reports, state: State) -> Plan:
        plan = plain(self, reports, state)
        return replace(plan, factor_C_G=torch.full_like(plan.weight_C_G, 2.0))

    monkeypatch.setattr(FedAvg, "plan", stretched)
    federation = Scripted({"a": (10, 3.0), "b": (10, -1.0)})
    state, _ = run(tmp_path, federation, "server.optimizer=fedexp", "server.epsilon=1e-12")
    assert shared(state).tolist() == pytest.approx([2.5 * 2.0] * 2)


@pytest.mark.parametrize("lost", [set(), {"b"}], ids=["it arrives", "it never arrives"])
def test_fedexp_goes_by_what_arrived_and_not_by_what_was_claimed(tmp_path: Path, lost: set[str]) -> None:
    """One claims 90 times its length, which is below what is left out as an outlier."""

    def boasting(statistics: Statistics) -> Statistics:
        return replace(statistics, norm_G=90 * statistics.norm_G) if statistics.client == "b" else statistics

    moves = {"a": (10, 3.0), "b": (10, 2.0), "c": (10, -1.0)}
    asked = ("server.optimizer=fedexp", "server.epsilon=1e-12")
    state, _ = run(tmp_path / "boast", Scripted(moves, spoil=boasting, lost=lost), *asked)
    honest, _ = run(tmp_path / "honest", Scripted({name: moves[name] for name in moves if name not in lost}), *asked)
    assert shared(state).tolist() == pytest.approx(shared(honest).tolist())


def test_that_a_client_with_low_scores_is_missing_makes_no_round_the_best(tmp_path: Path) -> None:
    """Scores never change; c fails to train in round 2, so that nobody knows how round 1 does on its rows."""
    right = {"a": 0.9, "b": 0.9, "c": 0.1}

    def failing(statistics: Statistics) -> Statistics | Failure:
        lost = (statistics.client, statistics.round) == ("c", 2)
        return Failure("c", "train", "its loss is nan at step 1") if lost else statistics

    federation = Scripted(
        dict.fromkeys(right, (30, 1.0)),
        spoil=failing,
        grade=lambda score: replace(score, accuracy=right[str(score.client)], loss=1.0),
    )
    state, log = run(tmp_path, federation, "run.rounds=4", scores=lambda number, weights: None)
    assert [len(line["client_accuracies"]) for line in state.history] == [3, 2, 3, 3, 3]
    assert state.history[1]["client_accuracy_weighted"] == pytest.approx(0.9)
    assert log.improved == [True, False, False, False, False]
    best = best_of(state.history, "accuracy")
    assert best is state.history[0]


def test_scores_that_cannot_be_used_are_named_and_the_others_count(tmp_path: Path) -> None:
    def grade(score: Evaluation) -> Evaluation | Failure:
        if score.client == "b":
            return replace(score, loss=float("nan"))
        return Failure("c", "evaluate", "no reply within 3 s") if score.client == "c" else score

    state, _ = run(tmp_path, Scripted({"a": (30, 1.0), "b": (10, 1.0), "c": (10, 1.0)}, grade=grade))
    for line in state.history:  # before the first round, too
        assert [(f["client"], f["stage"]) for f in line["failures"]] == [("b", "evaluate"), ("c", "evaluate")]
        assert line["failures"][0]["reason"] == "its loss is nan on 10 examples"
        assert list(line["client_accuracies"]) == ["a"]
        assert line["client_loss_mean_nats"] == 0.5


def test_nobodys_scores_leave_the_round_without_and_the_run_goes_on(tmp_path: Path) -> None:
    federation = Scripted({"a": (30, 1.0)}, grade=lambda score: Failure(str(score.client), "evaluate", "no"))
    state, _ = run(tmp_path, federation)
    assert state.round == 1
    assert "client_accuracy_mean" not in state.history[-1]
    assert len(state.history[-1]["failures"]) == 1


def test_what_the_federation_noticed_is_told_with_the_round_it_was_noticed_in(tmp_path: Path) -> None:
    federation = Scripted({"a": (30, 1.0), "b": (10, 1.0)}, lost={"b"})
    federation.noticed = [Failure("late", "join", "not connected")]
    state, _ = run(tmp_path, federation)
    assert state.history[0]["failures"] == [{"client": "late", "stage": "join", "reason": "not connected"}]
    assert [failure["client"] for failure in state.history[1]["failures"]] == ["b"]


def test_scores_come_in_any_order_and_are_told_in_one(tmp_path: Path) -> None:
    orders = [("a", "b", "c"), ("c", "b", "a")]
    lines = []
    for order in orders:
        federation = Scripted(dict.fromkeys(order, (10, 1.0)))
        federation.grade = lambda score: replace(score, loss={"a": 0.1, "b": 0.7, "c": 1.3}[str(score.client)])
        state, _ = run(tmp_path / "".join(order), federation)
        lines.append({key: value for key, value in state.history[-1].items() if key.startswith("client_l")})
    assert lines[0] == lines[1]
    assert list(lines[0]["client_losses_nats"]) == ["a", "b", "c"]


def test_bytes_are_told_by_client_both_ways(tmp_path: Path) -> None:
    members = [f"c{i}" for i in range(4)]
    state, _ = run(tmp_path, Scripted(dict.fromkeys(members, (10, 1.0))), "clients.sample=0.5")
    line = state.history[-1]
    chosen, model = line["clients"], 8 * 4
    assert len(chosen) == 2
    assert line["bytes_down_by_client"] == {member: model * (1 + (member in chosen)) for member in members}  # the last
    assert sum(line["bytes_down_by_client"].values()) == line["bytes_down"]
    assert set(line["bytes_up_by_client"]) == set(chosen)
    first = state.history[0]
    assert (first["bytes_up"], first["bytes_down"]) == (0, model * 4)


def test_traffic_adds_up() -> None:
    traffic = Traffic()
    traffic.up("a", 3)
    traffic.take(Moved({"b": 15, "a": 10}, {"a": 4, "b": 2}))
    assert (traffic.down, traffic.down_by_client) == (25, {"a": 10, "b": 15})
    assert (traffic.updates, traffic.up_by_client) == (6, {"a": 7, "b": 2})


def test_what_a_client_sends_in_vain_is_counted_all_the_same(tmp_path: Path) -> None:
    def spoil(statistics: Statistics) -> Statistics:
        return replace(statistics, loss=float("nan")) if statistics.client == "b" else statistics

    state, _ = run(tmp_path, Scripted({"a": (30, 1.0), "b": (10, 3.0)}, spoil=spoil))
    line = state.history[-1]
    assert line["clients"] == ["a"]
    assert line["bytes_up_by_client"]["b"] == line["bytes_up_statistics"] / 2


@pytest.mark.parametrize(("every", "last"), [(1, 4), (2, 6)])  # the best is of round 2, and two scored rounds follow
def test_a_run_ends_when_its_patience_is_spent(tmp_path: Path, every: int, last: int) -> None:
    patient = ["run.rounds=9", "run.patience=2", f"evaluation.every={every}"]
    rising = iter([0.1, 0.2, 0.3]) if every == 1 else iter([0.1, 0.3])
    federation, config = Scripted({"a": (30, 1.0)}), load_config(None, ["run.rounds=9"])
    scores = lambda n, w: Evaluation(None, 5, 1.0, next(rising, 0.3))  # noqa: E731 - a score a call
    state, _ = run(tmp_path, federation, *patient, scores=scores)
    assert state.round == last
    told = "run.patience = 2: the highest accuracy is of round 2, rounds scored since: 2"
    assert [line.get("stopped") for line in state.history] == [None] * last + [told]
    again, log = run(tmp_path, federation, *patient, state=state)
    assert (again.round, log.improved) == (last, [])
    on, _ = run(tmp_path, federation, "run.rounds=9", state=state)
    assert (on.round, on.history[: last + 1]) == (9, state.history)
    assert summarise(load_config(None, patient), state.history, 0)["stopped"] == told
    assert summarise(config, on.history, 0)["stopped"] is None


def test_the_loss_decides_where_it_is_to(tmp_path: Path) -> None:
    """Accuracy rises to the end, and the loss is lowest after round 2."""
    losses, right = [2.0, 1.5, 1.0, 1.2, 1.4, 1.1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    scores = lambda n, w: Evaluation(None, 5, losses[n], right[n])  # noqa: E731 - a score a round
    more = ["run.rounds=5", "run.patience=2"]
    state, log = run(tmp_path / "accuracy", Scripted({"a": (30, 1.0)}), *more, scores=scores)
    assert (state.round, log.improved) == (5, [True] * 6)
    more.append("evaluation.best=loss")
    state, log = run(tmp_path / "loss", Scripted({"a": (30, 1.0)}), *more, scores=scores)
    assert (state.round, log.improved) == (4, [True, True, True, False, False])
    told = "run.patience = 2: the lowest loss is of round 2, rounds scored since: 2"
    assert state.history[-1]["stopped"] == told
    summary = summarise(load_config(None, more), state.history, 0)
    assert [summary[name] for name in ("best_by", "best_round", "best_loss", "best_accuracy")] == ["loss", 2, 1.0, 0.3]
    summary = summarise(load_config(None, more[:2]), state.history, 0)
    assert [summary[name] for name in ("best_by", "best_round", "best_loss", "best_accuracy")] == [
        *("accuracy", 4, 1.4, 0.5)
    ]


def test_the_loss_decides_too_where_clients_alone_score(tmp_path: Path) -> None:
    """A round after which patience may be spent is scored by itself, whatever it goes by: nobody trains in vain."""
    losses = iter([1.0, 0.5, 0.6, 0.7, 0.1])
    federation = Scripted({"a": (30, 1.0)}, grade=lambda score: replace(score, loss=next(losses)))
    more = ("run.rounds=9", "run.patience=2", "evaluation.best=loss")
    state, log = run(tmp_path, federation, *more, scores=lambda n, w: None)
    assert (state.round, log.improved) == (3, [True, True, False, False])
    assert (federation.asked, rounds_scored(federation, alone=True)) == (["a"] * 3, [0, 3])


def test_a_start_that_others_have_scored_is_not_shown_beside_the_end(tmp_path: Path) -> None:
    def ended(fails: tuple[str, int]) -> tuple[dict[str, Any], Sequence[dict[str, Any]]]:
        def spoil(report: Statistics) -> Statistics | Failure:
            return Failure("b", "train", "gone") if (report.client, report.round) == fails else report

        moves = {"a": (30, 1.0), "b": (10, 1.0)}
        place = tmp_path / str(fails[1])
        state, _ = run(place, Scripted(moves, spoil=spoil), "run.rounds=2", scores=lambda n, w: None)
        return summarise(load_config(None, ["run.rounds=2"]), state.history, 0), state.history

    (whole, _), (summary, history) = ended(("b", 9)), ended(("b", 1))
    assert whole["initial_loss"] is not None
    assert [sorted(line["client_losses_nats"]) for line in history] == [["a"], ["a", "b"], ["a", "b"]]
    assert (summary["initial_loss"], summary["initial_accuracy"]) == (None, None)
    assert summary["final_loss"] == whole["final_loss"]


def test_patience_ends_no_run_in_its_last_round(tmp_path: Path) -> None:
    state, _ = run(tmp_path, Scripted({"a": (30, 0.0)}), "run.rounds=2", "run.patience=2")
    assert (state.round, "stopped" in state.history[-1]) == (2, False)
    state, _ = run(tmp_path, Scripted({"a": (30, 0.0)}), "run.rounds=3", "run.patience=2", state=state)
    assert state.round == 2  # asked for more, it has no patience left


def test_patience_without_a_score_is_refused(tmp_path: Path) -> None:
    lost = Scripted({"a": (30, 1.0)}, grade=lambda e: Failure(str(e.client), "evaluate", "gone"))
    with pytest.raises(UserError, match=r"run.patience = 2: round 0 was not scored.*evaluation.clients = true"):
        run(tmp_path, lost, "run.patience=2", scores=lambda n, w: None)


# ------------------------------------------------------------------------------------------ one broadcast a round

MODEL = 8 * 4  # bytes of a broadcast


def rounds_scored(federation: Scripted, *, alone: bool) -> list[int]:
    return sorted({round for round, _, by_itself in federation.scored if by_itself == alone})


def scores_of(line: dict[str, Any]) -> dict[str, Any]:
    """What a line says of its round's weights."""
    return {name: line[name] for name in line if "accura" in name or "loss" in name or name.endswith("examples")}


def test_a_round_is_scored_with_the_next_broadcast_and_the_last_by_itself(tmp_path: Path) -> None:
    federation = Scripted({"a": (30, 1.0), "b": (10, 3.0)})
    state, _ = run(tmp_path, federation, "run.rounds=3")
    assert rounds_scored(federation, alone=False) == [0, 1, 2]
    assert rounds_scored(federation, alone=True) == [3]
    assert [line["bytes_down"] for line in state.history] == [0, 2 * MODEL, 2 * MODEL, 4 * MODEL]
    for number, line in enumerate(state.history):
        assert line["client_accuracies"] == dict.fromkeys("ab", 1.5 * number / 10)
    rarely = Scripted({"a": (30, 1.0)})
    run(tmp_path / "rarely", rarely, "run.rounds=5", "evaluation.every=3")
    assert rounds_scored(rarely, alone=False) == [0, 3]
    assert rounds_scored(rarely, alone=True) == [5]


def test_scores_are_those_that_each_round_alone_would_have(tmp_path: Path) -> None:
    moves, patient = {"a": (30, 1.0), "b": (10, 3.0)}, "run.patience=1"  # with which every round may be the last
    together, alone = Scripted(moves), Scripted(moves)
    one, log = run(tmp_path / "one", together, "run.rounds=4", scores=lambda n, w: None)
    other, other_log = run(tmp_path / "other", alone, "run.rounds=4", patient, scores=lambda n, w: None)
    assert (len(together.scored), rounds_scored(alone, alone=False)) == (len(alone.scored), [])
    assert list(map(scores_of, one.history)) == list(map(scores_of, other.history))
    assert torch.equal(shared(one), shared(other))
    assert log.improved == other_log.improved == [True] * 5


def test_a_round_after_which_patience_may_be_spent_is_scored_by_itself(tmp_path: Path) -> None:
    grades = iter([0.1, 0.3, 0.2, 0.4, 0.3, 0.3, 0.9])
    federation = Scripted({"a": (30, 1.0)}, grade=lambda score: replace(score, accuracy=next(grades)))
    state, _ = run(tmp_path, federation, "run.rounds=9", "run.patience=2", scores=lambda n, w: None)
    assert state.round == 5
    assert federation.asked == ["a"] * 5  # nothing was trained in vain
    assert rounds_scored(federation, alone=True) == [0, 3, 5]  # without a score at the start it ends there
    told = Scripted({"a": (30, 1.0)})  # what the global test set tells needs no client
    run(tmp_path / "told", told, "run.rounds=9", "run.patience=2")
    assert rounds_scored(told, alone=True) == [2]


def test_only_those_that_train_are_scored_and_means_are_of_all(tmp_path: Path) -> None:
    members = [f"c{i}" for i in range(10)]
    overrides = ("run.rounds=5", "clients.sample=0.3", "evaluation.everyone=2")
    federation = Scripted(dict.fromkeys(members, (10, 1.0)))
    state, log = run(tmp_path, federation, *overrides, scores=lambda n, w: None)
    for number, line in enumerate(state.history):
        asked = members if number in (0, 2, 4, 5) else select(members, 0.3, seed=0, round=number + 1)
        assert list(line["client_accuracies"]) == list(line["client_examples"]) == asked
        assert ("client_accuracy_mean" in line) == ("client_loss_mean_nats" in line) == (asked == members)
    assert [is_scored(line) for line in state.history] == [True, False, True, False, True, True]
    assert log.improved == [True, False, True, False, True, True]  # rounds that some have scored are never the best
    assert rounds_scored(federation, alone=True) == [0, 2, 4, 5]
    assert [line["bytes_down"] // MODEL for line in state.history] == [10, 3, 13, 3, 13, 13]
    seldom = Scripted(dict.fromkeys(members, (10, 1.0)))
    run(tmp_path / "seldom", seldom, *overrides[:2], "run.patience=1", scores=lambda n, w: None)
    assert rounds_scored(seldom, alone=True) == [0, 5]


class CutOffError(Exception):
    """As a kill would."""


@dataclass
class Cut(Scripted):
    """A federation that is cut off while it trains a round: after how many replies?"""

    at: int = 2
    after: int = 0

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Statistics | Failure]:
        for number, reply in enumerate(super().train(broadcast, clients)):
            if (broadcast.round, number) == (self.at, self.after):
                raise CutOffError
            yield reply

    def collect(self, requests: Sequence[Request], accumulator: Accumulator) -> list[Failure]:
        if requests[0].round == self.at and self.after >= len(self.moves):
            raise CutOffError
        return super().collect(requests, accumulator)

    def evaluate(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Evaluation | Failure]:
        if broadcast.round == self.at - 1:
            raise CutOffError
        return super().evaluate(broadcast, clients)


MOVES = {"a": (30, 1.0), "b": (10, 3.0)}


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_run_cut_off_between_a_round_and_its_scores_goes_on_to_the_same_lines(
    tmp_path: Path, at: int, after: int
) -> None:
    whole, log = run(tmp_path / "whole", Scripted(MOVES), "run.rounds=3")
    with pytest.raises(CutOffError):
        run(tmp_path / "cut", Cut(MOVES, at=at, after=after), "run.rounds=3")
    kept = Checkpoints(tmp_path / "cut", {}).load()
    assert kept is not None
    assert kept.round == at - 1
    was_scored = after == 2 and at < 4
    assert [line["round"] for line in kept.lines] == list(range(at))
    assert (kept.pending is None) == was_scored
    federation = Scripted(MOVES)
    state, again = run(tmp_path / "cut", federation, "run.rounds=3", state=kept)
    assert min(round for round, _, _ in federation.scored) == (at if was_scored else at - 1)
    assert torch.equal(shared(state), shared(whole))
    own = (
        "round_seconds",
        "bytes_down",
        "bytes_down_by_client",
    )  # this federation does not know what the first one sent
    without_clock = [
        [{k: v for k, v in line.items() if k not in own} for line in run_state.history] for run_state in (state, whole)
    ]
    assert without_clock[0] == without_clock[1]
    assert again.improved == log.improved[at if was_scored else at - 1 :]


def test_scores_that_are_damaged_on_the_disk_are_asked_for_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CutOffError):
        run(tmp_path, Cut(MOVES, at=2, after=2), "run.rounds=2")
    (line,) = tmp_path.glob("round-00001/scored/line.json")
    line.write_text(line.read_text().replace("0.15", "0.95"))
    kept = Checkpoints(tmp_path, {}).load()
    assert kept is not None
    assert "the round is scored again" in caplog.text
    state, _ = run(tmp_path, Scripted(MOVES), "run.rounds=2", state=kept)
    assert state.history[1]["client_accuracies"] == {"a": 0.15, "b": 0.15}


def test_fewer_rounds_than_are_done_leave_none_without_its_scores(tmp_path: Path) -> None:
    with pytest.raises(CutOffError):
        run(tmp_path, Cut(MOVES, at=3), "run.rounds=5")
    kept = Checkpoints(tmp_path, {}).load()
    assert kept is not None
    assert kept.pending is not None
    federation = Scripted(MOVES)
    state, _ = run(tmp_path, federation, "run.rounds=2", state=kept)
    assert (state.round, state.pending, federation.asked) == (2, None, [])
    assert state.history[-1]["client_accuracies"] == {"a": 0.3, "b": 0.3}


def test_a_score_counts_though_the_report_beside_it_cannot_be_used(tmp_path: Path) -> None:
    broken = Scripted(MOVES, spoil=lambda s: replace(s, loss=math.nan) if s.client == "b" else s)
    state, _ = run(tmp_path, broken)
    assert list(state.history[0]["client_accuracies"]) == ["a", "b"]
    late = Scripted(MOVES, spoil=lambda s: replace(s, round=7) if s.client == "b" else s)
    state, _ = run(tmp_path / "late", late)
    assert list(state.history[0]["client_accuracies"]) == ["a"]  # of which weights would it be?


def test_scores_that_nobody_asked_for_count_for_nothing(tmp_path: Path) -> None:
    eager = Scripted(MOVES, spoil=lambda s: replace(s, held_out=10, held_out_loss=0.1, held_out_accuracy=1.0))
    state, _ = run(tmp_path, eager, "evaluation.every=2", "run.rounds=3")
    assert "client_accuracies" not in state.history[1]
