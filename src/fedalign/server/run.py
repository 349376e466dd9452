"""From a configuration to a finished run: load, partition, connect, go round, save."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fedalign import parallel
from fedalign.config.run import Config
from fedalign.config.settled import RESUMABLE, settled
from fedalign.config.toml import Overrides, as_texts, load_config
from fedalign.errors import UserError
from fedalign.files import rounds_in, write_text
from fedalign.maths.heap import Heap
from fedalign.protocol import Evaluation, Federation, Layout, Plan, Statistics, Weights
from fedalign.server.checkpoint import Checkpoints, ServerState
from fedalign.server.masked import MaskedServer
from fedalign.server.results import Progress, Recorder, RunFolder
from fedalign.server.rounds import Observer, Server

Holdings = Mapping[str, Mapping[str, Any]]
Marked = tuple[Evaluation, Mapping[str, Any]]  # a score, and for JSON what was answered


class Centre(Protocol):
    """The server's side of a run, whatever engine reaches the clients: what `execute` needs to know."""

    @property
    def config(self) -> Config:
        """The run's configuration."""

    @property
    def layout(self) -> Layout:
        """The model's parameter groups."""

    @property
    def federation(self) -> Federation:
        """The clients behind the configured engine."""

    def initial_weights(self, heap: Heap) -> Weights:
        """Weights that the first round starts from, in a heap."""

    def evaluate(self, weights: Weights, *, generate: bool = False) -> Marked | None:
        """Score weights on the global test set, if there is one; no client's row is in it.

        With `generate`, answers to some rows are generated where scoring alone generates none.
        """

    def save_model(self, weights: Weights, folder: Path) -> None:
        """Write weights as an ordinary Hugging Face folder, with the tokenizer."""

    def check_model(self, folder: Path) -> str:
        """Hold what was last saved against plain libraries; how far was looked. UserError: it is another model."""

    def leaving(self, weights: Weights, progress: Progress) -> Mapping[str, Any] | None:
        """Scores of each client's held-out rows, by the whole model and without each owner's experts, for JSON.

        `rows` of each client, and by client `accuracy` and `loss_nats` of `whole`, and of `without` by who left. None:
        no expert has an owner, the rows are not here, or are not to be told of.
        """

    def identity(self) -> dict[str, str]:
        """Fingerprints that a checkpoint must share with what resumes it."""

    def holdings(self) -> Holdings:
        """Numbers of the clients' examples, and of labels where the data was dealt out here."""

    def finish(self) -> None:
        """The run is complete: clients may forget its updates."""


def identity(config: Config, architecture: str) -> dict[str, str]:
    """Fingerprints of the model's architecture and of the configuration, but for what may change on resume."""
    return {"model": architecture[:16], "configuration": digest(settled(config))}


def digest(value: object) -> str:
    """16 hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def resumed_config(out: Path, overrides: Overrides) -> Config:
    """The configuration of the run in `out`, with those overrides that a resumed run may take.

    Raises:
        UserError: There is no run, or an override would make it another run or a shorter one, or a round the best that
            is gone.
    """
    folder = RunFolder(out)
    begun = folder.read_config("--resume")
    for override in as_texts(overrides):
        key = override.partition("=")[0].strip()
        if key not in RESUMABLE:
            raise UserError(
                f"--set {override!r}: a resumed run keeps its configuration. "
                f"It may change: {', '.join(RESUMABLE)}. For anything else start anew with another --out."
            )
    config = load_config(folder.config, overrides)
    if config.evaluation.best != begun.evaluation.best:
        folder.check_best(config)
    first, done = begun.run.rounds, max((number for number, _ in rounds_in(folder.checkpoint)), default=0)
    if config.run.rounds < done:
        raise UserError(
            f"run.rounds = {config.run.rounds}: the run in {str(out)!r} has {done} complete rounds. Choose {done} or "
            "more; for an earlier model begin another run."
        )
    if config.privacy.epsilon is not None and config.run.rounds > first:
        raise UserError(
            f"run.rounds = {config.run.rounds}: the noise of this run keeps privacy.epsilon = "
            f"{config.privacy.epsilon:g} in {first} round{'s' * (first > 1)}, and more would tell more. Choose at most "
            f"{first}, or begin another run with --set model.path={shlex.quote(str(out))}: what both tell "
            "adds up."
        )
    return config


def execute(centre: Centre, folder: RunFolder, watch: Observer) -> dict[str, Any]:
    """Run all rounds that `folder` does not hold yet, write the results, return the summary."""
    config = centre.config
    heap = heap_for(config, centre.layout, folder.checkpoint)
    checkpoints = Checkpoints(folder.checkpoint, centre.identity(), moving=heap.is_mapped and parallel.world() == 1)
    state = checkpoints.load() or ServerState(0, centre.initial_weights(heap), {}, ())
    folder.amend(config)  # what is refused stays as it was
    if parallel.is_first():
        write_text(folder.holdings, json.dumps(centre.holdings(), indent=1))
    recorder = Recorder(folder, config, centre, state)
    recorder.mend_best(state.history, checkpoints.weights_after)
    server = (MaskedServer if config.privacy.masked else Server)(
        federation=centre.federation,
        algorithm=config.algorithm.build(),
        layout=centre.layout,
        config=config,
        checkpoints=checkpoints,
        evaluate=recorder.evaluate,
        observer=Both(recorder, watch),
        heap=heap,
    )
    state = server.run(state)
    centre.finish()  # the last checkpoint is there: what clients and transfers keep need not lie beside the model
    return recorder.finish(state, partial(watch.progress, state.round, "without each owner of experts"))


def heap_for(config: Config, layout: Layout, folder: Path) -> Heap:
    """Where tensors as large as the model lie: in memory, or in mapped files in `folder`."""
    return Heap(folder if config.server.is_mapped(sum(layout.sizes.values())) else None)


@dataclass(frozen=True)
class Both:
    """Two observers as one; the first hears first."""

    first: Observer
    second: Observer

    def progress(self, round: int, stage: str, done: int, total: int) -> None:
        """Pass on."""
        self.first.progress(round, stage, done, total)
        self.second.progress(round, stage, done, total)

    def planned(self, round: int, reports: Sequence[Statistics], plan: Plan, layout: Layout) -> None:
        """Pass on."""
        self.first.planned(round, reports, plan, layout)
        self.second.planned(round, reports, plan, layout)

    def completed(self, state: ServerState, improved: bool) -> None:
        """Pass on."""
        self.first.completed(state, improved)
        self.second.completed(state, improved)
