"""PFL-MoE: the server's model and one of the client's own, mixed by a learnt score (Guo et al. 2021, arXiv 2012.15589).

    y = g·y_server + (1 − g)·y_own,     g = σ(linear(features))          server part: FedAvg, frozen in the mixture [P]

The two are mixed as probabilities, and the features are what the server model's head reads [O]. The own model begins as
the weights that the client first received, and goes on from where it was [O].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedalign.algorithms.fedavg import FedAvg
from fedalign.maths import functional, torch
from fedalign.protocol import Mix

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PFLMoE(FedAvg):
    """FedAvg, and for each client a model of its own, which is scored on its held-out part. Twice the training."""

    @property
    def mix(self) -> Mix:
        """Of their log-probabilities; the mixture is trained after the client's share in the server's model."""
        return mixture


def mixture(server_N_V: Tensor, own_N_V: Tensor, score_N_1: Tensor) -> Tensor:
    """log(σ(score)·p_server + (1 − σ(score))·p_own)."""
    server_N_V = functional.logsigmoid(score_N_1) + server_N_V
    return torch.logaddexp(server_N_V, functional.logsigmoid(-score_N_1) + own_N_V)
