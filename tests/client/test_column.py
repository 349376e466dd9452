"""A client's own column of a masked round's weights is that of the plan which a server would make."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fedalign import testing
from fedalign.algorithms.by_use import ByUse
from fedalign.algorithms.fedavg import FedAvg
from fedalign.client.masked import column, counts
from fedalign.protocol import Reports


@pytest.mark.parametrize("round", [1, 4])
@pytest.mark.parametrize(
    "algorithm", [FedAvg(), ByUse(), ByUse(vocabulary="clients"), ByUse(vocabulary_half_life=2, vocabulary_holders=2)]
)
def test_a_column_is_the_plans(algorithm: FedAvg, round: int) -> None:
    seen = testing.reports(asks=set(algorithm.asks))
    seen = Reports([replace(report, round=round) for report in seen.of], seen.layout, seen.members)
    shares = algorithm.shares
    assert shares is not None
    own = [counts(report, seen.layout, shares, set()) for report in seen.of]
    totals = {name: torch.stack([told[name] for told in own]).sum(0) for name in own[0]}
    plan = testing.planned(algorithm, seen)
    for client, told in enumerate(own):
        mine = column(told, totals, seen.layout, shares, least=1, round=round)
        weight_G = torch.tensor([mine.weight_G[group] for group in seen.layout.groups])
        assert_close(weight_G, plan.weight_C_G[client], atol=1e-4, rtol=1e-4)
        assert (mine.row_weight_M_V is None) == (plan.token_weight_C_M_V is None)
        if mine.row_weight_M_V is not None and plan.token_weight_C_M_V is not None:
            assert_close(mine.row_weight_M_V, plan.token_weight_C_M_V[client], atol=1e-4, rtol=1e-4)
