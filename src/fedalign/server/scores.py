"""Scores of a round: merit, accuracy, loss, and costs."""

from __future__ import annotations

import math
import statistics as stats
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedalign.config.run import Measure
from fedalign.protocol import MOST_LOSS, UNIT, Evaluation, Failure, HeldOut, Layout, Metrics, Moved, Plan, Statistics
from fedalign.server.checks import check_evaluation

MEANS = (  # over clients
    "client_loss_mean_nats",
    "client_accuracy_mean",
    "client_accuracy_weighted",
    "client_accuracy_worst",
    "client_accuracy_spread",
)


@dataclass
class Traffic:
    """Bytes of one round as they would travel, all clients together."""

    down: int = 0
    statistics: int = 0
    updates: int = 0
    up_by_client: dict[str, int] = field(default_factory=dict)
    down_by_client: dict[str, int] = field(default_factory=dict)

    def take(self, moved: Moved) -> None:
        """Count the weights and updates that a round has moved."""
        self.down, self.down_by_client = sum(moved.down.values()), dict(sorted(moved.down.items()))
        self.updates = sum(moved.up.values())
        for client, nbytes in sorted(moved.up.items()):
            self.up(client, nbytes)

    def up(self, client: str, nbytes: int) -> None:
        """Count what a client sent."""
        self.up_by_client[client] = self.up_by_client.get(client, 0) + nbytes


@dataclass
class Scores:
    """The clients' scores of one round's weights, as they come."""

    of: list[Evaluation] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def add(self, reply: Evaluation | Failure) -> None:
        """Take a score, if it can be used."""
        if isinstance(reply, Failure):
            self.failures.append(reply)
        elif problem := check_evaluation(reply):
            self.failures.append(Failure(str(reply.client), "evaluate", problem))
        else:
            self.of.append(reply)

    def __len__(self) -> int:
        """How many came."""
        return len(self.of) + len(self.failures)


def accuracy_of(metrics: Mapping[str, Any]) -> float | None:
    """The accuracy that a round is known by: the global one, else the clients', weighted by their examples."""
    accuracy: float | None = metrics.get("accuracy", metrics.get("client_accuracy_weighted"))
    return accuracy


def loss_of(metrics: Mapping[str, Any]) -> float | None:
    """The loss that a round is known by, nats: the global one, else the clients' mean."""
    loss: float | None = metrics.get("loss_nats", metrics.get("client_loss_mean_nats"))
    return loss


def rows_of(metrics: Mapping[str, Any]) -> int | None:
    """The examples that accuracy and loss of a round are of; None: it does not say.

    >>> rows_of({"test_examples": 30}), rows_of({"client_examples": {"a": 2, "b": 3}}), rows_of({})
    (30, 5, None)
    """
    overall: int | None = metrics.get("test_examples")
    return overall or held_out_rows(metrics) or None


def held_out_rows(metrics: Mapping[str, Any]) -> int:
    """The held-out examples that clients scored in a round, all together; also where no client tells its own.

    >>> held_out_rows({"client_examples": {"a": 2, "b": 3}}), held_out_rows({"held_out_examples": 7}), held_out_rows({})
    (5, 7, 0)
    """
    together: int = metrics.get("held_out_examples", sum(metrics.get("client_examples", {}).values()))
    return together


def scored_on(metrics: Mapping[str, Any], part: str) -> str:
    """Whose accuracy and loss those of a round are, and of how many rows; empty for a round without evaluation.

    >>> scored_on({"loss_nats": 1.0, "test_examples": 30}, "test"), scored_on({}, "test")
    ('global test set, n = 30', '')
    """
    if loss_of(metrics) is None:
        return ""
    whose = f"global {part} set" if "loss_nats" in metrics else "clients' held-out parts, weighted by examples"
    count = rows_of(metrics)
    return f"{whose}, n = {count:,}" if count else whose


def is_scored(metrics: Mapping[str, Any]) -> bool:
    """Whether a round has an accuracy or a loss that it is known by."""
    return accuracy_of(metrics) is not None or loss_of(metrics) is not None


