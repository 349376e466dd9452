"""Sums that one hostile site cannot decide: shares capped, norms clipped, or a rule that outvotes it.

    share     b_c ≤ min(share, ratio / holders), the rest to the others          Portnoy et al. 2020, arXiv 2004.04986
    clip      Δ_c ← Δ_c · min(1, clip · median_holders ‖Δ‖ / ‖Δ_c‖)          Sun et al. 2019, arXiv 1911.07963;
              to medians, as clients' norms shrink round by round         Nguyen et al. 2022, arXiv 2101.02281
    centered  v ← v + mean_c (Δ_c − v) · min(1, radius / ‖Δ_c − v‖)          Karimireddy et al. 2021, arXiv 2012.10333
    trimmed   the mean without the largest and smallest values, one by one    Yin et al. 2018, arXiv 1803.01498
    median    value by value                                                  Yin et al. 2018
    krum      the update nearest to its neighbours                            Blanchard et al. 2017, arXiv 1703.02757
    row       of a token that fewer than three met: ‖Δ_c‖ ≤ median_holders ‖Δ‖ / √(tokens met); than two: 0          [O]
    against   a client of which a part's median cosine with the others is below -0.1 is left out                   [O]

All of it group by group over a group's holders: the clients with weight in the plan whose update is not zero, for the
zeros of those who do not hold an expert are no vote. Capping and clipping change a plan (`guarded`). The four rules
count every holder alike, whatever it says of its data, and take the place of the streaming sum: centred clipping is a
streaming sum itself, around the last round's update v; the others keep a round's updates in wire precision.

Directions are told of whole parts of an update, once all have arrived: an opposite update is no outlier in length, and
value by value none either. They are sketched at the coordinator, with a seed that no client knows: who knew
it could send an update whose sketch looks like everybody's.

Papers set radii in the units of their own gradients. Here clip and radius are in medians of the holders' norms [O], so
that they mean the same in all groups and models. Values are those of Flower's own functions on the same arrays.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedalign.maths.average import Chunk, StreamingSum
from fedalign.maths.heap import Heap
from fedalign.maths.rounding import unpack
from fedalign.maths.routing import cap_weights
from fedalign.maths.sketch import Sketch
from fedalign.protocol import Layout, Packed, ParameterGroup, Plan, Robust, Update, Weights

DIRECTION_WIDTH = 1024
AGAINST = 0.1  # three standard errors of a sketched cosine; an honest median has once been -0.10, at Dirichlet 0.1
PARTS = (("embeddings", "head"), ("shared",), ("expert", "gate"))  # kinds whose directions are compared together
SMALL = 1e-9  # 0.29 of 100 is 29, and 28.999... as floats are multiplied
FEW = 3  # holders: of fewer, a liar is half or all, and a median of their norms tells nothing


def holders(plan: Plan, norm_C_G: Tensor) -> Tensor:
    """Boolean [C, G]: whose update of which group has weight and is not zero."""
    return (plan.weight_C_G > 0) & (norm_C_G > 0)


def guarded(
    plan: Plan, norm_C_G: Tensor, layout: Layout, max_share: float, max_share_ratio: float, clip: float
) -> Plan:
    """The plan with shares capped, updates clipped and rare rows bounded; what it wants of whom stays the same.

    Args:
        plan: the algorithm's.
        norm_C_G: the norms that clients reported, [C, G].
        layout: the model's groups.
        max_share: no client counts for more in a group, or in a token's row.
        max_share_ratio: nor for more than so many times 1/n of n holders; but 1/n it may have.
        clip: length that an update may have, in medians; see `typical_norms`.
    """
    factor_C_G = torch.ones_like(plan.weight_C_G) if plan.factor_C_G is None else plan.factor_C_G
    length_C_G = (norm_C_G.double() * factor_C_G.double().abs()).float()
    held_C_G = holders(plan, norm_C_G)
    shorter_C_G = _shorter(length_C_G, held_C_G, layout, clip)
    weight_C_G = capped(plan.weight_C_G, max_share, max_share_ratio)
    new = replace(
        plan,
        weight_C_G=weight_C_G,
        factor_C_G=factor_C_G * shorter_C_G,
        streams={
            name: stream_C_G * shorter_C_G * _shorter(norm_C_G * stream_C_G.abs() * shorter_C_G, held_C_G, layout, clip)
            for name, stream_C_G in plan.streams.items()
        },
    )
    if plan.token_weight_C_M_V is None:
        return new
    of_group = [layout.groups.index(rows.group) for rows in layout.token_rows]
    held_C_M, length_C_M = holders(plan, norm_C_G)[:, of_group], length_C_G[:, of_group]
    met_C_M_V = plan.token_weight_C_M_V > 0 if plan.met_C_M_V is None else plan.met_C_M_V
    token_weight_C_M_V = capped(plan.token_weight_C_M_V, max_share, max_share_ratio)
    token_weight_C_M_V = _row_weights(token_weight_C_M_V, met_C_M_V, plan.weight_C_G[:, of_group] > 0)
    kept_M_V = (met_C_M_V.sum(0) == 1) & (token_weight_C_M_V.sum(0) == 0)
    return replace(
        new,
        token_weight_C_M_V=token_weight_C_M_V,
        row_most_M_V=_row_lengths(length_C_M, held_C_M, met_C_M_V),
        metrics={**plan.metrics, "token_rows_of_one_kept": int(kept_M_V.sum())},
    )


def _shorter(length_C_G: Tensor, held_C_G: Tensor, layout: Layout, clip: float) -> Tensor:
    """Factors that leave no length above `clip` medians; of streams too: their weights follow from what clients say."""
    most_G = clip * typical_norms(length_C_G, held_C_G, layout)
    return torch.where(length_C_G > most_G, most_G / length_C_G, 1.0)


def _row_weights(weight_C_M_V: Tensor, met_C_M_V: Tensor, wanted_C_M: Tensor) -> Tensor:
    """Weights of token rows; none where one client alone met the token: the row stays as it is.

    So nobody owns a word: a trigger is a word of one client's. The other layers go on learning from its texts. Where
    fewer than three are wanted, all have the same weight instead: half of what two hospitals write about would stay.
    """
    wanted_M = wanted_C_M.sum(0)
    alike_C_M = torch.where(wanted_M < FEW, wanted_C_M / wanted_M.clamp_min(1), 0.0)
    alone_1_M_V = met_C_M_V.sum(0, keepdim=True) == 1
    return torch.where(alone_1_M_V, alike_C_M.unsqueeze(-1), weight_C_M_V)


def _row_lengths(length_C_M: Tensor, held_C_M: Tensor, met_C_M_V: Tensor) -> Tensor:
    """Lengths that rows may have, [M, V]: of tokens that few met, what a row that it met moved with the median holder.

    That is a mean square, of the length of all rows that count and their number, which a client can claim as it likes;
    but it is not the median of many. Other rows may have any length: their holders outvote each other.
    """
    row_C_M = length_C_M / met_C_M_V.sum(-1).clamp_min(1).sqrt()
    typical_M = row_C_M.masked_fill(~held_C_M, torch.nan).nanmedian(dim=0).values
    few_M_V = (met_C_M_V.sum(0) < FEW) & (held_C_M.sum(0) >= FEW).unsqueeze(-1)
    return torch.where(few_M_V, typical_M.unsqueeze(-1), torch.inf)


def capped(weight_C_X: Tensor, share: float, ratio: float = math.inf) -> Tensor:
    """Weights, none above min(share, ratio / holders) or, if more, 1 / holders; the rest to others in proportion.

    >>> capped(torch.tensor([[0.9, 0.8, 1.0], [0.06, 0.2, 0.0], [0.04, 0.0, 0.0]]), 0.5)
    tensor([[0.5000, 0.5000, 1.0000],
            [0.3000, 0.5000, 0.0000],
            [0.2000, 0.0000, 0.0000]])
    """
    held_C_X = weight_C_X > 0
    most_X = (ratio / held_C_X.sum(0).clamp_min(1).double()).clamp_max(share)
    return torch.where(held_C_X, cap_weights(weight_C_X, most_X, held_C_X), 0.0)


def typical_norms(norm_C_G: Tensor, held_C_G: Tensor, layout: Layout) -> Tensor:
    """The median norm of each group's holders, [G]; the lower one of two.

    Where there are fewer than three, or most of those who moved the group have no weight, what a client moved in the
    other groups of that kind and layer, in the median over clients: a lone holder of an expert is held to what others
    moved of the layer. A client has one voice there, however many groups it holds, and one without any weight has it,
    too. Where no such group moved, as of embeddings or a head: what a client moved in all other groups, for as many
    values [O]. If none of these voices is of a client that does not hold the group, they compare nothing: then two
    holders have their own median, and a lone one any length.
    """
    known_C_G = norm_C_G.masked_fill(~held_C_G, torch.nan)
    moved_C_G = norm_C_G.masked_fill(norm_C_G <= 0, torch.nan)
    median_G = known_C_G.nanmedian(dim=0).values
    size_G = torch.tensor([layout.sizes[group] for group in layout.groups], dtype=torch.float32)
    alike: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for column, group in enumerate(layout.groups):
        alike[group.kind, group.layer].append(column)
    holders_G, movers_G = held_C_G.sum(0), (norm_C_G > 0).sum(0)
    few_G = (holders_G < FEW) | (2 * holders_G < movers_G)
    for columns in alike.values():
        if not bool(few_G[columns].any()):
            continue
        rest = [other for other in range(len(layout.groups)) if other not in columns]
        a_value_C = _moved_a_value(moved_C_G[:, rest], size_G[rest])
        for column in columns:
            if not few_G[column]:
                continue
            others = [other for other in columns if other != column]
            own_C = _middle_of_each(known_C_G[:, others])
            if bool(own_C.isnan().any()):
                own_C = own_C.where(~own_C.isnan(), _middle_of_each(moved_C_G[:, others]))
            for voice_C, length in ((own_C, 1.0), (a_value_C, float(size_G[column].sqrt()))):
                if not bool(voice_C[~held_C_G[:, column]].isnan().all()):
                    median_G[column] = length * voice_C.nanmedian()
                    break
            else:
                if holders_G[column] < 2:
                    median_G[column] = torch.inf
    return median_G


def _middle_of_each(norm_C_G: Tensor) -> Tensor:
    """Each client's median over these groups, [C]; NaN: it has none."""
    return norm_C_G.nanmedian(dim=1).values if norm_C_G.shape[1] else norm_C_G.new_full((len(norm_C_G),), torch.nan)


