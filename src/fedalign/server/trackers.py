"""Where a run's numbers go besides its folder: TensorBoard, MLflow or Weights & Biases, each through its own library.

MLflow and W&B are set up as their users know it: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, `WANDB_MODE=offline`,
`WANDB_PROJECT` ... A resumed run goes on in the same curve: `trackers.json` in the run folder keeps its id, and the
last round that was taken. What a kill or a lost server kept from a tracker it gets with the next round.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedalign.config.toml import flat
from fedalign.errors import UserError
from fedalign.files import write_text
from fedalign.protocol import Metrics

logger = logging.getLogger(__name__)
PROJECT = "fedalign"  # where the user's environment names no other
METRICS_A_CALL, PARAMETERS_A_CALL = 1000, 100  # MLflow takes no more


class Tracker(Protocol):
    """A library that takes a round's numbers by name; its methods may raise anything."""

    def log(self, round: int, scalars: Mapping[str, float]) -> None:
        """Add one round."""

    def close(self) -> None:
        """No more rounds will come."""


@dataclass(frozen=True)
class TrackedRun:
    """The facts of a run that a tracker may know; what the run knows of the tracker is in trackers.json."""

    folder: Path
    settings: Mapping[str, Any]  # the configuration, flat: section.key -> value
    resumed_after: int  # the last round that is complete and scored, -1: none; what a cut-off one logged is void

    @property
    def name(self) -> str:
        """As a person finds it in a list of runs."""
        return self.folder.resolve().name

    def kept_id(self, tracker: str) -> str | None:
        """The id under which a tracker knows this run, if it does."""
        return self._known(tracker).get("id")

    def keep_id(self, tracker: str, id: str) -> None:
        """Remember it for `--resume`."""
        self._keep(tracker, {"id": id})

    def taken(self, tracker: str) -> int:
        """The last round that a tracker has taken; -1: none."""
        return min(int(self._known(tracker).get("taken", -1)), self.resumed_after)

    def keep_taken(self, tracker: str, round: int) -> None:
        """Remember it for `--resume`."""
        self._keep(tracker, {"taken": round})

    @property
    def _file(self) -> Path:
        return self.folder / "trackers.json"

    def _known(self, tracker: str) -> dict[str, Any]:
        about = self._all().get(tracker, {})
        return about if isinstance(about, dict) else {"id": about, "taken": self.resumed_after}  # as written before

    def _keep(self, tracker: str, about: Mapping[str, Any]) -> None:
        write_text(self._file, json.dumps(self._all() | {tracker: {**self._known(tracker), **about}}) + "\n")

    def _all(self) -> dict[str, Any]:
        try:
            known: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError(f"{str(self._file)!r}: damaged ({error}). Delete it; curves then start anew.") from None
        return known


@dataclass
class Follower:
    """A tracker that gets every round once; what it did not take is offered again until it takes a later one."""

    name: str
    tracker: Tracker
    run: TrackedRun

    def __post_init__(self) -> None:
        self._taken = self.run.taken(self.name)
        self._refused: set[int] = set()  # rounds after it; each was told once

    def follow(self, history: Sequence[Metrics]) -> None:
        """Hand over all rounds after the last one that it took; of those that it refused first the oldest alone.

        Once it takes one, it gets the others that it refused once more: what it refuses then, it never takes.
        A run is not lost because a server for its curves is: metrics.jsonl has every number anyway.
        """
        lines = {number: line for line in history if (number := int(line["round"])) > self._taken}
        waiting = sorted(self._refused)[1:]  # each may take as long as a lost server's time limit
        offered, answers = [number for number in lines if number not in waiting], False
        while offered:
            number = offered.pop(0)
            if not self._offer(number, lines[number]):
                continue
            self._taken = max(number, self._taken)
            self.run.keep_taken(self.name, self._taken)
            if not answers:
                answers, offered = True, sorted({*offered, *self._refused})
        if answers:
            self._refused = {number for number in self._refused if number > self._taken}

    def _offer(self, number: int, line: Metrics) -> bool:
        """Whether it took a round."""
        told = number in self._refused
        if _took(self.name, f"round {number}", partial(self.tracker.log, number, _scalars(line)), told=told):
            self._refused.discard(number)
            return True
        self._refused.add(number)
        return False

    def close(self) -> None:
        """No more rounds will come."""
        _took(self.name, "its end", self.tracker.close)


