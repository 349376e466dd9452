"""The round loop, written once, against a Federation, and knowing no algorithm by name.

broadcast -> local training -> statistics -> plan -> updates -> sum -> evaluate -> checkpoint
"""

from __future__ import annotations

import math
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from fedalign.config.run import Config
from fedalign.errors import UserError
from fedalign.maths.average import Average, StreamingSum
from fedalign.maths.robust import Directions, guarded, liars, make_sum
from fedalign.maths.rounding import broadcast_dtype, pack
from fedalign.maths.server_step import server_step
from fedalign.protocol import (
    KINDS,
    Accumulator,
    Algorithm,
    Broadcast,
    Evaluation,
    Failure,
    Federation,
    Layout,
    Metrics,
    Plan,
    Reports,
    State,
    Statistics,
    Update,
    Weights,
    asked_shapes,
)
from fedalign.server.checkpoint import Checkpoints, ServerState
from fedalign.server.checks import (
    check_evaluation,
    check_plan,
    check_state,
    check_statistics,
    check_weights,
    find_outliers,
)
from fedalign.server.scores import Traffic, best_of, describe_plan, describe_scores, describe_training, merit, spent

CENTER = "center."  # names of the last round's update among the moments
PATIENCE = 2  # rounds in which a site may announce an update and deliver none that can be used
MEMORY = 10  # rounds for which a site counts for nothing whose update was opposite: later ones may not tell it
OPPOSITE = "a part of its update was opposite to the others'"


class Observer(Protocol):
    """Whoever wants to know how the run goes: the live table, the result files."""

    def progress(self, round: int, stage: str, done: int, total: int) -> None:
        """`done` of `total` clients have finished a stage."""

    def planned(self, round: int, reports: Sequence[Statistics], plan: Plan, layout: Layout) -> None:
        """The clients' reports, and the plan: who is to count for how much."""

    def completed(self, state: ServerState, improved: bool) -> None:
        """A round is complete (round 0 is the evaluation before training); `improved`: its score is the best yet."""


class CountingSum:
    """An accumulator that counts what arrives, and passes on what is of this round."""

    def __init__(
        self,
        inner: Accumulator,
        round: int,
        traffic: Traffic,
        arrived: Callable[[], None],
        directions: Directions | None = None,
    ) -> None:
        self.inner, self.round, self.traffic, self.arrived = inner, round, traffic, arrived
        self.directions = directions
        self.refused: list[Failure] = []  # of what arrived

    def add(self, update: Update) -> Failure | None:
        """Count and pass on."""
        self.traffic.updates += update.nbytes
        self.traffic.up(update.client, update.nbytes)
        self.arrived()
        failure: Failure | None
        if update.round != self.round:
            failure = Failure(update.client, "update", f"its update is of round {update.round}, not {self.round}")
        else:
            failure = self.inner.add(update)
        if failure is not None:
            self.refused.append(failure)
        elif self.directions is not None:
            self.directions.add(update)
        return failure