def _moved_a_value(moved_C_G: Tensor, size_G: Tensor) -> Tensor:
    """Root mean square of what each client moved a value, of the groups that it moved, [C]; NaN: it moved none."""
    values_C = (~moved_C_G.isnan() * size_G).sum(1)
    return (moved_C_G.square().nansum(1) / values_C).sqrt().where(values_C > 0, torch.nan)


def liars(clients: int, share: float) -> int:
    """How many of so many clients can be told to lie, one at least; if more disagree, nobody tells who is right.

    >>> liars(4, 0.3), liars(10, 0.3), liars(100, 0.29)
    (1, 3, 29)
    """
    return max(1, int(share * clients + SMALL))


class Directions:
    """Cosines between updates as they arrived: of token rows, of shared layers, of experts with their routers.

    A group that was not asked of a client counts as zero there. Memory is three vectors of `DIRECTION_WIDTH` a client.

    Args:
        layout: the model's groups.
        seed: of the sketches; clients must not know it.
    """

    def __init__(self, layout: Layout, seed: int) -> None:
        self._sketch = Sketch(DIRECTION_WIDTH, seed)
        sign = torch.Generator().manual_seed(seed)
        self._sign = {g: 1.0 - 2 * torch.randint(2, (DIRECTION_WIDTH,), generator=sign) for g in layout.groups}
        self._of: dict[str, Tensor] = {}

    def add(self, update: Update) -> None:
        """Sketch an update. Each group has random signs of its own, for equal shapes meet in the same buckets."""
        part_P_S = torch.zeros(len(PARTS), DIRECTION_WIDTH)
        for group, packed in update.groups.items():
            part = next(part for part, kinds in enumerate(PARTS) if group.kind in kinds)
            values = packed.values if packed.scale is None else unpack(packed)  # sketched piece by piece
            part_P_S[part] += self._sketch.project(values) * self._sign[group]
        self._of[update.client] = part_P_S

    def against(self, share: float) -> dict[str, float]:
        """Clients of which a part's median cosine with the others is below -AGAINST, and the least such cosine.

        They are at most `share` of all, one at least; if more are, nobody tells who is right, and the answer is nobody.
        """
        found: dict[str, float] = {}
        for part in range(len(PARTS)):
            moved = {client: of[part] for client, of in self._of.items() if bool(of[part].any())}
            if len(moved) < FEW:
                continue
            unit_C_S = torch.nn.functional.normalize(torch.stack(list(moved.values())).double(), dim=1)
            cosine_C_C = (unit_C_S @ unit_C_S.T).fill_diagonal_(torch.nan)
            median_C = cosine_C_C.nanquantile(0.5, dim=1)  # of an even number the mean of the middle two
            opposite = {client: cos for client, cos in zip(moved, median_C.tolist(), strict=True) if cos < -AGAINST}
            if len(opposite) <= liars(len(moved), share):
                found |= {client: min(cos, found.get(client, cos)) for client, cos in opposite.items()}
        return found


