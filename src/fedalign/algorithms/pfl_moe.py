"""PFL-MoE: the server's model and one of the client's own, mixed by a learnt mixer (Guo et al. 2021, arXiv 2012.15589).

    y = g·y_server + (1 − g)·y_own,     g = σ(linear(features))          server part: FedAvg, frozen in the mixture [P]

The two are mixed as probabilities, and the features are what the server model's head reads [O]. The own model begins as
the weights that the client first received, and goes on from where it was [O].
"""

from __future__ import annotations

from dataclasses import dataclass

from fedalign.algorithms.fedavg import FedAvg


@dataclass(frozen=True)
class PFLMoE(FedAvg):
    """FedAvg, and for each client a model of its own, which is scored on its held-out part. Twice the training."""

    @property
    def mixes(self) -> bool:
        """The mixture is trained after the client's share in the server's model."""
        return True
