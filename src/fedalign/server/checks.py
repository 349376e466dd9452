"""Why a report or a plan cannot be used. A bad report is dropped and its client named; a bad plan ends the run.

Reports are held against what is possible. What a client withholds, or drops for want of room, makes loads and counts
smaller, so they have no least sum. Float32 sums of shares and of whole numbers may be off by 0.1 % (`SUM_SLACK`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedalign.config.run import TrainingConfig
from fedalign.maths.average import CHUNK
from fedalign.maths.tensor_file import unwritable
from fedalign.protocol import (
    MOST_LOSS,
    UNIT,
    Evaluation,
    Failure,
    HeldOut,
    Layout,
    Plan,
    Shape,
    State,
    Statistics,
    Weights,
)

OF_EVERY_ROUND = {  # in metrics.jsonl; no algorithm fills them in, nor those that begin like these
    "accuracy",
    "clients",
    "experts_held_by_nobody",
    "experts_held_share",
    "failures",
    "groups_unchanged",
    "held_out_examples",
    "loss_nats",
    "on_trial",
    "perplexity",
    "round",
    "round_seconds",
    "routing_divergence_nats",
    "stopped",
    "test_examples",
    "token_rows_of_one_kept",
    "train_examples",
    "train_loss_nats",
    "unscored",
    "uploaded_share",
}
OF_A_KIND = ("bytes_", "client_", "privacy_")
ROUNDED = 1e-3  # nats below zero that a loss may be: it has none, but float16 rounds
MOST = 1e15  # of any number: its square is still one in float32, and so is that of its inverse
WITHHELD = ("token_count_M_V", "token_met_M_B")  # what a client may keep to itself
SUM_SLACK = 1e-3  # of sums: rounding


def check_statistics(
    report: Statistics,
    layout: Layout,
    shapes: Mapping[str, Shape],
    round: int,
    training: TrainingConfig | None = None,
    chats: bool = False,
) -> str | None:
    """Why a report cannot be used, or None.

    Args:
        report: a client's.
        layout: the model's groups.
        shapes: of what was asked for.
        round: that was asked for.
        training: what was asked for; None: not known.
        chats: whether an example may be several sequences.
    """
    if report.round != round:
        return f"its statistics are of round {report.round}, not {round}"
    for name in ("examples", "tokens", "steps", "learning_rate"):
        if not 1 / MOST <= getattr(report, name) <= MOST:
            return f"{name} = {getattr(report, name)}: must be above 0 and possible"
    if not 0 <= report.loss <= MOST or not all(abs(value) <= MOST for value in report.metrics.values()):
        return f"its loss is {report.loss}, its metrics {dict(report.metrics)}: must be possible numbers"
    if training is not None and (flaw := _undoable(report, training, chats)):
        return flaw
    if strange := set(report.frozen) - set(layout.groups):
        return f"it did not train {min(strange)}, which the model does not have"
    for name, (shape, dtype) in shapes.items():
        value: Tensor = getattr(report, name)
        withheld = name in WITHHELD and value.numel() == 0 and value.dim() == len(shape)
        if (value.shape != shape and not withheld) or value.dtype != getattr(torch, dtype):
            return f"{name} is {value.dtype} {list(value.shape)}, expected torch.{dtype} {list(shape)}"
        if not bool(value.isfinite().all()):
            return f"{name} is not finite"
        least, most = _bounds(name, report, layout)
        if not bool(((least <= value) & (value <= most)).all()):
            return f"{name} is negative or impossibly large: must lie between {least:g} and {most:g}"
    if bool(((report.prob_L_E.sum(-1) - 1).abs() > SUM_SLACK).any()):
        return "prob_L_E does not sum to one over the experts of each layer"
    return _too_much(report, layout)


def _undoable(report: Statistics, training: TrainingConfig, chats: bool) -> str | None:
    """Why nobody can have trained so: a step takes a sequence at least, and the rate is the coordinator's."""
    most = training.epochs * (report.tokens if chats else report.examples)
    if report.steps > most:
        return f"steps = {report.steps}: with {report.examples} examples and {training.epochs} epochs at most {most}"
    if not math.isclose(report.learning_rate, training.learning_rate, rel_tol=SUM_SLACK):
        return (
            f"learning_rate = {report.learning_rate}: training.learning_rate = {training.learning_rate} was asked for"
        )
    return None


def _too_much(report: Statistics, layout: Layout) -> str | None:
    """Why sums over experts or tokens are more than its tokens allow, or None."""
    most = report.tokens * (1 + SUM_SLACK)
    for layer, (top_k, load) in enumerate(zip(layout.top_k_L, report.load_L_E.double().sum(1).tolist(), strict=False)):
        if load > top_k * most:
            return f"load_L_E of layer {layer} sums to {load:g}: {report.tokens} tokens go to {top_k} experts each"
    counts = report.token_count_M_V.double().sum(1).tolist() if not layout.two_sided else []
    if counts and max(counts) > most:
        return f"token_count_M_V sums to {max(counts):g}, of {report.tokens} tokens"
    tokens = layout.token_cells[1]
    met_M_B = report.token_met_M_B
    if met_M_B.numel() and tokens % 8 and bool((met_M_B[:, -1] >> tokens % 8).any()):
        return f"token_met_M_B has tokens beyond the last, {tokens - 1}"
    return None


