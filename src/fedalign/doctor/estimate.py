"""Estimates of training: sizes are counted, time is extrapolated from one forward and backward pass."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedalign.client.evaluation import TestSet
from fedalign.client.fit import make_autocast
from fedalign.client.forward import answer_logits
from fedalign.client.leaving import not_told
from fedalign.client.memory import ClientData
from fedalign.client.spent import PAID
from fedalign.client.trainer import trained_sizes
from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.data.batches import batches
from fedalign.data.encode import Encoded
from fedalign.federation.in_process import Prepared
from fedalign.federation.in_process import trained as trained_clients
from fedalign.files import KEPT_BY_CLIENTS
from fedalign.maths.rounding import BLOCKS, broadcast_dtype, packed_nbytes
from fedalign.protocol import DEALT, KEEPS_ALL, KINDS, Consent, Layout, asked_shapes
from fedalign.server import masked
from fedalign.server.rounds import by_itself, scored_by_clients, select
from fedalign.testing import reports

AT_CLIENT = 3  # times an algorithm's state: as received, as kept from before, and what is made of both
AT_SERVER = 3  # times: before, the sums that it is made of, and after
CARRIER = 4  # bytes that Flower's process at a site holds at its peak for each byte of a message (flwr 1.41, measured)


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds that a run in one process would take; memory is that of as many clients as train at a time."""

    parameters: int
    trained: int
    clients: int
    clients_a_round: int
    examples: Mapping[str, int]  # by client
    bytes_down: tuple[int, ...]  # by round, as metrics count them, from round 0; at most: if each changes all groups
    bytes_up: tuple[int, ...]  # likewise; at most: if each plan asks for all groups
    bytes_statistics_a_client: int
    memory: int
    seconds_a_round: float  # from one measured forward and backward pass
    seconds: float


@dataclass(frozen=True)
class SiteEstimate:
    """Bytes that one site's part of a run takes, before anything is measured."""

    training: int  # of the device that trains: weights, gradients, optimizer; activations come on top
    loading: int  # of RAM: the weights on their way to another device
    exchange: int  # of RAM: what was received, and the update
    carrier: int  # of RAM: Flower's own process, which carries messages in and out
    down_a_round: int
    down_whole: int  # in its first round, and after one that it missed
    up_a_round_at_most: int  # every group
    statistics: int
    disk: int  # kept rounds, and the one being written


@dataclass(frozen=True)
class StepCost:
    """One measured forward and backward pass."""

    activations: int  # bytes that the backward pass reads, on top of the weights
    seconds_a_token: float


def estimate_run(bench: Workbench, clients: Mapping[str, ClientData], test: TestSet | None) -> Estimate:
    """A run of all clients in this process, without training; the weights stay as they are."""
    config, layout = bench.config, bench.moe.layout
    total, trained = parameter_counts(bench)
    clients_a_round = len(select(list(clients), config.clients.sample, config.run.seed, 1))
    training = list(trained_clients(config.algorithm.build(), clients))
    largest = max(clients.values(), key=lambda client: len(client.train))
    step = measure_step(bench, largest.train)
    held = [client.held_out for client in clients.values()]
    train = [client.train for client in clients.values()]
    tokens = round_tokens(config, train, [*held, test])
    together = min(config.run.workers, max(1, clients_a_round))
    seconds = step.seconds_a_token * tokens * clients_a_round / max(1, len(clients)) / together
    frozen = sum(p.nbytes for p in bench.moe.model.parameters() if not p.requires_grad)  # which workers share
    state = state_nbytes(config, layout)
    own = training_nbytes(bench) - frozen + exchange_nbytes(trained, config) + step.activations + AT_CLIENT * state
    memory = frozen + together * own + server_nbytes(trained, config, clients_a_round) + AT_SERVER * state
    owners = len(layout.owners)
    last = 0.0  # seconds after the last round
    if owners and not not_told(config, bench.moe, sum(len(tests or ()) for tests in held)):
        last = step.seconds_a_token * round_tokens(config, (), held) * (owners + 1) / config.run.workers
        copied = sum(slot.parameter.nbytes for slot in bench.moe.slots if slot.kind == "expert")
        memory = max(memory, bench.moe.nbytes + copied + server_nbytes(trained, config, clients_a_round))
    return Estimate(
        parameters=total,
        trained=trained,
        clients=len(clients),
        clients_a_round=clients_a_round,
        examples={name: client.examples for name, client in clients.items()},
        bytes_down=bytes_down(config, layout, training),
        bytes_up=bytes_up(config, layout, training),
        bytes_statistics_a_client=statistics_nbytes(config, layout),
        memory=memory,
        seconds_a_round=seconds,
        seconds=seconds * config.run.rounds + last,
    )


