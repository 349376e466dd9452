"""From a configuration to a finished run: load, partition, connect, go round, save."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedalign.checkpoint import Checkpoints, ClientMemory, ServerState, folder_name
from fedalign.client import ClientData, Trainer, derive_seed, make_autocast
from fedalign.config import Config, load_config
from fedalign.data.batches import Encoder, batches, load_tokenizer
from fedalign.data.formats import Example, load_examples
from fedalign.data.partition import hold_out, partition
from fedalign.demo import model_folder
from fedalign.errors import UserError
from fedalign.evaluation import TestSet, evaluate
from fedalign.federation.in_process import InProcess
from fedalign.forward import answer_logits
from fedalign.moe.model import MoEModel
from fedalign.protocol import Evaluation, Weights
from fedalign.results import Recorder, RunFolder
from fedalign.server import Observer, Server, select
from fedalign.wire import broadcast_dtype, packed_nbytes

RESUMABLE = ("run.rounds", "run.device", "run.threads", "tracking.tensorboard")  # may change on resume


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs, loaded and checked; nothing has been trained or written."""

    config: Config
    moe: MoEModel
    tokenizer: Any
    clients: dict[str, ClientData]
    test: TestSet | None

    @property
    def federation(self) -> InProcess:
        """The clients behind the configured engine."""
        trainer = Trainer(self.moe, self.tokenizer, self.config.algorithm.build(), self.config)
        return InProcess(trainer, self.clients)

    def evaluate_globally(self, weights: Weights) -> Evaluation | None:
        """Score weights on the global test set, if there is one."""
        if self.test is None:
            return None
        self.moe.write(weights)
        return evaluate(self.moe, self.test, self.config.evaluation, self.tokenizer, client=None)

    def save_model(self, weights: Weights, folder: Path) -> None:
        """Write weights as an ordinary Hugging Face folder, with the tokenizer."""
        self.moe.write(weights)
        self.moe.save(folder)
        self.tokenizer.save_pretrained(folder)


def prepare(config: Config, client_folder: Path) -> Prepared:
    """Load model and data, and give each client its part.

    Raises:
        UserError: Anything in the configuration does not fit the model or the data.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    train = load_examples(config.data.train, config.data, "train", config.run.seed)
    test = load_examples(config.data.test or config.data.train, config.data, "test", config.run.seed)
    parts = partition(train, config.clients, config.run.seed)
    splits = {
        name: hold_out(indices, config.clients.held_out, derive_seed(config.run.seed, "held out"), name)
        for name, indices in parts.items()
    }
    moe = load_model(
        config.model.path,
        device=pick_device(config.run.device),
        trust_remote_code=config.model.trust_remote_code,
        revision=config.model.revision,
    )
    tokenizer = load_tokenizer(
        model_path(config.model.path),
        trust_remote_code=config.model.trust_remote_code,
        revision=config.model.revision,
    )
    encoder = Encoder(
        tokenizer,
        pick_length(config, moe),
        moe.is_seq2seq,
        config.data.too_long,
        decoder_start=getattr(moe.model.config, "decoder_start_token_id", None),
    )
    clients = {
        name: ClientData(
            name=name,
            train=encoder.encode(_pick(train, kept)),
            held_out=TestSet.prepare(_pick(train, held), encoder),
            memory=ClientMemory(client_folder / folder_name(name)),
        )
        for name, (kept, held) in splits.items()
    }
    for client in clients.values():
        if not client.train:
            raise UserError(
                f"client {client.name!r}: all of its examples are longer than {encoder.max_length} tokens and dropped. "
                f'Raise data.max_length, or set data.too_long = "truncate".'
            )
    return Prepared(config, moe, tokenizer, clients, TestSet.prepare(test, encoder))


def model_path(name: str) -> str:
    """Resolve "demo" to the model that comes with the package; anything else is a folder or a hub id."""
    return str(model_folder()) if name == "demo" else name


def load_model(
    name: str, *, device: str = "cpu", trust_remote_code: bool = False, revision: str | None = None
) -> MoEModel:
    """Load any Hugging Face MoE model, or the demo's."""
    return MoEModel.load(model_path(name), device=device, trust_remote_code=trust_remote_code, revision=revision)


def _pick(examples: Sequence[Example], indices: Sequence[int]) -> list[Example]:
    return [examples[index] for index in indices]


