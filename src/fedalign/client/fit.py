"""The local epochs of one client in one round: a plain PyTorch loop.

Statistics are streamed from the last local epoch's own forward passes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fedalign import parallel
from fedalign.client.forward import answer_logits, own_share
from fedalign.client.gradients import Unreached
from fedalign.client.losses import Correction
from fedalign.client.memory import ClientData, Kept
from fedalign.config.run import Config, TrainingConfig
from fedalign.data.batches import Batch, batches
from fedalign.data.tokens import TokenCounts
from fedalign.errors import TrainingFailedError, UserError, within
from fedalign.maths.hashing import derive_seed
from fedalign.moe.groups import Slot
from fedalign.moe.model import MoEModel
from fedalign.moe.probe import RoutingProbe, RoutingStatistics, balancing_loss, idle_experts
from fedalign.protocol import Algorithm, LocalRound, ParameterGroup, Step, Weights

BATCHES_TO_CHOOSE = 8  # that a client reads before it says which experts it trains
REMEDY = "try a lower training.learning_rate, or training.precision = 'float32'"


class LocalFit:
    """The local epochs of one client in one round, on a model that holds `local.start`."""

    def __init__(
        self,
        moe: MoEModel,
        algorithm: Algorithm,
        config: Config,
        client: ClientData,
        local: LocalRound,
        round: int,
        kept: Kept,
        correction: Correction | None = None,
        frozen: Collection[ParameterGroup] = (),
    ) -> None:
        self.moe, self.algorithm, self.options = moe, algorithm, config.training
        self.name = config.algorithm.name
        self.correction = correction
        self.client, self.local = client, local
        seed = config.run.seed if client.seed is None else client.seed
        self.seed = derive_seed(seed, round, client.name, "order")
        device = moe.device
        self.state = {name: value.to(device) for name, value in local.state.items()}
        self.prob_L_E = None if kept.prob_L_E is None else kept.prob_L_E.to(device)
        asks = client.consent.granted(config.asks)
        hidden = self.moe.hidden if "centroids" in asks else 0
        self.statistics = RoutingStatistics(len(self.moe.layers), self.moe.experts, hidden, device, "margins" in asks)
        self.tokens = TokenCounts(self.moe.layout.token_rows if asks & {"tokens", "met"} else ())
        self.parameters = [p for p in self.moe.model.parameters() if p.requires_grad]
        self.masters = {p: p.detach().float() for p in self.parameters if p.dtype != torch.float32}
        self.views = self.moe.views_of(self.masters)
        if self.masters:  # the model's own values are rounded
            self.moe.write(local.start, self.masters)
        self._rows = dict(_rows_of(self.moe.slots, frozenset(frozen)))
        self.stepped = [self._own(p, self.masters.get(p, p)) for p in self.parameters]
        self.optimizer = make_optimizer(self.stepped, self.options)
        trained = [index for index, p in enumerate(self.moe.model.parameters()) if p.requires_grad]
        self.numbered = dict(zip(map(str, trained), self.stepped, strict=True))  # the same whatever else is frozen
        if self.options.keep_optimizer:
            restore_optimizer(self.optimizer, self.numbered, kept.optimizer)
        self.frozen_L_E = torch.zeros(len(self.moe.layers), self.moe.experts, dtype=torch.bool, device=device)
        self.still = self.moe.weaker_components(client.limits.rank) if client.limits.rank else []
        self.steps = 0
        self.unreached = Unreached(self.moe, watch=round == 1)
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
            if self.client.limits.max_experts:
                self.frozen_L_E = self._least_used(probe, self.client.limits.max_experts)
            for epoch in range(self.options.epochs):
                self._nll_sum, self._answer_tokens = 0.0, 0
                last = epoch == self.options.epochs - 1
                for group in grouped(self._batches(epoch), self.options.accumulate):
                    self._step(group, probe, autocast, record=last)
                    schedule.step()
                self.unreached.refuse(self._run_one_batch)
        self.moe.model.zero_grad(set_to_none=True)

    def trained(self) -> Weights:
        """Flat float32 copies of all that was trained."""
        return self.moe.read(stand_ins=self.masters)

    def trained_of(self, group: ParameterGroup) -> Tensor:
        """A flat float32 copy of one group."""
        return self.moe.read([group], self.masters)[group]

    def some_text(self, most: int) -> Iterator[Batch]:
        """Batches of the first epoch, of at most so many tokens, padding included; one at least."""
        tokens = 0
        for batch in self._batches(0):
            tokens += batch.attention_mask_B_S.numel()
            if tokens > most and tokens > batch.attention_mask_B_S.numel():
                return
            yield batch.to(self.moe.device)

    def put(self, weights: Weights) -> None:
        """Let some groups have other values than they started from: it counts as trained."""
        self.moe.write(weights)
        if self.masters:
            self.moe.write(weights, self.masters)

    def _own(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """The trained part of a tensor shaped like a parameter, in place: all of it, or neighbouring groups."""
        if parameter not in self._rows:
            return whole
        slot, start, length = self._rows[parameter]
        return slot.some(whole.detach(), start, length)

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

    @torch.no_grad()
    def _run_one_batch(self) -> None:
        answer_logits(self.moe, own_share(next(self._batches(0))).to(self.moe.device))

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's state for the client's next round, if it is kept."""
        return dump_optimizer(self.optimizer, self.numbered) if self.options.keep_optimizer else {}

    def _batches(self, epoch: int) -> Iterator[Batch]:
        options = self.options
        seed = derive_seed(self.seed, epoch)
        equal = self.moe.equal_lengths
        return batches(self.client.train, options.batch_tokens, options.batch_examples, seed=seed, equal_lengths=equal)

    def _schedule(self) -> LambdaLR:
        steps = 0  # a constant rate needs no count, and counting collates every batch
        if self.options.schedule != "constant":
            epochs = range(self.options.epochs)
            steps = sum(math.ceil(sum(1 for _ in self._batches(e)) / self.options.accumulate) for e in epochs)
        return make_schedule(self.optimizer, self.options, steps)

    def _step(self, group: Sequence[Batch], probe: RoutingProbe, autocast: Any, record: bool) -> None:
        """One optimizer step on one or more batches."""
        if 0 < self.client.most_steps <= self.steps:
            raise TrainingFailedError(f"a round would take more than {self.client.most_steps} steps (limits.steps)")
        answer_tokens = sum(batch.answer_tokens for batch in group)
        for parameter in self.parameters:  # a model's own `zero_grad` walks through all of its modules
            parameter.grad = None
        idle_L_E: Tensor | None = None
        for batch in group:
            here = own_share(batch).to(self.moe.device)
            with probe.capture(*here.masks()) as captured, autocast():
                answer = answer_logits(self.moe, here)
                nll_sum = (answer if self.correction is None else self.correction(answer)).nll_N.sum()
            share = batch.answer_tokens / answer_tokens
            loss = nll_sum / answer_tokens
            penalty = self._penalty(Step(captured.routing, self._drift, self.state, self.prob_L_E))
            if penalty is not None:
                loss = loss + share * penalty
            if self.options.balance_coefficient:
                balance = self.options.balance_coefficient * balancing_loss(captured.routing, self.moe.experts)
                loss = loss + share * balance
            loss.backward()
            self._nll_sum += self._finite(nll_sum, f"its loss is {{}} at step {{}}; {REMEDY}")
            self._look_at(penalty)  # after the loss: weights that are lost spoil both
            self._answer_tokens += batch.answer_tokens
            idle = idle_experts(captured)
            idle_L_E = idle if idle_L_E is None else idle_L_E & idle
            if record:
                self.statistics.update(captured, here.whole_B)
                self.tokens.update(batch)
        assert idle_L_E is not None
        self.unreached.look()
        if self.local.shift:
            self.moe.shift_gradients(self.local.shift)
        for parameter, stepped in zip(self.parameters, self.stepped, strict=True):
            if stepped is not parameter:
                gradient = parameter.grad
                stepped.grad = None if gradient is None else self._own(parameter, gradient).float()
        if self.options.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.stepped, self.options.max_grad_norm)
        with self._holding_still(self._unmoved(idle_L_E) + self.moe.cells(self.frozen_L_E)):
            self.optimizer.step()
        with torch.no_grad():
            for parameter, master in self.masters.items():
                parameter.copy_(master)
        self.steps += 1

    def _look_at(self, penalty: Tensor | None) -> None:
        if penalty is not None:
            self._finite(penalty, f"the penalty of {self.name} is {{}} at step {{}}")

    def _finite(self, number: Tensor, told: str) -> float:
        """The sum over processes, so that all of them go on or none does."""
        value = float(parallel.total(number.detach()))
        if not math.isfinite(value):
            raise TrainingFailedError(told.format(value, self.steps + 1))
        return value

    def _penalty(self, step: Step) -> Tensor | None:
        """The algorithm's own, which is one number."""
        with within(f"`penalty` of {self.name} at {self.client.name}"):
            penalty: object = self.algorithm.penalty(step)
        if penalty is None or (isinstance(penalty, Tensor) and penalty.numel() == 1):
            return penalty
        what = f"of shape {list(penalty.shape)}" if isinstance(penalty, Tensor) else f"a {type(penalty).__name__}"
        raise UserError(f"algorithm.name = {self.name!r}: its penalty is {what}, and no tensor of one number.")

    def _drift(self) -> Tensor:
        """‖w − w_start‖², of the rows that are here; what training starts from is copied when first asked for."""
        if self._start is None:
            if self.steps:
                raise RuntimeError("a penalty on the drift must use it from the first step on")
            self._start = [parallel.held(self._unrounded(p).detach())[0].clone() for p in self.parameters]
        pairs = zip(map(self._unrounded, self.parameters), self._start, strict=True)
        terms = [(parallel.held(value)[0] - start).square().sum().to(self.moe.device) for value, start in pairs]
        return torch.stack(terms).sum()

    def _unrounded(self, parameter: Tensor) -> Tensor:
        """The value that training goes on from; its gradient is the parameter's."""
        master = self.masters.get(parameter)
        return parameter if master is None else master + (parameter - parameter.detach()).float()

    def _unmoved(self, idle_L_E: Tensor) -> list[ParameterGroup]:
        """Idle experts that nothing else moves: a correction of gradients does, and so does a penalty on the drift."""
        idle = self.moe.cells(idle_L_E)
        if not self.local.shift and self._start is None:
            return idle
        moved = self.moe.with_gradients(idle)
        return [group for group in idle if group not in moved]

    @contextlib.contextmanager
    def _holding_still(self, groups: Collection[ParameterGroup]) -> Iterator[None]:
        """Experts without gradients stay: AdamW would move them by momentum, and the plan read that as direction."""
        idle = (view for group in groups for view in self.views[group])
        before = [(view, view.clone()) for view in (*idle, *self.still)]
        yield
        for view, value in before:
            view.copy_(value)


