"""Site experts: each site trains an expert of its own, with its router row, beside public ones (arXiv 2507.07024).

    own experts, rows    θ_e ← θ_e + Δ_c(e)                    c the owner; nobody else writes e         [P]
    public ones          as they were                                                                    [P]
    the rest             as it was, or with shared = "average" FedAvg                                    [P; BAR]

A site trains with the public experts and its own: no other's is in its forward passes [P]. With shared = "frozen"
nothing that a site computes depends on another, so the model without one of them is that of a run in which it never
was. The row is fitted on the site's own text before it first trains (`moe.rows`) [O]. With adapters θ_e are the factors
of a low-rank change of the expert, beside the public one that it was copied from [FlexMoRE].

Marks: [P] FlexOlmo (Shi et al. 2025), [O] our choice. BAR (Ai2 2026) averages what is shared when it fine-tunes;
FlexMoRE (arXiv 2602.08818) has low-rank experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedalign.algorithms.fedavg import FedAvg, option
from fedalign.maths import torch
from fedalign.protocol import CELLS, WHOLE, Layout, ParameterGroup, Part, Plan, Reports, State


@dataclass(frozen=True)
class SiteExperts(FedAvg):
    """For a model that says whose expert is whose: `fedalign upcycle --site-experts`."""

    shared: Literal["frozen", "average"] = option(
        "frozen", "what experts share: stays, and leaving is exact; or average: trained by all sites"
    )

    def part(self, layout: Layout, client: str) -> Part:
        """The public experts and its own, of which it trains its own."""
        own = layout.owners.get(client, ())
        cells = (
            ParameterGroup(kind, layer, expert) for kind in CELLS for layer in range(layout.layers) for expert in own
        )
        common = WHOLE if own and self.shared == "average" else ()
        return Part((*layout.public, *own), frozenset((*common, *cells)))

    def plan(self, reports: Reports, state: State) -> Plan:
        """1 for the owner of an expert, 0 for all others."""
        layout = reports.layout
        own_C_L_E = torch.zeros(len(reports.of), layout.layers, layout.experts)
        for row, report in enumerate(reports.of):
            own_C_L_E[row, :, list(layout.owners.get(report.client, ()))] = 1
        shared_C = reports.share_C if self.shared == "average" else torch.zeros(len(reports.of))
        clients = tuple(report.client for report in reports.of)
        return Plan(clients, layout.table(shared_C, own_C_L_E, own_C_L_E))
