"""FedMoE: an expert is averaged over the clients that activate it (Mei et al. 2024, arXiv 2408.11304).

    experts, router rows   θ_e ← θ_e + Σ_c w_c(e) · Δ_c(e)      w_c(e) ∝ n_c · 1[c activates e]      [P]
    the rest               FedAvg                                                                    [P]

This is the paper's *modular aggregation*: an expert that nobody activates stays as it was, one that a single client
activates takes that client's update whole, and its router row goes the same way. Its memory budgets, and the search
for a part of the model to send to each client, are left out: here every client trains the whole model.

Marks: [P] the paper says so, [O] our choice where it is silent. [O]: a client activates an expert if it reports it as
held, so one that few tokens reached does not count; a client's row updates are centred over experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedalign.algorithms.fedavg import FedAvg, column_shares, data_share
from fedalign.protocol import Layout, Plan, State, Statistics


@dataclass(frozen=True)
class FedMoE(FedAvg):
    """FedAvg, expert by expert among its holders."""

    @property
    def centre_gates(self) -> bool:
        """A vector added to all rows changes no softmax routing, but weighted row by row it would become noise [O]."""
        return True

    def plan(self, reports: Sequence[Statistics], layout: Layout, state: State) -> tuple[Plan, State]:
        """n_c over the holders' sum, for each expert and its router row."""
        share_C = data_share(reports)
        held_C_L_E = torch.stack([report.held_L_E for report in reports])
        weight_C_L_E = column_shares(share_C[:, None, None] * held_C_L_E)
        weight_C_G = layout.table(share_C, weight_C_L_E, weight_C_L_E)
        return Plan(tuple(report.client for report in reports), weight_C_G), state
