"""FedAvg: the mean of the clients' updates, weighted by their data (McMahan et al. 2017, arXiv 1602.05629).

w ← w + Σ_c (n_c / Σ n) · Δ_c          n_c: training examples client c used in the round
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedalign.protocol import Layout, LocalRound, ParameterGroup, Plan, State, Statistics, Step, Weights


def data_share(reports: Sequence[Statistics]) -> Tensor:
    """n_c / Σ n, float32 [C]."""
    examples_C = torch.tensor([report.examples for report in reports], dtype=torch.float64)
    return (examples_C / examples_C.sum().clamp_min(1)).float()


def column_shares(score_C_L_E: Tensor) -> Tensor:
    """Non-negative scores normalised over clients; a column without any score stays zero.

    >>> column_shares(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    tensor([[0.7500, 0.0000],
            [0.2500, 0.0000]])
    """
    total_L_E = score_C_L_E.sum(dim=0)
    return score_C_L_E / total_L_E.where(total_L_E > 0, torch.ones_like(total_L_E))


@dataclass(frozen=True)
class FedAvg:
    """One weight a client, the same for all of its groups; the base of the others, which change what they must."""

    @property
    def centre_gates(self) -> bool:
        """All router rows have the same weight, so a vector common to them cancels anyway."""
        return False

    def plan(self, reports: Sequence[Statistics], layout: Layout, state: State) -> tuple[Plan, State]:
        """n_c / Σ n for every group."""
        share_C = data_share(reports)
        weight_C_G = share_C.unsqueeze(1).repeat(1, len(layout.groups))
        return Plan(tuple(report.client for report in reports), weight_C_G), state

    @property
    def pooled(self) -> bool:
        """Each client keeps its data."""
        return False

    @property
    def mixes(self) -> bool:
        """Clients use the server's model as it is."""
        return False

    @property
    def counts_tokens(self) -> bool:
        """All rows of the embeddings have the same weight."""
        return False

    @property
    def corrects(self) -> bool:
        """Gradients stay as they are."""
        return False

    @property
    def spans_rounds(self) -> bool:
        """Each round stands for itself."""
        return False

    def apply(self, state: State, sums: Mapping[str, Weights], layout: Layout, members: int) -> State:
        """The plan's state."""
        return state

    def penalty(self, step: Step) -> Tensor | None:
        """None: clients minimise their own loss."""
        return None

    def private(self, group: ParameterGroup) -> bool:
        """Nothing is."""
        return False

    def begin(self, local: LocalRound) -> None:
        """Clients start from what they receive."""

    def correct(self, local: LocalRound, gradients: Mapping[ParameterGroup, Sequence[Tensor]]) -> None:
        """Gradients stay as they are."""

    def end(self, local: LocalRound, update: Weights, steps: int) -> Mapping[str, Tensor]:
        """Clients keep nothing."""
        return {}
