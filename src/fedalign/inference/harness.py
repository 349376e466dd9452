"""Tasks of EleutherAI's lm-evaluation-harness (extra `harness`), on the model as it stands."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedalign.errors import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from fedalign.client.workbench import Workbench

BATCH = 8  # requests at a time
Results = Mapping[str, Mapping[str, Any]]  # task or group -> "metric,filter" -> value, as the harness has it


@dataclass(frozen=True)
class Tasks:
    """Tasks, and where else than in the harness they are defined."""

    names: Sequence[str]
    folder: Path | None = None  # of YAML files
    limit: int | None = None  # examples of each task; None: all

    def check(self) -> None:
        """Refuse what cannot be run.

        Raises:
            UserError: The harness is not installed, or there is no such folder.
        """
        if find_spec("lm_eval") is None:
            raise UserError("--harness: needs lm-evaluation-harness: pip install 'fedalign-moe[harness]'")
        if not all(self.names):
            raise UserError("--harness: an empty name. Give tasks with commas between them: --harness arc_easy,piqa")
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(f"--tasks-in {str(self.folder)!r}: is no folder. Give one of the harness's YAML tasks.")

    def load(self) -> Loaded:
        """The tasks with their data.

        Raises:
            UserError: There is no such task, or its data cannot be had.
        """
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = self._manager()
        try:
            return Loaded(manager, _highest(manager.load(list(self.names))), self.limit)
        except Exception as error:  # the libraries behind it raise many kinds for data that cannot be had
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--harness {','.join(self.names)}: cannot be loaded: {reason}") from None

    def _manager(self) -> TaskManager:
        """An index of tasks; that of the harness has thousands and takes seconds, so it is left out where it can be."""
        from lm_eval.tasks import TaskManager  # noqa: PLC0415 - of an extra, and slow to load

        if self.folder is not None:
            own = TaskManager(include_path=self.folder, include_defaults=False)
            if set(self.names) <= set(own.all_subtasks):  # a group may hold the harness's own
                return own
        manager = TaskManager(include_path=self.folder)
        for name in self.names:
            if name not in manager.all_tasks:
                there = "" if self.folder is None else f" and in {str(self.folder)!r}"
                raise UserError(
                    f"--harness {name!r}: unknown among the {len(manager.all_tasks):,} of the harness{there}. "
                    "List them: lm-eval ls tasks. Add yours: --tasks-in DIR."
                )
        return manager


def _highest(found: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Groups that no other holds, and tasks that none does: a group has a score of its own."""
    inner = {name for children in found["group_map"].values() for name in children}
    held = {task.task_name for group in found["groups"].values() for task in group.get_all_tasks()}
    groups = [group for name, group in found["groups"].items() if name not in inner]
    return [*groups, *(task for name, task in found["tasks"].items() if name not in held)]


@dataclass(frozen=True)
class Loaded:
    """Tasks with their data, to be scored on one model after another."""

    manager: TaskManager
    tasks: list[Any]  # and groups of them
    limit: int | None

    def score(self, bench: Workbench) -> Results:
        """All numbers of the harness; a model that was tuned for chats gets each prompt through its chat template."""
        from lm_eval import simple_evaluate  # noqa: PLC0415 - of an extra, and slow to load
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 - the same

        if bench.config.data.kind == "chat":
            bench.encoder.chats.source(None)  # refused here, if there is none
        moe, most = bench.moe, bench.encoder.max_length or None
        moe.model.eval()
        backend = "seq2seq" if moe.is_seq2seq else "causal"
        model = HFLM(moe.model, backend, tokenizer=bench.tokenizer, max_length=most, batch_size=BATCH)
        found = simple_evaluate(
            model,
            tasks=self.tasks,
            limit=self.limit,
            task_manager=self.manager,
            apply_chat_template=bench.config.data.kind == "chat",
            log_samples=False,
            bootstrap_iters=0,
        )
        results: Results = found["results"]
        return results


def numbers(results: Results) -> dict[str, float]:
    """The scores by name, without what else the harness tells of a task.

    >>> numbers({"t": {"alias": "t", "sample_len": 9, "acc,none": 0.5, "acc_stderr,none": "N/A"}})
    {'t, acc': 0.5}
    """
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, way = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                found[f"{task}, {metric}{'' if way == 'none' else f' ({way})'}"] = float(value)
    return found
