"""HFedMoE: an expert is averaged over the clients it matters to (Fang et al. 2026, arXiv 2601.00583).

    experts, router rows   θ_e ← θ_e + Σ_c w_c(e) · Δ_c(e)      w_c(e) ∝ n_c · u_c(e) · 1[u_c(e) ≥ τ / E]
    the rest               FedAvg

u_c(e), the importance, is the mean router probability of expert e on client c (eq. 16). The paper's expert weights are
`experts = "size"`, without the factor u (eq. 17). Its router is one weight a client, `gate = "whole"`: the sum over
the experts that pass of u_c(e) · s_c(e), with s a blend of mean and maximum of the router probability (eqs. 18-21); the
statistics have no maximum, so s = u. Its router weights do not sum to one; ours do. The equations were read in others'
notes on the paper, not in the paper itself. The selection of experts under a client's memory budget is left out: every
client trains the whole model.

An expert that passes nowhere stays as it was. In two rounds of the demo that were 8 and 9 of 32 at τ = 1, where 43 % of
the pairs of client and expert passed, and none at τ = 0.75 (82 and 87 %) or 0.5 (98 % and more).

Marks: [P] the paper says so, [O] our choice.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

from fedalign.algorithms.fedavg import FedAvg, column_shares, option
from fedalign.protocol import Ask, Plan, Reports, State


@dataclass(frozen=True)
class HFedMoE(FedAvg):
    """FedAvg, expert by expert among the clients whose routers favour it."""

    threshold: float = option(0.75, "least probability of an expert, in shares of a uniform router's 1 / E [O]")
    experts: Literal["importance", "size"] = option("importance", '[O] n_c · u_c(e); "size" [P] n_c')
    gate: Literal["rows", "whole"] = option(
        "rows", '[O] each row like its expert; "whole" [P] one weight a client and layer'
    )

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold = {self.threshold}: must be at least 0 and finite")

    @property
    def asks(self) -> Set[Ask]:
        """Mean routing that is a probability."""
        return frozenset({"probabilities"})

    def plan(self, reports: Reports, state: State) -> Plan:
        """Weights by importance and data among the clients that pass the threshold."""
        share_C_1_1 = reports.share_C[:, None, None]
        prob_C_L_E = reports.stack("prob_L_E")
        passes_C_L_E = reports.held_C_L_E & (prob_C_L_E >= self.threshold / reports.layout.experts)
        importance_C_L_E = prob_C_L_E.double() * passes_C_L_E

        row_C_L_E = column_shares(share_C_1_1 * importance_C_L_E)
        whole_C_L_1 = column_shares(importance_C_L_E.square().sum(dim=-1, keepdim=True))
        return reports.plan(
            row_C_L_E if self.gate == "rows" else whole_C_L_1.expand_as(row_C_L_E),
            row_C_L_E if self.experts == "importance" else column_shares(share_C_1_1 * passes_C_L_E),
            centred=self.gate == "rows",
            metrics={"experts_important_to_nobody": int((~passes_C_L_E.any(dim=0)).sum())},
        )
