"""A client's own model beside the server's, and a learnt gate that mixes the two.

    p(y | x) = g·p_server(y | x) + (1 − g)·p_own(y | x),     g = σ(linear(h)),  h: what the server model's head reads

The server's part is frozen while the own part and the gate are trained on the client's loss of the mixture. Two models
are in memory meanwhile. Which algorithm wants this is said by `Algorithm.mixes`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedalign.client.forward import AnswerLogits, answer_logits
from fedalign.client.memory import GATE, OWN
from fedalign.data.batches import Batch
from fedalign.moe.model import MoEModel
from fedalign.protocol import Weights


class Mixture:
    """One client's own model and gate, on top of a server model that somebody else holds."""

    def __init__(self, server: MoEModel) -> None:
        self.server = server
        self.own = copy.deepcopy(server)
        self.gate = nn.Linear(server.hidden, 1).to(server.device)

    def load(self, kept: Mapping[str, Tensor], start: Weights) -> None:
        """What the client kept of it; at first the own model is the server's, and the gate undecided."""
        with torch.no_grad():
            for name, parameter in zip(GATE, (self.gate.weight, self.gate.bias), strict=True):
                parameter.copy_(kept[name]) if name in kept else parameter.zero_()
        self.own.write({group: kept.get(f"{OWN}{group}", value) for group, value in start.items()})

    def state(self) -> dict[str, Tensor]:
        """What the client keeps of it."""
        own = {f"{OWN}{group}": value.cpu() for group, value in self.own.read().items()}
        gate = {name: p.detach().cpu().clone() for name, p in zip(GATE, self.gate.parameters(), strict=True)}
        return own | gate

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [*(p for p in self.own.model.parameters() if p.requires_grad), *self.gate.parameters()]

    def answer(self, batch: Batch) -> AnswerLogits:
        """The mixture's predictions, as log-probabilities."""
        with torch.no_grad():
            server = answer_logits(self.server, batch)
        own = answer_logits(self.own, batch)
        score_N_1 = self.gate(server.hidden_N_H.float())
        mixed_N_V = torch.logaddexp(
            nn.functional.logsigmoid(score_N_1) + server.logits_N_V.log_softmax(-1),
            nn.functional.logsigmoid(-score_N_1) + own.logits_N_V.log_softmax(-1),
        )
        return replace(server, logits_N_V=mixed_N_V)

    def fit(self, batches: Iterable[Batch], optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        """One pass over the client's batches; the server's model must hold what the client received."""
        self.own.model.train()
        self.server.model.eval()
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            loss = self.answer(batch.to(self.server.device)).nll_N.mean()
            loss.backward()
            if max_grad_norm:
                nn.utils.clip_grad_norm_(self.parameters(), max_grad_norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
