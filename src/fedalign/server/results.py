"""A run's results: its folder, and the content of each file in it.

config.toml     as resolved           metrics.jsonl   one line a round, all numbers
summary.json    how it went           checkpoint/     to resume from
model/  best/   Hugging Face folders  clients/        what each client keeps for itself
clients.json    what is known of their data   transfers/     what has arrived of a round
answers.json    to some rows of the global test set, and the confusion of classes: at the start, after two rounds
leaving.json    held-out rows scored by the finished model, and without each owner's experts
health/         routing, similarities and weights of each round
events.*        for TensorBoard       trackers.json   its ids at MLflow and W&B
.fedalign       what may be removed when the run is replaced
.lock  .watch   who does the rounds, and who started the run and looks on
"""

from __future__ import annotations

import json
import logging
import platform
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from fedalign import parallel
from fedalign.config.run import Config
from fedalign.config.toml import flat, read_config
from fedalign.errors import UserError
from fedalign.files import (
    LOCK,
    SUMS,
    TALLY,
    WATCH,
    check_free,
    damage,
    locked,
    refuse_held,
    replacing,
    take,
    tidy,
    write_text,
)
from fedalign.protocol import Evaluation, Layout, Metrics, Plan, Statistics, Weights
from fedalign.server.checkpoint import FILES, LINE, PUBLIC, SCORED, ServerState, whole_rounds
from fedalign.server.health import write_health
from fedalign.server.scores import (
    accuracy_of,
    beside,
    best_called,
    best_of,
    epsilon_spent,
    is_scored,
    loss_of,
    measure_of,
    scored_on,
    spent,
)
from fedalign.server.trackers import TrackedRun, open_trackers

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]  # so many of so many are done
ROUND = "round.json"  # in model/ and best/: which round it is, and how that scored
OF_A_CLIENT = (  # what a client keeps for itself, below its own folder
    *(f"round-#/{name}" for name in (SUMS, "digests.json", "kept.safetensors", "update.safetensors")),
    *(f"{folder}/{name}" for folder in ("start", "concealed") for name in (SUMS, "digests.json", "update.safetensors")),
    *(f"{name}.safetensors{end}" for name in ("received", "arriving", "differences") for end in ("", ".journal")),
    *("sizes.json", "layout.json", "counts.safetensors", "terms.json"),
    *(name for file in ("masks.jsonl", "privacy.jsonl") for name in (file, f".{file}{LOCK}")),
)
OF_FLOWER = (  # in its home
    *("config.toml", "source", "run-id", "run.toml", "federation.toml", "superlink.log"),
    *("apps/fedalign.fedalign-moe-app.*/pyproject.toml", "fedalign-moe-app/pyproject.toml"),
)
OF_WANDB = (  # offline and online
    *("latest-run", "debug.log", "debug-internal.log", "wandb-resume.json"),
    *(
        f"{run}run-#_#-*/{name}"
        for run in ("", "offline-")
        for name in (
            *("run-*.wandb", "run-*.wandb.synced", "run-*.wandb.syncstate", "files/requirements.txt"),
            *(
                "files/config.yaml",
                "files/output.log",
                "files/wandb-metadata.json",
                "files/wandb-summary.json",
                "files/conda-environment.yaml",
            ),
            *("logs/debug.log", "logs/debug-internal.log", "logs/debug-core.log"),
        )
    ),
)
OF_A_ROUND = (  # in transfers/round-#/, by site
    "sums.json",
    *(
        f"*.{kind}.safetensors{end}"
        for kind in ("update", "counts", "scores", "shares", "shares-again")
        for end in ("", ".journal")
    ),
)
ARRIVED = (  # in transfers/
    *("moved.jsonl", "start.safetensors", "start.safetensors.journal", *(f"round-#/{name}" for name in OF_A_ROUND)),
)
WRITTEN = {  # to a run's folder, by whoever takes part in the run; model/ and best/ are marked themselves
    "run": (
        *("config.toml", "metrics.jsonl", "summary.json", "clients.json", "answers.json", "leaving.json"),
        "asked.json",
        *("trackers.json", "report.html", "status.json", "run-key", "events.out.tfevents.#.*.#.#", "model/", "best/"),
        *(f"checkpoint/round-#/{name}" for name in (SUMS, *FILES, PUBLIC, f"{SCORED}/{SUMS}", f"{SCORED}/{LINE}")),
        *(f"checkpoint/constants/{name}" for name in (SUMS, "constants.safetensors")),
        *("health/round-#.safetensors", f"clients/{TALLY}", *(f"clients/*/{name}" for name in OF_A_CLIENT)),
        *(f"transfers/{name}" for name in ARRIVED),
        *(f"flower/{name}" for name in OF_FLOWER),
        *(f"wandb/{name}" for name in OF_WANDB),
    )
}