def _scalars(line: Metrics) -> dict[str, float]:
    """All numbers of a round, nested ones by path."""
    values = flat(line, "/")
    return {name: value for name, value in values.items() if isinstance(value, int | float) and name != "round"}


def _took(tracker: str, what: str, call: Callable[[], None], *, told: bool = False) -> bool:
    try:
        call()
    except Exception as error:  # the libraries raise anything, bare Exception too
        if not told:
            logger.warning("%s did not take %s: %s", tracker, what, " ".join(str(error).split()))
        return False
    return True


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder), purge_step=run.taken("tensorboard") + 1)

    def log(self, round: int, scalars: Mapping[str, float]) -> None:
        """Add and flush, so that a person sees it at once."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class MLflow:
    """A run of an MLflow experiment."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when the library is imported
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        with _setting_up("mlflow", MlflowException, "Check MLFLOW_TRACKING_URI and that its server answers."):
            self._client = MlflowClient()
            kept = run.kept_id("mlflow")
            if kept is not None:
                self._id = self._client.get_run(kept).info.run_id
                self._client.update_run(self._id, status="RUNNING")
                return
            self._id = self._client.create_run(self._experiment(), run_name=run.name).info.run_id
            settings = [Param(key, str(value)[:500]) for key, value in run.settings.items()]
            for first in range(0, len(settings), PARAMETERS_A_CALL):
                self._client.log_batch(self._id, params=settings[first : first + PARAMETERS_A_CALL])
            run.keep_id("mlflow", self._id)

    def log(self, round: int, scalars: Mapping[str, float]) -> None:
        """Add; names keep letters, digits, and what MLflow allows besides."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_mlflow_name(name), float(value), now, round) for name, value in scalars.items()]
        for first in range(0, len(metrics), METRICS_A_CALL):
            self._client.log_batch(self._id, metrics=metrics[first : first + METRICS_A_CALL])

    def close(self) -> None:
        """Mark it as finished."""
        self._client.set_terminated(self._id)

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))


class WandB:
    """A run of a Weights & Biases project; with WANDB_MODE=offline, files beside the run to be synced later."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        id = run.kept_id("wandb") or uuid.uuid4().hex[:12]
        run.keep_id("wandb", id)
        mode: Any = os.environ.get("WANDB_MODE") or "online"
        remedy = "Log in with `wandb login`, or keep the numbers here: WANDB_MODE=offline."
        with _setting_up("wandb", wandb.Error, remedy):
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=id,
                mode=mode,  # the library remembers what an earlier run in this process had
                resume="allow" if mode == "online" else None,
                name=run.name,
                dir=str(run.folder),
                config=dict(run.settings),
                settings=wandb.Settings(console="off", silent=True),
            )

    def log(self, round: int, scalars: Mapping[str, float]) -> None:
        """Add."""
        self._run.log(dict(scalars), step=round)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


TRACKERS: Mapping[str, Callable[[TrackedRun], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
EXTRAS = ("mlflow", "wandb")  # not installed unless asked for; library and extra have the tracker's name


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose library is missing, before anything else is done.

    Raises:
        UserError: One is, and how to install it.
    """
    for name in names:
        if name in EXTRAS and find_spec(name) is None:
            raise UserError(
                f"tracking.loggers = {list(names)}: {name} is not installed. Install it with "
                f"pip install 'fedalign-moe[{name}]', or leave {name!r} out."
            )


def open_trackers(names: Sequence[str], run: TrackedRun) -> list[Follower]:
    """The named trackers, ready for the rounds that each has not taken yet.

    Raises:
        UserError: A library is missing, or its server does not want this run.
    """
    require_trackers(names)
    return [Follower(name, TRACKERS[name](run), run) for name in names]


@contextlib.contextmanager
def _setting_up(tracker: str, errors: type[Exception], remedy: str) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise UserError(f"tracking.loggers: {tracker}: {' '.join(str(error).split())} {remedy}") from None


def _mlflow_name(name: str) -> str:
    """As MLflow allows it.

    >>> _mlflow_name("client_accuracies/site (1)"), _mlflow_name("client_accuracies/..")
    ('client_accuracies/site _1_', 'client_accuracies/_')
    """
    parts = [re.sub(r"[^\w\-. ]", "_", part) for part in name.split("/")]
    return "/".join(part if part.strip(". ") else "_" for part in parts)[:250]
