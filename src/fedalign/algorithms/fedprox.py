"""FedProx: FedAvg whose clients are held near the weights they start from (Li et al. 2020, arXiv 1812.06127).

L = L_task + (μ / 2) · ‖w − w_start‖²      w_start: as received; private groups: the client's own [O]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedalign.algorithms.fedavg import FedAvg, option
from fedalign.protocol import Step

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg with a proximal term."""

    mu: float = option(0.01, "μ; 0: FedAvg")

    def __post_init__(self) -> None:
        if not 0 <= self.mu < math.inf:
            raise ValueError(f"mu = {self.mu}: must be at least 0 and finite")

    def penalty(self, step: Step) -> Tensor | None:
        """(μ / 2) · ‖w − w_start‖²."""
        return self.mu / 2 * step.drift() if self.mu else None