class Server:
    """Runs rounds until the configured number is complete, or patience is spent."""

    def __init__(
        self,
        federation: Federation,
        algorithm: Algorithm,
        layout: Layout,
        config: Config,
        checkpoints: Checkpoints,
        evaluate: Callable[[int, Weights], Evaluation | None],  # after a round, on the global test set
        observer: Observer,
    ) -> None:
        self.federation = federation
        self.algorithm = algorithm
        self.layout = layout
        self.config = config
        self.checkpoints = checkpoints
        self.evaluate = evaluate
        self.observer = observer

    def run(self, state: ServerState) -> ServerState:
        """Continue from `state`; each complete round is checkpointed before it is announced.

        Raises:
            UserError: Too few clients had anything usable to say, or there is patience and no score to be patient for.
        """
        rounds, patience = self.config.run.rounds, self.config.run.patience
        if not state.history:
            traffic = Traffic()
            metrics, failures = self._scores(state.weights, 0, traffic)
            metrics |= {"bytes_up": 0, "bytes_down": traffic.down, "failures": self._named(failures)}
            state = self._complete(state, metrics)
        if patience and best_of(state.history) is None:
            raise UserError(
                f"run.patience = {patience}: round {state.round} was not scored, so no later one can be called better. "
                "Give data.test or clients.held_out, or go on with --set run.patience=0."
            )
        while state.round < rounds and not spent(state.history, patience):
            state = self._round(state)
        return state

    def _round(self, state: ServerState) -> ServerState:
        started, number, traffic = time.perf_counter(), state.round + 1, Traffic()
        members = self.federation.members()
        chosen = select(members, self.config.clients.sample, self.config.run.seed, number)
        reports, failures = self._train(state, number, chosen, traffic)
        if len(reports) < self.config.server.min_clients:
            reasons = "; ".join(f"{failure.client}: {failure.reason}" for failure in failures) or "nobody replied"
            raise UserError(
                f"round {number}: {len(reports)} of {len(chosen)} clients can be used, server.min_clients = "
                f"{self.config.server.min_clients} are needed ({reasons}). The last complete round is kept."
            )
        reports, silent, left_out = self._on_trial(state, reports)
        on_trial = [*(report.client for report in silent), *(failure.client for failure in left_out)]
        while True:
            directions = self._directions(number, len(reports))
            plan, total, lost, refused = self._sum(state, reports, number, len(members), traffic, directions)
            out = self._out(directions, refused, reports) if directions else []
            if not out:
                break
            left_out += out
            names = {failure.client for failure in out}
            reports = [report for report in reports if report.client not in names]
        self.observer.planned(number, reports, plan, self.layout)
        failures += [*lost, *left_out, *self._try(silent, number, traffic)]
        share = self.config.server.min_arrived
        summed = total.result(state.weights, share)
        weights, moments = self._optimise(state, summed, plan, reports)
        moments = moments | self._center(state.weights, summed)
        algorithm_state = plan.then(total.streams(share)) if plan.then else plan.state
        self._refuse(number, check_state(algorithm_state))
        self._refuse(number, check_weights(weights))
        scores, unscored = self._scores(weights, number, traffic)
        metrics = {
            **scores,
            **describe_training(reports),
            **describe_plan(plan, self.layout, traffic, len(total.unchanged(share))),
            "clients": [report.client for report in reports],
            "failures": self._named([*failures, *unscored]),
            **({"on_trial": on_trial} if on_trial else {}),
            "round_seconds": time.perf_counter() - started,
        }
        after = replace(state, round=number, weights=weights, algorithm=algorithm_state, moments=moments)
        return self._complete(after, metrics)

    def _refuse(self, number: int, problem: str | None) -> None:
        """End the run if there is a problem with a round's plan."""
        if problem:
            name = self.config.algorithm.name
            raise UserError(f"round {number}: the plan of {name} {problem}. The last complete round is kept.")

    def _optimise(
        self, state: ServerState, summed: Weights, plan: Plan, reports: Sequence[Statistics]
    ) -> tuple[Weights, State]:
        """The server's own step along the summed updates (Reddi et al. 2021); groups that did not change stay."""
        options = self.config.server
        if options.optimizer == "average":
            return summed, state.moments
        norm_C_G = torch.stack([report.norm_G for report in reports]).double()
        if self.config.robust != "none" and plan.factor_C_G is not None:
            norm_C_G = norm_C_G * plan.factor_C_G  # as it was clipped
        spread = float((plan.weight_C_G.double() * norm_C_G.square()).sum())
        return server_step(options, state.weights, summed, state.moments, spread)

    def _guarded(self, plan: Plan, reports: Sequence[Statistics]) -> Plan:
        """The plan with no site's share or length beyond what one may have."""
        if self.config.robust == "none":
            return plan
        norm_C_G = torch.stack([report.norm_G for report in reports])
        options = self.config.server
        return guarded(plan, norm_C_G, self.layout, options.max_share, options.max_share_ratio, options.clip)

    def _center(self, old: Weights, summed: Weights) -> State:
        """The centre around which the next round clips: the summed update of each group that changed."""
        if self.config.robust != "centered_clip":
            return {}
        return {f"{CENTER}{group}": summed[group] - old[group] for group in old if summed[group] is not old[group]}

    def _on_trial(
        self, state: ServerState, reports: Sequence[Statistics]
    ) -> tuple[list[Statistics], list[Statistics], list[Failure]]:
        """Reports that count, those of clients that lately delivered nothing, and who else is not heard, and why.

        Not heard are those whose update was opposite a while ago, unless they are more than can be told to lie.
        """
        if self.config.robust == "none":
            return list(reports), [], []
        opposite = {report.client: when for report in reports if (when := opposed(state.history, report.client))}
        if len(opposite) > liars(len(reports), self.config.server.hostile):
            opposite = {}
        rest = [report for report in reports if report.client not in opposite]
        silent = [report for report in rest if undelivered(state.history, report.client) >= PATIENCE]
        heard = [report for report in rest if undelivered(state.history, report.client) < PATIENCE]
        if len(heard) < self.config.server.min_clients:  # more likely it is the network
            return list(reports), [], []
        reason = "its word counts for nothing for {} rounds: " + OPPOSITE + " in round {}"
        told = [Failure(name, "train", reason.format(MEMORY, when)) for name, when in opposite.items()]
        return heard, silent, told

    def _try(self, silent: Sequence[Statistics], number: int, traffic: Traffic) -> list[Failure]:
        """Ask those who delivered nothing for one group of their update: does it come as announced?"""
        if not silent:
            return []
        weight_C_G = torch.zeros(len(silent), len(self.layout.groups))
        weight_C_G[:, next(i for i, group in enumerate(self.layout.groups) if self.layout.sizes[group])] = 1
        trial = Plan(tuple(report.client for report in silent), weight_C_G / len(silent))
        norms = {report.client: report.norm_G for report in silent}
        ignored = StreamingSum(self.layout, trial, norms, self.config.wire.dtype)
        counted = CountingSum(ignored, number, traffic, lambda: None)
        reason = f"its word counts for nothing until it delivers: {PATIENCE} times no update of it could be used"
        return [
            *(Failure(report.client, "train", reason) for report in silent),
            *self.federation.collect(trial.requests(number, self.layout), counted),
        ]

    def _named(self, failures: Sequence[Failure]) -> list[dict[str, str]]:
        """Every fault of a round, for metrics and the live table."""
        return [vars(failure) for failure in (*self.federation.faults(), *failures)]

    def _broadcast(self, weights: Weights, state: State, round: int) -> Broadcast:
        dtype = broadcast_dtype(self.config.wire.dtype)
        return Broadcast(round, {group: pack(value, dtype, seed=0) for group, value in weights.items()}, state)

    def _train(
        self, state: ServerState, number: int, chosen: Sequence[str], traffic: Traffic
    ) -> tuple[list[Statistics], list[Failure]]:
        broadcast = self._broadcast(state.weights, state.algorithm, number)
        traffic.send(chosen, broadcast.nbytes)
        reports: dict[str, Statistics] = {}
        failures: list[Failure] = []
        widths = self.config.statistics.centroid_width, self.config.statistics.update_width
        shapes = asked_shapes(self.layout, self.config.asks, *widths)
        training, chats = self.config.training, self.config.data.has_chats
        self.observer.progress(number, "training", 0, len(chosen))
        for reply in self.federation.train(broadcast, chosen):
            if isinstance(reply, Statistics):
                traffic.statistics += reply.nbytes
                traffic.up(reply.client, reply.nbytes)
                problem = check_statistics(reply, self.layout, shapes, number, training, chats)
                if problem is None:
                    reports[reply.client] = reply
                else:
                    failures.append(Failure(reply.client, "train", problem))
            else:
                failures.append(reply)
            self.observer.progress(number, "training", len(reports) + len(failures), len(chosen))
        usable = [reports[name] for name in chosen if name in reports]  # arrival order must not matter
        ratio = self.config.server.max_norm_ratio if self.config.robust == "none" else 0  # else they are clipped
        outliers = find_outliers(usable, ratio)
        names = {failure.client for failure in outliers}
        return [report for report in usable if report.client not in names], [*failures, *outliers]

    def _sum(
        self,
        state: ServerState,
        reports: Sequence[Statistics],
        number: int,
        members: int,
        traffic: Traffic,
        directions: Directions | None,
    ) -> tuple[Plan, StreamingSum, list[Failure], list[Failure]]:
        """Plan, ask for updates, and add them up; also all failures, and those of updates that arrived.

        Updates that were added whole are added to `directions`, too.
        """
        plan = self.algorithm.plan(Reports(reports, self.layout, members), state.algorithm)
        self._refuse(number, check_plan(plan, reports, self.layout))
        plan = self._guarded(plan.without({report.client: report.frozen for report in reports}, self.layout), reports)
        total = self._empty_sum(plan, {report.client: report.norm_G for report in reports}, number, state)
        requests = [request for request in plan.requests(number, self.layout) if request.groups]
        done = 0

        def arrived() -> None:
            nonlocal done
            done += 1
            self.observer.progress(number, "summing", done, len(requests))

        counted = CountingSum(total, number, traffic, arrived, directions)
        failures = self.federation.collect(requests, counted)
        return plan, total, failures, counted.refused

    def _directions(self, number: int, clients: int) -> Directions | None:
        """Sketches that tell opposite updates; where clients are strangers their seed is a secret."""
        if self.config.robust == "none":
            return None
        strangers = self.config.federation.engine == "flower"
        chance = random.Random(f"{self.config.run.seed}/{number}/{clients}/directions")
        return Directions(self.layout, secrets.randbits(31) if strangers else chance.getrandbits(31))

    def _out(self, directions: Directions, refused: Sequence[Failure], reports: Sequence[Statistics]) -> list[Failure]:
        """Why a round is summed again without some clients: opposite updates, and those refused when half was added.

        Nobody is, where that would be most of them, or leave too few.
        """
        reason = OPPOSITE + ", by a median cosine of {:.2f}: summed again without it"
        opposite = directions.against(self.config.server.hostile)
        out = [*(Failure(client, "update", reason.format(cos)) for client, cos in opposite.items()), *refused]
        left = len(reports) - len(out)
        return out if left >= max(len(out), self.config.server.min_clients) else []

    def _empty_sum(self, plan: Plan, norms: Mapping[str, Tensor], number: int, state: ServerState) -> StreamingSum:
        """The empty sum to which updates are added, by the configured rule."""
        rule, options, dtype = self.config.robust, self.config.server, self.config.wire.dtype
        if rule in ("none", "clip"):
            exact: Average = "exact" if self.config.tuning.averages_products else "sum"
            return StreamingSum(self.layout, plan, norms, dtype, exact, by_sites=rule == "clip")
        last = {f"{CENTER}{group}": group for group in self.layout.groups}
        center = {last[name]: value for name, value in state.moments.items() if name in last}
        try:
            return make_sum(
                rule, self.layout, plan, norms, dtype, hostile=options.hostile, radius=options.radius, center=center
            )
        except ValueError as error:
            self._refuse(number, f"has {error}")
            raise

    def _scores(self, weights: Weights, number: int, traffic: Traffic) -> tuple[Metrics, list[Failure]]:
        last = number == self.config.run.rounds
        metrics: Metrics = {"round": number}
        if number % self.config.evaluation.every and not last:
            return metrics, []
        self.observer.progress(number, "evaluating", 0, 1)
        everyone_alone = self.algorithm.private >= set(KINDS)
        overall = None if everyone_alone else self.evaluate(number, weights)
        scores: list[Evaluation] = []
        failures: list[Failure] = []
        if self.config.evaluation.clients and self.config.clients.held_out:
            members = self.federation.members()
            broadcast = self._broadcast(weights, {}, number)
            traffic.send(members, broadcast.nbytes)
            for score in self.federation.evaluate(broadcast, members):
                if isinstance(score, Failure):
                    failures.append(score)
                elif problem := check_evaluation(score):
                    failures.append(Failure(str(score.client), "evaluate", problem))
                else:
                    scores.append(score)
                self.observer.progress(number, "evaluating", len(scores) + len(failures), len(members))
        scores.sort(key=lambda score: str(score.client))  # arrival order must not matter
        return metrics | describe_scores(overall, scores), failures

    def _complete(self, state: ServerState, metrics: Metrics) -> ServerState:
        earlier = [score for past in state.history if (score := merit(past)) is not None]
        score = merit(metrics)
        why = spent((*state.history, metrics), self.config.run.patience)
        stopped = {"stopped": why} if why and metrics["round"] < self.config.run.rounds else {}
        state = replace(state, history=(*state.history, metrics | stopped))
        self.checkpoints.save(state)
        self.observer.completed(state, improved=score is not None and score > max(earlier, default=-math.inf))
        return state


