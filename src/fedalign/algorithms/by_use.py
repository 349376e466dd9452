"""By use: whoever uses a part of the model more counts for more in it, and nothing else matters.

    experts       θ_e   ← θ_e + Σ_c b_c(e) · Δ_c(e)         b ∝ n_c(e), the client's share of its load         [O]
    token rows    row_v ← row_v + Σ_c k_c(v) · Δrow_c(v)    k ∝ n_c · the token's share of what c read          [O]
    the rest      FedAvg, routers too

Each weight is a share of a sum over clients, so a round needs nothing but sums. Options are those of `fedalign_moe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedalign.algorithms.fedalign_moe import FedAlignMoE


@dataclass(frozen=True)
class ByUse(FedAlignMoE):
    """No alignment of routers, no similarities, and no clip by other clients' norms."""

    gate: Literal["rows", "average", "local"] = "average"
    experts: Literal["semantic", "load", "average"] = "load"
    min_holders: int = 1
