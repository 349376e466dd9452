"""Local: no federation. Each client goes on from its own weights; a bound from below to compare with.

w_c ← w_c + Δ_c at each client c; nothing is uploaded, the server's model stays what it was.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from fedalign.algorithms.fedavg import FedAvg
from fedalign.maths import torch
from fedalign.protocol import KINDS, Kind, Plan, Reports, State


@dataclass(frozen=True)
class Local(FedAvg):
    """Everything is private. Scores are the clients' own: there is no common model to score."""

    @property
    def private(self) -> Set[Kind]:
        """All of it."""
        return frozenset(KINDS)

    def plan(self, reports: Reports, state: State) -> Plan:
        """Zero for everybody: nothing travels."""
        plan = reports.plan()
        return Plan(plan.clients, torch.zeros_like(plan.weight_C_G))
