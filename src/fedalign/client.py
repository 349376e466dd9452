"""One client's side of a round: train, keep the update, report statistics, hand over what the plan asks for.

A plain PyTorch loop. Statistics are streamed from the last local epoch's own forward passes; the update is the
difference of float32 masters, rounded to wire precision here, before any engine sees it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import get_scheduler

from fedalign import parallel
from fedalign.checkpoint import ClientMemory
from fedalign.config import ClientLimits, Config, TrainingConfig
from fedalign.data.batches import Batch, Encoded, batches
from fedalign.data.tokens import TokenCounts
from fedalign.errors import TrainingFailedError
from fedalign.evaluation import TestSet, evaluate
from fedalign.forward import answer_logits, own_share
from fedalign.maths.sketch import Sketch
from fedalign.messages import parse_group
from fedalign.moe.model import MoEModel
from fedalign.moe.probe import Captured, RoutingProbe, RoutingStatistics, balancing_loss, idle_experts
from fedalign.personal import Mixture
from fedalign.protocol import (
    Algorithm,
    Broadcast,
    Evaluation,
    Hello,
    Layout,
    LocalRound,
    ParameterGroup,
    Statistics,
    Step,
    Weights,
)
from fedalign.wire import pack, unpack_weights

AS_EVERYBODY = ClientLimits()
BATCHES_TO_CHOOSE = 8  # that a client reads before it says which experts it trains
PRIVATE, KEPT, MIXTURE = "private.", "kept.", "mixture."  # in the names of what a client remembers
REMEDY = "try a lower training.learning_rate, or training.precision = 'float32'"


@dataclass(frozen=True)
class ClientData:
    """What one client holds. It never leaves."""

    name: str
    train: Sequence[Encoded]
    held_out: TestSet | None
    memory: ClientMemory


@dataclass(frozen=True)
class OpenClient:
    """One client, loaded and ready for rounds."""

    trainer: Trainer
    data: ClientData
    hello: Callable[[], Hello]


def derive_seed(*parts: object) -> int:
    """A 63-bit seed for one purpose, the same on every machine.

    >>> derive_seed(0, 1, "client-00") == derive_seed(0, 1, "client-00") != derive_seed(0, 2, "client-00")
    True
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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
                every = batches(client.train, options.batch_tokens, options.batch_examples, seed=order)
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