# --------------------------------------------------------------------------------------------------------------- rules


def trimmed_mean(value_C_N: Tensor, share: float, held_C_N: Tensor | None = None) -> Tensor:
    """The mean of each value over its holders but for the int(share · holders) largest and smallest ones, [N].

    Args:
        value_C_N: an update a client.
        share: below 0.5.
        held_C_N: whose value counts; None: all. A value that nobody holds is 0.

    >>> trimmed_mean(torch.tensor([[1.0], [2.0], [3.0], [99.0]]), 0.25)
    tensor([2.5000])
    """
    return _middle(value_C_N, held_C_N, lambda count_N: (share * count_N.double() + SMALL).int())


def median(value_C_N: Tensor, held_C_N: Tensor | None = None) -> Tensor:
    """The median of each value over its holders, [N]; of an even number the mean of the middle two.

    >>> median(torch.tensor([[1.0], [2.0], [99.0]]))
    tensor([2.])
    """
    return _middle(value_C_N, held_C_N, lambda count_N: (count_N - 1).div(2, rounding_mode="floor"))


def _middle(value_C_N: Tensor, held_C_N: Tensor | None, cut: Any) -> Tensor:
    """The mean of what is left of each column's sorted values when `cut(holders)` are taken off at both ends."""
    held_C_N = torch.ones_like(value_C_N, dtype=torch.bool) if held_C_N is None else held_C_N
    sorted_C_N = value_C_N.masked_fill(~held_C_N, torch.inf).sort(dim=0).values
    count_N = held_C_N.sum(0)
    first_N = cut(count_N).clamp_min(0)
    place_C_1 = torch.arange(len(value_C_N)).unsqueeze(1)
    kept_C_N = (place_C_1 >= first_N) & (place_C_1 < count_N - first_N)
    mean_N: Tensor = sorted_C_N.masked_fill(~kept_C_N, 0).sum(0) / kept_C_N.sum(0).clamp_min(1)
    return mean_N


