"""FedAvg: the mean of the clients' updates, weighted by their data (McMahan et al. 2017, arXiv 1602.05629).

w ← w + Σ_c (n_c / Σ n) · Δ_c          n_c: training examples client c used in the round
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from fedalign.maths import torch
from fedalign.protocol import (
    Ask,
    Kind,
    Layout,
    LocalRound,
    Mix,
    ParameterGroup,
    Part,
    Plan,
    Reports,
    Shares,
    State,
    Step,
)

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def option(default: T, help: str) -> T:
    """An algorithm's option: a field of its dataclass, and what it means."""
    value: T = field(default=default, metadata={"help": help})
    return value


def column_shares(score_C_L_E: Tensor) -> Tensor:
    """Non-negative scores normalised over clients; a column without any score stays zero.

    >>> column_shares(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    tensor([[0.7500, 0.0000],
            [0.2500, 0.0000]])
    """
    total_L_E = score_C_L_E.sum(dim=0)
    return score_C_L_E / total_L_E.where(total_L_E > 0, torch.ones_like(total_L_E))


@dataclass(frozen=True)
class FedAvg:
    """One weight a client, the same for all of its groups; the base of the others, which change what they must."""

    @property
    def asks(self) -> Set[Ask]:
        """Nothing: data size is in every report."""
        return frozenset()

    @property
    def private(self) -> Set[Kind]:
        """Nothing is."""
        return frozenset()

    @property
    def mix(self) -> Mix | None:
        """Clients use the server's model as it is."""
        return None

    @property
    def shares(self) -> Shares | None:
        """Of data size, unless a subclass has a plan of its own or asks for more."""
        return Shares() if type(self).plan is FedAvg.plan and not self.asks else None

    @property
    def shared(self) -> Literal["frozen", "average"] | None:
        """Sites own no experts."""
        return None

    def part(self, layout: Layout, client: str) -> Part | None:
        """All of it."""
        return None

    def plan(self, reports: Reports, state: State) -> Plan:
        """n_c / Σ n for every group."""
        return reports.plan()

    def begin(self, local: LocalRound) -> None:
        """Clients start from what they receive."""

    def penalty(self, step: Step) -> Tensor | None:
        """None: clients minimise their own loss."""
        return None

    def keep(self, local: LocalRound, update: Mapping[ParameterGroup, Tensor]) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}