class LocalFit:
    """The local epochs of one client in one round."""

    def __init__(
        self,
        trainer: Trainer,
        client: ClientData,
        local: LocalRound,
        round: int,
        remembered: Mapping[str, Tensor],
        limits: ClientLimits = AS_EVERYBODY,
    ) -> None:
        self.moe, self.algorithm, self.options = trainer.moe, trainer.algorithm, trainer.config.training
        self.client, self.local = client, local
        self.seed = derive_seed(trainer.config.run.seed, round, client.name, "order")
        device = self.moe.device
        self.state = {name: value.to(device) for name, value in local.state.items()}
        self.prob_L_E = remembered["prob_L_E"].to(device) if "prob_L_E" in remembered else None
        self.statistics = RoutingStatistics(len(self.moe.layers), self.moe.experts, self.moe.hidden, device)
        self.tokens = TokenCounts(self.moe.layout.token_rows if self.algorithm.counts_tokens else ())
        self.parameters = [p for p in self.moe.model.parameters() if p.requires_grad]
        self.masters = {p: p.detach().float() for p in self.parameters if p.dtype != torch.float32}
        self.views = trainer.views if not self.masters else self.moe.views_of(self.masters)
        if self.masters:  # the model's own values are rounded
            self.moe.write(local.start, self.masters)
        self.stepped = [self.masters.get(p, p) for p in self.parameters]
        self.optimizer = make_optimizer(self.stepped, self.options)
        if self.options.keep_optimizer:
            restore_optimizer(self.optimizer, self.stepped, remembered)
        self.limits = limits
        self.frozen_L_E = torch.zeros(len(self.moe.layers), self.moe.experts, dtype=torch.bool, device=device)
        self.still = self.moe.weaker_components(limits.rank) if limits.rank else []
        self.steps = 0
        self._start: list[Tensor] | None = None
        self._nll_sum, self._answer_tokens = 0.0, 0

    @property
    def mean_loss(self) -> float:
        """Task loss of the last epoch, nats per answer token."""
        return self._nll_sum / max(1, self._answer_tokens)

    def run(self) -> None:
        """All local epochs."""
        self.moe.model.train()
        schedule = self._schedule()
        autocast = make_autocast(self.moe.device, self.options.precision)
        with RoutingProbe(self.moe) as probe:
            if self.limits.max_experts:
                self.frozen_L_E = self._least_used(probe, self.limits.max_experts)
            for epoch in range(self.options.epochs):
                self._nll_sum, self._answer_tokens = 0.0, 0
                last = epoch == self.options.epochs - 1
                for group in grouped(self._batches(epoch), self.options.accumulate):
                    self._step(group, probe, autocast, record=last)
                    schedule.step()
        self.moe.model.zero_grad(set_to_none=True)

    def trained(self) -> Weights:
        """Flat float32 copies of all that was trained."""
        return self.moe.read(stand_ins=self.masters)

    @torch.no_grad()
    def _least_used(self, probe: RoutingProbe, count: int) -> Tensor:
        """Boolean [L, E]: all but the `count` experts of each layer that most of the client's tokens go to."""
        load_L_E = torch.zeros(self.frozen_L_E.shape, device=self.moe.device)
        for batch in itertools.islice(self._batches(0), BATCHES_TO_CHOOSE):
            here = own_share(batch).to(self.moe.device)
            with probe.capture(*here.masks()) as captured:
                answer_logits(self.moe, here)
            load_L_E += torch.cat([stack.dispatch_M_T_E.sum(1) for stack in captured.stacks])
        most_L_K = load_L_E.topk(min(count, self.moe.experts), dim=1).indices
        return torch.ones_like(self.frozen_L_E).scatter_(1, most_L_K, False)

    def optimizer_state(self) -> dict[str, Tensor]:
        """What the client's next round needs, if the optimizer is kept."""
        return dump_optimizer(self.optimizer, self.stepped) if self.options.keep_optimizer else {}

    def _batches(self, epoch: int) -> Iterator[Batch]:
        options = self.options
        seed = derive_seed(self.seed, epoch)
        return batches(self.client.train, options.batch_tokens, options.batch_examples, seed=seed)

    def _schedule(self) -> Any:
        name = "constant_with_warmup" if self.options.schedule == "constant" else self.options.schedule
        steps = 0  # a constant rate needs no count, and counting collates every batch
        if self.options.schedule != "constant":
            epochs = range(self.options.epochs)
            steps = sum(math.ceil(sum(1 for _ in self._batches(e)) / self.options.accumulate) for e in epochs)
        return get_scheduler(name, self.optimizer, self.options.warmup_steps, steps)

    def _step(self, group: Sequence[Batch], probe: RoutingProbe, autocast: Any, record: bool) -> None:
        """One optimizer step on one or more batches."""
        answer_tokens = sum(batch.answer_tokens for batch in group)
        self.moe.model.zero_grad(set_to_none=True)
        idle_L_E: Tensor | None = None
        for batch in group:
            here = own_share(batch).to(self.moe.device)
            with probe.capture(*here.masks()) as captured, autocast():
                nll_sum = answer_logits(self.moe, here).nll_N.sum()
            share = batch.answer_tokens / answer_tokens
            loss = nll_sum / answer_tokens
            for extra in self._penalties(captured):
                loss = loss + share * extra
            loss.backward()  # type: ignore[no-untyped-call]
            self._nll_sum += self._finite(parallel.total(nll_sum))
            self._answer_tokens += batch.answer_tokens
            idle = idle_experts(captured)
            idle_L_E = idle if idle_L_E is None else idle_L_E & idle
            if record:
                self.statistics.update(captured)
                self.tokens.update(batch)
        if self.algorithm.corrects:
            self.algorithm.correct(self.local, self.moe.gradients())
        for parameter, master in self.masters.items():
            master.grad = parameter.grad.float() if parameter.grad is not None else None
        if self.options.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.stepped, self.options.max_grad_norm)
        assert idle_L_E is not None
        with self._holding_still(idle_L_E | self.frozen_L_E):
            self.optimizer.step()
        with torch.no_grad():
            for parameter, master in self.masters.items():
                parameter.copy_(master)
        self.steps += 1

    def _finite(self, nll_sum: Tensor) -> float:
        value = float(nll_sum.detach())
        if not math.isfinite(value):
            raise TrainingFailedError(f"its loss is {value} at step {self.steps + 1}; {REMEDY}")
        return value

    def _penalties(self, captured: Captured) -> Iterator[Tensor]:
        penalty = self.algorithm.penalty(Step(captured.routing, self._drift, self.state, self.prob_L_E))
        if penalty is not None:
            yield penalty
        if self.options.balance_coefficient:
            yield self.options.balance_coefficient * balancing_loss(captured.routing, self.moe.experts)

    def _drift(self) -> Tensor:
        """‖w − w_received‖², of the rows that are here; the received weights are copied when first asked for."""
        if self._start is None:
            if self.steps:
                raise RuntimeError("a penalty on the drift must use it from the first step on")
            self._start = [parallel.held(p.detach())[0].clone() for p in self.parameters]
        pairs = zip(self.parameters, self._start, strict=True)
        terms = [(parallel.held(p)[0] - start).square().sum().to(self.moe.device) for p, start in pairs]
        return torch.stack(terms).sum()

    @contextlib.contextmanager
    def _holding_still(self, idle_L_E: Tensor) -> Iterator[None]:
        """Idle experts stay where they are: AdamW would move them by momentum, and the plan read that as direction."""
        cells = [ParameterGroup("expert", *cell) for cell in idle_L_E.nonzero().tolist()]
        before = [(view, view.clone()) for view in (*(v for cell in cells for v in self.views[cell]), *self.still)]
        yield
        for view, value in before:
            view.copy_(value)


