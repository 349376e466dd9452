"""A masked round at the server: counts, then updates, as residues of which the sum over clients alone has a meaning.

broadcast -> local training -> masked counts -> their totals -> each client's own weights -> masked shares -> sum

The server holds no key: it adds residues modulo 2^64 and 2^16. Drop-outs: what not all sent means nothing, so it is
asked for once more, masked among those left; of a group that is complete no second sum is asked for, nor of one of
which a lost client's share broke off: the difference of both would tell its part. That group stays. The weight of a
client that is lost after the totals were told stays where it is: its part of a group's step is zero. A sum that lacks
anybody else is never used: the round fails, and the last complete one is kept. A round that was interrupted goes on
among the same clients: sums over others beside it would tell of those who are in one of them alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from fedalign.errors import UserError
from fedalign.maths.fixed_point import BLOCK, MOST_CLIENTS, POWERS, decode, highest, limits
from fedalign.maths.server_step import server_step
from fedalign.protocol import (
    CLIPPED,
    EXAMPLES,
    HEIGHTS,
    HELD_OUT,
    HOLDERS,
    LOSS,
    MET,
    SCORED,
    UNIT,
    Begun,
    Broadcast,
    Concealed,
    Failure,
    HeldOut,
    Layout,
    MaskedFederation,
    Metrics,
    ParameterGroup,
    Shares,
    Stage,
    Totals,
    Weights,
    count_shapes,
)
from fedalign.server.checkpoint import ServerState
from fedalign.server.checks import check_held_out, check_weights, reasons
from fedalign.server.rounds import Server, select
from fedalign.server.scores import Traffic, describe_held_out

LOST = "clients were lost in a masked sum, and others when it was asked for again"
Residues = tuple[tuple[int, ...], torch.dtype]  # shape and type
SCORE_RESIDUES: Mapping[str, Residues] = {SCORED: ((len(HeldOut._fields),), torch.int64)}  # of a score by itself


def count_residues(layout: Layout, shares: Shares, tells: Set[str]) -> dict[str, Residues]:
    """Shape and type of all counts of a client, concealed; `tells` as of `protocol.count_shapes`."""
    told: dict[str, Residues] = {
        name: (shape, torch.int64) for name, shape in count_shapes(layout, shares, tells).items()
    }
    for group, size in layout.sizes.items():
        if size:
            told[f"{HEIGHTS}{group}"] = (-(-size // BLOCK), POWERS), torch.int32
    return told


def share_residues(sizes: Mapping[ParameterGroup, int], groups: Iterable[ParameterGroup]) -> dict[str, Residues]:
    """Shape and type of a client's share of these groups' sums, concealed."""
    shapes: dict[str, Residues] = {}
    for group in groups:
        shapes[str(group)] = (sizes[group],), torch.int16
        shapes[f"{CLIPPED}{group}"] = (1,), torch.int64
    return shapes


def totals_nbytes(layout: Layout, shares: Shares, tells: Set[str]) -> int:
    """Bytes of the totals that each client is told, as of `Totals.nbytes`; those of scores are not."""
    counts = sum(8 * math.prod(shape) for shape in count_shapes(layout, shares, tells - {HELD_OUT}).values())
    return counts + sum(-(-size // BLOCK) for size in layout.sizes.values())


@dataclass
class Sums:
    """Residues as they arrive, added modulo 2^64 or 2^16; of whom, name by name.

    Args:
        round: of the messages.
        among: who is to send them.
        shapes: name -> shape and type of residues.
    """

    round: int
    among: tuple[str, ...]
    shapes: Mapping[str, Residues]
    sums: dict[str, Tensor] = field(default_factory=dict)
    came: dict[str, list[str]] = field(default_factory=dict)

    def add(self, message: Concealed) -> Failure | None:
        """Add one message, or say why none of it was added."""
        problem = self._problem(message)
        if problem:
            return Failure(message.client, "update", problem)
        for name, residues in message.residues.items():
            if name in self.sums:
                self.sums[name] += residues
            else:
                self.sums[name] = residues.clone()
            self.came.setdefault(name, []).append(message.client)
        return None

    def complete(self, name: str) -> bool:
        """Whether all have sent it, so that the masks cancel."""
        return len(self.came.get(name, ())) == len(self.among)

    def of(self) -> tuple[str, ...]:
        """Clients that sent all names."""
        return tuple(one for one in self.among if all(one in self.came.get(name, ()) for name in self.shapes))

    def _problem(self, message: Concealed) -> str | None:
        if message.client not in self.among:
            return "not a client of this round"
        if message.round != self.round:
            return f"its masked numbers are of round {message.round}, not {self.round}"
        if message.among != self.among:
            return f"its masks are among {len(message.among)} clients, not the {len(self.among)} asked"
        for name, residues in message.residues.items():
            if name not in self.shapes:
                return f"{name!r:.40}: sent but not requested"
            if message.client in self.came.get(name, ()):
                return f"{name}: sent twice"
            shape, dtype = self.shapes[name]
            if residues.shape != shape or residues.dtype != dtype:
                return f"{name}: {residues.dtype} {list(residues.shape)}, expected {dtype} {list(shape)}"
        return None


class MaskedServer(Server):
    """A server whose rounds are masked; it hears of no client but who takes part, and why one does not."""

    def _round(self, state: ServerState) -> ServerState:
        started, number, traffic = time.perf_counter(), state.round + 1, Traffic()
        begun = self._sites.begun(number)
        chosen = select(self.federation.members(), self.config.clients.sample, self.config.run.seed, number)
        every = self.config.clients.sample == 1  # of some clients there is no mean
        scores = begun.score if begun.counted else state.pending is not None and every
        broadcast = self._broadcast(state, number, state.algorithm, score=scores)
        totals, held_out, failures = self._count(broadcast, begun.counted or tuple(sorted(chosen)), traffic)
        if state.pending is not None:
            trained = time.perf_counter()
            told = self._held_out(held_out, len(totals.among)) if scores and held_out else {}
            state = self._scored(state, state.pending, told, [])
            started += time.perf_counter() - trained  # saving the round before is no part of this one
        sums, lost = self._add_up(totals, begun, traffic)
        clipped = self._clipped(totals, sums)
        summed = self._stepped(state.weights, totals, sums)
        weights, moments = summed, state.moments
        if self.config.server.optimizer != "average":
            options = self.config.server
            weights, moments = server_step(options, state.weights, summed, moments, 0.0, self.heap.keep)
        self._refuse(number, check_weights(weights))
        updates = traffic.updates
        traffic.take(self.federation.moved(number))
        traffic.updates = updates
        down = self._moved_down(number, totals.among)
        metrics = {
            **self._tested(number, weights),
            **self._described(totals),
            "clipped_share": clipped,
            "uploaded_share": 1.0,
            "groups_unchanged": sum(1 for group, size in self.layout.sizes.items() if size and str(group) not in sums),
            "bytes_up": traffic.statistics + traffic.updates,
            "bytes_up_statistics": traffic.statistics,
            "bytes_up_by_client": traffic.up_by_client,
            "bytes_down": sum(down.values()),
            "bytes_down_by_client": down,
            "clients": list(totals.among),
            "failures": self._named([*failures, *lost]),
            "round_seconds": time.perf_counter() - started,
        }
        after = replace(state, round=number, weights=weights, moments=moments, public=self._public(state, weights))
        return self._complete(after, metrics)

    def _moved_down(self, number: int, clients: Sequence[str]) -> dict[str, int]:
        """With the totals, which these clients were told."""
        totals = totals_nbytes(self.layout, self._shares, self.config.tells)
        down = super()._moved_down(number, clients)
        return dict(sorted((down | {client: down.get(client, 0) + totals for client in clients}).items()))

    @property
    def _sites(self) -> MaskedFederation:
        return cast("MaskedFederation", self.federation)

    @property
    def _shares(self) -> Shares:
        shares = self.algorithm.shares
        assert shares is not None  # the configuration was refused else
        return shares

    def _count(
        self, broadcast: Broadcast, chosen: tuple[str, ...], traffic: Traffic
    ) -> tuple[Totals, HeldOut | None, list[Failure]]:
        """The totals of all clients that trained, of their scores if they tell any, and why others did not train."""
        number = broadcast.round
        self._enough(number, chosen, [])
        shapes = count_residues(self.layout, self._shares, self.config.tells)
        first = Sums(number, chosen, shapes)
        told = self._sites.count(broadcast, chosen)
        counted, failures = self._again(first, told, "train", "training", traffic)
        self._enough(number, counted.among, failures)
        if counted.of() != counted.among:
            self._fail(number, failures)
        return *self._totals(number, counted.among, counted.sums), failures

    def _evaluated(self, state: ServerState) -> tuple[Metrics, Sequence[Failure]]:
        """The scores of all clients together; where they cannot be summed the run goes on, and the line says why."""
        number, members = state.round, self.federation.members()
        among = self._sites.begun(number).scored or tuple(sorted(members))
        if problem := self._unsummed(among):
            return {"unscored": problem}, []
        told = self._sites.score(self._broadcast(state, number, {}), among)
        scored, failures = self._again(Sums(number, among, SCORE_RESIDUES), told, "evaluate", "evaluating", Traffic())
        problem = self._unsummed(scored.among) or (LOST if scored.of() != scored.among else "")
        if problem:
            return {"unscored": problem}, failures
        return self._held_out(HeldOut(*scored.sums[SCORED].tolist()), len(scored.among)), failures

    def _held_out(self, total: HeldOut, clients: int) -> Metrics:
        """The scores of so many clients together, or why they are not told."""
        if problem := check_held_out(total, clients):
            return {"unscored": problem}
        return describe_held_out(total, self.config.privacy.masked_min_holders)

    def _again(
        self, first: Sums, told: Iterable[Concealed | Failure], stage: Stage, doing: str, traffic: Traffic
    ) -> tuple[Sums, list[Failure]]:
        """Counts or scores of all, or, if some are missing and enough are left, of these; and why some are missing."""
        self.observer.progress(first.round, doing, 0, len(first.among))
        failures = self._take(first, told, stage, doing, traffic)
        left = first.of()
        if left == first.among:
            return first, failures
        again = Sums(first.round, left, first.shapes)
        if not self._unsummed(left):
            failures += self._take(again, self._sites.recount(first.round, left, stage), stage, doing, traffic)
        return again, failures

    def _add_up(self, totals: Totals, begun: Begun, traffic: Traffic) -> tuple[dict[str, Tensor], list[Failure]]:
        """The sums of all shares, and of what was clipped, by name; and why clients are missing in some of them."""
        number, later = totals.round, {*begun.groups, *begun.broken} if begun.groups else set()
        groups = [group for group in self.layout.groups if self.layout.sizes[group] and group not in later]
        first = Sums(number, totals.among, self._share_shapes(groups))
        told = self._sites.conceal(totals, totals.among, groups)
        failures = self._take(first, told, "update", "summing", traffic)
        # a group whose values all came is never asked for again, also where a count of what was clipped did not come
        lacking = [group for group in groups if not first.complete(str(group))]
        had = {name: total for name, total in first.sums.items() if first.complete(name)}
        if lacking and begun.groups:
            self._fail(number, failures)
        broken = {*self._sites.begun(number).broken} if lacking else set()
        rest: Sequence[ParameterGroup] = [group for group in lacking if group not in broken] or begun.groups
        left = begun.left
        if not rest:
            return had, failures
        shapes = self._share_shapes(rest)
        if lacking:
            left = tuple(one for one in totals.among if all(one in first.came.get(str(group), ()) for group in rest))
        self._enough(number, left, failures)
        again = Sums(number, left, shapes)
        lost = self._take(again, self._sites.conceal(totals, left, rest), "update", "summing", traffic)
        if again.of() != left:
            self._fail(number, [*failures, *lost])
        return had | again.sums, [*failures, *lost]

    def _share_shapes(self, groups: Sequence[ParameterGroup]) -> dict[str, Residues]:
        return share_residues(self.layout.sizes, groups)

    def _stepped(self, old: Weights, totals: Totals, sums: Mapping[str, Tensor]) -> Weights:
        new = dict(old)
        for group in old:
            if str(group) in sums:
                change = decode(sums[str(group)], limits(totals.counts[f"{HEIGHTS}{group}"]))
                new[group] = self.heap.keep(change.add_(old[group]))
        return new

    def _take(
        self, sums: Sums, told: Iterable[Concealed | Failure], stage: Stage, doing: str, traffic: Traffic
    ) -> list[Failure]:
        """Add what comes; why some of it was not added."""
        failures, heard = list[Failure](), set[str]()
        for message in told:
            failure = message if isinstance(message, Failure) else sums.add(message)
            if failure is not None:
                failures.append(replace(failure, stage=stage))
            if isinstance(message, Concealed):
                nbytes = message.nbytes
                traffic.up(message.client, nbytes)
                traffic.statistics, traffic.updates = (
                    (traffic.statistics + nbytes, traffic.updates)
                    if stage == "train"
                    else (traffic.statistics, traffic.updates + nbytes)
                )
            heard.add(message.client)
            self.observer.progress(sums.round, doing, len(heard), len(sums.among))
        return failures

    def _enough(self, number: int, left: Sequence[str], failures: Sequence[Failure]) -> None:
        """End the run where the sum would be of too few clients, or of so many that it might wrap."""
        if problem := self._unsummed(left):
            told = f" ({reasons(failures)})" if failures else ""
            raise UserError(f"round {number}: {problem}{told}. The last complete round is kept.")

    def _unsummed(self, left: Sequence[str]) -> str:
        """Why there is no sum of these clients; empty: there may be one."""
        if len(left) > MOST_CLIENTS:
            return (
                f"{len(left)} clients are to be summed, and a masked sum is of {MOST_CLIENTS} at most, since each may "
                "round up by a step: choose fewer with clients.sample, or privacy.masked = false"
            )
        least = max(self.config.privacy.masked_min_holders, self.config.server.min_clients)
        if len(left) < least:
            asked = "privacy.masked_min_holders and server.min_clients ask for"
            return f"{len(left)} clients can be summed, {asked} {least}"
        return ""

    def _fail(self, number: int, failures: Sequence[Failure]) -> None:
        told = reasons(failures) or "nobody replied"
        third = "A third time would tell of one client"
        raise UserError(f"round {number}: {LOST} ({told}). {third}. The last complete round is kept.")

    def _totals(self, number: int, among: tuple[str, ...], sums: Mapping[str, Tensor]) -> tuple[Totals, HeldOut | None]:
        """The totals of a round, or the end of the run where they cannot be sums of what clients count.

        Totals are told to all clients; those of scores are not, and stand beside them.
        """
        told = {name: value for name, value in sums.items() if not name.startswith(HEIGHTS) and name != HELD_OUT}
        held_out = HeldOut(*sums[HELD_OUT].tolist()) if HELD_OUT in sums else None
        most, holders = len(among), [told[name] for name in (HOLDERS, MET) if name in told]
        sound = bool(told[EXAMPLES] > 0) and all(bool((value >= 0).all()) for value in told.values())
        try:
            tall = {name: highest(value) for name, value in sums.items() if name.startswith(HEIGHTS)}
        except ValueError:
            sound = False
        if not sound or any(bool((value > most).any()) for value in holders):
            raise UserError(
                f"round {number}: the totals of {most} clients are impossible: one of them counts falsely, or "
                "received another model, so that its masks do not cancel. The last complete round is kept."
            )
        return Totals(number, among, told | tall), held_out

    def _clipped(self, totals: Totals, sums: Mapping[str, Tensor]) -> float:
        """The share of values that lay beyond their limits, of groups that tell it, or the end of the run."""
        clipped = {name: int(total) for name, total in sums.items() if name.startswith(CLIPPED)}
        most = {f"{CLIPPED}{group}": len(totals.among) * size for group, size in self.layout.sizes.items()}
        if any(not 0 <= count <= most[name] for name, count in clipped.items()):
            raise UserError(
                f"round {totals.round}: the sum of {len(totals.among)} updates is impossible: one counts falsely, "
                "or was told other totals, so that its masks do not cancel. The last complete round is kept."
            )
        return sum(clipped.values()) / max(sum(most[name] for name in clipped), 1)

    def _described(self, totals: Totals) -> Metrics:
        """A round's training, as far as totals tell."""
        counts, clients = totals.counts, len(totals.among)
        least = self.config.privacy.masked_min_holders
        examples = float(counts[EXAMPLES]) / UNIT
        told: Metrics = {"train_examples": round(examples)}
        if LOSS in counts:
            told["train_loss_nats"] = float(counts[LOSS]) / UNIT / examples
        if HOLDERS in counts:
            told |= {
                "experts_held_share": float(counts[HOLDERS].double().mean()) / clients,
                "experts_held_by_nobody": int((counts[HOLDERS] == 0).sum()),
                "experts_by_size": int((counts[HOLDERS] < least).sum()),
            }
        if MET in counts:
            told["token_rows_by_size"] = int((counts[MET] < max(least, self._shares.row_holders)).sum())
        return told
