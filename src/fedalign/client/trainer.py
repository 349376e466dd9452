"""One client's side of a round: train, keep the update, report statistics, hand over what the plan asks for.

A plain PyTorch loop. Statistics are streamed from the last local epoch's own forward passes; the update is the
difference of float32 masters, rounded to wire precision here, before any engine sees it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedalign import parallel
from fedalign.client.accountant import Terms
from fedalign.client.evaluation import evaluate
from fedalign.client.fit import REMEDY, LocalFit
from fedalign.client.losses import Correction, correction
from fedalign.client.memory import ClientData, Keeping, Kept
from fedalign.client.mixture import Mixture
from fedalign.client.noisy import PrivateFit
from fedalign.client.statistics import centroid_sketches, packed_bits, update_sketches
from fedalign.config.run import Config
from fedalign.errors import TrainingFailedError, UserError, within
from fedalign.maths.hashing import derive_seed
from fedalign.maths.lazy import LazyWeights
from fedalign.maths.low_rank import lost_products, owed
from fedalign.maths.rounding import pack, shapes_of, unpack, unpack_weights
from fedalign.maths.tensor_file import unwritable
from fedalign.moe.model import MoEModel
from fedalign.moe.part import part_of
from fedalign.moe.rows import fitted_row, look, public_text, with_row
from fedalign.protocol import (
    Algorithm,
    Broadcast,
    Consent,
    Evaluation,
    Hello,
    Layout,
    LocalRound,
    ParameterGroup,
    Part,
    Statistics,
    Weights,
    asked_shapes,
)

log = logging.getLogger("fedalign")
TEXT = 8192  # tokens, padding included, of a client's own text that its router row is fitted on


def left_alone(part: Part | None, layout: Layout) -> frozenset[ParameterGroup]:
    """The groups that a client never trains, since they are not of its part of the model; none, if it has all of it."""
    return frozenset() if part is None else frozenset(layout.groups) - part.trained


def trained_sizes(config: Config, layout: Layout, client: str, consent: Consent) -> dict[ParameterGroup, int]:
    """The groups that a client trains, whose updates leave it, and how many values each has."""
    kept = {*consent.frozen(layout), *left_alone(config.algorithm.build().part(layout, client), layout)}
    return {group: size for group, size in layout.sizes.items() if size and group not in kept}


@dataclass(frozen=True)
class OpenClient:
    """One client, loaded and ready for rounds."""

    trainer: Trainer
    data: ClientData
    hello: Callable[[], Hello]


class Trainer:
    """The client step on one loaded model. Clients take turns on it: each call writes the weights that it needs."""

    def __init__(self, moe: MoEModel, tokenizer: Any, algorithm: Algorithm, config: Config) -> None:
        self.moe = moe
        self.tokenizer = tokenizer
        self.algorithm = algorithm
        self.config = config
        self._spare: Mixture | None = None  # made when first needed: a second model
        self._last: tuple[Part, Trainer] | None = None  # where clients have parts of the model: the last one's

    def _with_part(self, client: ClientData) -> tuple[Trainer, Set[ParameterGroup]]:
        """The trainer of a client's part of the model, and the groups of it that the client is to leave alone."""
        part = self.algorithm.part(self.moe.layout, client.name)
        if part is None:
            return self, frozenset()
        if self._last is None or self._last[0] != part:
            self._last = part, Trainer(part_of(self.moe, part.experts), self.tokenizer, self.algorithm, self.config)
        return self._last[1], left_alone(part, self.moe.layout)

    def train(self, client: ClientData, broadcast: Broadcast) -> Statistics:
        """As `_train`, on the client's part of the model.

        Raises:
            TrainingFailedError: As `_train`, or there is no such part.
            UserError: The algorithm has changed what the other clients receive, too.
        """
        trainer, alone = self._with_part(client)
        versions = [packed.values._version for packed in broadcast.weights.values()]
        if all(group in alone for group, size in self.moe.layout.sizes.items() if size):
            named = ", ".join(self.moe.layout.owners)
            raise TrainingFailedError(f"no expert of this model is its own, so it trains nothing; owners are: {named}")
        statistics = trainer._train(client, broadcast, alone)
        if versions != [packed.values._version for packed in broadcast.weights.values()]:
            raise UserError(
                f"algorithm.name = {self.config.algorithm.name!r}: it changes in place what all clients received, of "
                f"{client.name} first. Set another tensor, as in local.start[group] = 0.9 * local.start[group]."
            )
        return statistics

    def _train(self, client: ClientData, broadcast: Broadcast, alone: Set[ParameterGroup]) -> Statistics:
        """Train on the client's own examples, keep the update on its disk, and report.

        Where the broadcast asks for it, what was received is scored before, as `evaluate` does after the last round.

        Raises:
            TrainingFailedError: The loss or the update is not finite.
        """
        before = client.memory.before(broadcast.round)
        agreed, paid = self._agreed(client, broadcast.round)
        local = self._local_round(client, broadcast, before)
        score = self._score(client, local.received, before) if broadcast.score else None
        self._begin(local, client.name)
        frozen = alone | {*client.consent.frozen(self.moe.layout)}
        local.start.update((group, local.received[group]) for group in frozen if group in local.received)
        local.shift = {group: shift for group, shift in local.shift.items() if group not in frozen}
        try:
            self.moe.write(local.start)
        except ValueError as error:
            raise UserError(
                f"algorithm.name = {self.config.algorithm.name!r}: `begin` left local.start: {error}"
            ) from None
        seed = derive_seed(self.config.run.seed if client.seed is None else client.seed, broadcast.round, client.name)
        started = time.perf_counter()
        drawn = seed + parallel.rank()  # other rows want other dropout
        with self.moe.freezing(frozen), self._random(drawn), self.moe.sending_to(client.limits.top_k):
            kind = LocalFit if agreed is None else PrivateFit
            correct, at = self._correction(client, broadcast), broadcast.round
            fit = kind(self.moe, self.algorithm, self.config, client, local, at, before, correct, frozen)
            if isinstance(fit, PrivateFit) and agreed is not None and client.privacy is not None:
                fit.agree(agreed, client.privacy.secret, self.config.privacy.max_grad_norm)
            fitted, unfitted = self._rows(fit, local, alone, before)
            fit.run()
        trained = self._trained(fit, local, frozen)
        private = {g: trained[g].cpu().clone() for g in trained if g.kind in self.algorithm.private}
        update = LazyWeights({group: partial(_moved, trained, local.start, group) for group in trained})
        update = _cut(update, client.limits.max_norm)
        wire, sizes = self.config.wire, self.moe.layout.sizes
        sent = (one for g in sizes if g not in frozen for one in shapes_of(str(g), sizes[g], wire.dtype))
        with client.memory.keeping(broadcast.round, sent) as keeping:
            norm_G, lost = self._keep_update(keeping, update, local.start, before.lost, seed, frozen)
            if not bool(norm_G.isfinite().all()):
                broken = self.moe.layout.groups[int((~norm_G.isfinite()).nonzero()[0])]
                raise TrainingFailedError(f"its update of {broken} is not finite; {REMEDY}")
            seconds = time.perf_counter() - started
            if isinstance(fit, PrivateFit):
                statistics = self._private_report(client, broadcast.round, fit, norm_G, paid)
            else:
                report = self._report(client, broadcast.round, fit, local, update, norm_G, seconds, score)
                statistics = parallel.agreed(report)
            local.steps = fit.steps
            kept = Kept(
                statistics.prob_L_E,
                fit.optimizer_state(),
                private,
                self._kept(local, client.name, update),
                lost,
                fitted=fitted,
                unfitted=unfitted,
            )
            if self.algorithm.mix:
                mixture = self._mixture(before, local.received)
                with self._random(derive_seed(seed, "mixture")):
                    left = client.most_steps - fit.steps if client.most_steps else math.inf
                    mixture.fit(client.train, self.config.training, seed, left)
                kept = mixture.add_to(kept)
            keeping.save(kept)
        return statistics

    def _begin(self, local: LocalRound, client: str) -> None:
        """Let the algorithm set what training starts from, and what is added to gradients."""
        with within(f"`begin` of {self.config.algorithm.name} at {client}"):
            self.algorithm.begin(local)
        sizes, told = self.moe.layout.sizes, f"algorithm.name = {self.config.algorithm.name!r}: its `begin` leaves"
        if lost := [group for group in local.received if group not in local.start]:
            raise UserError(f"{told} no local.start[{lost[0]}].")
        for group, shift in local.shift.items():
            if shift.shape != (sizes.get(group, 0),):
                raise UserError(
                    f"{told} local.shift[{group}] of shape {list(shift.shape)}, not [{sizes.get(group, 0)}]."
                )
            if not bool(shift.isfinite().all()):
                raise UserError(f"{told} local.shift[{group}] with a value that is not finite.")

    def _kept(self, local: LocalRound, client: str, update: Mapping[ParameterGroup, Tensor]) -> Mapping[str, Tensor]:
        """Tensors that the algorithm keeps for the client's next round."""
        with within(f"`keep` of {self.config.algorithm.name} at {client}"):
            kept = self.algorithm.keep(local, update)
        if flaw := unwritable(kept):
            raise UserError(f"algorithm.name = {self.config.algorithm.name!r}: it keeps {flaw}.")
        return kept

    def _agreed(self, client: ClientData, round: int) -> tuple[Terms | None, dict[str, float]]:
        """The terms of a private round, and what it and all before cost, which is on the client's disk by now."""
        if not self.config.privacy.on:
            return None, {}
        if client.privacy is None:
            raise RuntimeError(f"{client.name} has no ledger for a private run")
        agreed = client.privacy.terms(client.examples)
        return agreed, client.privacy.pay(round, agreed)

    def _correction(self, client: ClientData, broadcast: Broadcast) -> Correction | None:
        """Of the loss; who does not tell its own labels trains as if there were none."""
        options = self.config.training
        silent = options.loss == "label_shift" and not client.consent.token_counts
        return None if silent else correction(options, client.labels, broadcast.labels)

    def _trained(
        self, fit: LocalFit, local: LocalRound, frozen: Set[ParameterGroup]
    ) -> Mapping[ParameterGroup, Tensor]:
        """Values after training; unless they are spread over processes, a group is read when it is looked up."""
        if self.moe.sharded:
            return fit.trained() | {group: local.start[group] for group in frozen}
        look = {True: local.start.__getitem__, False: fit.trained_of}
        return LazyWeights({group: partial(look[group in frozen], group) for group in self.moe.layout.groups})

    def _keep_update(
        self,
        keeping: Keeping,
        update: Mapping[ParameterGroup, Tensor],
        start: Mapping[ParameterGroup, Tensor],
        lost: Weights,
        seed: int,
        frozen: Set[ParameterGroup],
    ) -> tuple[Tensor, Weights]:
        """Keep an update in wire precision; the norm of each group [G], and what rounding lost.

        With feedback, what it lost last time is sent along. Of a group that nobody asked for it is gone: neither the
        update nor what was added to it has arrived. Where rounding may lengthen an update, the norms are those sent.
        Where products of factors are averaged, products are what is lost and made up for.
        """
        wire, norms, left = self.config.wire, list[Tensor](), Weights()
        products = self.moe.layout.factors if self.config.tuning.average == "exact" else {}
        for group in self.moe.layout.groups:
            delta = update[group]
            norms.append(delta.norm().cpu())
            if group in frozen:
                continue
            trained, before, factors = delta.cpu(), lost.get(group), products.get(group, ())
            begun = start[group].cpu() if factors else trained
            delta = trained if before is None else trained + owed(factors, begun, before)
            packed = pack(delta, wire.dtype, derive_seed(seed, group))
            if wire.feeds_back or wire.dtype == "int4":
                sent = unpack(packed)
                norms[-1] = sent.norm()
                if wire.feeds_back and bool(norms[-1].isfinite()):  # else the round fails, and nothing is kept
                    left[group] = lost_products(factors, begun, trained, sent, before)
            keeping.put(group, packed)
        return torch.stack(norms), left

    @contextmanager
    def _random(self, seed: int) -> Iterator[None]:
        """Meanwhile torch draws from `seed`; afterwards the process goes on as if nothing had been drawn."""
        with torch.random.fork_rng(devices=[d.index or 0 for d in self.moe.devices if d.type == "cuda"]):
            torch.manual_seed(seed)
            yield

    def _local_round(self, client: ClientData, broadcast: Broadcast, before: Kept) -> LocalRound:
        received = self._here(unpack_weights(broadcast.weights))
        return LocalRound(
            received=received,
            start=received | before.private,
            state=broadcast.state,
            kept=before.algorithm,
            last_update=lambda: unpack_weights(client.memory.last_update(broadcast.round)),
            learning_rate=self.config.training.learning_rate,
        )

    def _mixture(self, kept: Kept, received: Mapping[ParameterGroup, Tensor]) -> Mixture:
        """A client's mixture as kept, beside the weights that it received."""
        assert self.algorithm.mix is not None
        self._spare = self._spare or Mixture(self.moe, self.algorithm.mix)
        self._spare.load(kept, received)
        return self._spare

    def _report(
        self,
        client: ClientData,
        round: int,
        fit: LocalFit,
        local: LocalRound,
        update: Mapping[ParameterGroup, Tensor],
        norm_G: Tensor,
        seconds: float,
        score: Evaluation | None,
    ) -> Statistics:
        options, layout, seed = self.config.statistics, self.moe.layout, self.config.run.seed
        asks = client.consent.granted(self.config.asks)
        idle = self.moe.cells(fit.frozen_L_E)
        routing = fit.statistics.finish(options.min_tokens, options.min_examples).without(fit.frozen_L_E)
        if layout.experts != self.moe.experts:
            routing = routing.spread(self.moe.layers[0].named, layout.experts)
        count_M_V = fit.tokens.finish(options.min_examples)
        centroid_L_E_D, scale_L = torch.zeros(0, 0, 0).half(), torch.zeros(0)
        if "centroids" in asks:
            centroid_L_E_D, scale_L = centroid_sketches(routing.centroid_L_E_H, options.centroid_width, seed)
        update_L_E_S = torch.zeros(0, 0, 0).half()
        if "directions" in asks:
            update_L_E_S = update_sketches(layout, update, local.start, options.update_width, seed)
            update_L_E_S = (update_L_E_S * (routing.load_L_E > 0).cpu().unsqueeze(-1)).half()
        return Statistics(
            client=client.name,
            round=round,
            examples=client.examples,
            tokens=routing.tokens,
            steps=fit.steps,
            learning_rate=self.config.training.learning_rate,
            loss=fit.mean_loss,
            prob_L_E=routing.prob_L_E.cpu(),
            load_L_E=routing.load_L_E.cpu(),
            norm_G=norm_G,
            margin_L_E=routing.margin_L_E.cpu() if "margins" in asks else torch.zeros(0, 0),
            centroid_L_E_D=centroid_L_E_D,
            centroid_scale_L=scale_L,
            update_L_E_S=update_L_E_S,
            token_count_M_V=count_M_V if "tokens" in asks else torch.zeros(0, 0),
            token_met_M_B=packed_bits(count_M_V > 0) if "met" in asks else torch.zeros(0, 0, dtype=torch.uint8),
            frozen=(*client.consent.frozen(layout), *idle),
            metrics={"train_seconds": seconds},
            held_out=score.examples if score else 0,
            held_out_loss=score.loss if score else None,
            held_out_accuracy=score.accuracy if score else None,
        )

    def _private_report(
        self, client: ClientData, round: int, fit: PrivateFit, norm_G: Tensor, paid: dict[str, float]
    ) -> Statistics:
        """All that follows from noised weights and the noised number of examples, and the loads if they are asked for.

        Nothing else is sent: each example counts as one token, experts are equally probable, and the loss is 0.
        """
        options, layout = self.config.statistics, self.moe.layout
        cells = (layout.layers, layout.experts)
        shapes = asked_shapes(layout, frozenset(), options.centroid_width, options.update_width)
        tensors: dict[str, Any] = {
            name: torch.zeros(shape, dtype=getattr(torch, dtype))
            for name, (shape, dtype) in shapes.items()
            if not name.endswith("_G")
        }
        told = fit.terms.examples
        with self.moe.sending_to(client.limits.top_k):
            load_L_E = fit.loads() if self.config.sends_loads else torch.zeros(cells)
        return Statistics(
            client=client.name,
            round=round,
            examples=told,
            tokens=told,
            steps=fit.steps,
            learning_rate=self.config.training.learning_rate,
            loss=0.0,
            norm_G=norm_G,
            **tensors | {"prob_L_E": torch.full(cells, 1 / layout.experts), "load_L_E": load_L_E},
            frozen=client.consent.frozen(layout),
            metrics=paid,
        )

    def evaluate(self, client: ClientData, received: Mapping[ParameterGroup, Tensor], round: int) -> Evaluation | None:
        """Score the weights after a round on the client's held-out part, if it has one.

        Where groups are private, the client's own take their place.
        """
        trainer, _ = self._with_part(client)
        return trainer._score(client, trainer._here(received), client.memory.before(round + 1))

    def _here(self, received: Mapping[ParameterGroup, Tensor]) -> LazyWeights:
        """The received weights, and nothing of groups that are not in this part of the model."""
        sizes = self.moe.layout.sizes
        return LazyWeights({g: partial(received.__getitem__ if sizes[g] else _nothing, g) for g in received})

    def _rows(
        self, fit: LocalFit, local: LocalRound, alone: Set[ParameterGroup], before: Kept
    ) -> tuple[Weights, Weights]:
        """Router rows of the client's own experts, if it has any, as fitted and as received; fitted where need be."""
        if not alone or not _lacks_rows(before, local.received):
            return before.fitted, before.unfitted
        fitted = self._fitted_rows(fit, local, alone)
        fit.put(fitted)
        return fitted, {group: local.received[group].cpu().clone() for group in fitted}

    def _fitted_rows(self, fit: LocalFit, local: LocalRound, alone: Set[ParameterGroup]) -> Weights:
        """Router rows of the client's own experts, fitted on its text and on what the model itself writes."""
        rows = [g for g in self.moe.layout.groups if g.kind == "gate" and g not in alone and self.moe.layout.sizes[g]]
        own = {group.expert for group in rows}
        among = [place for place, number in enumerate(self.moe.layers[0].named) if number not in own]
        public_L = look(self.moe, public_text(self.moe, derive_seed(self.config.run.seed, "public text")), among)
        text = ((batch.inputs(), batch.attention_mask_B_S) for batch in fit.some_text(TEXT))
        own_L = look(self.moe, text, among)
        fitted_L = [fitted_row(mine, public) for mine, public in zip(own_L, public_L, strict=True)]
        return {group: with_row(self.moe, group, local.start[group], fitted_L[group.layer]) for group in rows}

    def _score(self, client: ClientData, received: Mapping[ParameterGroup, Tensor], kept: Kept) -> Evaluation | None:
        if client.held_out is None:
            return None
        self.moe.write(received)
        self.moe.write(kept.private)
        answer = self._mixture(kept, received).answer if self.algorithm.mix else None
        return evaluate(self.moe, client.held_out, self.config.evaluation, self.tokenizer, client.name, answer)


