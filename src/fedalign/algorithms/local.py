"""Local: no federation. Each client goes on from its own weights; a bound from below to compare with.

w_c ← w_c + Δ_c at each client c; nothing is uploaded, the server's model stays what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedalign.algorithms.fedavg import FedAvg
from fedalign.protocol import Layout, ParameterGroup, Plan, State, Statistics


@dataclass(frozen=True)
class Local(FedAvg):
    """Everything is private. Scores are the clients' own: there is no common model to score."""

    def private(self, group: ParameterGroup) -> bool:
        """All of it."""
        return True

    def plan(self, reports: Sequence[Statistics], layout: Layout, state: State) -> tuple[Plan, State]:
        """Zero for everybody: nothing travels."""
        clients = tuple(report.client for report in reports)
        return Plan(clients, torch.zeros(len(reports), len(layout.groups))), state