def estimate_site(bench: Workbench, site: str, consent: Consent) -> SiteEstimate:
    """A site's needs for this model; a skeleton of it is enough."""
    config, layout = bench.config, bench.moe.layout
    _, trained = parameter_counts(bench)
    state = state_nbytes(config, layout)
    told = state + totals_nbytes(config, layout)  # beside weights
    weights, update = weights_nbytes(config, layout) + told, update_nbytes(config, layout, site, consent)
    statistics, sent = statistics_nbytes(config, layout, consent), sent_nbytes(config, layout, site, consent)
    remembered = 4 * layout.layers * layout.experts + (4 * trained * moments(config) * config.training.keep_optimizer)
    remembered += 4 * trained * config.wire.feeds_back  # what rounding lost
    remembered += state  # by the algorithm, which keeps about as much as it is told
    return SiteEstimate(
        training=training_nbytes(bench) + AT_CLIENT * state,
        loading=bench.moe.saved.before if bench.moe.saved else bench.moe.nbytes,
        exchange=exchange_nbytes(trained, config),
        carrier=CARRIER * max(weights, sent),
        down_a_round=broadcast_nbytes(config, layout) + told,  # scored and trained on
        down_whole=weights,
        up_a_round_at_most=sent + statistics,
        statistics=statistics,
        disk=(KEPT_BY_CLIENTS + 1) * (update + remembered),
    )


def parameter_counts(bench: Workbench) -> tuple[int, int]:
    """Values of the model, and how many of them are trained."""
    return sum(p.numel() for p in bench.moe.model.parameters()), sum(bench.moe.layout.sizes.values())


def weights_nbytes(config: Config, layout: Layout) -> int:
    """Bytes of all weights on their way to a client."""
    dtype = broadcast_dtype(config.wire.broadcasts)
    return sum(packed_nbytes(size, dtype) for size in layout.sizes.values())


def broadcast_nbytes(config: Config, layout: Layout) -> int:
    """Bytes of all weights on their way to a client that holds those of the broadcast before."""
    return sum(packed_nbytes(size, config.wire.broadcasts) for size in layout.sizes.values())


def bytes_down(config: Config, layout: Layout, clients: Sequence[str]) -> tuple[int, ...]:
    """Bytes of weights, state and totals that travel down in each round, from 0, where each changes all groups.

    Args:
        config: the run's.
        layout: of the model.
        clients: those that train, in the order of the partition.
    """
    whole, change = weights_nbytes(config, layout), broadcast_nbytes(config, layout)
    state, totals = state_nbytes(config, layout), totals_nbytes(config, layout)
    told, has = [0] * (config.run.rounds + 1), dict[str, int]()  # the round of the weights that a client has
    stays = never_summed(config)

    def send(number: int, weights: int, among: Sequence[str], besides: int) -> None:
        now = 0 if stays else weights
        for client in among:
            before = has.get(client)
            told[number] += besides + (0 if before == now else change if before == now - 1 else whole)
            has[client] = now

    for number in range(config.run.rounds + 1):
        if number:
            chosen = select(clients, config.clients.sample, config.run.seed, number)
            send(number, number - 1, chosen, totals + state * (number > 1))
        if by_itself(config, number) and scored_by_clients(config, number):
            send(number, number, clients, 0)
    return tuple(told)


def bytes_up(config: Config, layout: Layout, clients: Sequence[str]) -> tuple[int, ...]:
    """Bytes of statistics and updates that travel up in each round, from 0, where plans ask for all groups."""
    sent = {client: sent_nbytes(config, layout, client) + statistics_nbytes(config, layout) for client in clients}
    chosen = (select(clients, config.clients.sample, config.run.seed, 1 + n) for n in range(config.run.rounds))
    return (0, *(sum(sent[client] for client in among) for among in chosen))


def never_summed(config: Config) -> bool:
    """Whether all groups are private, so that no update travels and the server's weights stay."""
    return config.algorithm.build().private >= set(KINDS)


def state_nbytes(config: Config, layout: Layout) -> int:
    """Bytes of the algorithm's state, which is broadcast from round 2 on: of its plan for made-up reports.

    It is planned as for the model at hand; a state as large as that is for a moment in memory.
    """
    if config.privacy.masked:
        return 0  # its weights are shares, and there is no plan
    algorithm = config.algorithm.build()
    plan = algorithm.plan(reports(2, asks=algorithm.asks, model=layout), {})
    if plan.then is None:
        return sum(tensor.nbytes for tensor in plan.state.values())
    nothing = {group: torch.zeros(1).expand(size) for group, size in layout.sizes.items()}
    state = plan.then(dict.fromkeys(plan.streams, nothing), dict.fromkeys(nothing, 2))
    return sum(tensor.nbytes for tensor in state.values())


def totals_nbytes(config: Config, layout: Layout) -> int:
    """Bytes of the totals that each client of a masked round is told; 0 without masks."""
    shares = config.algorithm.build().shares
    if not config.privacy.masked or shares is None:
        return 0
    return masked.totals_nbytes(layout, shares, config.tells)


def sent_nbytes(config: Config, layout: Layout, client: str, consent: Consent = DEALT) -> int:
    """Bytes of a client's whole update on its way to the server: as such, as its share of masked sums, or none."""
    if never_summed(config):
        return 0
    if config.privacy.masked:  # of what it does not train, too: zeros
        trained = [group for group, size in layout.sizes.items() if size]
        return residues_nbytes(masked.share_residues(layout.sizes, trained))
    return update_nbytes(config, layout, client, consent)


