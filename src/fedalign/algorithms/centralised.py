"""Centralised: one client holds everybody's training data; a bound from above to compare with, not a federation.

w ← w + Δ, one local training a round on the union of the clients' data. Scores are still taken client by client.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from fedalign.algorithms.fedavg import FedAvg
from fedalign.protocol import Ask


@dataclass(frozen=True)
class Centralised(FedAvg):
    """FedAvg over the one client that holds everything."""

    @property
    def asks(self) -> Set[Ask]:
        """The data is not kept apart."""
        return frozenset({"data"})
