"""FC-MoE: experts by importance, and no update against the consensus (arXiv 2606.15625).

    importance   b_c(e) ∝ load_c(e) / tokens_c · ‖Δ_c(e)‖, normalised over the clients that hold e                   [P]
    consensus    D(e) = Σ_c b_c(e) Δ_c(e)                                                                           [O]
    projection   where ⟨Δ_c, D⟩ < 0:  Δ_c ← Δ_c − p_c·D,  p_c = ⟨Δ_c, D⟩ / ⟨D, D⟩                                   [P]
    experts      θ_e ← θ_e + Σ_c b_c Δ_c = θ_e + (1 − Σ_{c against} b_c p_c)·D
    residual     what was removed from a client, p_c·D: it starts its next round from θ_e + ρ·p_c·D, ρ = 1/2         [P]
    the rest     FedAvg

What is removed lies along D, so the projected sum is D stretched: the server needs no more than one factor for each
expert, which it estimates from the sketches. The client finds its residual in what it kept and what it receives.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedalign.algorithms.fedavg import FedAvg, column_shares, option
from fedalign.maths import torch
from fedalign.protocol import Ask, LocalRound, ParameterGroup, Plan, Reports, State

if TYPE_CHECKING:
    from torch import Tensor

RECEIVED = "received."


@dataclass(frozen=True)
class FCMoE(FedAvg):
    """FedAvg but for the experts."""

    residual: float = option(0.5, "[P] share of its residual that a client goes on with")
    max_stretch: float = option(2.0, "[O] the largest factor: a consensus that is almost nothing says nothing")

    def __post_init__(self) -> None:
        if not 0 <= self.residual <= 1:
            raise ValueError(f"residual = {self.residual}: must lie between 0 and 1")
        if not 1 <= self.max_stretch < float("inf"):
            raise ValueError(f"max_stretch = {self.max_stretch}: must be at least 1 and finite")

    @property
    def asks(self) -> Set[Ask]:
        """Directions of the experts' updates, of which the consensus is made."""
        return frozenset({"directions"})

    def plan(self, reports: Reports, state: State) -> Plan:
        """Importance for the experts, n_c / Σ n for the rest."""
        layout = reports.layout
        norm_C_L_E = layout.split(reports.stack("norm_G"))[2]
        tokens_C = reports.column("tokens").clamp_min(1).float()
        importance_C_L_E = reports.stack("load_L_E") / tokens_C[:, None, None] * norm_C_L_E
        weight_C_L_E = column_shares(importance_C_L_E)
        stretch_L_E, against_C_L_E = self.project(reports.stack("update_L_E_S"), weight_C_L_E * norm_C_L_E)
        ones_C_L_E = torch.ones_like(weight_C_L_E)
        return reports.plan(
            expert_C_L_E=weight_C_L_E,
            factor_C_G=layout.table(ones_C_L_E[:, 0, 0], ones_C_L_E, stretch_L_E.expand_as(weight_C_L_E)),
            metrics={"expert_updates_against_consensus": int(against_C_L_E.sum())},
        )

    def project(self, direction_C_L_E_S: Tensor, length_C_L_E: Tensor) -> tuple[Tensor, Tensor]:
        """The factor of each expert's sum, [L, E], and who is against the consensus, [C, L, E].

        `length_C_L_E` is b·‖Δ‖: the length of each client's part of the consensus.
        """
        consensus_L_E_S = (length_C_L_E.unsqueeze(-1) * direction_C_L_E_S).sum(0)
        square_L_E = consensus_L_E_S.square().sum(-1)
        part_C_L_E = length_C_L_E * (direction_C_L_E_S * consensus_L_E_S).sum(-1)  # b_c ⟨Δ_c, D⟩
        against_C_L_E = part_C_L_E < 0
        removed_L_E = -(part_C_L_E * against_C_L_E).sum(0) / square_L_E.clamp_min(torch.finfo(torch.float32).tiny)
        return (1 + removed_L_E).clamp_max(self.max_stretch), against_C_L_E

    def begin(self, local: LocalRound) -> None:
        """Start from what was received, plus `residual` of what was removed from the client's own last update."""
        if not self.residual:
            return
        last = local.last_update()
        for group, update in last.items():
            before = local.kept.get(f"{RECEIVED}{group}")
            if group.kind == "expert" and before is not None:
                consensus = local.received[group] - before
                against, square = float(update @ consensus), float(consensus @ consensus)
                if against < 0 < square:
                    local.start[group] = local.received[group] + self.residual * against / square * consensus

    def keep(self, local: LocalRound, update: Mapping[ParameterGroup, Tensor]) -> Mapping[str, Tensor]:
        """The experts as received: the next ones, held against them, show where the other clients went."""
        if not self.residual:
            return {}
        return {f"{RECEIVED}{group}": value for group, value in local.received.items() if group.kind == "expert"}