def _bounds(name: str, report: Statistics, layout: Layout) -> tuple[float, float]:
    """Least and most that a value of a field can be. A token is sent to an expert once."""
    unit = 1 + SUM_SLACK
    return {
        "prob_L_E": (0, unit),
        "load_L_E": (0, report.tokens),
        "margin_L_E": (0, unit),
        "centroid_L_E_D": (-unit, unit),
        "update_L_E_S": (-unit, unit),
        "token_count_M_V": (0, MOST if layout.two_sided else report.tokens),
        "token_met_M_B": (0, 255),
    }.get(name, (0, MOST))


def check_plan(plan: object, reports: Sequence[Statistics], layout: Layout) -> str | None:
    """Why what an algorithm plans cannot be used, or None: words after its name, as "has ..."."""
    if not isinstance(plan, Plan):
        return f"is {plan!r}, and no Plan"
    clients = tuple(report.client for report in reports)
    if plan.clients != clients:
        return f"has clients {plan.clients}, asked were {clients}"
    cells = (len(clients), len(layout.groups))
    tables: dict[str, tuple[object, tuple[int, ...], bool]] = {
        "weights": (plan.weight_C_G, cells, True),
        "factors": (plan.factor_C_G, cells, False),
    }
    if flaw := unwritable(plan.streams):
        return f"has streams: {flaw}"
    tables |= {f"stream {name}": (stream_C_G, cells, False) for name, stream_C_G in plan.streams.items()}
    tables["token weights"] = (plan.token_weight_C_M_V, (len(clients), *layout.token_cells), True)
    for name, (table, shape, is_weight) in tables.items():
        if table is None:
            continue
        if not isinstance(table, Tensor):
            return f"has {name} that are {table!r:.60}, and no tensor"
        if table.shape != shape or not bool(table.isfinite().all()):
            return f"has {name} {list(table.shape)} that are not finite, or not {list(shape)}"
        total = table.double().sum(0)
        if is_weight and bool((table < 0).any() | ((total - 1).abs().minimum(total.abs()) > SUM_SLACK).any()):
            return f"has {name} that are negative, or sum over clients to neither 0 nor 1"
    return _check_metrics(plan.metrics)


def _check_metrics(metrics: Mapping[str, float]) -> str | None:
    """Why what an algorithm says about a round cannot stand in the round's line, or None."""
    if taken := sorted(name for name in metrics if name in OF_EVERY_ROUND or name.startswith(OF_A_KIND)):
        return f"has a metric {taken[0]}, which each round has of its own: choose another name"
    broken = [name for name, value in metrics.items() if not (isinstance(value, int | float) and math.isfinite(value))]
    return f"has a metric {broken[0]} = {metrics[broken[0]]!r}, which is no finite number" if broken else None


def check_state(state: State) -> str | None:
    """Why what an algorithm would broadcast next cannot be used, or None."""
    if flaw := unwritable(state):
        return f"has a state: {flaw}"
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    return f"has a state that is not finite: {broken[0]}" if broken else None


def check_weights(weights: Weights) -> str | None:
    """Why a round's new weights cannot be kept, or None."""
    broken = [
        group for group, value in weights.items() if not all(bool(part.isfinite().all()) for part in value.split(CHUNK))
    ]
    return f"leads to weights that are not finite: {broken[0]}" if broken else None


def check_evaluation(score: Evaluation) -> str | None:
    """Why a client's score cannot be used, or None."""
    if not 0 < score.examples <= MOST or not -ROUNDED <= score.loss <= MOST:
        return f"its loss is {score.loss} on {score.examples} examples"
    if score.accuracy is not None and not 0 <= score.accuracy <= 1:
        return f"its accuracy is {score.accuracy}"
    return None


def check_held_out(total: HeldOut, clients: int) -> str | None:
    """Why the sum of so many clients' scores cannot be one, or None."""
    one_by_one = 0 <= total.clients <= min(clients, total.examples) and total.examples <= total.clients * MOST
    right = 0 <= total.right <= total.judged <= total.examples
    loss = 0 <= total.loss <= total.examples * MOST_LOSS * UNIT
    if one_by_one and right and loss:
        return None
    return (
        f"the scores of {clients} clients together are impossible: one of them counts falsely, or scored other "
        "weights, so that its masks do not cancel"
    )


def reasons(failures: Sequence[Failure], most: int = 5) -> str:
    """Why clients are missing, each reason once, with the names of `most` clients; empty: none is.

    >>> print(reasons([Failure("a", "train", "gone"), Failure("b", "train", "full"), Failure("c", "train", "full")]))
    a: gone; b, c: full
    >>> print(reasons([Failure(name, "train", "full") for name in "abcd"], most=2))
    a, b and 2 more: full
    """
    names = defaultdict[str, list[str]](list)
    for failure in failures:
        names[failure.reason].append(failure.client)
    more = {why: f" and {len(who) - most} more" if len(who) > most else "" for why, who in names.items()}
    return "; ".join(f"{', '.join(who[:most])}{more[why]}: {why}" for why, who in names.items())


def find_outliers(reports: Sequence[Statistics], ratio: float) -> list[Failure]:
    """Clients whose whole update is longer than `ratio` median ones: broken, and enough to break the model. 0: none."""
    if not ratio or len(reports) < 2:
        return []
    norm_C = torch.stack([report.norm_G for report in reports]).double().norm(dim=1)
    median = float(norm_C.median())  # the lower one of two
    return [
        Failure(
            report.client,
            "train",
            f"its update is {norm / median:.3g} times as long as the median one, server.max_norm_ratio = {ratio:g}",
        )
        for report, norm in zip(reports, norm_C.tolist(), strict=True)
        if norm > ratio * median > 0
    ]