def update_nbytes(config: Config, layout: Layout, client: str, consent: Consent = DEALT) -> int:
    """Bytes of a client's whole update in wire precision, as it is kept."""
    sizes = trained_sizes(config, layout, client, consent).values()
    return sum(packed_nbytes(size, config.wire.dtype) for size in sizes)


def statistics_nbytes(config: Config, layout: Layout, consent: Consent = DEALT) -> int:
    """Bytes of one client's statistics on the wire; in a masked run of its counts."""
    options, shares = config.statistics, config.algorithm.build().shares
    if config.privacy.masked and shares is not None:
        return residues_nbytes(masked.count_residues(layout, shares, config.tells))
    shapes = asked_shapes(layout, consent.granted(config.asks), options.centroid_width, options.update_width)
    widths = {"float32": 4, "float16": 2, "uint8": 1}
    fixed = 64 + 8 * (len(PAID) if config.privacy.on else 1)  # or the seconds of training
    return fixed + sum(math.prod(shape) * widths[dtype] for shape, dtype in shapes.values())


def residues_nbytes(residues: Mapping[str, masked.Residues]) -> int:
    """Bytes of residues of these shapes and types."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in residues.values())


def moments(config: Config) -> int:
    """Values that the optimizer keeps for each trained value."""
    return 2 if config.training.optimizer == "adamw" else 0


def training_nbytes(bench: Workbench) -> int:
    """Weights, gradients, optimizer, and masters of what is rounded; the update takes the place of the gradients."""
    trained: list[nn.Parameter] = [p for p in bench.moe.model.parameters() if p.requires_grad]
    rounded = [p for p in trained if p.dtype != torch.float32]
    stepped = 4 * sum(p.numel() for p in trained) * (1 + moments(bench.config))
    return bench.moe.nbytes + stepped + sum(4 * p.numel() + p.nbytes for p in rounded)


def exchange_nbytes(trained: int, config: Config) -> int:
    """Received weights and update; what travels is a copy of each, unless it travels in float32 as well."""
    dtypes = (broadcast_dtype(config.wire.broadcasts), config.wire.dtype)
    return 4 * trained * 2 + sum(packed_nbytes(trained, dtype) for dtype in dtypes if dtype != "float32")


def server_nbytes(trained: int, config: Config, clients: int) -> int:
    """Master weights and their sum; around the last update, that too; or instead all that clients of a round sent.

    And where broadcasts travel as differences, two of them, whole and as such. 0 where they lie in mapped files.
    """
    if config.server.is_mapped(trained):
        return 0
    down = config.wire.broadcasts
    public = 2 * sum(packed_nbytes(trained, one) for one in (broadcast_dtype(down), down)) if down in BLOCKS else 0
    if config.robust in KEEPS_ALL:
        return public + 4 * trained * 2 + clients * packed_nbytes(trained, config.wire.dtype)
    return public + 4 * trained * (3 if config.robust == "centered_clip" else 2)


def round_tokens(config: Config, train: Sequence[Sequence[Encoded]], tests: Sequence[TestSet | None]) -> float:
    """Tokens of one round in which every client takes part; those of evaluation cost a third."""
    trained = sum(len(one.input_ids) for client in train for one in client) * config.training.epochs
    scored = sum(len(one.input_ids) for test in tests if test is not None for one in test.encoded)
    return trained + scored / 3


def measure_step(bench: Workbench, examples: Sequence[Encoded]) -> StepCost:
    """Run one batch of these examples forward and backward; the weights stay as they are."""
    moe, options = bench.moe, bench.config.training
    every = batches(examples, options.batch_tokens, options.batch_examples, seed=0, equal_lengths=moe.equal_lengths)
    batch = next(iter(every)).to(moe.device)
    autocast = make_autocast(moe.device, options.precision)
    moe.model.train()
    kept, seconds = Kept(moe.model), math.inf
    for counting in (kept.counting(), nullcontext(), nullcontext()):  # the first pass also warms up
        started = time.perf_counter()
        with autocast(), counting:
            loss = answer_logits(moe, batch).nll_N.mean()
        loss.backward()
        moe.model.zero_grad(set_to_none=True)
        if moe.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - started)
    return StepCost(kept.nbytes, seconds / float(batch.attention_mask_B_S.sum()))


class Kept:
    """Counts what a forward pass keeps for its backward pass, the model's own storage left out."""

    def __init__(self, model: nn.Module) -> None:
        self._sizes: dict[int, int] = {}
        self._own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    @property
    def nbytes(self) -> int:
        """Bytes of all kept storages."""
        return sum(self._sizes.values())

    def counting(self) -> AbstractContextManager[Any]:
        """A context in which what is kept is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def estimate(prepared: Prepared) -> Estimate:
    """The run's bytes and seconds, without training."""
    return estimate_run(prepared.bench, prepared.clients, prepared.test)
