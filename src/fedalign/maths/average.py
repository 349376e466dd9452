"""The streaming sum: updates are checked and added one after another, then normalised by the weight that arrived.

    new[g] = old[g] + (Σ_planned b / Σ_arrived b) · Σ_arrived b · factor · Δ      for each parameter group g   [O]

b and factor come from the `Plan`; factors never enter the normaliser. Memory is one float32 model, whatever the
number of clients: nothing that was added is kept. A client lost on the way costs its share, never the round.

Of a softmax router that the plan wants centred, each client's mean over experts is taken off its rows first.

Rows of embeddings and head may have weights of their own in place of b, normalised row by row in the same way, and a
length that nobody's update of them exceeds.

What an update weighs in the sum is bounded before it is added, so no update can make the new weights overflow.

The exception is average = "exact": of groups with low-rank factors the same sum is taken over the products B·A, for
which their updates, as small as they are, are kept until the end (see `low_rank`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fedalign.maths.heap import Heap
from fedalign.maths.low_rank import Stack
from fedalign.maths.rounding import TORCH_DTYPE, count, scales, stored, unpack_into
from fedalign.protocol import Failure, Layout, Packed, ParameterGroup, Plan, TokenRows, Update, Weights, WireDtype

Average = Literal["sum", "exact"]
Chunk = tuple[int, Tensor]  # where it begins, its values

CHUNK = 1 << 20  # values worked on at a time, most groups whole; a whole number of the wire's blocks
MOST = 1e15  # length that factors may give an update
NORM_SLACK = 0.02  # wire rounding may lengthen an update: bfloat16 by 0.4 %, int8 by about 0.2 %; int4 claims it


class Words:
    """The weights of one group's token rows, and how much of them has arrived.

    Args:
        rows: where they lie in the group.
        weight_C_V: each client's weight in each row.
        most_V: length that an update of a row may have; None: any.
    """

    def __init__(self, rows: TokenRows, weight_C_V: Tensor, most_V: Tensor | None = None) -> None:
        self.rows, self._weight_C_V = rows, weight_C_V[:, : rows.tokens]
        self._most_V = None if most_V is None else most_V[: rows.tokens]
        self._arrived_V = torch.zeros(rows.tokens, dtype=torch.float64)

    def weight_V(self, client: int) -> Tensor:
        """A client's weights, float32 [V]."""
        return self._weight_C_V[client]

    def arrive(self, client: int) -> None:
        """Count a client's weights as there."""
        self._arrived_V += self._weight_C_V[client]

    def stretch_V(self, min_arrived: float) -> Tensor:
        """Planned over arrived weight of each row, float32 [V]; 0 where too little arrived to change it."""
        planned_V = self._weight_C_V.double().sum(0)
        enough_V = (self._arrived_V > 0) & (self._arrived_V >= min_arrived * planned_V * (1 - 1e-6))
        return torch.where(enough_V, planned_V / self._arrived_V, 0).float()

    def spread(self, weight_V: Tensor, other: float, start: int, length: int) -> Tensor:
        """The weight of each value from `start` on, [length]: its row's; `other` where it is in none."""
        weights = torch.full((length,), other)
        values, touched, before = self._touched(start, length)
        spread = weight_V[touched].repeat_interleave(self.rows.width)
        weights[values] = spread[before : before + values.stop - values.start]
        return weights

    def shorter_V(self, chunks: Iterable[Chunk], stretch: float) -> Tensor | None:
        """Factors, [V], that leave no row of an update, times `stretch`, longer than it may be; None: it may be any."""
        if self._most_V is None or not bool(self._most_V.isfinite().any()):
            return None
        square_V = torch.zeros(self.rows.tokens)
        for start, chunk in chunks:
            values, touched, before = self._touched(start, len(chunk))
            square_N = chunk[values].square()
            if len(square_N):
                after = (touched.stop - touched.start) * self.rows.width - before - len(square_N)
                square_V[touched] += functional.pad(square_N, (before, after)).view(-1, self.rows.width).sum(1)
        length_V = square_V.sqrt_().mul_(abs(stretch))
        return torch.where(length_V > self._most_V, self._most_V / length_V, 1.0)

    def _touched(self, start: int, length: int) -> tuple[slice, slice, int]:
        """Of `length` values from `start` on: which lie in rows; in which; how many of its first row come before."""
        first, width = self.rows.start, self.rows.width
        begin = max(start, first)
        end = max(begin, min(start + length, self.rows.stop))
        touched = slice((begin - first) // width, -(-(end - first) // width))
        return slice(begin - start, end - start), touched, (begin - first) % width


@contextmanager
def one_thread() -> Iterator[None]:
    """Meanwhile torch computes in the calling thread alone.

    Sums are as fast as memory, whoever computes them. Threads of a pool wait for each other after each chunk, and on a
    busy machine for the whole time that others have their cores: that made a sum 20 times as slow.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _words(layout: Layout, plan: Plan) -> Iterator[tuple[ParameterGroup, Words]]:
    if plan.token_weight_C_M_V is not None:
        most = plan.row_most_M_V
        for matrix, rows in enumerate(layout.token_rows):
            yield rows.group, Words(rows, plan.token_weight_C_M_V[:, matrix], None if most is None else most[matrix])


class StreamingSum:
    """Sums the updates that a plan asked for; an `Accumulator`.

    The result depends on the order of `add` calls (by float32 rounding) and on nothing else: not on timing, and not on
    updates that were refused. Of what is averaged exactly, not even the order matters.

    Args:
        layout: the model's parameter groups.
        plan: each client's weight in each group.
        norms: client -> norm_G of its statistics: the length it claimed for each group's update.
        dtype: wire precision that updates arrive in.
        average: whether low-rank factors are summed like all other values, or exactly: as products.
        by_sites: whether what must arrive of a group is a share of its clients, not of the weight that they claim.
        heap: where the sums lie.

    Raises:
        ValueError: the plan has streams, which are sums of values and not of products, but the average is exact.
    """

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        norms: Mapping[str, Tensor],
        dtype: WireDtype,
        average: Average = "sum",
        by_sites: bool = False,
        heap: Heap | None = None,
    ) -> None:
        if average == "exact" and plan.streams:
            names = ", ".join(plan.streams)
            why = 'tuning.average = "exact" has none, as they sum values; use factors or freeze_a'
            raise ValueError(f"streams {names}: {why}")
        low_rank = layout.factors if average == "exact" else {}
        self._stacks = {group: Stack(factors, layout.sizes[group]) for group, factors in low_rank.items() if factors}
        self._turn = {client: turn for turn, client in enumerate(plan.clients)}
        self._sizes, self._experts = layout.sizes, layout.experts
        self._dtype = dtype
        self._column = {group: i for i, group in enumerate(layout.groups)}
        self._expected = {request.client: request.groups for request in plan.requests(0, layout)}
        factor_C_G = torch.ones_like(plan.weight_C_G) if plan.factor_C_G is None else plan.factor_C_G
        # plain lists: a look-up for each group and client must cost nothing beside the sum
        self._weight = dict(zip(plan.clients, plan.weight_C_G.tolist(), strict=True))
        self._stretch = dict(zip(plan.clients, factor_C_G.tolist(), strict=True))
        self._factor = dict(zip(plan.clients, (plan.weight_C_G * factor_C_G).tolist(), strict=True))
        self._streams = {
            name: dict(zip(plan.clients, (stream_C_G * (plan.weight_C_G > 0)).tolist(), strict=True))
            for name, stream_C_G in plan.streams.items()
        }
        self._stream_sums: dict[str, Weights] = {name: {} for name in plan.streams}
        largest_C_G = torch.stack([factor_C_G, *plan.streams.values()]).abs().amax(0)
        self._largest = dict(zip(plan.clients, largest_C_G.tolist(), strict=True))
        self._words = dict(_words(layout, plan))
        self._norm = {client: norms[client].tolist() for client in plan.clients}
        self._centred = {layer for layer, softmax in enumerate(layout.softmax_L) if softmax and plan.centred}
        self._planned = dict(zip(layout.groups, plan.weight_C_G.double().sum(dim=0).tolist(), strict=True))
        self._arrived: defaultdict[ParameterGroup, float] = defaultdict(float)
        self._squares: defaultdict[ParameterGroup, float] = defaultdict(float)  # weight x length² of what did
        self._by_sites = by_sites
        self._holders = dict(zip(layout.groups, (plan.weight_C_G > 0).sum(dim=0).tolist(), strict=True))
        self._came: Counter[ParameterGroup] = Counter()  # clients of weight that did
        self._sums: Weights = {}
        self._heap = heap or Heap()
        self._is_spent = False
        self._seen: set[str] = set()
        self._buffer = torch.empty(0)

    def add(self, update: Update) -> Failure | None:
        """Check and add one client's update.

        What cannot be added (unknown or repeated client, groups other than the requested ones, shape, dtype) is refused
        before anything is added. A group that is not finite, or longer than its client claimed, is refused before any
        of it is added, and the client's later groups with it: they count as not arrived.

        Returns:
            None, or a `Failure` that names the client, the group and the value.
        """
        problem = self._mismatch(update)
        if problem is None:
            self._seen.add(update.client)
            with one_thread():
                problem = self._add_groups(update)
        return None if problem is None else Failure(update.client, "update", problem)

    def _add_groups(self, update: Update) -> str | None:
        """Add one group after another, until one cannot be added: why."""
        common: Tensor | None = None  # of the rows of one router, which follow one another
        problem: str | None = None
        for group in self._expected[update.client]:
            if group.kind != "gate" or group.layer not in self._centred:
                common = None
            elif common is None or group.expert == 0:
                common, problem = self._common(update, group.layer)
            problem = problem or self._add_group(update.client, group, update.groups[group], common)
            if problem is not None:
                return problem
        return None

    def unchanged(self, min_arrived: float = 0.5) -> list[ParameterGroup]:
        """Groups that the plan wanted to change but of which less than `min_arrived` arrived."""
        return [group for group in self._planned if self._wanted(group) and not self._carried(group, min_arrived)]

    def result(self, old: Mapping[ParameterGroup, Tensor], min_arrived: float = 0.5) -> Weights:
        """The new weights, which take the place of the sums.

        Groups that nobody changed, see also `unchanged`, are the old tensors themselves.

        Args:
            old: the weights the round started from, flat float32 [N] for each group.
            min_arrived: the share of its planned weight, or of its clients, that a group needs to be changed at all.

        Raises:
            RuntimeError: It is asked for a second time.
        """
        if self._is_spent:
            raise RuntimeError("a sum's result can be asked for once: it takes the place of the sums")
        self._is_spent = True
        return {group: self._new(group, values, min_arrived) for group, values in old.items()}

    def streams(self, min_arrived: float = 0.5) -> dict[str, Weights]:
        """The sums of the plan's streams over what arrived; groups that did not change are left out."""
        return {
            name: {group: values for group, values in sums.items() if self._carried(group, min_arrived)}
            for name, sums in self._stream_sums.items()
        }

    def came(self, min_arrived: float = 0.5) -> dict[ParameterGroup, int]:
        """How many clients' updates are in the sums of each group that changes, those of no weight left out."""
        return {group: count for group, count in self._came.items() if self._carried(group, min_arrived)}

    def spread(self, min_arrived: float = 0.5) -> float:
        """Σ over clients and groups of b · ‖Δ‖² of what arrived, as it is summed, and normalised like the sum."""
        changed = [group for group in self._squares if self._wanted(group) and self._carried(group, min_arrived)]
        return float(sum(self._squares[group] * self._planned[group] / self._arrived[group] for group in changed))

    def _new(self, group: ParameterGroup, old: Tensor, min_arrived: float) -> Tensor:
        if not (self._wanted(group) and self._carried(group, min_arrived)):
            return old
        stretch = self._planned[group] / self._arrived[group]
        if group in self._stacks:
            return self._stacks[group].result(old, stretch)
        change = self._sums.pop(group)
        if words := self._words.get(group):
            part = slice(words.rows.start, words.rows.stop)
            change_V_H = change[part].view(words.rows.tokens, words.rows.width)
            least = 0.0 if self._by_sites else min_arrived  # clients were counted for the group
            moved = old[part] + (change_V_H * words.stretch_V(least).unsqueeze(1)).flatten()
        new = torch.add(old, change, alpha=stretch, out=change)
        if words:
            new[part] = moved
        return new

    def _wanted(self, group: ParameterGroup) -> bool:
        return self._planned[group] > 0 and self._sizes[group] > 0

    def _carried(self, group: ParameterGroup, min_arrived: float) -> bool:
        arrived = self._arrived.get(group, 0.0)
        if self._by_sites:
            return arrived > 0 and self._came[group] >= min_arrived * self._holders[group]
        return arrived > 0 and arrived >= min_arrived * self._planned[group] * (1 - 1e-6)  # sums of float32 weights

    def _mismatch(self, update: Update) -> str | None:
        """Why the update as a whole is not what was asked for, or None."""
        expected = self._expected.get(update.client)
        if expected is None:
            return "not a client of this round's plan"
        if update.client in self._seen:
            return "handed over its update twice"
        for group in sorted(set(expected) ^ update.groups.keys()):
            return f"{group}: " + ("requested but missing" if group in expected else "sent but not requested")
        for group, packed in update.groups.items():
            problem = self._misshapen(packed, self._sizes[group])
            if problem is not None:
                return f"{group}: {problem}"
        return None

    def _misshapen(self, packed: Packed, size: int) -> str | None:
        values, scale = packed.values, packed.scale
        if values.dtype != TORCH_DTYPE[self._dtype]:
            return f"dtype {values.dtype}, expected {TORCH_DTYPE[self._dtype]}"
        if values.shape != (stored(size, self._dtype),):
            return f"shape {list(values.shape)}, expected [{stored(size, self._dtype)}]"
        blocks = scales(size, self._dtype)
        if (scale is None) != (blocks is None):
            return f"{'no' if scale is None else 'a'} scale with dtype {values.dtype}"
        if scale is not None and (scale.shape != (blocks,) or scale.dtype != torch.float32):
            return f"scale {scale.dtype} {list(scale.shape)}, expected torch.float32 [{blocks}]"
        if count(packed) != size:
            return f"{count(packed)} values, expected {size}"
        return None

    def _common(self, update: Update, layer: int) -> tuple[Tensor | None, str | None]:
        """The mean over experts of one router's rows, [N], or why there is none: a row that cannot be used."""
        rows = [ParameterGroup("gate", layer, expert) for expert in range(self._experts)]  # all travel, or none
        for row in rows:
            if problem := self._flaw(update.client, row, update.groups[row], self._length(update.groups[row])):
                return None, problem
        whole = [torch.cat([chunk.clone() for _, chunk in self._chunks(update.groups[row])]) for row in rows]
        return torch.stack(whole).mean(0), None

    def _length(self, packed: Packed, chunks: Iterable[Chunk] = ()) -> float:
        """Euclidean length of a group's update. `chunks`: if unpacked."""
        return math.hypot(*(float(torch.linalg.vector_norm(chunk)) for _, chunk in chunks or self._chunks(packed)))

    def _flaw(self, client: str, group: ParameterGroup, packed: Packed, norm: float) -> str | None:
        """Why a group so long cannot be added, or None: it is not finite, or longer than claimed."""
        column = self._column[group]
        claimed = self._norm[client][column]
        if norm <= claimed * (1 + NORM_SLACK) < math.inf:
            most = norm * self._largest[client][column]
            return None if most <= MOST else f"{group}: the plan would make its update {most:.3g} long"
        if not all(bool(chunk.isfinite().all()) for _, chunk in self._chunks(packed)):
            return f"{group}: not finite"
        return f"{group}: norm {norm:.6g}, but its statistics said {claimed:.6g}"

    def _add_group(self, client: str, group: ParameterGroup, packed: Packed, common: Tensor | None) -> str | None:
        """Add one group, less `common`, if it is finite and no longer than claimed; else leave the sum alone."""
        column = self._column[group]
        chunks = list(self._chunks(packed)) if count(packed) <= CHUNK else None  # unpack what fits only once
        norm = self._length(packed, chunks or ())
        if flaw := self._flaw(client, group, packed, norm):
            return flaw
        self._squares[group] += self._weight[client][column] * (self._stretch[client][column] * norm) ** 2
        self._arrived[group] += self._weight[client][column]
        self._came[group] += self._weight[client][column] > 0
        if words := self._words.get(group):
            words.arrive(self._turn[client])
        self._take(client, group, packed, common, chunks or ())
        return None

    def _take(
        self, client: str, group: ParameterGroup, packed: Packed, common: Tensor | None, chunks: Iterable[Chunk]
    ) -> None:
        """Sum a group that was checked, less `common`. `chunks`: if unpacked."""
        column = self._column[group]
        if group in self._stacks:
            self._stacks[group].add(self._turn[client], self._factor[client][column], packed)
            return
        words = self._words.get(group)
        stretch = self._stretch[client][column]
        weight_V = words.weight_V(self._turn[client]) * stretch if words else None
        if words and weight_V is not None:
            shorter_V = words.shorter_V(chunks or self._chunks(packed), stretch)
            weight_V = weight_V if shorter_V is None else weight_V * shorter_V
        targets = [(self._sums, self._factor[client][column])]
        targets += [(sums, self._streams[name][client][column]) for name, sums in self._stream_sums.items()]
        for sums, _ in targets:
            if group not in sums:
                sums[group] = self._heap.zeros(self._sizes[group])
        for start, chunk in chunks or self._chunks(packed):
            values = chunk if common is None else chunk - common[start : start + len(chunk)]
            for sums, factor in targets:
                target = sums[group][start : start + len(chunk)]
                if words and weight_V is not None and sums is self._sums:
                    target.addcmul_(values, words.spread(weight_V, factor, start, len(chunk)))
                else:
                    target.add_(values, alpha=factor)

    def _chunks(self, packed: Packed) -> Iterator[Chunk]:
        """Start and float32 values of each chunk; one buffer serves them all."""
        if self._dtype == "float32":
            for start in range(0, len(packed.values), CHUNK):
                yield start, packed.values[start : start + CHUNK]
            return
        if not len(self._buffer):
            self._buffer = torch.empty(CHUNK)
        size = count(packed)
        for start in range(0, size, CHUNK):
            chunk = self._buffer[: min(CHUNK, size - start)]
            unpack_into(chunk, packed, start)
            yield start, chunk
