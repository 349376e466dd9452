"""A client's own model beside the server's, and a learnt mixer of the two.

    p(y | x) = g·p_server(y | x) + (1 − g)·p_own(y | x),     g = σ(linear(h)),  h: what the server model's head reads

The server's part is frozen while the own part and the mixer are trained on the client's loss of the mixture. Two models
are in memory meanwhile. The equation is the algorithm's `mix`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedalign.client.fit import grouped, make_optimizer
from fedalign.client.forward import AnswerLogits, answer_logits
from fedalign.client.memory import Kept
from fedalign.config.run import TrainingConfig
from fedalign.data.batches import Batch, batches
from fedalign.data.encode import Encoded
from fedalign.errors import TrainingFailedError
from fedalign.maths.hashing import derive_seed
from fedalign.moe.model import MoEModel
from fedalign.protocol import Mix, ParameterGroup


class Mixture:
    """One client's own model and mixer, on top of a server model that others write to as well."""

    def __init__(self, server: MoEModel, mix: Mix) -> None:
        self.server, self.mix = server, mix
        self.own = copy.deepcopy(server)
        self.mixer = nn.Linear(server.hidden, 1).to(server.device)

    def load(self, kept: Kept, received: Mapping[ParameterGroup, Tensor]) -> None:
        """Write both models, ready to answer; at first the own model is the server's, and the mixer undecided."""
        self.server.write(received)
        self.own.write(received)
        self.own.write(kept.own)
        self.own.model.eval()
        with torch.no_grad():
            for name, parameter in self.mixer.named_parameters():
                parameter.copy_(kept.mixer[name]) if kept.mixer else parameter.zero_()

    def add_to(self, kept: Kept) -> Kept:
        """With what the client keeps of the mixture."""
        own = {group: value.cpu() for group, value in self.own.read().items()}
        mixer = {name: value.cpu().clone() for name, value in self.mixer.state_dict().items()}
        return replace(kept, own=own, mixer=mixer)

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [*(p for p in self.own.model.parameters() if p.requires_grad), *self.mixer.parameters()]

    def answer(self, batch: Batch) -> AnswerLogits:
        """The mixture's predictions, as log-probabilities."""
        with torch.no_grad():
            server = answer_logits(self.server, batch)
        own = answer_logits(self.own, batch)
        score_N_1 = self.mixer(server.hidden_N_H.float())
        mixed_N_V = self.mix(server.logits_N_V.log_softmax(-1), own.logits_N_V.log_softmax(-1), score_N_1)
        return replace(server, logits_N_V=mixed_N_V)

    def fit(self, examples: Sequence[Encoded], options: TrainingConfig, seed: int, most: float = math.inf) -> None:
        """All local epochs.

        Raises:
            TrainingFailedError: They would take more than `most` optimizer steps.
        """
        optimizer = make_optimizer(self.parameters(), options)
        self.own.model.train()
        self.server.model.eval()
        steps = 0
        for epoch in range(options.epochs):
            order = derive_seed(seed, "mixture", epoch)
            equal = self.server.equal_lengths
            found = batches(examples, options.batch_tokens, options.batch_examples, seed=order, equal_lengths=equal)
            for group in grouped(found, options.accumulate):
                steps += 1
                if steps > most:
                    raise TrainingFailedError("a round and its mixture would take more steps than limits.steps")
                optimizer.zero_grad(set_to_none=True)
                answer_tokens = sum(batch.answer_tokens for batch in group)
                for batch in group:
                    (self.answer(batch.to(self.server.device)).nll_N.sum() / answer_tokens).backward()
                if options.max_grad_norm:
                    nn.utils.clip_grad_norm_(self.parameters(), options.max_grad_norm)
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
