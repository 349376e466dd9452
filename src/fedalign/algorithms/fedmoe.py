"""FedMoE: an expert is averaged over the clients that activate it (Mei et al. 2024, arXiv 2408.11304).

    experts, router rows   θ_e ← θ_e + Σ_c w_c(e) · Δ_c(e)      w_c(e) ∝ n_c · 1[c activates e]      [P]
    the rest               FedAvg                                                                    [P]

This is the paper's *modular aggregation*: an expert that nobody activates stays as it was, one that a single client
activates takes that client's update whole, and its router row goes the same way. Its memory budgets, and the search
for a part of the model to send to each client, are left out: here every client trains the whole model.

Marks: [P] the paper says so, [O] our choice where it is silent. [O]: a client activates an expert if it reports it as
held, so one that few tokens reached does not count; updates of router rows are centred over experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedalign.algorithms.fedavg import FedAvg, column_shares
from fedalign.protocol import Plan, Reports, State


@dataclass(frozen=True)
class FedMoE(FedAvg):
    """FedAvg, expert by expert among its holders."""

    def plan(self, reports: Reports, state: State) -> Plan:
        """n_c over the holders' sum, for each expert and its router row."""
        weight_C_L_E = column_shares(reports.share_C[:, None, None] * reports.held_C_L_E)
        return reports.plan(weight_C_L_E, weight_C_L_E)