def measure_of(metrics: Mapping[str, Any], by: Measure) -> Measure:
    """The measure that a round is judged by, as of `evaluation.best`: of one without an accuracy it is the loss."""
    return by if accuracy_of(metrics) is not None else "loss"


def merit(metrics: Mapping[str, Any], by: Measure) -> float | None:
    """The merit by which rounds are "best": accuracy, or minus the loss; None for a round without evaluation.

    Args:
        metrics: of the round.
        by: `evaluation.best`.

    >>> merit({"accuracy": 0.5, "loss_nats": 2.0}, "accuracy"), merit({"accuracy": 0.5, "loss_nats": 2.0}, "loss")
    (0.5, -2.0)
    >>> merit({"loss_nats": 2.0}, "accuracy"), merit({}, "loss")
    (-2.0, None)
    """
    if measure_of(metrics, by) == "accuracy":
        return accuracy_of(metrics)
    loss = loss_of(metrics)
    return None if loss is None else -loss


def best_of(history: Sequence[Metrics], by: Measure) -> Metrics | None:
    """The line of the best round, of equals the first; None: no round was scored.

    Where clients' scores tell, a round is held against the best before it on the clients that scored both.

    >>> def line(number, **right):
    ...     scores = [Evaluation(name, 5, 1.0, accuracy) for name, accuracy in right.items()]
    ...     return {"round": number} | describe_clients(scores, all_asked=True)
    >>> best_of([line(0, a=0.8, b=0.2), line(1, a=0.7), line(2, a=0.7, b=0.6)], "accuracy")["round"]
    2
    >>> best_of([line(0, a=0.8, b=0.2), line(1, a=0.8)], "accuracy")["round"]  # that b is away is no merit
    0
    """
    best: Metrics | None = None
    for line in history:
        if merit(line, by) is not None and (best is None or _is_better(line, best, by)):
            best = line
    return best


def _is_better(line: Metrics, best: Metrics, by: Measure) -> bool:
    """Whether a round has more merit than another, as told by the clients that scored both."""
    scorers = [one.get("client_losses_nats", {}).keys() for one in (line, best)]
    if scorers[0] != scorers[1] and scorers[0] & scorers[1] and "loss_nats" not in line:
        both = scorers[0] & scorers[1]
        line, best = (describe_clients(_scores_of(one, both), all_asked=True) for one in (line, best))
    new, old = merit(line, by), merit(best, by)
    return new is not None and old is not None and new > old


def _scores_of(line: Metrics, clients: Collection[str]) -> list[Evaluation]:
    """Some clients' scores of a round."""
    losses, accuracies = line["client_losses_nats"], line.get("client_accuracies", {})
    counts = line["client_examples_counted" if "client_examples_counted" in line else "client_examples"]
    return [Evaluation(name, counts[name], losses[name], accuracies.get(name)) for name in clients]


def beside(line: Metrics, other: Metrics) -> Metrics:
    """A round's line to be shown beside another, without the means over clients where others have scored that one.

    >>> line = {"round": 0, "client_losses_nats": {"a": 2.0}, "client_loss_mean_nats": 2.0}
    >>> beside(line, {"client_losses_nats": {"a": 1.0}}) == line
    True
    >>> sorted(beside(line, {"client_losses_nats": {"b": 1.0}}))
    ['client_losses_nats', 'round']
    """
    scorers, others = (one.get("client_losses_nats", {}).keys() for one in (line, other))
    if not others or scorers == others:
        return line
    return {name: value for name, value in line.items() if name not in MEANS}


def best_called(measure: Measure) -> str:
    """The best of a measure, in words.

    >>> best_called("accuracy"), best_called("loss")
    ('highest accuracy', 'lowest loss')
    """
    return "highest accuracy" if measure == "accuracy" else "lowest loss"


