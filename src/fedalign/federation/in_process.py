"""The embedded engine: clients in this process, one after another, or side by side in forks of it."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedalign import parallel
from fedalign.client.evaluation import TestSet, evaluate
from fedalign.client.leaving import by_leaving, not_told
from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.trainer import Trainer
from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.config.settled import sha256_of
from fedalign.data.batches import Batch
from fedalign.data.deal import split_among_clients
from fedalign.data.encode import Encoded
from fedalign.errors import TrainingFailedError, UserError
from fedalign.federation.ledger import Tally
from fedalign.federation.masked_site import MaskedSite, Terms, seen_of
from fedalign.federation.masks import Masks, Once
from fedalign.federation.workers import Workers, check_workers
from fedalign.files import TALLY, folder_name
from fedalign.maths.fixed_point import MOST_CLIENTS
from fedalign.maths.heap import Heap
from fedalign.maths.rounding import unpack_weights
from fedalign.moe.load import pick_device
from fedalign.moe.model import MoEModel
from fedalign.protocol import (
    Accumulator,
    Algorithm,
    Begun,
    Broadcast,
    Concealed,
    Evaluation,
    Failure,
    Layout,
    Moved,
    ParameterGroup,
    Request,
    Stage,
    Statistics,
    Totals,
    Weights,
    summed,
)
from fedalign.server.run import Holdings, Marked, digest, identity
from fedalign.server.trackers import require_trackers

POOLED = "pooled"


class InProcess:
    """A `protocol.Federation` whose messages are calls."""

    def __init__(self, trainer: Trainer, clients: Mapping[str, ClientData], workers: Workers | None = None) -> None:
        self.trainer = trainer
        self.workers = workers or Workers()
        self.clients = trained(trainer.algorithm, clients)
        self.scored = clients
        self._tally = Tally(next(iter(clients.values())).memory.folder.with_name(TALLY))

    def members(self) -> Sequence[str]:
        """All clients, in the order of the partition."""
        return list(self.clients)

    def labels(self) -> tuple[int, ...]:
        """Examples of each label at all clients that train."""
        least = self.trainer.config.statistics.min_examples
        return summed(client.labels.told(least) for client in self.clients.values() if client.labels)

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Statistics | Failure]:
        """Train clients, in their order; a client whose loss or update is not finite is a Failure."""
        if parallel.is_first():
            self._tally.send("train", broadcast, clients)

        def train(name: str) -> Statistics | Failure:
            try:
                return self.trainer.train(self.clients[name], broadcast)
            except TrainingFailedError as error:
                return Failure(name, "train", str(error))

        for outcome in self.workers.map(
            train, clients, lambda name: sum(one.tokens for one in self.clients[name].train)
        ):
            if isinstance(outcome, Failure):
                self._tally.failed(outcome.client)
            yield outcome

    def collect(self, requests: Sequence[Request], accumulator: Accumulator) -> list[Failure]:
        """Read kept updates in the order of `requests`, one in memory at a time."""
        failures = []
        for request in requests:
            update = self.clients[request.client].memory.hand_over(request.client, request)
            self._tally.fetch(update)
            failures.append(accumulator.add(update))
        return [failure for failure in failures if failure is not None]

    def evaluate(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Evaluation | Failure]:
        """Score each client's held-out part; clients without one have nothing to say."""
        if parallel.is_first():
            self._tally.send("evaluate", broadcast, clients)
        received = unpack_weights(broadcast.weights)
        scored = [self.scored[name] for name in (clients if self.scored is self.clients else self.scored)]
        scores = self.workers.map(
            lambda client: self.trainer.evaluate(client, received, broadcast.round),
            scored,
            lambda client: len(client.held_out or ()),
        )
        return (score for score in scores if score is not None)

    def faults(self) -> list[Failure]:
        """None: a client in this process cannot go away."""
        return []

    def moved(self, round: int) -> Moved:
        """Bytes that would have travelled."""
        return self._tally.of(round)