def _lacks_rows(before: Kept, received: Mapping[ParameterGroup, Tensor]) -> bool:
    """Whether router rows of a client's own experts are to be fitted: they never were, or what came of it was lost.

    What it receives is then nearer to what it had received before it fitted them.
    """
    if before.prob_L_E is None:
        return True

    def far(rows: Weights) -> float:
        return float(sum((received[group].cpu() - row).square().sum() for group, row in rows.items()))

    return far(before.unfitted) < far(before.fitted)


def _nothing(group: ParameterGroup) -> Tensor:
    return torch.empty(0)


def _cut(update: LazyWeights, most: float) -> LazyWeights:
    """An update as it is, or if it is longer than `most` of this length; with 0 as it is.

    The length is Euclidean, over all groups. The bound is the client's own, and depends neither on data nor on others.
    """
    if not most:
        return update
    length = math.sqrt(sum(float(update[group].double().square().sum()) for group in update))
    if not length > most:
        return update
    log.info("an update of length %.4g is cut to %g (limits.max_norm)", length, most)
    return LazyWeights({group: partial(_scaled, update, group, most / length) for group in update})


def _scaled(update: Mapping[ParameterGroup, Tensor], group: ParameterGroup, factor: float) -> Tensor:
    return update[group] * factor


def _moved(
    trained: Mapping[ParameterGroup, Tensor], start: Mapping[ParameterGroup, Tensor], group: ParameterGroup
) -> Tensor:
    """By how much a group moved."""
    value = trained[group]
    return value - start[group].to(value.device)