def pick_device(name: str) -> str:
    """`auto` is a GPU if there is one.

    Raises:
        UserError: The device is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        there = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(f"run.device = {name!r}: not on this machine. Choose one of: {', '.join(there)}.") from None
    return name


def pick_length(config: Config, moe: MoEModel) -> int:
    """The longest example in tokens: as asked, at most what the model allows."""
    asked, allowed = config.data.max_length, moe.max_length
    if asked and allowed and asked > allowed:
        raise UserError(
            f"data.max_length = {asked}: the model allows {allowed} tokens. Choose 1 to {allowed}, or 0 for all of it."
        )
    return asked or allowed or 0


def identity(prepared: Prepared) -> dict[str, str]:
    """Fingerprints that a checkpoint must share with what resumes it."""
    tables = prepared.config.model_dump(mode="json")
    for key in RESUMABLE:
        section, name = key.split(".")
        del tables[section][name]
    held = {name: [len(c.train), sum(e.tokens for e in c.train)] for name, c in prepared.clients.items()}
    return {"model": prepared.moe.fingerprint()[:16], "configuration": _digest(tables), "data": _digest(held)}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def resumed_config(out: Path, overrides: Sequence[str]) -> Config:
    """The configuration of the run in `out`, with those overrides that a resumed run may take.

    Raises:
        UserError: There is no run, or an override would make it another run.
    """
    folder = RunFolder(out)
    folder.require_run()
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in RESUMABLE:
            raise UserError(
                f"--set {override!r}: a resumed run keeps its configuration. "
                f"It may change: {', '.join(RESUMABLE)}. For anything else start anew with another --out."
            )
    return load_config(folder.config, overrides)


def execute(prepared: Prepared, folder: RunFolder, watch: Observer) -> dict[str, Any]:
    """Run all rounds that `folder` does not hold yet, write the results, return the summary."""
    config = prepared.config
    checkpoints = Checkpoints(folder.checkpoint, identity(prepared))
    state = checkpoints.load() or ServerState(0, {g: w.cpu() for g, w in prepared.moe.read().items()}, {}, ())
    recorder = Recorder(folder, config, prepared.save_model, state)
    server = Server(
        federation=prepared.federation,
        algorithm=config.algorithm.build(),
        layout=prepared.moe.layout,
        config=config,
        checkpoints=checkpoints,
        evaluate=prepared.evaluate_globally,
        observer=Both(recorder, watch),
    )
    summary = recorder.finish(server.run(state))
    for client in prepared.clients.values():
        client.memory.forget_updates()
    return summary


@dataclass(frozen=True)
class Both:
    """Two observers as one; the first hears first."""

    first: Observer
    second: Observer

    def progress(self, round: int, stage: str, done: int, total: int) -> None:
        """Pass on."""
        self.first.progress(round, stage, done, total)
        self.second.progress(round, stage, done, total)

    def completed(self, state: ServerState, improved: bool) -> None:
        """Pass on."""
        self.first.completed(state, improved)
        self.second.completed(state, improved)


@dataclass(frozen=True)
class Estimate:
    """What a run would take. Bytes and seconds; memory is that of this process, all clients in turn."""

    parameters: int
    trained: int
    clients: int
    clients_a_round: int
    examples: Mapping[str, int]  # by client
    bytes_down_a_round: int
    bytes_up_a_round_at_most: int  # every group of every client
    bytes_statistics_a_client: int
    memory: int
    seconds_a_round: float  # from one measured forward and backward pass
    seconds: float


def estimate(prepared: Prepared) -> Estimate:
    """What to expect, without training: sizes are counted, time is extrapolated from one forward and backward pass."""
    config, moe, wire = prepared.config, prepared.moe, prepared.config.wire.dtype
    sizes = [size for size in moe.layout.sizes.values() if size]
    trained, total = sum(sizes), sum(p.numel() for p in moe.model.parameters())
    asked = len(select(list(prepared.clients), config.clients.sample, config.run.seed, 1))
    down = sum(packed_nbytes(size, broadcast_dtype(wire)) for size in sizes)
    up = sum(packed_nbytes(size, wire) for size in sizes)
    statistics = statistics_nbytes(config, moe)
    scored = len(prepared.clients) if config.evaluation.clients and config.clients.held_out else 0
    activation, per_token = measure_step(prepared)
    seconds = per_token * _round_tokens(prepared) * asked / max(1, len(prepared.clients))
    return Estimate(
        parameters=total,
        trained=trained,
        clients=len(prepared.clients),
        clients_a_round=asked,
        examples={name: len(client.train) for name, client in prepared.clients.items()},
        bytes_down_a_round=down * (asked + scored),
        bytes_up_a_round_at_most=(up + statistics) * asked,
        bytes_statistics_a_client=statistics,
        memory=memory_nbytes(total, trained, config) + activation,
        seconds_a_round=seconds,
        seconds=seconds * config.run.rounds,
    )


def statistics_nbytes(config: Config, moe: MoEModel) -> int:
    """Bytes of one client's statistics on the wire."""
    cells = moe.layout.layers * moe.layout.experts
    sketches = 2 * cells * (config.statistics.update_width + config.statistics.centroid_width)
    return sketches + 4 * 3 * cells + 4 * moe.layout.layers + 4 * len(moe.layout.groups) + 40


def memory_nbytes(total: int, trained: int, config: Config) -> int:
    """Weights, gradients and optimizer on the client; received weights and update; master, sum and broadcast."""
    moments = 2 if config.training.optimizer == "adamw" else 0
    wire = packed_nbytes(trained, broadcast_dtype(config.wire.dtype)) + packed_nbytes(trained, config.wire.dtype)
    return 4 * (total + trained * (1 + moments + 2 + 2)) + wire


def measure_step(prepared: Prepared) -> tuple[int, float]:
    """Bytes of activations (on a GPU; 0 where they cannot be read) and seconds a token of a training step."""
    moe, options = prepared.moe, prepared.config.training
    largest = max(prepared.clients.values(), key=lambda client: len(client.train))
    batch = next(iter(batches(largest.train, options.batch_tokens, options.batch_examples, seed=0))).to(moe.device)
    autocast = make_autocast(moe.device, options.precision)
    cuda = moe.device.type == "cuda"
    before = torch.cuda.max_memory_allocated() if cuda else 0
    moe.model.train()
    seconds = math.inf
    for _ in range(3):  # the first pass also warms up
        started = time.perf_counter()
        with autocast():
            loss = answer_logits(moe, batch).nll_N.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        moe.model.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - started)
    activations = torch.cuda.max_memory_allocated() - before if cuda else 0
    return activations, seconds / float(batch.attention_mask_B_S.sum())


def _round_tokens(prepared: Prepared) -> float:
    """Tokens of training, and of evaluation at a third of their cost, when every client takes part."""
    every = [e for client in prepared.clients.values() for e in client.train]
    trained = sum(len(e.input_ids) for e in every) * prepared.config.training.epochs
    held = [client.held_out for client in prepared.clients.values() if client.held_out is not None]
    tests = [*held, *([prepared.test] if prepared.test else [])]
    scored = sum(len(e.input_ids) for test in tests for e in test.encoded)
    return trained + scored / 3
