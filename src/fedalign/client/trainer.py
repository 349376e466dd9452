"""One client's side of a round: train, keep the update, report statistics, hand over what the plan asks for.

A plain PyTorch loop. Statistics are streamed from the last local epoch's own forward passes; the update is the
difference of float32 masters, rounded to wire precision here, before any engine sees it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedalign import parallel
from fedalign.client.evaluation import evaluate
from fedalign.client.fit import AS_EVERYBODY, REMEDY, LocalFit, make_optimizer
from fedalign.client.memory import KEPT, MIXTURE, PRIVATE, ClientData, private_weights
from fedalign.client.mixture import Mixture
from fedalign.client.statistics import centre_rows, centroid_sketches, update_sketches
from fedalign.config.run import Config
from fedalign.data.batches import batches
from fedalign.errors import TrainingFailedError
from fedalign.maths.hashing import derive_seed
from fedalign.maths.rounding import pack, unpack_weights
from fedalign.moe.model import MoEModel
from fedalign.protocol import Algorithm, Broadcast, Evaluation, Hello, LocalRound, ParameterGroup, Statistics, Weights


@dataclass(frozen=True)
class OpenClient:
    """One client, loaded and ready for rounds."""

    trainer: Trainer
    data: ClientData
    hello: Callable[[], Hello]


class Trainer:
    """The client step on one loaded model; in process, clients take turns on it."""

    def __init__(self, moe: MoEModel, tokenizer: Any, algorithm: Algorithm, config: Config) -> None:
        self.moe = moe
        self.views = moe.views  # of storage that training and writing change in place
        self.tokenizer = tokenizer
        self.algorithm = algorithm
        self.config = config
        self._spare: Mixture | None = None  # made when first needed: a second model

    def train(self, client: ClientData, broadcast: Broadcast) -> Statistics:
        """Train on the client's own examples, keep the update on its disk, and report.

        Raises:
            TrainingFailedError: The loss or the update is not finite.
        """
        remembered = client.memory.before(broadcast.round)
        local = self._local_round(client, broadcast, remembered)
        self.algorithm.begin(local)
        self.moe.write(local.start)
        seed = derive_seed(self.config.run.seed, broadcast.round, client.name)
        started = time.perf_counter()
        limits = self.config.clients.limits.get(client.name, AS_EVERYBODY)
        with torch.random.fork_rng(devices=_cuda_devices(self.moe.devices)), self.moe.sending_to(limits.top_k):
            torch.manual_seed(seed + parallel.rank())  # other rows want other dropout
            fit = LocalFit(self, client, local, broadcast.round, remembered, limits)
            fit.run()
        trained = fit.trained()
        private = [group for group in trained if self.algorithm.private(group)]
        own = {f"{PRIVATE}{group}": trained[group].cpu().clone() for group in private}
        update = self._update(trained, local.start)
        norm_G = torch.stack([update[group].norm() for group in self.moe.layout.groups]).cpu()
        if not bool(norm_G.isfinite().all()):
            broken = self.moe.layout.groups[int((~norm_G.isfinite()).nonzero()[0])]
            raise TrainingFailedError(f"its update of {broken} is not finite; {REMEDY}")
        seconds = time.perf_counter() - started
        statistics = parallel.agreed(self._report(client, broadcast.round, fit, local, update, norm_G, seconds))
        wire = self.config.wire.dtype
        packed = {group: pack(delta.cpu(), wire, derive_seed(seed, group)) for group, delta in update.items()}
        mixture = self._fit_mixture(client, local, broadcast.round, seed) if self.algorithm.mixes else {}
        kept = {f"{KEPT}{name}": value for name, value in self.algorithm.end(local, update, fit.steps).items()}
        state = {"prob_L_E": statistics.prob_L_E, **fit.optimizer_state(), **own, **kept, **mixture}
        client.memory.keep(broadcast.round, packed, state)
        return statistics

    def _local_round(self, client: ClientData, broadcast: Broadcast, remembered: Mapping[str, Tensor]) -> LocalRound:
        received = unpack_weights(broadcast.weights)
        return LocalRound(
            client=client.name,
            received=received,
            start=received | private_weights(remembered),
            state=broadcast.state,
            kept={name.removeprefix(KEPT): value for name, value in remembered.items() if name.startswith(KEPT)},
            last_update=lambda: unpack_weights(client.memory.last_update(broadcast.round)),
            learning_rate=self.config.training.learning_rate,
        )

    def _fit_mixture(self, client: ClientData, local: LocalRound, round: int, seed: int) -> dict[str, Tensor]:
        """Train the client's own model and its gate beside the weights that it received; what it keeps of them."""
        options = self.config.training
        mixture = self._mixture(client, local.received, round)
        optimizer = make_optimizer(mixture.parameters(), options)
        self.moe.write(local.received)
        with torch.random.fork_rng(devices=_cuda_devices(self.moe.devices)):
            torch.manual_seed(derive_seed(seed, "mixture"))
            for epoch in range(options.epochs):
                order = derive_seed(seed, "mixture", epoch)
                every = batches(
                    client.train,
                    options.batch_tokens,
                    options.batch_examples,
                    seed=order,
                    equal_lengths=self.moe.equal_lengths,
                )
                mixture.fit(every, optimizer, options.max_grad_norm)
        return {f"{MIXTURE}{name}": value for name, value in mixture.state().items()}

    def _mixture(self, client: ClientData, received: Weights, round: int) -> Mixture:
        """The client's mixture as it was before `round`."""
        remembered = client.memory.before(round)
        if self._spare is None:
            self._spare = Mixture(self.moe)
        kept = {n.removeprefix(MIXTURE): value for n, value in remembered.items() if n.startswith(MIXTURE)}
        self._spare.load(kept, received)
        return self._spare

    def _update(self, trained: Weights, start: Weights) -> Weights:
        """Trained minus start, in place; softmax routers' rows centred if the algorithm weights them one by one."""
        update = {g: value.sub_(start[g].to(value.device)) for g, value in trained.items()}
        if self.algorithm.centre_gates:
            centre_rows(update, self.moe)
        return update

    def _report(
        self,
        client: ClientData,
        round: int,
        fit: LocalFit,
        local: LocalRound,
        update: Weights,
        norm_G: Tensor,
        seconds: float,
    ) -> Statistics:
        options, layout, seed = self.config.statistics, self.moe.layout, self.config.run.seed
        routing = fit.statistics.finish(options.min_tokens, options.min_examples).without(fit.frozen_L_E)
        held_L_E = routing.load_L_E > 0
        centroid_L_E_D, scale_L = centroid_sketches(routing.centroid_L_E_H, options.centroid_width, seed)
        update_L_E_S = update_sketches(layout, update, local.start, options.update_width, seed)
        return Statistics(
            client=client.name,
            round=round,
            examples=len(client.train),
            tokens=routing.tokens,
            loss=fit.mean_loss,
            prob_L_E=routing.prob_L_E.cpu(),
            load_L_E=routing.load_L_E.cpu(),
            margin_L_E=routing.margin_L_E.cpu(),
            centroid_L_E_D=centroid_L_E_D,
            centroid_scale_L=scale_L,
            update_L_E_S=(update_L_E_S * held_L_E.cpu().unsqueeze(-1)).half(),
            norm_G=norm_G,
            token_count_M_V=fit.tokens.finish(options.min_examples),
            frozen=tuple(ParameterGroup("expert", *cell) for cell in fit.frozen_L_E.nonzero().tolist()),
            metrics={
                "train_seconds": seconds,
                "steps": float(fit.steps),
                "learning_rate": self.config.training.learning_rate,
            },
        )

    def evaluate(self, client: ClientData, received: Weights, round: int) -> Evaluation | None:
        """Score the received weights, which the model holds, on the client's held-out part; None without one.

        Where groups are private, the client's own take their place meanwhile.
        """
        if client.held_out is None:
            return None
        own = private_weights(client.memory.before(round + 1))
        self.moe.write(own)
        answer = None
        if self.algorithm.mixes:
            mixture = self._mixture(client, received, round + 1)
            mixture.own.model.eval()
            answer = mixture.answer
        score = evaluate(self.moe, client.held_out, self.config.evaluation, self.tokenizer, client.name, answer)
        self.moe.write({group: received[group] for group in own})
        return score


def _cuda_devices(devices: Sequence[torch.device]) -> list[int]:
    return [device.index or 0 for device in devices if device.type == "cuda"]