def krum(value_C_N: Tensor, share: float) -> Tensor:
    """The update whose n - f - 2 nearest others are nearest, [N], with f = int(share · n) of n clients hostile.

    Of two neither is nearer: their mean.
    """
    clients = len(value_C_N)
    if clients < FEW:
        return value_C_N.mean(0)
    nearest = max(1, clients - int(share * clients + SMALL) - 2)
    distance_C_C = torch.cdist(value_C_N.double(), value_C_N.double(), compute_mode="donot_use_mm_for_euclid_dist")
    score_C = distance_C_C.square().sort(dim=1).values[:, 1 : nearest + 1].sum(1)
    return value_C_N[int(score_C.argmin())]


def shortened(value_N: Tensor, radius: float) -> Tensor:
    """A vector no longer than `radius`.

    >>> shortened(torch.tensor([3.0, 4.0]), 1.0)
    tensor([0.6000, 0.8000])
    """
    norm = float(value_N.norm())
    return value_N * (radius / norm) if norm > radius else value_N


# -------------------------------------------------------------------------------------------------------- accumulators


def make_sum(
    rule: Robust,
    layout: Layout,
    plan: Plan,
    norms: Mapping[str, Tensor],
    dtype: Any,
    *,
    hostile: float,
    radius: float,
    center: Weights,
    heap: Heap | None = None,
) -> StreamingSum:
    """The accumulator of a rule other than none and clip, for a guarded plan.

    Args:
        rule: which.
        layout: the model's groups.
        plan: who holds what; beyond that, its weights do not matter.
        norms: client -> norm_G that it reported.
        dtype: wire precision.
        hostile: share of a group's holders that trimmed_mean and krum reckon with.
        radius: of centred clipping, in medians of the holders' norms.
        center: of centred clipping: the last round's update, by group.
        heap: where the sums lie.

    Raises:
        ValueError: The plan has streams, which only a weighted sum can have.
    """
    if plan.streams:
        raise ValueError(f'streams {", ".join(plan.streams)}: server.robust = "{rule}" has none; use "clip"')
    if rule == "centered_clip":
        return CenteredSum(layout, plan, norms, dtype, radius, center, heap)
    return KeptSum(layout, plan, norms, dtype, rule, hostile, heap)