class Saves(Protocol):
    """Who can write the model: see `server.run.Centre`."""

    def save_model(self, weights: Weights, folder: Path) -> None:
        """Write weights as an ordinary Hugging Face folder, with the tokenizer."""

    def check_model(self, folder: Path) -> str:
        """Hold what was last saved against plain libraries; how far was looked."""

    def evaluate(self, weights: Weights, *, generate: bool = False) -> tuple[Evaluation, Mapping[str, Any]] | None:
        """Score weights on the global test set, and tell what was answered."""

    def leaving(self, weights: Weights, progress: Progress) -> Mapping[str, Any] | None:
        """Scores of held-out rows, by the whole model and without each owner's experts."""


class RunFolder:
    """One run's output folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.checkpoint = path / "checkpoint"
        self.clients = path / "clients"
        self.model = path / "model"
        self.best = path / "best"
        self.health = path / "health"
        self.transfers = path / "transfers"
        self.holdings = path / "clients.json"
        self.answers = path / "answers.json"
        self.leaving = path / "leaving.json"
        self.asked = path / "asked.json"

    def check_free(self, overwrite: bool) -> None:
        """Refuse a place where anything would be lost but a run that `overwrite` replaces.

        Raises:
            UserError: Something would be lost.
        """
        go_on = f"Go on with it: fedalign run --resume {shlex.quote(str(self.path))}. "
        check_free(self.path, "run", overwrite, go_on=go_on, written=WRITTEN)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hold the run as who starts it and looks on.

        Raises:
            UserError: Another process does.
        """
        with locked(self.path / WATCH, "a run") if parallel.is_first() else nullcontext():
            yield

    @contextmanager
    def worked(self) -> Iterator[None]:
        """Hold the run as who does the rounds, or empties the folder for a new one.

        Raises:
            UserError: Another process does.
        """
        with locked(self.path / LOCK, "a run") if parallel.is_first() else nullcontext():
            yield

    def check_idle(self, *, rounds: bool = True) -> None:
        """Refuse a run that another process has started and looks on or, with `rounds`, does the rounds of.

        Raises:
            UserError: One does.
        """
        for name in (WATCH, LOCK) if rounds else (WATCH,):
            refuse_held(self.path / name, "a run")

    @parallel.by_the_first
    def begin(self, config: Config) -> None:
        """Make the folder anew with the resolved configuration; call it where `check_free` allowed it.

        Raises:
            UserError: Something is there now that no run wrote.
        """
        take(self.path, "run", WRITTEN)
        write_text(self.config, config.to_toml())

    def finished(self) -> int:
        """Rounds of the finished run that is here; 0 if none is."""
        try:
            return int(json.loads(self.summary.read_text(encoding="utf-8"))["rounds"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def last_asked(self) -> int:
        """The last round that clients were asked to train with noise, complete or not; 0: none.

        Raises:
            UserError: What says so cannot be read.
        """
        if not self.asked.exists():
            return 0
        try:
            return int(json.loads(self.asked.read_text(encoding="utf-8"))["round"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{str(self.asked)!r}: cannot be read: {error}") from None

    def stopped(self, config: Config) -> str | None:
        """Why the run that is here takes no more rounds of those that `config` asks for; None: it does."""
        return spent(read_history(self), config.run.patience, config.evaluation.best)

    def check_best(self, config: Config) -> None:
        """Refuse a measure by which another round is the best, whose model is no longer kept.

        Raises:
            UserError: Neither `best/` nor a checkpoint holds that round.
        """
        by = config.evaluation.best
        best = best_of(read_history(self), by)
        if best is None or not _unlike(self.best, best):
            return
        kept = whole_rounds(self.checkpoint)
        if best["round"] not in kept:
            what, numbers = best_called(measure_of(best, by)), ", ".join(map(str, kept)) or "none"
            raise UserError(
                f'evaluation.best = "{by}": the {what} is of round {best["round"]}, whose model is no longer kept '
                f"(checkpoints: {numbers}). Leave it as it was, or start anew with another --out."
            )

    @parallel.by_the_first
    def amend(self, config: Config) -> None:
        """Keep what a resumed run was given anew, such as more rounds; the folder is locked, its checkpoint fits."""
        if config.to_toml() != self.config.read_text(encoding="utf-8"):
            write_text(self.config, config.to_toml())

    def read_config(self, said: str) -> Config:
        """The run's configuration.

        Raises:
            UserError: There is no run, or its configuration cannot be read; `said` is how the user gave the folder.
        """
        try:
            return read_config(self.config.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{said} {str(self.path)!r}: holds no run (no config.toml). Give the --out of a run."
            ) from None
        except (OSError, ValueError, UserError) as error:
            raise UserError(f"{str(self.config)!r}: cannot be read ({' '.join(str(error).split())}).") from None


class Recorder:
    """A `server.rounds.Observer` that keeps the result files true after every round."""

    def __init__(self, folder: RunFolder, config: Config, centre: Saves, resumed: ServerState) -> None:
        self.folder = folder
        self.config = config
        self.centre = centre
        if parallel.is_first():
            tidy(folder.path, WRITTEN)
        self._write_metrics(resumed.history)  # lines of a round that was cut off are dropped
        self._answers = self._kept_answers(resumed.round) if parallel.is_first() else {}
        told = resumed.history[-1]["round"] if resumed.history else -1
        followed = TrackedRun(folder.path, flat(config.model_dump(mode="json"), "."), told)
        self._trackers = open_trackers(config.tracking.loggers if parallel.is_first() else (), followed)
        self._tell_trackers(resumed.history)  # a kill may have come before they were told

    def progress(self, round: int, stage: str, done: int, total: int) -> None:
        """Of a run with noise, that clients are asked to train: it costs them, whatever becomes of the round."""
        if self.config.privacy.on and stage == "training" and not done and parallel.is_first():
            write_text(self.folder.asked, json.dumps({"round": round}) + "\n")

    def planned(self, round: int, reports: Sequence[Statistics], plan: Plan, layout: Layout) -> None:
        """Keep what a person will want to look at: routing, similarity, weights; not what [privacy] hides."""
        if self.config.tracking.health != "off" and not self.config.privacy.on and parallel.is_first():
            write_health(self.folder.health, round, reports, plan, layout)

    def completed(self, state: ServerState, improved: bool) -> None:
        """Add the round's line, tell the trackers; keep the model if it is the best yet."""
        self._write_metrics(state.history)
        self._tell_trackers(state.history)
        if improved:
            self._save(state.weights, self.folder.best, state.history[-1])

    def evaluate(self, round: int, weights: Weights, *, last: bool = False) -> Evaluation | None:
        """The score after a round; what was answered is kept before the round counts, so that no kill parts them."""
        marked = self.centre.evaluate(weights, generate=last or round in (0, self.config.run.rounds))
        if marked is None:
            return None
        score, told = marked
        later = sorted(self._answers.keys() - {0, round})[-1:]  # what a report shows while this round is not complete
        self._answers = {n: self._answers[n] for n in (0, *later) if n in self._answers} | {round: told}
        self._write_answers()
        return score

    def _tell_trackers(self, history: Sequence[Metrics]) -> None:
        for tracker in self._trackers:
            tracker.follow(history)

    def mend_best(self, history: Sequence[Metrics], weights_after: Callable[[int], Weights | None]) -> None:
        """Make `best/` that of the best round again, if a kill or a damage came between.

        Args:
            history: of the complete rounds.
            weights_after: the weights of a round that is still kept.
        """
        best = best_of(history, self.config.evaluation.best)
        problem = "" if best is None else parallel.agreed(_unlike(self.folder.best, best))
        if best is None or not problem:
            return
        weights = weights_after(best["round"])
        if weights is not None:
            self._save(weights, self.folder.best, best)
        elif parallel.is_first():
            logger.warning(
                "%s: %s. The best round so far is %d, which is no longer kept; the next better one is written there.",
                self.folder.best,
                problem,
                best["round"],
            )

    def finish(self, state: ServerState, progress: Progress) -> dict[str, Any]:
        """Write the final model, how it does without each owner of experts, and the summary; return the summary."""
        for tracker in self._trackers:
            tracker.close()
        early = state.round != self.config.run.rounds and not self._answers.get(state.round, {}).get("answered")
        lacking = self.config.evaluation.answers > 0 and (early or state.round not in self._answers)
        if "test_examples" in state.history[-1] and parallel.agreed(lacking):  # as of a run that an older version did
            self.evaluate(state.round, state.weights, last=True)
        self._save(state.weights, self.folder.model, state.history[-1])
        checked = self.centre.check_model(self.folder.model) if self.config.run.check and parallel.is_first() else None
        self._write_leaving(state, progress)
        summary = summarise(self.config, state.history, self.folder.last_asked()) | {"checked": checked}
        if parallel.is_first():
            write_text(self.folder.summary, json.dumps(summary, indent=2) + "\n")
        return summary

    def _write_leaving(self, state: ServerState, progress: Progress) -> None:
        """Write how the final model does without each owner; nothing is left of what was told of an earlier round."""
        told = self.centre.leaving(state.weights, progress)
        if not parallel.is_first():
            return
        if told is None:
            self.folder.leaving.unlink(missing_ok=True)
        else:
            write_text(self.folder.leaving, json.dumps({"round": state.round, **told}, indent=1) + "\n")

    def _save(self, weights: Weights, place: Path, line: Metrics) -> None:
        """Every process gives its share of the model, the first writes it, with the round that it is of."""
        with replacing(place, "model") if parallel.is_first() else nullcontext(place) as folder:
            self.centre.save_model(weights, folder)
            if parallel.is_first():
                (folder / ROUND).write_text(json.dumps(_described(line), indent=1) + "\n", encoding="utf-8")

    def _kept_answers(self, round: int) -> dict[int, Mapping[str, Any]]:
        """Those of complete rounds; a damaged file is told, and written anew."""
        try:
            return {number: told for number, told in read_answers(self.folder.path).items() if number <= round}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("%s: damaged (%s), and begun anew.", self.folder.answers, error)
            return {}

    @parallel.by_the_first
    def _write_answers(self) -> None:
        write_text(self.folder.answers, json.dumps(self._answers, indent=1) + "\n")

    @parallel.by_the_first
    def _write_metrics(self, history: Sequence[Metrics]) -> None:
        write_text(self.folder.metrics, "".join(json.dumps(line) + "\n" for line in history))


def saved_round(folder: Path) -> dict[str, Any] | None:
    """The round that a saved model is of, `round`, and its numbers; None: the folder does not say."""
    try:
        about = json.loads((folder / ROUND).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) and isinstance(about.get("round"), int) else None


def _described(line: Metrics) -> dict[str, Any]:
    """A round's number and numbers, without what a clock measured and what is told client by client."""
    return {k: v for k, v in line.items() if isinstance(v, int | float) and not k.endswith("seconds")}


def _unlike(folder: Path, line: Metrics) -> str:
    """Why a saved model is not that of a round, in a few words; empty: it is."""
    about = saved_round(folder)
    if about is None:
        return f"does not say of which round it is (no {ROUND})" if folder.is_dir() else "is missing"
    if about != _described(line):
        again = ", done once more since" if about["round"] == line["round"] else ""
        return f"holds round {about['round']}{again}"
    problem = damage(folder)
    return problem and f"is damaged ({problem})"


def check_round(folder: Path, line: Metrics) -> None:
    """Refuse a saved model that is not that of a round as it was scored.

    Raises:
        UserError: It is of another round, or was changed or damaged since.
    """
    if problem := _unlike(folder, line):
        run = folder.parent
        raise UserError(
            f"{str(folder)!r}: {problem}; asked for is round {line['round']}. "
            f"Make it whole again: fedalign run --resume {shlex.quote(str(run))}"
        )


def summarise(config: Config, history: Sequence[Metrics], asked: int) -> dict[str, Any]:
    """The run in one flat record. Accuracies are shares in [0, 1], losses nats per answer token; None: never scored.

    `asked` is the last round that clients were asked to train. `privacy_epsilon` is what no client has spent more than;
    None: there was no noise, or a client may have spent more than it told, and no epsilon was agreed on.
    """
    by = config.evaluation.best
    scored: list[Metrics] = [line for line in history if is_scored(line)] or [{}]
    first, last, best = beside(scored[0], scored[-1]), scored[-1], best_of(history, by) or {}
    rounds = history[-1]["round"]
    cost = epsilon_spent(history, asked)
    return {
        "algorithm": config.algorithm.name,
        "seed": config.run.seed,
        "rounds": rounds,
        "stopped": spent(history, config.run.patience, by) if rounds < config.run.rounds else None,
        "initial_accuracy": accuracy_of(first),
        "final_accuracy": accuracy_of(last),
        "best_accuracy": accuracy_of(best),
        "best_round": best.get("round"),
        "best_by": measure_of(best, by) if best else None,
        "accuracy_of": f"global {config.evaluation.part} set"
        if "loss_nats" in first
        else "clients' held-out parts, weighted by examples",
        "initial_loss": loss_of(first),
        "final_loss": loss_of(last),
        "best_loss": loss_of(best),
        "scored_on": scored_on(last, config.evaluation.part),
        "unscored": history[-1].get("unscored"),
        "client_examples": last.get("client_examples", {}),
        "client_accuracies": last.get("client_accuracies", {}),
        "bytes_up": sum(line.get("bytes_up", 0) for line in history),
        "bytes_down": sum(line.get("bytes_down", 0) for line in history),
        "failures": [failure | {"round": line["round"]} for line in history for failure in line.get("failures", ())],
        "privacy_epsilon": cost and cost.most(config.privacy.epsilon),
        "privacy_delta": cost and cost.delta,
        "seconds": sum(line.get("round_seconds", 0.0) for line in history),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the software that made the numbers."""
    packages = ("fedalign-moe", "torch", "transformers", "peft", "tokenizers", "safetensors", "flwr-datasets", "numpy")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def read_answers(run: Path) -> dict[int, Mapping[str, Any]]:
    """The answers after each round, as `client.answers.sheet` tells it; empty where it was not kept.

    Raises:
        ValueError, TypeError, AttributeError, OSError: The file is damaged.
    """
    path = RunFolder(run).answers
    if not path.exists():
        return {}
    return {int(number): dict(told) for number, told in json.loads(path.read_text(encoding="utf-8")).items()}


def read_history(folder: RunFolder, *, strict: bool = False) -> list[Metrics]:
    """The rounds that metrics.jsonl holds; unless `strict`, without what cannot be read of a run at work.

    Raises:
        ValueError, OSError: `strict`, and it is missing or damaged.
    """
    try:
        lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        if strict:
            raise ValueError(f"metrics.jsonl: {error}") from None
        return []
    if not all(isinstance(line, dict) for line in lines):
        if strict:
            raise ValueError("metrics.jsonl: a line is not an object")
        return []
    return lines