class MaskedInProcess(InProcess):
    """A `protocol.MaskedFederation`: clients that conceal what leaves them, each with keys of its own."""

    def __init__(self, trainer: Trainer, clients: Mapping[str, ClientData], workers: Workers | None = None) -> None:
        super().__init__(trainer, clients, workers)
        config, shares = trainer.config, trainer.algorithm.shares
        assert shares is not None  # the configuration was refused else
        terms = Terms(
            trainer.moe.layout,
            shares,
            config.privacy.masked_min_holders,
            config.tells,
            config.run.seed,
            sha256_of(config),
        )
        run = secrets.token_hex(16)
        self.sites = dict[str, MaskedSite]()
        for name, one in clients.items():
            once = Once(name, run, terms.least, MOST_CLIENTS)
            self.sites[name] = MaskedSite(name, one.memory, terms, Masks(name, run, once.key, terms.least), once)
        for site in self.sites.values():
            site.masks.meet({name: other.masks.public for name, other in self.sites.items()})

    def begun(self, round: int) -> Begun:
        """Nowhere: whoever resumes has other keys, and a share is here whole, or not at all."""
        return Begun()

    def count(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Concealed | Failure]:
        """Train clients, in their order, and conceal what they count."""
        seen = seen_of(broadcast)
        for outcome in self.train(broadcast, clients):
            if isinstance(outcome, Failure):
                yield outcome
            else:
                site = self.sites[outcome.client]
                yield from _told(outcome.client, (site.count(one, seen, clients) for one in [outcome]))

    def score(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Concealed | Failure]:
        """Score each client's held-out part, and conceal the scores."""
        seen = seen_of(broadcast)
        scores = {one.client: one for one in self.evaluate(broadcast, clients) if isinstance(one, Evaluation)}
        for name in clients:
            told = (site.score(broadcast.round, scores.get(name), seen, clients) for site in [self.sites[name]])
            yield from _told(name, told)

    def recount(self, round: int, left: Sequence[str], stage: Stage) -> Iterator[Concealed | Failure]:
        """Conceal again what the clients that are left counted or scored last."""
        for name in left:
            yield from _told(name, (site.recount(round, left) for site in [self.sites[name]]))

    def conceal(
        self, totals: Totals, among: Sequence[str], groups: Sequence[ParameterGroup]
    ) -> Iterator[Concealed | Failure]:
        """Conceal clients' shares of the sums, one client after another, group by group."""
        for name in among:
            yield from _told(name, self.sites[name].conceal(totals, among, groups))


def _told(name: str, answers: Iterator[Concealed]) -> Iterator[Concealed | Failure]:
    """A client's answers, one after another, until one is refused."""
    try:
        yield from answers
    except TrainingFailedError as error:
        yield Failure(name, "update", str(error))


def trained(algorithm: Algorithm, clients: Mapping[str, ClientData]) -> Mapping[str, ClientData]:
    """The clients that train: all of them, or one that holds their data."""
    return pooled(clients) if "data" in algorithm.asks else clients


def pooled(clients: Mapping[str, ClientData]) -> dict[str, ClientData]:
    """One client that holds what all of them train on, in their order."""
    first = next(iter(clients.values()))
    memory = ClientMemory(first.memory.folder.with_name(POOLED))
    train = list[Encoded]()
    for client in clients.values():  # each numbers its own examples, in their order
        before = train[-1].example + 1 if train else 0
        train += [replace(one, example=before + one.example) for one in client.train]
    known = [client.labels for client in clients.values() if client.labels]
    labels = replace(known[0], examples=summed(one.examples for one in known)) if known else None
    return {POOLED: ClientData(POOLED, train, None, memory, labels=labels)}


