"""FedAlign-MoE as its paper has it (arXiv 2603.21276): routing aligned, experts averaged where they do the same job.

    router rows   by consistency of routing, and while training a pull towards the global routing distribution   [P]
    experts       by semantic similarity and consensus of directions                                             [P]
    the rest      FedAvg, embeddings too

Options are those of `fedalign_moe`, where each is marked [P] or [O]. Measurements moved that one's defaults elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedalign.algorithms.fedalign_moe import FedAlignMoE


@dataclass(frozen=True)
class FedAlignPaper(FedAlignMoE):
    """Defaults are the paper's; its ablation is `gate`, `gate_weights`, `adaptive_strength` and `experts`."""

    reg_strength: float = 0.1
    gate: Literal["rows", "average", "local"] = "rows"
    experts: Literal["semantic", "load", "average"] = "semantic"
    vocabulary: Literal["average", "tokens"] = "average"