def undelivered(history: Sequence[Metrics], client: str) -> int:
    """How many times in a row a client announced an update, and nothing usable came when it was asked for.

    >>> silent = {"clients": ["a"], "failures": [{"client": "a", "stage": "update", "reason": "no reply"}]}
    >>> undelivered([{"clients": ["a"], "failures": []}, silent, {"clients": ["b"], "failures": []}, silent], "a")
    2
    """
    times = 0
    for past in reversed(history):
        if any((f["client"], f["stage"]) == (client, "update") for f in past.get("failures", ())):
            times += 1
        elif client in (*past.get("clients", ()), *past.get("on_trial", ())):
            break
    return times


def opposed(history: Sequence[Metrics], client: str) -> int:
    """The last of the `MEMORY` latest rounds in which a client's update was found opposite to the others'; 0: none.

    >>> said = {"client": "a", "stage": "update", "reason": OPPOSITE}
    >>> opposed([{"round": 0}, {"round": 1, "failures": [said]}, {"round": 2}], "a")
    1
    """
    for past in reversed(history[-MEMORY:]):
        faults = [f for f in past.get("failures", ()) if (f["client"], f["stage"]) == (client, "update")]
        if any(fault["reason"].startswith(OPPOSITE) for fault in faults):
            return int(past["round"])
    return 0


def select(members: Sequence[str], share: float, seed: int, round: int) -> list[str]:
    """The clients of a round: a random share, at least one, in the order of `members`.

    >>> select(["a", "b", "c", "d"], 0.5, seed=0, round=1) == select(["a", "b", "c", "d"], 0.5, seed=0, round=1)
    True
    """
    count = max(1, round_half_up(share * len(members)))
    chosen = set(random.Random(f"{seed}/{round}/select").sample(list(members), count))
    return [member for member in members if member in chosen]


def round_half_up(value: float) -> int:
    """2.5 becomes 3, always."""
    return math.floor(value + 0.5)