def spent(history: Sequence[Metrics], patience: int, by: Measure) -> str | None:
    """Why a run ends early: as many scored rounds as it has patience for, none of them better; None: it goes on.

    >>> line = [{"round": n, "accuracy": score} for n, score in enumerate([0.1, 0.5, 0.5])]
    >>> spent(line, 2, "accuracy"), spent([*line, {"round": 3}], 2, "accuracy")  # what was not scored does not count
    (None, None)
    >>> spent([*line, {"round": 3}, {"round": 4, "accuracy": 0.4}], 2, "accuracy")
    'run.patience = 2: the highest accuracy is of round 1, rounds scored since: 2'
    """
    best = best_of(history, by)
    if best is None or not patience:
        return None
    since = sum(is_scored(line) for line in history if line["round"] > best["round"])
    what = best_called(measure_of(best, by))
    told = f"run.patience = {patience}: the {what} is of round {best['round']}, rounds scored since: {since}"
    return told if since >= patience else None


def describe_test(overall: Evaluation | None) -> Metrics:
    """The score on the global test set by name."""
    if overall is None:
        return {}
    metrics: Metrics = {"loss_nats": overall.loss, "perplexity": _exp(overall.loss), "test_examples": overall.examples}
    return metrics if overall.accuracy is None else metrics | {"accuracy": overall.accuracy}


def describe_clients(replies: Sequence[Evaluation], *, all_asked: bool, ratio: float = math.inf) -> Metrics:
    """Scores over the clients' own held-out parts by name.

    Means are of all clients: where only some were asked there are none, since those of other rounds are of others.

    Args:
        replies: scores that were checked.
        all_asked: whether all clients were.
        ratio: against liars, no client counts in means for more examples than so many times the median one's, and no
            loss for more than MOST_LOSS [O]. How many a site holds out is its own word: with it one alone could say
            which round is the best, and end the run.
    """
    scores = sorted(replies, key=lambda score: str(score.client))  # arrival order must not matter
    metrics: Metrics = {}
    if scores:
        metrics["client_examples"] = {str(score.client): score.examples for score in scores}
    if scores and ratio < math.inf:
        most = max(1, int(ratio * stats.median_low([score.examples for score in scores])))
        if any(score.examples > most for score in scores):
            scores = [replace(score, examples=min(score.examples, most)) for score in scores]
            metrics["client_examples_counted"] = {str(score.client): score.examples for score in scores}
        scores = [replace(score, loss=min(max(score.loss, 0.0), MOST_LOSS)) for score in scores]
    if scores:
        metrics["client_losses_nats"] = {str(score.client): score.loss for score in scores}
    accuracies = {str(score.client): score.accuracy for score in scores if score.accuracy is not None}
    if accuracies:
        metrics["client_accuracies"] = accuracies
    if scores and all_asked:
        examples = sum(score.examples for score in scores)
        metrics["client_loss_mean_nats"] = sum(score.loss * score.examples for score in scores) / examples
    if accuracies and all_asked:
        counted = [score.examples for score in scores if score.accuracy is not None]
        right = [score.examples * score.accuracy for score in scores if score.accuracy is not None]
        metrics |= {
            "client_accuracy_mean": stats.fmean(accuracies.values()),
            "client_accuracy_weighted": sum(right) / sum(counted),
            "client_accuracy_worst": min(accuracies.values()),
            "client_accuracy_spread": stats.pstdev(accuracies.values()),
        }
    return metrics


def describe_held_out(total: HeldOut, least: int) -> Metrics:
    """Scores over held-out parts by name, of the sum over all clients; none where fewer than `least` have scored.

    Nor is an accuracy, where some clients have none: of how many others it is nobody counts.

    >>> describe_held_out(HeldOut(3, 10, 10, 6, 5 * UNIT), 3)
    {'held_out_examples': 10, 'client_loss_mean_nats': 0.5, 'client_accuracy_weighted': 0.6}
    >>> describe_held_out(HeldOut(3, 10, 8, 6, 5 * UNIT), 3)["unscored"]
    'accuracy of 8 of 10 held-out examples: of how many clients is not counted, privacy.masked_min_holders = 3'
    >>> describe_held_out(HeldOut(2, 10, 10, 6, 5 * UNIT), 3)
    {'unscored': '2 clients told a score, privacy.masked_min_holders = 3'}
    """
    if total.clients < least:
        told = f"{total.clients} client{'' if total.clients == 1 else 's'} told a score"
        return {"unscored": f"{told}, privacy.masked_min_holders = {least}"}
    scores = {"held_out_examples": total.examples, "client_loss_mean_nats": total.loss / UNIT / total.examples}
    if total.judged in (0, total.examples):
        return scores | ({"client_accuracy_weighted": total.right / total.judged} if total.judged else {})
    judged = f"accuracy of {total.judged} of {total.examples} held-out examples"
    why = f"of how many clients is not counted, privacy.masked_min_holders = {least}"
    return scores | {"unscored": f"{judged}: {why}"}


