"""DP-SGD: steps whose gradient hides any single example (Abadi et al. 2016, arXiv 1607.00133).

    g ← (Σ_{x in a Poisson sample} g_x · min(1, C / ‖g_x‖) + σ·C·N(0, 1)) / B        B: examples of a step on average

Each example runs forward and backward by itself, so its gradient over all trained parameters is exact for every family
and way of tuning, and no example changes what another does: capacity, balancing losses and dropout are those of one.
What leaves otherwise follows from the noised weights, from the noised number of examples, or is the noised loads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fedalign import parallel
from fedalign.client.accountant import Terms
from fedalign.client.fit import LocalFit, make_autocast, make_schedule
from fedalign.client.forward import answer_logits
from fedalign.client.spent import Secret
from fedalign.data.batches import Batch, batches
from fedalign.data.encode import Encoded
from fedalign.errors import TrainingFailedError, UserError
from fedalign.moe.probe import RoutingProbe, balancing_loss
from fedalign.protocol import Step

log = logging.getLogger("fedalign")
SLACK = 1e-5  # relative, of a float32 norm over rows
ROW = 256  # values whose squares are added in float32: over millions, a CPU loses a hundredth of them


class PrivateFit(LocalFit):
    """The local steps of one client in one round, with noise.

    `agree` comes before `run`.
    """

    terms: Terms
    secret: Secret
    clip: float
    every: Sequence[Sequence[Encoded]]
    equal_lengths: bool

    def agree(self, terms: Terms, secret: Secret, clip: float) -> None:
        """Take the terms of the round.

        Raises:
            UserError: The model couples examples, or several processes would train it together.
        """
        if parallel.world() > 1:
            raise UserError("torchrun: not with [privacy]. Leave torchrun out.")
        for name, module in self.moe.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise UserError(f"{name}: its batch statistics couple examples, which [privacy] cannot have.")
        self.terms, self.secret, self.clip = terms, secret, clip
        self.every = by_example(self.client.train)
        self.equal_lengths = self.moe.equal_lengths  # looked up once: it walks all modules
        self.autocast = make_autocast(self.moe.device, self.options.precision)

    def run(self) -> None:
        """All local steps; how many they are does not depend on the sample."""
        if 0 < self.client.most_steps < self.terms.steps:
            raise TrainingFailedError(
                f"a round would take {self.terms.steps} steps, more than {self.client.most_steps} (limits.steps)"
            )
        self.moe.model.train()
        schedule = self._schedule()
        with RoutingProbe(self.moe) as probe:
            for step in range(self.terms.steps):
                self._noisy_step(step, probe)
                schedule.step()
        self.moe.model.zero_grad(set_to_none=True)

    def _schedule(self) -> LambdaLR:
        return make_schedule(self.optimizer, self.options, self.terms.steps)

    def _noisy_step(self, step: int, probe: RoutingProbe) -> None:
        """One optimizer step; an empty sample is one of noise alone."""
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]
        for example in self._sample(step):
            texts = [one.input_ids for one in example]  # dropout depends on these, and on no other example
            torch.manual_seed(self.secret.draw(self.seed, "dropout", step, texts) % 2**64)
            with fitting(example):
                self._backward(example, probe)
                add_clipped(sums, [p.grad for p in self.parameters], self.clip)
        self._add_noise(sums, step)
        self._clear()
        # without any routing to look at, it is of the weights alone and needs no noise
        penalty = self._penalty(Step((), self._drift, self.state, None))
        self._look_at(penalty)
        if penalty is not None:
            penalty.backward()
        for parameter, stepped, total in zip(self.parameters, self.stepped, sums, strict=True):
            total.div_(self.terms.batch)
            if parameter.grad is not None:
                total.add_(parameter.grad)
            stepped.grad = total
        with self._holding_still(self.moe.cells(self.frozen_L_E)):
            self.optimizer.step()
        with torch.no_grad():
            for parameter, master in self.masters.items():
                parameter.copy_(master)
        self.steps += 1

    def _sample(self, step: int) -> Iterator[Sequence[Encoded]]:
        """Each example with the same chance, whatever becomes of the others."""
        drawn = self._generator("sample", step).random(len(self.every))
        for index in (drawn < self.terms.rate).nonzero()[0].tolist():
            yield self.every[index]

    def _backward(self, example: Sequence[Encoded], probe: RoutingProbe) -> None:
        """The gradient of one example's mean loss an answer token, and of its own balancing loss."""
        self._clear()
        answer_tokens = sum(batch.answer_tokens for batch in self._parts(example))
        for batch in self._parts(example):
            here = batch.to(self.moe.device)
            with probe.capture(*here.masks()) as captured, self.autocast():
                loss = answer_logits(self.moe, here).nll_N.sum() / answer_tokens
            if self.options.balance_coefficient:
                share = batch.answer_tokens / answer_tokens * self.options.balance_coefficient
                loss = loss + share * balancing_loss(captured.routing, self.moe.experts)
            loss.backward()

    def _parts(self, example: Sequence[Encoded]) -> Iterator[Batch]:
        options = self.options
        return batches(example, options.batch_tokens, options.batch_examples, equal_lengths=self.equal_lengths)

    def _add_noise(self, sums: Sequence[Tensor], step: int) -> None:
        for number, total in enumerate(sums):
            noise = self._normal(total.shape, total.device, "noise", step, number)
            total.add_(noise, alpha=self.terms.noise * self.clip)

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _normal(self, shape: torch.Size, device: torch.device, *place: object) -> Tensor:
        """Normal noise, float32. Of a seed torch takes 64 bits on a GPU, but 32 on a CPU: few enough to try all."""
        if device.type == "cpu":
            return torch.from_numpy(self._generator(*place).standard_normal(shape, dtype=np.float32))
        generator = torch.Generator(device).manual_seed(self.secret.draw(self.seed, *place) % 2**64)
        return torch.randn(shape, generator=generator, device=device)

    def _generator(self, *place: object) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.secret.draw(self.seed, *place)))

    @torch.no_grad()
    def loads(self) -> Tensor:
        """Of how many examples each expert has the tokens, [L, E], with noise; a layer's sum is what was told.

        An example's share of a layer sums to one, and the whole of it is no longer than `most`.
        """
        noise = self.terms.loads_noise
        assert noise is not None
        most = longest_share(self.moe.layout.top_k_L, self.moe.layout.layers)
        self.moe.model.eval()
        total_L_E = torch.zeros(self.frozen_L_E.shape, dtype=torch.float64)
        with RoutingProbe(self.moe) as probe:
            for example in self.every:
                with fitting(example):
                    load_L_E = torch.zeros_like(total_L_E)
                    for batch in self._parts(example):
                        here = batch.to(self.moe.device)
                        with probe.capture(*here.masks()) as captured, self.autocast():
                            answer_logits(self.moe, here)
                        load_L_E += torch.cat([stack.load_M_E for stack in captured.stacks]).cpu()
                    share_L_E = load_L_E / load_L_E.sum(1, keepdim=True).clamp_min(1)
                    total_L_E += share_L_E * min(1.0, most / max(float(share_L_E.norm()), most))
        drawn_L_E = torch.from_numpy(self._generator("loads").standard_normal(total_L_E.shape))
        return possible(total_L_E + noise * most * drawn_L_E, self.terms.examples)


