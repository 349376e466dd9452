"""The embedded engine: clients in this process, one after another, on one loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fedalign.checkpoint import ClientMemory
from fedalign.client import ClientData, Trainer
from fedalign.errors import TrainingFailedError
from fedalign.protocol import Accumulator, Broadcast, Evaluation, Failure, Request, Statistics
from fedalign.wire import unpack_weights

POOLED = "pooled"


class InProcess:
    """A `protocol.Federation` whose messages are calls."""

    def __init__(self, trainer: Trainer, clients: Mapping[str, ClientData]) -> None:
        self.trainer = trainer
        self.clients = pooled(clients) if trainer.algorithm.pooled else clients
        self.scored = clients

    def members(self) -> Sequence[str]:
        """All clients, in the order of the partition."""
        return list(self.clients)

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Statistics | Failure]:
        """Train one client after another; a client whose loss or update is not finite is a Failure."""
        for name in clients:
            try:
                yield self.trainer.train(self.clients[name], broadcast)
            except TrainingFailedError as error:
                yield Failure(name, "train", str(error))

    def collect(self, requests: Sequence[Request], accumulator: Accumulator) -> list[Failure]:
        """Read kept updates in the order of `requests`, one in memory at a time."""
        answers = (accumulator.add(self.clients[r.client].memory.hand_over(r.client, r)) for r in requests)
        return [failure for failure in answers if failure is not None]

    def evaluate(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Evaluation | Failure]:
        """Score each client's held-out part; clients without one have nothing to say."""
        received = unpack_weights(broadcast.weights)
        self.trainer.moe.write(received)
        for name in self.scored if self.trainer.algorithm.pooled else clients:
            score = self.trainer.evaluate(self.scored[name], received, broadcast.round)
            if score is not None:
                yield score

    def faults(self) -> list[Failure]:
        """None: a client in this process cannot go away."""
        return []


def pooled(clients: Mapping[str, ClientData]) -> dict[str, ClientData]:
    """One client that holds what all of them train on, in their order."""
    first = next(iter(clients.values()))
    memory = ClientMemory(first.memory.folder.with_name(POOLED))
    return {POOLED: ClientData(POOLED, [e for client in clients.values() for e in client.train], None, memory)}
