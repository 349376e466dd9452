"""One client's side of a masked round with its masks: what leaves it, wherever it is.

What it counted, and its update, stay with it. It conceals its counts once a round, and once more among those left; a
group of its update likewise, for which it takes the totals that it is told, never a weight of another's making.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedalign.client.masked import column, counts
from fedalign.client.memory import ClientMemory
from fedalign.errors import TrainingFailedError
from fedalign.maths.fixed_point import BLOCK, MOST_CLIENTS, encode, limits, mean_squares
from fedalign.maths.hashing import derive_seed
from fedalign.protocol import (
    CLIPPED,
    EXAMPLES,
    SQUARES,
    Broadcast,
    Concealed,
    Layout,
    ParameterGroup,
    Request,
    Shares,
    Statistics,
    Totals,
)

if TYPE_CHECKING:
    from fedalign.federation.masks import Masks

PIECE = 1 << 20  # values concealed at a time; a whole number of blocks


@dataclass(frozen=True)
class Terms:
    """The terms of a masked run, the same for all sides."""

    layout: Layout
    shares: Shares
    least: int  # clients of a sum, and holders of a part that has weights of its own
    tells_loss: bool
    seed: int  # of rounding


@dataclass
class MaskedSite:
    """One client in a masked run, from round to round."""

    name: str
    memory: ClientMemory
    terms: Terms
    masks: Masks
    counts: dict[str, Tensor] = field(default_factory=dict)  # of the round at work
    broadcast: str = ""  # hash of what that round began with
    told: dict[int, str] = field(default_factory=dict)  # hash of the totals, by round
    answered: dict[tuple[int, str], list[frozenset[str]]] = field(default_factory=dict)  # among whom, by round and name

    def count(self, report: Statistics, broadcast: str, among: Sequence[str]) -> Concealed:
        """Keep what was counted in a round that has been trained, and conceal it.

        Raises:
            TrainingFailedError: As of `recount`; or the round was counted before, and its masks are used up.
        """
        if (report.round, EXAMPLES) in self.answered:
            raise TrainingFailedError(f"round {report.round} was counted before: its masks are used up")
        self.counts = counts(report, self.terms.layout, self.terms.shares, self.terms.tells_loss)
        self.broadcast = broadcast
        groups = [group for group in self.terms.layout.groups if self.terms.layout.sizes[group]]
        for group, values in self._update(report.round, groups).items():
            self.counts[f"{SQUARES}{group}"] = mean_squares(values)
        return self.recount(report.round, among)

    def recount(self, round: int, among: Sequence[str]) -> Concealed:
        """The counts of a round, concealed among these clients.

        Raises:
            TrainingFailedError: They are too few, or were concealed twice already.
        """
        self._agree(round, self.counts, among)
        return self._concealed(round, self.counts, ("counts", self.broadcast), among)

    def conceal(self, totals: Totals, among: Sequence[str], groups: Sequence[ParameterGroup]) -> Iterator[Concealed]:
        """This client's share of the sums, group by group; the limits of their values follow from the totals.

        Raises:
            TrainingFailedError: As of `recount`; or the totals are not of what this client counted.
        """
        seen = fingerprint_of(totals.counts, self.broadcast, *totals.among)
        self._check(totals, seen, among)
        self._agree(totals.round, map(str, groups), among)
        layout, terms = self.terms.layout, self.terms
        own = column(self.counts, totals.counts, layout, terms.shares, terms.least)
        for group, update in self._update(totals.round, groups).items():
            limit_B = limits(totals.counts[f"{SQUARES}{group}"])
            seed = derive_seed(terms.seed, totals.round, self.name, group, "masked")
            residues, clipped = torch.empty(len(update), dtype=torch.int16), 0
            for start in range(0, len(update), PIECE):
                part = slice(start, start + PIECE)
                weights, values = own.weighed(layout, group, start, update[part])
                limit = limit_B[start // BLOCK : (start + PIECE) // BLOCK]
                residues[part], beyond = encode(values, weights, limit, seed, start)
                clipped += beyond
            told = {str(group): residues, f"{CLIPPED}{group}": torch.tensor([clipped])}
            yield self._concealed(totals.round, told, ("update", seen), among)

    def _concealed(
        self, round: int, told: Mapping[str, Tensor], about: tuple[str, str], among: Sequence[str]
    ) -> Concealed:
        masked = {name: self.masks.mask(value, (round, *about, name), among) for name, value in told.items()}
        return Concealed(self.name, round, tuple(among), masked)

    def _update(self, round: int, groups: Sequence[ParameterGroup]) -> dict[ParameterGroup, Tensor]:
        """Values of the kept update, float32, mapped from its file."""
        kept = self.memory.hand_over(self.name, Request(self.name, round, tuple(groups))).groups
        return {group: packed.values for group, packed in kept.items()}

    def _agree(self, round: int, names: Iterable[str], among: Sequence[str]) -> None:
        """Note that these names are concealed among these clients, or refuse."""
        possible = self.terms.least <= len(among) <= MOST_CLIENTS  # of more it might wrap
        if self.name not in among or len(set(among)) != len(among) or not possible:
            raise TrainingFailedError(
                f"a masked sum of {len(among)} clients: it takes part in sums of {self.terms.least} to {MOST_CLIENTS}, "
                "itself among them"
            )
        for name in names:
            before = self.answered.setdefault((round, name), [])
            asked = frozenset(among)
            if asked in before:
                continue  # the same once more: nobody learns anything
            if len(before) == 2 or (before and not asked < before[0]):
                raise TrainingFailedError(
                    f"{name} of round {round} was concealed already: a further sum would tell of one client"
                )
            before.append(asked)
        self.answered = {key: value for key, value in self.answered.items() if key[0] >= round - 1}

    def _check(self, totals: Totals, seen: str, among: Sequence[str]) -> None:
        """Refuse totals that are less than what this client counted itself, of another sum, or that were others."""
        names = {name: value.shape for name, value in self.counts.items()}
        told = {name: value.shape for name, value in totals.counts.items()}
        if names != told or frozenset(totals.among) not in self.answered.get((totals.round, EXAMPLES), ()):
            raise TrainingFailedError(f"the totals of round {totals.round} are not of what it counted")
        if not set(among) <= set(totals.among):
            raise TrainingFailedError(f"a sum of round {totals.round} is asked for among others than were counted")
        if any(bool((totals.counts[name] < value).any()) for name, value in self.counts.items()):
            raise TrainingFailedError(f"the totals of round {totals.round} are less than it counted itself")
        if self.told.setdefault(totals.round, seen) != seen:
            raise TrainingFailedError(f"it was told other totals of round {totals.round} before")
        self.told = {round: hash for round, hash in self.told.items() if round >= totals.round - 1}


def fingerprint_of(tensors: Mapping[str, Tensor], *more: str) -> str:
    """SHA-256 of names and values: who saw others has other masks."""
    found = hashlib.sha256("|".join(more).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"|{name} {tensor.dtype} {list(tensor.shape)}|".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def seen_of(broadcast: Broadcast) -> str:
    """SHA-256 of what a round began with."""
    parts = {f"state {name}": tensor for name, tensor in broadcast.state.items()}
    for group, packed in broadcast.weights.items():
        parts[f"values {group}"] = packed.values
        if packed.scale is not None:
            parts[f"scale {group}"] = packed.scale
    return fingerprint_of({name: tensor.reshape(-1) for name, tensor in parts.items()}, str(broadcast.round))
