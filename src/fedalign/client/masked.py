"""One client's side of a masked round, masks aside: its counts, its own column of weights, its share of each sum.

A weight is a client's number over the total of all clients', so a client that is told the totals computes its own::

    w(e) = n_c(e) / N(e)   experts        k_c(v) / K(v)   token rows        n_c / N   all else                      [O]

Of token rows that is what is left of it in the round (`vocabulary_half_life`), n_c / N the rest.
Where fewer than `least` clients hold an expert, or met a token, the sum would show a holder's update nearly by itself:
such parts go on as under FedAvg, n_c / N over all clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from fedalign.algorithms.fedalign_moe import apart, expert_sizes, row_sizes
from fedalign.maths.average import Words
from fedalign.maths.fixed_point import counted
from fedalign.protocol import (
    EXAMPLES,
    HELD_OUT,
    HOLDERS,
    LOAD,
    LOSS,
    MET,
    MOST_LOSS,
    ROWS,
    UNIT,
    Evaluation,
    HeldOut,
    Layout,
    ParameterGroup,
    Reports,
    Shares,
    Statistics,
)


@dataclass(frozen=True)
class Column:
    """One client's weights: its column of the plan."""

    weight_G: Mapping[ParameterGroup, float]
    row_weight_M_V: Tensor | None  # float32; in place of their group's

    def weighed(self, layout: Layout, group: ParameterGroup, start: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [N] of some of a group's values, from `start` on, and the values times them."""
        weight = self.weight_G[group]
        weights = torch.full_like(values, weight)
        if self.row_weight_M_V is not None:
            for matrix, rows in enumerate(layout.token_rows):
                if rows.group == group:
                    own_V = self.row_weight_M_V[matrix]
                    weights = Words(rows, own_V.unsqueeze(0)).spread(own_V[: rows.tokens], weight, start, len(values))
        return weights, values * weights


def counts(report: Statistics, layout: Layout, shares: Shares, tells: Set[str]) -> dict[str, Tensor]:
    """A client's numbers that the weights are shares of, int64, in units of 1 / UNIT where they need not be whole.

    Without consent to counts of tokens it counts as one that met none.

    Args:
        report: of the round, which stays at the client.
        layout: the model's groups.
        shares: what the algorithm asks for.
        tells: which of LOSS and HELD_OUT are summed, too.

    Raises:
        ValueError: A number is so large, or not finite, that its sum could wrap.
    """
    alone = Reports([report], layout, 1)
    told = {EXAMPLES: counted(torch.tensor([float(report.examples)]), UNIT)}
    if LOSS in tells:
        told[LOSS] = counted(torch.tensor([report.examples * report.loss]).double(), UNIT)
    if HELD_OUT in tells:
        told[HELD_OUT] = held_out(report.score)
    if shares.load:
        told[LOAD] = counted(expert_sizes(alone)[0], UNIT)
        told[HOLDERS] = (told[LOAD] > 0).long()
    if shares.rows != "examples" and layout.token_rows:
        size_M_V = row_sizes(alone, counted=shares.rows == "tokens")[0]
        told[ROWS] = counted(size_M_V if size_M_V.numel() else torch.zeros(layout.token_cells), UNIT)
        told[MET] = (told[ROWS] > 0).long()
    return told


def held_out(score: Evaluation | None) -> Tensor:
    """A `HeldOut` of one client's score, int64 [5].

    >>> held_out(Evaluation("a", 4, 0.5, 0.75)).tolist() == [1, 4, 4, 3, 2 * UNIT], held_out(None).tolist()
    (True, [0, 0, 0, 0, 0])

    Raises:
        ValueError: Examples times loss is so large that its sum could wrap.
    """
    if score is None:
        return torch.zeros(len(HeldOut._fields), dtype=torch.int64)
    loss = min(max(score.loss, 0.0), MOST_LOSS) if math.isfinite(score.loss) else MOST_LOSS
    nats = counted(torch.tensor([score.examples * loss], dtype=torch.float64), UNIT)
    judged, right = (0, 0) if score.accuracy is None else (score.examples, round(score.examples * score.accuracy))
    return torch.tensor(HeldOut(1, score.examples, judged, right, int(nats)))


def column(
    own: Mapping[str, Tensor], totals: Mapping[str, Tensor], layout: Layout, shares: Shares, least: int, round: int
) -> Column:
    """A client's weights of its own counts and a round's totals; with fewer than `least` holders those of FedAvg."""
    by_size = float(own[EXAMPLES]) / float(totals[EXAMPLES])
    weight_G = dict.fromkeys(layout.groups, by_size)
    if LOAD in own:
        weight_L_E = _shared(own[LOAD], totals[LOAD], totals[HOLDERS] >= least, by_size)
        for group in layout.groups:
            if group.kind == "expert":
                weight_G[group] = float(weight_L_E[group.layer, group.expert])
    if ROWS not in own:
        return Column(weight_G, None)
    enough_M_V = totals[MET] >= max(least, shares.row_holders)
    row_weight_M_V = _shared(own[ROWS], totals[ROWS], enough_M_V, by_size)
    by_size_M_V = torch.full_like(row_weight_M_V, by_size)
    return Column(weight_G, torch.lerp(by_size_M_V, row_weight_M_V, apart(round, shares.row_half_life)))


def _shared(own: Tensor, total: Tensor, enough: Tensor, by_size: float) -> Tensor:
    """Own over total, float32, where enough hold it."""
    return torch.where(enough, own.double() / total.double().clamp_min(1), by_size).float()
