"""FedAlign-MoE as its paper has it (arXiv 2603.21276), to the letter.

    router rows   by consistency of routing, and while training a pull towards the global routing distribution   [P]
    experts       by semantic similarity and consensus of directions                                             [P]
    the rest      FedAvg, embeddings too

Options are those of `fedalign_moe`, where each is marked [P] or [O].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedalign.algorithms.fedalign_moe import FedAlignMoE
from fedalign.maths.routing import Form, Granularity


@dataclass(frozen=True)
class FedAlignPaper(FedAlignMoE):
    """Defaults are the paper's; its ablation is `gate`, `gate_weights`, `adaptive_strength` and `experts`."""

    reg_strength: float = 0.1
    granularity: Granularity = "token"
    form: Form = "kl"
    size_weighted: bool = False
    min_agreement: float = 0.5
    vocabulary: Literal["tokens", "clients", "average"] = "average"
