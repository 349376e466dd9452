"""One client's side of a masked round with its masks: what leaves it, wherever it is.

What it counted, and its update, stay with it. It conceals its counts once a round, and once more among those left; a
group of its update likewise, for which it takes the totals that it is told, never a weight of another's making. What it
counted may be kept in a file: whoever is started again goes on with that, and need not train the round anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedalign.client.masked import column, counts, held_out
from fedalign.client.memory import ClientMemory
from fedalign.errors import TrainingFailedError
from fedalign.files import replacing_file
from fedalign.maths.fixed_point import BLOCK, POWERS, encode, heights, limits, marks
from fedalign.maths.hashing import derive_seed
from fedalign.protocol import (
    CLIPPED,
    EXAMPLES,
    HEIGHTS,
    HELD_OUT,
    LOSS,
    SCORED,
    Broadcast,
    Concealed,
    Evaluation,
    Layout,
    ParameterGroup,
    Request,
    Shares,
    Statistics,
    Totals,
    parse_group,
)

if TYPE_CHECKING:
    from fedalign.federation.masks import Masks, Once

PIECE = 1 << 20  # values concealed at a time; a whole number of blocks
COUNTED, TOTALS = "counts and update", "totals"  # of a round, as `Once` calls what may not change under a mask;
SCORES = "scores"  # likewise


@dataclass(frozen=True)
class Terms:
    """The terms of a masked run, the same for all sides."""

    layout: Layout
    shares: Shares
    least: int  # clients of a sum, and holders of a part that has weights of its own
    tells: Set[str]  # as of `protocol.count_shapes`
    seed: int  # of rounding
    settings: str  # `settled.sha256_of` the run's configuration: whoever trains by another has other masks

    @property
    def told(self) -> str:
        """All of them, as a text that goes into the keys of masks: who was told others has masks that do not cancel."""
        sizes = sorted((str(group), size) for group, size in self.layout.sizes.items())
        rows = [str(rows) for rows in self.layout.token_rows]
        return json.dumps([sizes, rows, str(self.shares), self.least, LOSS in self.tells, self.seed, self.settings])


@dataclass
class MaskedSite:
    """One client in a masked run, from round to round."""

    name: str
    memory: ClientMemory
    terms: Terms
    masks: Masks
    once: Once
    file: Path | None = None  # where it keeps what follows; None: nowhere
    round: int = 0  # at work
    counts: dict[str, Tensor] = field(default_factory=dict)  # of it, or its score once that is asked for by itself
    broadcast: str = ""  # hash of what that round began with
    content: str = ""  # hash of counts and update
    frozen: frozenset[ParameterGroup] = frozenset()  # groups that it did not train: its update of them is zero

    def __post_init__(self) -> None:
        """Go on with what is kept; what cannot be read is as if it were not there."""
        try:
            if self.file is None or not self.file.exists():
                return
            with safe_open(self.file, "pt") as kept:
                about = json.loads(kept.metadata()["about"])
                self.counts = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 # no mapping
            self.broadcast, self.content = about["broadcast"], about["content"]
            self.frozen = frozenset(map(parse_group, about["frozen"]))
            self.round = about["round"]
        except (SafetensorError, OSError, ValueError, LookupError, TypeError):
            self.counts = {}

    def has(self, round: int, broadcast: str, name: str = EXAMPLES) -> bool:
        """Whether it has counted in a round that began with this; with SCORED, whether it has scored these weights.

        Raises:
            TrainingFailedError: It has, and the round began with something else: what it trained then must stay.
        """
        there = self.round == round and name in self.counts
        if there and self.broadcast != broadcast:
            raise TrainingFailedError(f"round {round} began with other weights: its masks are used up")
        return there

    def count(self, report: Statistics, broadcast: str, among: Sequence[str]) -> Concealed:
        """Keep what was counted in a round that has been trained, and conceal it.

        Raises:
            TrainingFailedError: As of `recount`; or other numbers of the round were concealed before, or none can be.
        """
        self.counts, self.frozen = {}, frozenset(report.frozen)
        try:
            told = counts(report, self.terms.layout, self.terms.shares, self.terms.tells)
            update = self._update(report.round)
            told |= {f"{HEIGHTS}{group}": heights(values) for group, values in update.items()}
        except ValueError as error:
            raise TrainingFailedError(str(error)) from None
        return self._first(report.round, told, update, broadcast, among)

    def score(self, round: int, score: Evaluation | None, broadcast: str, among: Sequence[str]) -> Concealed:
        """Keep the score of a round's weights, None without a held-out part, and conceal it.

        Raises:
            TrainingFailedError: As of `count`.
        """
        self.counts = {}
        try:
            told = {SCORED: held_out(score)}
        except ValueError as error:
            raise TrainingFailedError(str(error)) from None
        return self._first(round, told, {}, broadcast, among)

    def _first(
        self,
        round: int,
        told: dict[str, Tensor],
        update: Mapping[ParameterGroup, Tensor],
        broadcast: str,
        among: Sequence[str],
    ) -> Concealed:
        self.content = content_of(told, update, broadcast)
        self.once.bind(round, SCORES if SCORED in told else COUNTED, self.content)
        self.round, self.counts, self.broadcast = round, told, broadcast
        self._keep()
        return self.recount(round, among)

    def recount(self, round: int, among: Sequence[str]) -> Concealed:
        """The counts of a round, or its score if that was asked for since, concealed among these clients.

        Raises:
            TrainingFailedError: Nothing was counted, they are too few, or it was concealed twice already, or its sum is
                known.
        """
        if round != self.round or not self.counts:
            raise TrainingFailedError(f"round {round}: nothing was counted in it")
        kind = SCORES if SCORED in self.counts else COUNTED
        self.once.bind(round, kind, self.content)
        summed = kind == COUNTED and self.once.knows(round, TOTALS)
        if summed and frozenset(among) not in self.once.among(round, EXAMPLES)[-1:]:
            raise TrainingFailedError(
                f"counts of round {round} were summed: other sums of them would tell of one client"
            )
        self.once.allow(round, self.counts, among)
        masked = dict[str, Tensor]()
        for name, value in self.counts.items():
            about = (round, "counts", self.broadcast, self.terms.told, name)  # a score's name is like no count's
            masked[name] = self.masks.mask(self._told(name, value, (*about, sorted(among))), about, among)
        return Concealed(self.name, round, tuple(among), masked)

    def conceal(self, totals: Totals, among: Sequence[str], groups: Sequence[ParameterGroup]) -> Iterator[Concealed]:
        """This client's share of the sums, group by group; the limits of their values follow from the totals.

        Raises:
            TrainingFailedError: As of `recount`; or the totals are not of what this client counted.
        """
        seen = fingerprint_of(totals.counts, self.broadcast, self.terms.told, *totals.among)
        self._check(totals, seen, among)
        kept = self._update(totals.round)
        self.once.bind(totals.round, COUNTED, content_of(self.counts, kept, self.broadcast))
        self.once.allow(totals.round, map(str, groups), among)
        layout, terms = self.terms.layout, self.terms
        own = column(self.counts, totals.counts, layout, terms.shares, terms.least, totals.round)
        for group in groups:
            update = kept[group]
            limit_B = limits(totals.counts[f"{HEIGHTS}{group}"])
            seed = derive_seed(terms.seed, totals.round, self.name, group, "masked")
            residues, clipped = torch.empty(len(update), dtype=torch.int16), 0
            for start in range(0, len(update), PIECE):
                part = slice(start, start + PIECE)
                weights, values = own.weighed(layout, group, start, update[part])
                limit = limit_B[start // BLOCK : (start + PIECE) // BLOCK]
                share, beyond = encode(values, weights, limit, seed, start)
                residues[part] = self.masks.mask(share, (totals.round, "update", seen, group), among, start)
                clipped += beyond
            about = (totals.round, "update", seen, f"{CLIPPED}{group}")
            told = {f"{CLIPPED}{group}": self.masks.mask(torch.tensor([clipped]), about, among)}
            yield Concealed(self.name, totals.round, tuple(among), {str(group): residues, **told})

    def _told(self, name: str, value: Tensor, about: Sequence[object]) -> Tensor:
        """A count as it is sent: itself, or of heights their marks, the same each time that it is about the same."""
        if not name.startswith(HEIGHTS):
            return value
        return marks(value, self.masks.noise((len(value), POWERS), torch.int32, about))

    def _update(self, round: int) -> dict[ParameterGroup, Tensor]:
        """Values of the kept update, float32, mapped from its file; zeros of what was not trained."""
        sizes = self.terms.layout.sizes
        groups = [group for group in self.terms.layout.groups if sizes[group]]
        trained = tuple(group for group in groups if group not in self.frozen)
        kept = self.memory.hand_over(self.name, Request(self.name, round, trained)).groups
        return {group: kept[group].values if group in kept else torch.zeros(sizes[group]) for group in groups}

    def _keep(self) -> None:
        """Return when the disk has it."""
        if self.file is not None:
            about = {"round": self.round, "broadcast": self.broadcast, "content": self.content}
            about |= {"frozen": [str(group) for group in self.frozen]}
            with replacing_file(self.file) as new:
                save_file(self.counts, new, {"about": json.dumps(about)})

    def _check(self, totals: Totals, seen: str, among: Sequence[str]) -> None:
        """Refuse totals that are less than what this client counted itself, of another sum, or that were others."""
        own = {**self.counts}
        own.pop(HELD_OUT, None)  # of which no client is told the sum
        names, told = (
            {name: (value.shape, value.dtype) for name, value in counts.items()} for counts in (own, totals.counts)
        )
        if names != told or frozenset(totals.among) not in self.once.among(totals.round, EXAMPLES):
            raise TrainingFailedError(f"the totals of round {totals.round} are not of what it counted")
        if not set(among) <= set(totals.among):
            raise TrainingFailedError(f"a sum of round {totals.round} is asked for among others than were counted")
        if any(bool((totals.counts[name] < value).any()) for name, value in own.items()):
            raise TrainingFailedError(f"the totals of round {totals.round} are less than it counted itself")
        if any(name.startswith(HEIGHTS) and bool((value >= POWERS).any()) for name, value in totals.counts.items()):
            raise TrainingFailedError(f"the totals of round {totals.round} have heights that no update may have")
        self.once.bind(totals.round, TOTALS, seen)


def content_of(counts: Mapping[str, Tensor], update: Mapping[ParameterGroup, Tensor], broadcast: str) -> str:
    """SHA-256 of all that a client conceals in a round that began with this."""
    return fingerprint_of({**counts, **{str(group): values for group, values in update.items()}}, broadcast)


def fingerprint_of(tensors: Mapping[str, Tensor], *more: str) -> str:
    """SHA-256 of names and values: who saw others has other masks."""
    found = hashlib.sha256("|".join(more).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"|{name} {tensor.dtype} {list(tensor.shape)}|".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def seen_of(broadcast: Broadcast) -> str:
    """SHA-256 of what a round began with; who is asked for a score, and others are not, has other masks than they."""
    parts = {f"state {name}": tensor for name, tensor in broadcast.state.items()}
    for group, packed in broadcast.weights.items():
        parts[f"values {group}"] = packed.values
        if packed.scale is not None:
            parts[f"scale {group}"] = packed.scale
    return fingerprint_of(
        {name: tensor.reshape(-1) for name, tensor in parts.items()}, str(broadcast.round), *["score"] * broadcast.score
    )
