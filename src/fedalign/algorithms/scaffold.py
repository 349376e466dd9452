"""SCAFFOLD: control variates against client drift (Karimireddy et al. 2020, arXiv 1910.06378, option II).

    client    g ← g − c_i + c at each of its K steps;   c_i ← c_i − c − Δ_i / (K·η)      η: the client's learning rate
    server    w ← w + Σ_i (n_i / Σ n) Δ_i;   c ← c − (|S| / N) · (c + mean over the S clients of Δ_i / (K_i·η))

The change of c is a second sum over the same updates, so clients send nothing more than in FedAvg; c travels down with
the weights. Exact for optimizer = "sgd" with a constant rate; with AdamW, Δ / (K·η) is not a mean gradient and this is
a heuristic [O]. The paper weights clients alike; n_i / Σ n is ours [O].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedalign.algorithms.fedavg import FedAvg
from fedalign.protocol import Layout, LocalRound, ParameterGroup, Plan, State, Statistics, Weights

CONTROL, PARTICIPANTS = "control", "participants"


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """FedAvg whose clients correct their gradients by what they know of everybody's."""

    @property
    def corrects(self) -> bool:
        """Every step."""
        return True

    @property
    def spans_rounds(self) -> bool:
        """Control variates are of earlier rounds."""
        return True

    def plan(self, reports: Sequence[Statistics], layout: Layout, state: State) -> tuple[Plan, State]:
        """FedAvg's weights, and a stream whose sum is the mean of Δ_i / (K_i·η)."""
        plan, state = super().plan(reports, layout, state)
        per_step_C = torch.tensor(
            [1 / (len(reports) * report.metrics["steps"] * report.metrics["learning_rate"]) for report in reports]
        )
        stream_C_G = (per_step_C[:, None] / plan.weight_C_G).nan_to_num(posinf=0.0)
        if CONTROL not in state:
            state = {**state, CONTROL: torch.zeros(sum(layout.sizes[group] for group in layout.groups))}
        state = {**state, PARTICIPANTS: torch.tensor(float(len(reports)))}
        return Plan(plan.clients, plan.weight_C_G, streams={CONTROL: stream_C_G}), state

    def apply(self, state: State, sums: Mapping[str, Weights], layout: Layout, members: int) -> State:
        """C ← c − (|S| / N) · (c + the stream's sum); groups that did not arrive keep theirs."""
        share = float(state[PARTICIPANTS]) / members
        control = split(state[CONTROL], layout.sizes)
        for group, mean in sums[CONTROL].items():
            control[group] = control[group] - share * (control[group] + mean)
        return {**state, CONTROL: join(control)}

    def correct(self, local: LocalRound, gradients: Mapping[ParameterGroup, Sequence[Tensor]]) -> None:
        """G ← g − c_i + c."""
        if CONTROL not in local.state:
            return
        sizes = {group: len(value) for group, value in local.start.items()}
        everybody = split(local.state[CONTROL], sizes)
        own = split(local.kept[CONTROL], sizes) if CONTROL in local.kept else None
        for group, pieces in gradients.items():
            shift = everybody[group] if own is None else everybody[group] - own[group]
            for piece, part in zip(pieces, torch.split(shift, [piece.numel() for piece in pieces]), strict=True):
                piece.add_(part.to(piece.device).view_as(piece))

    def end(self, local: LocalRound, update: Weights, steps: int) -> Mapping[str, Tensor]:
        """c_i ← c_i − c − Δ_i / (K·η)."""
        control = -join({group: value.cpu() for group, value in update.items()})
        control /= max(1, steps) * local.learning_rate
        control -= local.state.get(CONTROL, torch.zeros(()))
        return {CONTROL: control + local.kept.get(CONTROL, torch.zeros(()))}


def join(weights: Weights) -> Tensor:
    """All groups as one flat vector, in the order that groups have of themselves."""
    return torch.cat([weights[group] for group in sorted(weights)])


def split(flat: Tensor, sizes: Mapping[ParameterGroup, int]) -> Weights:
    """The inverse of `join`; the parts are views."""
    groups = sorted(sizes)
    return dict(zip(groups, torch.split(flat, [sizes[group] for group in groups]), strict=True))