def private_weights(remembered: Mapping[str, Tensor]) -> Weights:
    """What a client remembers of its private groups."""
    names = [name for name in remembered if name.startswith(PRIVATE)]
    return {parse_group(name.removeprefix(PRIVATE)): remembered[name] for name in names}


def centre_rows(update: Weights, moe: MoEModel) -> None:
    """Take the mean over its experts off each softmax router's rows, in place."""
    for layer, info in enumerate(moe.layers):
        if info.scoring == "softmax":
            rows = [ParameterGroup("gate", layer, expert) for expert in range(moe.experts)]
            mean = torch.stack([update[row] for row in rows]).mean(0)
            for row in rows:
                update[row] -= mean


def centroid_sketches(centroid_L_E_H: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centroids sketched, float16 [L, E, D], and the scale of each layer that they are to be multiplied with."""
    sketch = Sketch(width, seed)
    sketch_L_E_D = torch.stack([torch.stack([sketch.project(row) for row in rows]) for rows in centroid_L_E_H]).cpu()
    scale_L = sketch_L_E_D.abs().amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    return (sketch_L_E_D / scale_L[:, None, None]).half(), scale_L


def update_sketches(layout: Layout, update: Weights, start: Weights, width: int, seed: int) -> Tensor:
    """Directions of the experts' updates, [L, E, S]; of adapters those of their products, as factors are not unique."""
    sketch = Sketch(width, seed)

    def project(group: ParameterGroup) -> Tensor:
        factors = layout.factors.get(group)
        if not factors:
            return sketch.project(update[group]).cpu()
        old = start[group].to(update[group].device)
        return sketch.project_change(old + update[group], old, factors).cpu()

    sketches = torch.stack([project(group) for group in layout.groups if group.kind == "expert"])
    return torch.nn.functional.normalize(sketches.view(layout.layers, layout.experts, width), dim=-1)


def grouped(items: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Consecutive lists of `size`; the last may be shorter."""
    while part := list(itertools.islice(items, size)):
        yield part


def make_optimizer(parameters: Sequence[Tensor], options: TrainingConfig) -> Optimizer:
    """AdamW or plain SGD; weight decay on matrices only."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate)
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)


def dump_optimizer(optimizer: Optimizer, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """The optimizer's tensors by parameter index."""
    return {
        f"optimizer.{index}.{name}": parallel.whole(value.detach()).cpu()
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: Optimizer, parameters: Sequence[Tensor], remembered: Mapping[str, Tensor]) -> None:
    """The inverse of `dump_optimizer`; nothing remembered leaves the optimizer fresh."""
    for key, value in remembered.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            parameter = parameters[int(index)]
            optimizer.state[parameter][name] = parallel.like(value.clone(), parameter)


def make_autocast(device: torch.device, precision: str) -> Any:
    """A factory of contexts: bfloat16 where asked for, or where the hardware has it and the choice is ours."""
    wanted = precision == "bfloat16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def _cuda_devices(devices: Sequence[torch.device]) -> list[int]:
    return [device.index or 0 for device in devices if device.type == "cuda"]