@dataclass(frozen=True)
class Prepared:
    """Everything a run in this process needs, loaded and checked; nothing has been trained or written. A `Centre`."""

    bench: Workbench
    clients: dict[str, ClientData]
    test: TestSet | None
    labels: Mapping[str, Mapping[str, int]]  # of each client's examples
    workers: Workers = field(default_factory=Workers)

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.bench.config

    @property
    def layout(self) -> Layout:
        """The model's parameter groups."""
        return self.bench.moe.layout

    @property
    def federation(self) -> InProcess:
        """The clients, in this process."""
        kind = MaskedInProcess if self.config.privacy.masked else InProcess
        return kind(self.bench.trainer(), self.clients, self.workers)

    def initial_weights(self, heap: Heap) -> Weights:
        """Those that the model was loaded with."""
        return self.bench.weights(heap)

    def evaluate(self, weights: Weights, *, generate: bool = False) -> Marked | None:
        """Score weights on the global test set, if there is one."""
        if self.test is None:
            return None
        return self.bench.marked(weights, self.test, generate=generate, apply=self._side_by_side)

    def _side_by_side(self, work: Callable[[Batch], Any], batches: Iterable[Batch]) -> Iterator[Any]:
        return self.workers.map(work, list(batches), lambda batch: batch.attention_mask_B_S.numel())

    def save_model(self, weights: Weights, folder: Path) -> None:
        """Write weights as an ordinary Hugging Face folder, with the tokenizer."""
        self.bench.save(weights, folder)

    def check_model(self, folder: Path) -> str:
        """Hold what was last saved against plain libraries; how far was looked."""
        return self.bench.check(folder)

    @property
    def leaving_not_told(self) -> str:
        """Why `leaving` has nothing to tell though sites own experts; empty: it has, or they own none."""
        return not_told(self.config, self.bench.moe, sum(len(c.held_out or ()) for c in self.clients.values()))

    def leaving(self, weights: Weights, progress: Callable[[int, int], None]) -> Mapping[str, Any] | None:
        """Score weights on each client's held-out part, whole and without each owner's experts."""
        moe, bench = self.bench.moe, self.bench
        if not moe.layout.owners or self.leaving_not_told:
            return None
        held = {name: client.held_out for name, client in self.clients.items() if client.held_out}

        def score(one: MoEModel) -> dict[str, dict[str, float | None]]:
            found = self.workers.map(
                lambda name: evaluate(one, held[name], self.config.evaluation, bench.tokenizer, name),
                list(held),
                lambda name: len(held[name]),
            )
            return {name: {"accuracy": s.accuracy, "loss_nats": s.loss} for name, s in zip(held, found, strict=True)}

        moe.write(weights)
        progress(0, len(moe.layout.owners) + 1)
        scores = dict[str | None, dict[str, dict[str, float | None]]]()
        for left, told in by_leaving(moe, list(moe.layout.owners), score):
            scores[left] = told
            progress(len(scores), len(moe.layout.owners) + 1)
        rows = {name: len(tests) for name, tests in held.items()}
        return {"rows": rows, "whole": scores.pop(None), "without": scores}

    def identity(self) -> dict[str, str]:
        """Of the model's architecture, the configuration, and the sizes of the data."""
        held = {name: [len(c.train), sum(e.tokens for e in c.train)] for name, c in self.clients.items()}
        return identity(self.config, self.bench.moe.fingerprint()) | {"data": digest(held)}

    def holdings(self) -> Holdings:
        """Examples to train on, and all of a client's labels; with noise only what it tells: about how many."""
        told = not self.config.privacy.on
        return {
            name: {"examples": client.told, "labels": dict(self.labels[name]) if told else {}}
            for name, client in self.clients.items()
        }

    def finish(self) -> None:
        """Clients forget their updates."""
        for client in trained(self.config.algorithm.build(), self.clients).values():
            client.memory.forget_updates()


def check_masked() -> None:
    """Refuse masks where they cannot be made.

    Raises:
        UserError: Under torchrun, or cryptography is not installed.
    """
    if parallel.launched() > 1:
        raise UserError("privacy.masked = true: not under torchrun. Start fedalign by itself.")
    if find_spec("cryptography") is None:
        raise UserError("privacy.masked = true: cryptography is not installed. pip install 'fedalign-moe[flower]'")


def prepare(config: Config, client_folder: Path) -> Prepared:
    """Load model and data, and give each client its part.

    Raises:
        UserError: Anything in the configuration does not fit the model or the data.
    """
    require_trackers(config.tracking.loggers)
    if config.privacy.masked:
        check_masked()
    check_workers(config.run.workers, pick_device(config.run.device))
    examples, parts = split_among_clients(config)
    bench = Workbench.load(config)
    bench.check_limits(parts)
    clients = {
        name: bench.client(name, examples, indices, client_folder / folder_name(name))
        for name, indices in parts.items()
    }
    labels = {name: Counter(examples[index].label for index in indices) for name, indices in parts.items()}
    return Prepared(bench, clients, bench.test_set(), labels, Workers(config.run.workers))
