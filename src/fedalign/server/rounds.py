"""The round loop, written once, against a Federation, and knowing no algorithm by name.

broadcast -> local training -> statistics -> plan -> updates -> sum -> checkpoint

Clients score what they receive before they train on it: a round is scored in the next one, and its line is complete
then. What no broadcast to all may follow is scored by itself: see `Server._alone`.
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
from fedalign.errors import UserError, within
from fedalign.maths.average import Average, StreamingSum
from fedalign.maths.hashing import derive_seed
from fedalign.maths.heap import Heap
from fedalign.maths.robust import Directions, guarded, liars, make_sum
from fedalign.maths.rounding import BLOCKS, pack
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
    Packed,
    Plan,
    Reports,
    State,
    Statistics,
    Update,
    Weights,
    WireDtype,
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
    reasons,
)
from fedalign.server.public import PublicModel, first, following
from fedalign.server.scores import (
    Scores,
    Traffic,
    best_of,
    describe_clients,
    describe_plan,
    describe_test,
    describe_training,
    is_scored,
    spent,
)

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
        """A round is scored (round 0 is before training), or is not to be; `improved`: its score is the best yet.

        Of `state` this is the last line, and the weights; the next round may have been trained meanwhile.
        """


class ToldSum:
    """An accumulator that tells what arrives, and passes on what is of this round."""

    def __init__(
        self,
        inner: Accumulator,
        round: int,
        arrived: Callable[[], None],
        directions: Directions | None = None,
    ) -> None:
        self.inner, self.round, self.arrived = inner, round, arrived
        self.directions = directions
        self.refused: list[Failure] = []  # of what arrived

    def add(self, update: Update) -> Failure | None:
        """Tell and pass on."""
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
        heap: Heap | None = None,  # where what is as large as the model lies
    ) -> None:
        self.heap = heap or Heap()
        self.federation = federation
        self.algorithm = algorithm
        self.layout = layout
        self.config = config
        self.checkpoints = checkpoints
        self.evaluate = evaluate
        self.observer = observer

    def run(self, state: ServerState) -> ServerState:
        """Continue from `state`; each round is checkpointed before it is scored, and its scores before they are told.

        Raises:
            UserError: Too few clients had anything usable to say, or there is patience and no score to be patient for.
        """
        rounds, patience, by = self.config.run.rounds, self.config.run.patience, self.config.evaluation.best
        if not state.lines:
            about = {"bytes_up": 0, "bytes_down": 0, "failures": self._named([])}
            state = replace(state, public=self._public(state, state.weights))
            state = self._complete(state, self._tested(0, state.weights) | about)
        while True:
            over = state.round >= rounds or spent(state.lines, patience, by) is not None
            if state.pending is not None and (over or self._alone(state, state.pending)):
                state = self._score(state, state.pending)
                continue
            if patience and state.pending is None and best_of(state.history, by) is None:
                raise UserError(
                    f"run.patience = {patience}: round {state.round} was not scored, so no later one can be called "
                    "better. Give data.test, or clients.held_out with evaluation.clients = true; or go on with "
                    "--set run.patience=0."
                )
            if over:
                return state
            state = self._round(state)

    def _round(self, state: ServerState) -> ServerState:
        started, number, traffic, scores = time.perf_counter(), state.round + 1, Traffic(), Scores()
        members = self.federation.members()
        chosen = select(members, self.config.clients.sample, self.config.run.seed, number)
        reports, failures = self._train(state, number, chosen, traffic, scores)
        if len(reports) < self.config.server.min_clients:
            why = reasons(failures) or "nobody replied"
            raise UserError(
                f"round {number}: {len(reports)} of {len(chosen)} clients can be used, server.min_clients = "
                f"{self.config.server.min_clients} are needed ({why}). The last complete round is kept."
            )
        if state.pending is not None:
            trained = time.perf_counter()
            told = self._told(scores, all_asked=len(chosen) == len(members))
            state = self._scored(state, state.pending, told, scores.failures)
            started += time.perf_counter() - trained  # saving the round before is no part of this one
        reports, silent, left_out = self._on_trial(state, reports)
        on_trial = [*(report.client for report in silent), *(failure.client for failure in left_out)]
        while True:
            directions = self._directions(number, len(reports))
            plan, total, lost, refused = self._sum(state, reports, number, len(members), directions)
            out = self._out(directions, refused, reports) if directions else []
            if not out:
                break
            left_out += out
            names = {failure.client for failure in out}
            reports = [report for report in reports if report.client not in names]
        self.observer.planned(number, reports, plan, self.layout)
        failures += [*lost, *left_out, *self._try(silent, number)]
        share = self.config.server.min_arrived
        summed = total.result(state.weights, share)
        weights, moments = self._optimise(state, summed, total.spread(share))
        moments = moments | self._center(state.weights, summed)
        with within(f"`then` of {self.config.algorithm.name} in round {number}"):
            algorithm_state = plan.then(total.streams(share), total.came(share)) if plan.then else plan.state
        self._refuse(number, check_state(algorithm_state))
        self._refuse(number, check_weights(weights))
        traffic.take(self.federation.moved(number))
        metrics = {
            **self._tested(number, weights),
            **describe_training(reports, self.config.privacy.on),
            **describe_plan(plan, self.layout, traffic, len(total.unchanged(share))),
            "clients": [report.client for report in reports],
            "failures": self._named(failures),
            **({"on_trial": on_trial} if on_trial else {}),
            "round_seconds": time.perf_counter() - started,
        }
        after = replace(
            state,
            round=number,
            weights=weights,
            algorithm=algorithm_state,
            moments=moments,
            public=self._public(state, weights),
        )
        return self._complete(after, metrics)

    def _refuse(self, number: int, problem: str | None) -> None:
        """End the run if there is a problem with a round's plan."""
        if problem:
            name = self.config.algorithm.name
            raise UserError(f"round {number}: the plan of {name} {problem}. The last complete round is kept.")

    def _optimise(self, state: ServerState, summed: Weights, spread: float) -> tuple[Weights, State]:
        """The server's own step along the summed updates (Reddi et al. 2021); groups that did not change stay."""
        options = self.config.server
        if options.optimizer == "average":
            return summed, state.moments
        return server_step(options, state.weights, summed, state.moments, spread, self.heap.keep)

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
        return {
            f"{CENTER}{group}": self.heap.keep(summed[group] - old[group])
            for group in old
            if summed[group] is not old[group]
        }

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

    def _try(self, silent: Sequence[Statistics], number: int) -> list[Failure]:
        """Ask those who delivered nothing for one group of their update: does it come as announced?"""
        if not silent:
            return []
        weight_C_G = torch.zeros(len(silent), len(self.layout.groups))
        weight_C_G[:, next(i for i, group in enumerate(self.layout.groups) if self.layout.sizes[group])] = 1
        trial = Plan(tuple(report.client for report in silent), weight_C_G / len(silent))
        norms = {report.client: report.norm_G for report in silent}
        ignored = StreamingSum(self.layout, trial, norms, self.config.wire.dtype)
        counted = ToldSum(ignored, number, lambda: None)
        reason = f"its word counts for nothing until it delivers: {PATIENCE} times no update of it could be used"
        return [
            *(Failure(report.client, "train", reason) for report in silent),
            *self.federation.collect(trial.requests(number, self.layout), counted),
        ]

    def _named(self, failures: Sequence[Failure]) -> list[dict[str, str]]:
        """Every fault of a round, for metrics and the live table."""
        return [vars(failure) for failure in (*self.federation.faults(), *failures)]

    def _public(self, state: ServerState, weights: Weights) -> PublicModel | None:
        """The weights that clients are to be told of these, where `state` was before; None: as they are."""
        dtype = self.config.wire.broadcasts
        if dtype not in BLOCKS:
            return None
        if state.public is None:
            return first(weights, dtype, self.heap.keep)
        seed = derive_seed(self.config.run.seed, state.round + 1, "broadcast")
        return following(state.public, state.weights, weights, dtype, seed, self.heap.keep)

    def _broadcast(self, state: ServerState, round: int, algorithm: State, *, score: bool = False) -> Broadcast:
        """The weights of a state, in the order of the layout: what comes of a checkpoint is in another."""
        public, dtype, groups = state.public, self.config.wire.broadcasts, self.layout.groups
        if public is not None:
            weights = {group: public.weights[group] for group in groups}
            return Broadcast(round, weights, algorithm, score, {}, public.differences, public.before)
        packed = {group: self._packed(state.weights[group], dtype) for group in groups}
        return Broadcast(round, packed, algorithm, score)

    def _packed(self, value: Tensor, dtype: WireDtype) -> Packed:
        """Weights in wire precision; a copy lies where the weights lie."""
        if self.heap.is_mapped and dtype == "bfloat16":  # what comes to be in memory first leaves holes there
            return Packed(self.heap.zeros(len(value), torch.bfloat16).copy_(value))
        packed = pack(value, dtype, seed=0)
        return packed if packed.values is value else Packed(self.heap.keep(packed.values), packed.scale)

    def _train(
        self, state: ServerState, number: int, chosen: Sequence[str], traffic: Traffic, scores: Scores
    ) -> tuple[list[Statistics], list[Failure]]:
        """Usable reports, and why there are no others; scores of the round before are added to `scores`."""
        broadcast = self._broadcast(state, number, state.algorithm, score=state.pending is not None)
        if self.config.training.loss == "label_shift":
            broadcast = replace(broadcast, labels=self.federation.labels())
        reports: dict[str, Statistics] = {}
        failures: list[Failure] = []
        widths = self.config.statistics.centroid_width, self.config.statistics.update_width
        shapes = asked_shapes(self.layout, self.config.asks, *widths)
        training, chats = self.config.training, self.config.data.has_chats
        self.observer.progress(number, "training", 0, len(chosen))
        for reply in self.federation.train(broadcast, chosen):
            if isinstance(reply, Failure) and reply.stage == "evaluate":
                scores.add(reply)  # its statistics come besides
                continue
            if isinstance(reply, Statistics):
                traffic.statistics += reply.nbytes
                traffic.up(reply.client, reply.nbytes)
                if broadcast.score and reply.score is not None and reply.round == number:
                    scores.add(reply.score)
                problem = check_statistics(reply, self.layout, shapes, number, training, chats)
                if problem is None:
                    reports[reply.client] = reply
                else:
                    failures.append(Failure(reply.client, "train", problem))
            else:
                failures.append(reply)
            self.observer.progress(number, "training", len(reports) + len(failures), len(chosen))
        usable = [reports[name] for name in chosen if name in reports]  # arrival order must not matter
        outliers = find_outliers(usable, self.config.norm_ratio)
        names = {failure.client for failure in outliers}
        return [report for report in usable if report.client not in names], [*failures, *outliers]

    def _sum(
        self,
        state: ServerState,
        reports: Sequence[Statistics],
        number: int,
        members: int,
        directions: Directions | None,
    ) -> tuple[Plan, StreamingSum, list[Failure], list[Failure]]:
        """Plan, ask for updates, and add them up; also all failures, and those of updates that arrived.

        Updates that were added whole are added to `directions`, too.
        """
        with within(f"`plan` of {self.config.algorithm.name} in round {number}"):
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

        counted = ToldSum(total, number, arrived, directions)
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
        exact: Average = "exact" if self.config.tuning.averages_products else "sum"
        last = {f"{CENTER}{group}": group for group in self.layout.groups}
        center = {last[name]: value for name, value in state.moments.items() if name in last}
        try:
            if rule in ("none", "clip"):
                return StreamingSum(self.layout, plan, norms, dtype, exact, by_sites=rule == "clip", heap=self.heap)
            return make_sum(
                rule,
                self.layout,
                plan,
                norms,
                dtype,
                hostile=options.hostile,
                radius=options.radius,
                center=center,
                heap=self.heap,
            )
        except ValueError as error:
            self._refuse(number, f"has {error}")
            raise

    def _alone(self, state: ServerState, line: Metrics) -> bool:
        """Whether a round that others may follow is scored by itself.

        After it the run may end, if its scores are bad or missing: then no broadcast follows. Or all clients are to
        score it and only some will train; or their data is pooled, and they do not train at all.
        """
        if by_itself(self.config, state.round):
            return True
        patience = self.config.run.patience
        if not patience or is_scored(line) or self.config.clients.sample < 1:  # it is known what ends the run
            return False
        as_feared = {"round": state.round, "accuracy": -math.inf, "loss_nats": math.inf}
        by = self.config.evaluation.best
        return not state.history or spent((*state.history, as_feared), patience, by) is not None

    def _tested(self, number: int, weights: Weights) -> Metrics:
        """The first part of a round's line: its number, and the score on the global test set."""
        everyone_alone = self.algorithm.private >= set(KINDS)
        if everyone_alone or not due(self.config, number):
            return {"round": number}
        self.observer.progress(number, "evaluating", 0, 1)
        overall = self.evaluate(number, weights)
        if overall is not None and (problem := check_evaluation(overall)):
            hint = "Nothing is trained yet: choose another model, or tuning.dtype = 'float32'."
            if number:
                remedy = "Try a lower training.learning_rate, or training.precision = 'float32'."
                hint = f"{remedy} The last complete round is kept."
            raise UserError(f"round {number}: the model cannot be scored on data.test: {problem}. {hint}")
        return {"round": number} | describe_test(overall)

    def _score(self, state: ServerState, line: Metrics) -> ServerState:
        """Have all clients score a round by itself, and complete its line."""
        started = time.perf_counter()
        told, failures = self._evaluated(state)
        down = self._moved_down(state.round, line.get("clients", ()))
        now = {
            "bytes_down": sum(down.values()),
            "bytes_down_by_client": down,
            "failures": [*line["failures"], *self._named([])],
            "round_seconds": line.get("round_seconds", 0.0) + time.perf_counter() - started,
        }
        line = {name: now.get(name, value) for name, value in line.items()}
        return self._scored(state, line, told, failures)

    def _moved_down(self, number: int, clients: Sequence[str]) -> dict[str, int]:
        """Bytes that a round, summed over these clients, has moved down so far, by client."""
        return dict(sorted(self.federation.moved(number).down.items()))

    def _evaluated(self, state: ServerState) -> tuple[Metrics, Sequence[Failure]]:
        """The scores of all clients, by name, and why some are missing."""
        scores, members = Scores(), self.federation.members()
        broadcast = self._broadcast(state, state.round, {})
        self.observer.progress(state.round, "evaluating", 0, len(members))
        for reply in self.federation.evaluate(broadcast, members):
            scores.add(reply)
            self.observer.progress(state.round, "evaluating", len(scores), max(len(scores), len(members)))
        return self._told(scores, all_asked=True), scores.failures

    def _told(self, scores: Scores, *, all_asked: bool) -> Metrics:
        """The clients' scores by name, with what a liar's count for where rules are on."""
        ratio = math.inf if self.config.robust == "none" else self.config.server.max_share_ratio
        return describe_clients(scores.of, all_asked=all_asked, ratio=ratio)

    def _scored(self, state: ServerState, line: Metrics, told: Metrics, failures: Sequence[Failure]) -> ServerState:
        """A round's line is complete; it is kept before it is told."""
        line = line | told
        line["failures"] = [*line["failures"], *map(vars, failures)]
        after = replace(state, history=(*state.history, self._last(state, line)), pending=None)
        self.checkpoints.save_scored(after)
        self._tell(after)
        return after

    def _complete(self, state: ServerState, line: Metrics) -> ServerState:
        """Checkpoint a round; where clients are to score it, its line is complete only then."""
        if scored_by_clients(self.config, state.round):
            return self._kept(replace(state, pending=line))
        state = self._kept(replace(state, history=(*state.history, self._last(state, line))))
        self._tell(state)
        return state

    def _kept(self, state: ServerState) -> ServerState:
        """The state, checkpointed."""
        self.checkpoints.save(state)
        return self.checkpoints.mapped(state)

    def _last(self, state: ServerState, line: Metrics) -> Metrics:
        """A round's line, with the reason if none follows though more were asked for."""
        why = spent((*state.history, line), self.config.run.patience, self.config.evaluation.best)
        return line | ({"stopped": why} if why and state.round < self.config.run.rounds else {})

    def _tell(self, state: ServerState) -> None:
        best = best_of(state.history, self.config.evaluation.best)
        self.observer.completed(state, improved=best is state.history[-1])


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


def due(config: Config, number: int) -> bool:
    """Whether a round is scored at all."""
    return number % config.evaluation.every == 0 or number == config.run.rounds or _by_all(config, number)


def scored_by_clients(config: Config, number: int) -> bool:
    """Whether clients score a round on what they hold out, with the next one or by itself."""
    return due(config, number) and config.evaluation.clients and bool(config.clients.held_out)


def by_itself(config: Config, number: int) -> bool:
    """Whether clients that score a round do so by itself, whatever its scores are: with a broadcast of its own to all.

    It is the last, or is for all clients though only some train in the next; or their data is pooled, and they do not
    train at all.
    """
    return number >= config.run.rounds or _by_all(config, number) or "data" in config.asks


def _by_all(config: Config, number: int) -> bool:
    every = config.evaluation.everyone
    return config.clients.sample < 1 and (number == 0 or (every > 0 and number % every == 0))


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
