"""Two clients, one layer, two experts: small enough to be worked out on paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, tensor

from fedalign import testing
from fedalign.protocol import (
    EMBEDDINGS,
    HEAD,
    SHARED,
    Algorithm,
    Layout,
    ParameterGroup,
    Plan,
    Reports,
    State,
    Statistics,
)

LAYOUT = Layout(
    1,
    2,
    {SHARED: 5, EMBEDDINGS: 4, HEAD: 6}
    | {ParameterGroup(kind, 0, e): size for kind, size in (("gate", 2), ("expert", 3)) for e in range(2)},  # type: ignore[arg-type] # mypy takes the two words for any str
)

Report = Callable[..., Statistics]


@pytest.fixture
def layout() -> Layout:
    return LAYOUT


@pytest.fixture
def report() -> Report:
    def make_report(
        client: str,
        examples: int,
        prob: list[float],
        load: list[float],
        margin: list[float],
        centroid: list[list[float]],
        update: list[list[float]],
        norm: list[float] | None = None,
    ) -> Statistics:
        return Statistics(
            client=client,
            round=1,
            examples=examples,
            tokens=100,
            steps=1,
            learning_rate=0.1,
            loss=1.0,
            prob_L_E=tensor([prob]),
            load_L_E=tensor([load]),
            margin_L_E=tensor([margin]),
            centroid_L_E_D=tensor([centroid]).half() / 2,
            centroid_scale_L=tensor([2.0]),
            update_L_E_S=torch.nn.functional.normalize(tensor([update]), dim=-1).half(),
            norm_G=_norms(norm),
            token_count_M_V=torch.zeros(0, 0),
            token_met_M_B=torch.zeros(0, 0, dtype=torch.uint8),
        )

    return make_report


def _norms(norm: list[float] | None) -> Tensor:
    return torch.ones(len(LAYOUT.groups)) if norm is None else tensor(norm)


def planned(
    algorithm: Algorithm, reports: Sequence[Statistics], layout: Layout = LAYOUT, state: State | None = None
) -> Plan:
    """The plan for clients that are all there is, checked as a server does."""
    return testing.planned(algorithm, Reports(reports, layout, len(reports)), state)
