"""SCAFFOLD: control variates against client drift (Karimireddy et al. 2020, arXiv 1910.06378, option II).

    client    g ← g − c_i + c at each of its K steps;   c_i ← c_i − c − Δ_i / (K·η)      η: the client's learning rate
    server    w ← w + Σ_i (n_i / Σ n) Δ_i;   c ← c − (|S| / N) · (c + mean over the S clients of Δ_i / (K_i·η))

S are the clients whose update of a group arrived; of a group that a client does not train, its c_i stays. So c is the
mean of all c_i, but where an update is lost: its client has changed its c_i, and nobody heard of it [O]. The change of
c is a second sum over the same updates, so clients send nothing more than in FedAvg; c travels down with the weights.
Exact for optimizer = "sgd" with a constant rate; with AdamW, Δ / (K·η) is not a mean gradient and this is a heuristic
[O]. The paper weights clients alike; n_i / Σ n is ours [O].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedalign.algorithms.fedavg import FedAvg
from fedalign.maths import torch
from fedalign.protocol import LocalRound, ParameterGroup, Plan, Reports, State, Weights

if TYPE_CHECKING:
    from torch import Tensor

CONTROL = "control"


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """FedAvg whose clients correct their gradients by what they know of everybody's."""

    def plan(self, reports: Reports, state: State) -> Plan:
        """FedAvg's weights, and a stream whose sum is that of Δ_i / (K_i·η)."""
        per_step_C = (1 / (reports.column("steps") * reports.column("learning_rate"))).float()
        sizes = reports.layout.sizes
        control = state.get(CONTROL, torch.zeros(sum(sizes.values())))

        def then(sums: Mapping[str, Weights], came: Mapping[ParameterGroup, int]) -> State:
            """C ← c − (|S|·c + the stream's sum) / N; groups that did not arrive keep theirs."""
            new = split(control.clone(), sizes)
            for group, moved in sums[CONTROL].items():
                new[group] -= (came[group] * new[group] + moved) / reports.members
            return {CONTROL: join(new)}

        stream_C_G = per_step_C[:, None].expand(-1, len(reports.layout.groups))
        return reports.plan(streams={CONTROL: stream_C_G}, then=then)

    def begin(self, local: LocalRound) -> None:
        """G ← g − c_i + c at every step."""
        if CONTROL in local.state:
            shift = local.state[CONTROL] - local.kept.get(CONTROL, torch.zeros(()))
            local.shift = split(shift, {group: len(value) for group, value in local.start.items()})

    def keep(self, local: LocalRound, update: Mapping[ParameterGroup, Tensor]) -> Mapping[str, Tensor]:
        """c_i ← c_i − c − Δ_i / (K·η); of what it did not train, which did not move, c_i stays."""
        moved = join({group: value.cpu() for group, value in update.items()})
        trained = join({group: value.cpu().any().expand(len(value)) for group, value in update.items()})
        change = moved / (max(1, local.steps) * local.learning_rate) + local.state.get(CONTROL, torch.zeros(()))
        return {CONTROL: local.kept.get(CONTROL, torch.zeros(())) - change * trained}


def join(weights: Weights) -> Tensor:
    """All groups as one flat vector, in the order that groups have of themselves."""
    return torch.cat([weights[group] for group in sorted(weights)])


def split(flat: Tensor, sizes: Mapping[ParameterGroup, int]) -> Weights:
    """The inverse of `join`; the parts are views."""
    groups = sorted(sizes)
    return dict(zip(groups, torch.split(flat, [sizes[group] for group in groups]), strict=True))