def describe_training(reports: Sequence[Statistics], private: bool = False) -> Metrics:
    """Metrics of a round's training, from the statistics; of a private run what it has cost each client so far."""
    examples = sum(report.examples for report in reports)
    if private:  # no site tells its loss, its routing, or how long it took
        epsilons = {r.client: r.metrics["privacy_epsilon"] for r in reports if "privacy_epsilon" in r.metrics}
        deltas = [report.metrics.get("privacy_delta", 1.0) for report in reports]
        return {"train_examples": examples, "privacy_epsilons": epsilons, "privacy_delta": max(deltas)}
    return {
        "train_loss_nats": sum(report.loss * report.examples for report in reports) / examples,
        "train_examples": examples,
        "routing_divergence_nats": routing_divergence(torch.stack([report.prob_L_E for report in reports])),
        "experts_held_share": float(torch.stack([report.held_L_E for report in reports]).float().mean()),
        "experts_held_by_nobody": int((~torch.stack([r.held_L_E for r in reports]).any(0)).sum()),
        "client_train_seconds": sum(report.metrics.get("train_seconds", 0.0) for report in reports),
    }


@dataclass(frozen=True)
class Spent:
    """The largest epsilon that a client has told, and delta."""

    epsilon: float
    delta: float
    whole: bool  # else a client was asked to train after it last told what it had spent, and may have spent more

    def most(self, agreed: float | None) -> float | None:
        """No client has spent more, if the run's epsilon is this; None: nobody but the clients knows."""
        return self.epsilon if self.whole else agreed


def epsilon_spent(history: Sequence[Metrics], asked: int) -> Spent | None:
    """The cost of a run to an example of some client; None: no client has told any.

    Args:
        history: of the complete rounds.
        asked: the last round that clients were asked to train, complete or not.

    >>> epsilon_spent([{"round": 1, "privacy_epsilons": {"a": 1.5, "b": 2.0}, "privacy_delta": 1e-5}], asked=1)
    Spent(epsilon=2.0, delta=1e-05, whole=True)
    """
    told = [(cost, line["privacy_delta"]) for line in history for cost in line.get("privacy_epsilons", {}).values()]
    if not told:
        return None
    silent = set[str]()
    for line in history:
        silent |= {failure["client"] for failure in line.get("failures", ())}
        silent -= line.get("privacy_epsilons", {}).keys()
    return Spent(*max(told), whole=not silent and history[-1]["round"] >= asked)


def routing_divergence(prob_C_L_E: Tensor) -> float:
    """Mean over clients and layers of KL(p̄_c ‖ mean over clients of p̄_c), nats.

    >>> routing_divergence(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))  # doctest: +ELLIPSIS
    0.693...
    """
    mean_L_E = prob_C_L_E.mean(0)
    return float(torch.special.xlogy(prob_C_L_E, prob_C_L_E / mean_L_E).nansum(-1).mean())


def describe_plan(plan: Plan, layout: Layout, traffic: Traffic, skipped: int) -> Metrics:
    """How selective the plan was, and what it cost."""
    size_G = torch.tensor([layout.sizes[group] for group in layout.groups], dtype=torch.float64)
    asked = float((plan.wanted(layout).double() @ size_G).sum())
    return {
        **plan.metrics,
        "uploaded_share": asked / (float(size_G.sum()) * len(plan.clients)),
        "groups_unchanged": skipped,
        "bytes_up": traffic.statistics + traffic.updates,
        "bytes_up_statistics": traffic.statistics,
        "bytes_up_by_client": traffic.up_by_client,
        "bytes_down": traffic.down,
        "bytes_down_by_client": traffic.down_by_client,
    }


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