class HolderSum(StreamingSum):
    """The rules' common part: who holds which value, and that all holders count alike."""

    def __init__(
        self, layout: Layout, plan: Plan, norms: Mapping[str, Tensor], dtype: Any, heap: Heap | None = None
    ) -> None:
        super().__init__(layout, plan, norms, dtype, by_sites=True, heap=heap)
        self._layout = layout

    def _holds(self, client: str, group: ParameterGroup) -> bool:
        column = self._column[group]
        return bool(self._weight[client][column] > 0 and self._norm[client][column] > 0)

    def _whole(self, client: str, group: ParameterGroup, packed: Packed, common: Tensor | None) -> Tensor:
        """A client's update of a group as the plan wants it, float32 [N]: centred, and clipped."""
        values = torch.cat([chunk.clone() for _, chunk in self._chunks(packed)])
        if common is not None:
            values -= common
        values.mul_(self._stretch[client][self._column[group]])
        if words := self._words.get(group):
            shorter_V = words.shorter_V([(0, values)], 1.0)
            if shorter_V is not None:
                rows = words.rows
                values[rows.start : rows.stop].view(rows.tokens, rows.width).mul_(shorter_V.unsqueeze(1))
        return values

    def _held(self, client: str, group: ParameterGroup) -> Tensor | None:
        """Boolean [N]: which of its values a client holds, token by token; None: all of them."""
        if (words := self._words.get(group)) is None:
            return None
        rows, held_N = words.rows, torch.ones(self._sizes[group], dtype=torch.bool)
        held_N[rows.start : rows.stop] = (words.weight_V(self._turn[client]) > 0).repeat_interleave(rows.width)
        return held_N


class KeptSum(HolderSum):
    """The trimmed mean, median or Krum of updates that are kept, in wire precision, until the round's last is there."""

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        norms: Mapping[str, Tensor],
        dtype: Any,
        rule: Robust,
        hostile: float,
        heap: Heap | None = None,
    ) -> None:
        super().__init__(layout, plan, norms, dtype, heap)
        self._rule, self._hostile = rule, hostile
        self._kept: defaultdict[ParameterGroup, dict[str, tuple[Packed, Tensor | None]]] = defaultdict(dict)

    def _take(
        self, client: str, group: ParameterGroup, packed: Packed, common: Tensor | None, chunks: Iterable[Chunk]
    ) -> None:
        if self._holds(client, group):
            scale = None if packed.scale is None else self._heap.copy(packed.scale)
            self._kept[group][client] = Packed(self._heap.copy(packed.values), scale), common

    def _new(self, group: ParameterGroup, old: Tensor, min_arrived: float) -> Tensor:
        kept = self._kept.get(group)
        if not kept or not (self._wanted(group) and self._carried(group, min_arrived)):
            return old
        clients = sorted(kept, key=self._turn.__getitem__)  # the order of arrival must not matter
        value_C_N = torch.stack([self._whole(client, group, *kept[client]) for client in clients])
        held = [held_N for client in clients if (held_N := self._held(client, group)) is not None]
        held_C_N = torch.stack(held) if held else None
        if self._rule == "krum":
            chosen_N = krum(value_C_N, self._hostile)
            return self._heap.keep(old + (chosen_N if held_C_N is None else chosen_N * held_C_N.any(0)))
        if self._rule == "median":
            return self._heap.keep(old + median(value_C_N, held_C_N))
        return self._heap.keep(old + trimmed_mean(value_C_N, self._hostile, held_C_N))


class CenteredSum(HolderSum):
    """Centred clipping around the last round's update: a streaming sum, one model in memory beside that update."""

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        norms: Mapping[str, Tensor],
        dtype: Any,
        radius: float,
        center: Weights,
        heap: Heap | None = None,
    ) -> None:
        super().__init__(layout, plan, norms, dtype, heap)
        norm_C_G = torch.stack([norms[client] for client in plan.clients])
        self._radius_G = radius * typical_norms(norm_C_G, holders(plan, norm_C_G), layout)
        self._center = center
        self._votes: dict[ParameterGroup, Tensor] = {}  # of each value, or of all of them

    def _take(
        self, client: str, group: ParameterGroup, packed: Packed, common: Tensor | None, chunks: Iterable[Chunk]
    ) -> None:
        if not self._holds(client, group):
            return
        apart = self._whole(client, group, packed, common)
        if group in self._center:
            apart -= self._center[group]
        held_N = self._held(client, group)
        if held_N is not None:
            apart *= held_N
        if group not in self._sums:
            self._sums[group] = self._heap.zeros(self._sizes[group])
            self._votes[group] = self._heap.zeros(1 if held_N is None else self._sizes[group])
        self._sums[group] += shortened(apart, float(self._radius_G[self._column[group]]))
        self._votes[group] += 1.0 if held_N is None else held_N

    def _new(self, group: ParameterGroup, old: Tensor, min_arrived: float) -> Tensor:
        if group not in self._sums or not (self._wanted(group) and self._carried(group, min_arrived)):
            return old
        change = self._sums[group] / self._votes[group].clamp_min(1)
        if group in self._center:
            change += self._center[group]
        return self._heap.keep(old + change * (self._votes[group] > 0))
