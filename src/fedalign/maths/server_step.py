"""The server's own step along the summed updates: FedOpt (Reddi et al. 2021, arXiv 2003.00295) and FedExP.

With d = the summed update of a group (new minus old), which FedAvg simply adds:

    sgd      m ← β1·m + d;                     w ← w + η·m                        [FedAvgM with momentum β1]
    adam     m ← β1·m + (1 − β1)·d;  v ← β2·v + (1 − β2)·d²;       w ← w + η·m / (√v + ε)
    yogi     as adam, but  v ← v − (1 − β2)·d²·sign(v − d²)
    fedexp   w ← w + max(1, Σ_c b_c ‖Δ_c‖² / (2 (‖d‖² + ε)))·d   (Jhunjhunwala et al. 2023, arXiv 2301.09604)

Groups whose sum did not change (nobody sent them, or too little arrived) stay, and so do their moments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fedalign.protocol import ServerOptimizer, State, Weights


class ServerOptions(Protocol):
    """Options of `server_step`; `[server]` of the configuration."""

    @property
    def optimizer(self) -> ServerOptimizer:
        """Which rule."""

    @property
    def learning_rate(self) -> float:
        """η; not used by average and fedexp."""

    @property
    def momentum(self) -> float:
        """β1."""

    @property
    def beta2(self) -> float:
        """β2 of adam and yogi."""

    @property
    def epsilon(self) -> float:
        """ε."""


def server_step(
    options: ServerOptions,
    old: Weights,
    summed: Weights,
    moments: State,
    spread: float,
    keep: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> tuple[Weights, State]:
    """New weights, and the moments for the next round.

    Args:
        options: the rule and its numbers.
        old: the weights that the round started from, flat float32 [N] by group.
        summed: the same plus the summed updates; a group that is the same tensor as in `old` did not change.
        moments: what this function returned after the last round; empty at first.
        spread: Σ over clients and groups of b · ‖Δ‖², for fedexp.
        keep: puts what a group has come to where it shall lie; see `maths.heap`.
    """
    changed = [group for group, value in summed.items() if value is not old[group]]
    if options.optimizer == "fedexp":
        length = sum(float((summed[group] - old[group]).double().square().sum()) for group in changed)
        stretch = max(1.0, spread / (2 * (length + options.epsilon)))
        longer = {group: keep(old[group] + stretch * (summed[group] - old[group])) for group in changed}
        return summed | longer, moments
    new, moments = dict(summed), dict(moments)
    for group in changed:
        step = summed[group] - old[group]
        zero = torch.zeros_like(step)
        first, second = f"first.{group}", f"second.{group}"
        if options.optimizer == "sgd":
            moments[first] = keep(options.momentum * moments.get(first, zero) + step)
            new[group] = keep(old[group] + options.learning_rate * moments[first])
            continue
        moments[first] = keep(options.momentum * moments.get(first, zero) + (1 - options.momentum) * step)
        before, square = moments.get(second, zero), step.square()
        moved = square - before if options.optimizer == "adam" else square * torch.sign(square - before)
        moments[second] = keep(before + (1 - options.beta2) * moved)
        stepped = options.learning_rate * moments[first] / (moments[second].sqrt() + options.epsilon)
        new[group] = keep(old[group] + stepped)
    return new, moments