@contextmanager
def fitting(example: Sequence[Encoded]) -> Iterator[None]:
    """An example that memory cannot hold adds nothing to a sum: as a failure it would tell of a long example."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise  # of a CPU, torch says it in words alone
        log.error("an example of %d tokens does not fit into memory and adds nothing", tokens(example))


def by_example(every: Sequence[Encoded]) -> list[list[Encoded]]:
    """Sequences of the same example together: the unit that is protected."""
    order = sorted(every, key=lambda one: one.example)
    return [list(group) for _, group in groupby(order, key=lambda one: one.example)]


def tokens(example: Sequence[Encoded]) -> int:
    """Of its longest sequence."""
    return max(one.tokens for one in example)


def add_clipped(sums: Sequence[Tensor], gradients: Sequence[Tensor | None], most: float) -> float:
    """Add a gradient, at most `most` long over all parameters, to sums; its length before.

    One that is not finite adds nothing: that it was dropped is nobody else's business.
    """
    there = [(total, gradient) for total, gradient in zip(sums, gradients, strict=True) if gradient is not None]
    if not there:
        return 0.0
    first = there[0][0].device
    norm = math.hypot(*torch.stack([length(gradient).to(first) for _, gradient in there]).tolist())
    if not math.isfinite(norm):
        return norm
    scale = min(1.0, most / (norm * (1 + SLACK))) if norm else 1.0
    for total, gradient in there:
        total.add_(gradient, alpha=scale)
    return norm


def length(gradient: Tensor) -> Tensor:
    """Euclidean length, a float64 scalar; of rows first, since a float32 sum of many squares comes out too small."""
    flat = gradient.reshape(-1)
    rows = flat[: flat.numel() // ROW * ROW].view(-1, ROW)
    rest = flat[rows.numel() :].view(1, -1)
    lengths = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in (rows, rest)]
    whole: Tensor = torch.linalg.vector_norm(torch.cat(lengths), dtype=torch.float64)
    return whole


def longest_share(top_k_L: Sequence[int], layers: int) -> float:
    """Euclidean length that one example's shares of all loads can have: of K experts a token, each has 1 / K at most.

    >>> longest_share((2, 2), 2), longest_share((), 4)
    (1.0, 2.0)
    """
    return math.sqrt(sum(1 / top_k for top_k in top_k_L) if top_k_L else layers)


def possible(noisy_L_E: Tensor, examples: int) -> Tensor:
    """Noisy loads as they could be: none is negative, and a layer's sum is the number of examples; float32.

    >>> possible(torch.tensor([[3.0, -1.0, 1.0], [-1.0, -2.0, -3.0]]), 8)
    tensor([[6., 0., 2.],
            [0., 0., 0.]])
    """
    positive_L_E = noisy_L_E.clamp_min(0)
    total_L_1 = positive_L_E.sum(1, keepdim=True)
    return (positive_L_E * examples / total_L_1.where(total_L_1 > 0, torch.ones_like(total_L_1))).float()
