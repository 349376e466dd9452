"""FLAME: who trained an expert more often counts for more in it (Le et al. 2025, arXiv 2506.16600).

    experts    θ_e ← θ_e + Σ_c w_c(e) · Δ_c(e)      w_c(e) ∝ n_c · (a_c(e) / S_c)^t
    the rest   FedAvg

a_c(e): how often client c activated expert e; S_c: its training steps; t: the temperature. The paper aggregates with
regard to activations [P]; only its abstract was read, so the formula is [O]. Its rescaling of outputs where clients
activate fewer experts is left out: here all activate equally many. a_c(e) counts the tokens of the last local epoch,
S_c the optimiser steps of all epochs: the number of epochs, which is the same for all clients, cancels.

Marks: [P] the paper says so, [O] our choice where it is silent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedalign.algorithms.fedavg import FedAvg, column_shares, option
from fedalign.maths import torch
from fedalign.protocol import Plan, Reports, State


@dataclass(frozen=True)
class FLAME(FedAvg):
    """FedAvg with experts weighted by activations."""

    temperature: float = option(1.0, "of activations [O]; 0: by data alone, among the clients that hold the expert")

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature}: must be at least 0 and finite")

    def plan(self, reports: Reports, state: State) -> Plan:
        """n_c · (a / S)^t for experts, n_c for the rest."""
        load_C_L_E = reports.stack("load_L_E").double()
        rate_C_L_E = load_C_L_E / reports.column("steps")[:, None, None]
        peak_L_E = rate_C_L_E.amax(dim=0)  # dividing by it first keeps powers of rates between 0 and 1
        relative_C_L_E = rate_C_L_E / peak_L_E.where(peak_L_E > 0, torch.ones_like(peak_L_E))
        active_C_L_E = (relative_C_L_E**self.temperature).masked_fill(load_C_L_E <= 0, 0)  # 0 ** 0 is 1
        return reports.plan(expert_C_L_E=column_shares(reports.share_C[:, None, None] * active_C_L_E))