def _rows_of(slots: Sequence[Slot], frozen: Set[ParameterGroup]) -> Iterator[tuple[Tensor, tuple[Slot, int, int]]]:
    """Parameters of which some groups are trained and others frozen: the first trained one, and how many follow."""
    for slot in slots:
        trained = [index for index, group in enumerate(slot.groups) if group not in frozen]
        if slot.parameter.requires_grad and 0 < len(trained) < len(slot.groups):
            if trained != list(range(trained[0], trained[-1] + 1)):
                raise RuntimeError(f"{slot.name}: groups that are trained must be neighbours")
            yield slot.parameter, (slot, trained[0], len(trained))


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
    whole = all(p.is_contiguous() for p in parameters)  # of others the fused step writes between the values
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=whole)


def make_schedule(optimizer: Optimizer, options: TrainingConfig, steps: int) -> LambdaLR:
    """The learning rate of a round's steps: it rises from 0 over `warmup_steps`, then stays, or falls to 0 at `steps`.

    These are the rates of transformers' `get_scheduler`, whose import loads peft, and bitsandbytes where it is.
    """
    warmup, falling = options.warmup_steps, max(1, steps - options.warmup_steps)

    def share(step: int) -> float:
        if step < warmup:
            return step / warmup
        if options.schedule == "linear":
            return max(0.0, (steps - step) / falling)
        if options.schedule == "cosine":
            return (1 + math.cos(math.pi * min(1.0, (step - warmup) / falling))) / 2
        return 1.0

    return LambdaLR(optimizer, share)


def dump_optimizer(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's tensors, named by the parameter's number, a dot, and its own name."""
    return {
        f"{number}.{name}": parallel.whole(value.detach()).cpu()
        for number, parameter in parameters.items()
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: Optimizer, parameters: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """The inverse of `dump_optimizer`; nothing kept leaves the optimizer fresh, and so does what is frozen by now."""
    for key, value in kept.items():
        number, _, name = key.partition(".")
        if number in parameters:
            parameter = parameters[number]
            optimizer.state[parameter][name] = parallel.like(value.clone(), parameter)


def make_autocast(device: torch.device, precision: str) -> Any:
    """A factory of contexts: bfloat16 where asked for, or where the hardware has it and the choice is ours."""
    wanted = precision == "bfloat16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)
