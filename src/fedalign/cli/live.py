"""The live view of a run: a table with a line a round, and a bar for the step at work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.jupyter import JupyterMixin
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from fedalign.protocol import Layout, Metrics, Plan, Statistics
from fedalign.server.checkpoint import ServerState
from fedalign.server.scores import accuracy_of, loss_of, scored_on
from fedalign.units import clock, nats, percent, size

ROWS = 25  # of the live table; older rounds are in metrics.jsonl
REFRESH = 0.25  # seconds between two looks of the live table


class LiveTable(JupyterMixin):
    """A `server.rounds.Observer` for a terminal or a notebook; where output goes to a file it prints a line a round."""

    def __init__(self, console: Console, rounds: int, part: str = "test") -> None:
        self.console, self.rounds, self.part = console, rounds, part
        self.history: Sequence[Metrics] = ()
        self._begun: dict[int, float] = {}  # when each round of this process was
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.completed}/{task.total}")
        )
        self._task = self._bar.add_task("starting", total=1)
        self._live = Live(get_renderable=self.__rich__, console=console, refresh_per_second=1 / REFRESH)
        self._cell: Any = None  # what a notebook shows in our place
        self._shown = 0.0  # when it did

    def __enter__(self) -> LiveTable:
        if self.console.quiet:
            return self
        if self.console.is_jupyter:  # rich's own live view of notebooks wants ipywidgets
            from IPython.display import display

            self._cell = display(self, display_id=True)
        elif self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.update(self._task, visible=False)
        self._refresh(at_once=True)
        self._live.stop()

    def progress(self, round: int, stage: str, done: int, total: int) -> None:
        """Move the bar."""
        if round:
            self._begun.setdefault(round, time.monotonic())
        where = f"round {round} of {self.rounds}" if round else "before round 1"
        self._bar.update(self._task, description=f"{where}: {stage}", completed=done, total=total)
        self._refresh()

    def planned(self, round: int, reports: Sequence[Statistics], plan: Plan, layout: Layout) -> None:
        """Nothing to see."""

    def completed(self, state: ServerState, improved: bool) -> None:
        """Add the round's line."""
        self.history = state.history
        self._refresh(at_once=True)
        if not (self.console.is_terminal or self._cell):
            cells = zip(COLUMNS, row(self.history, len(self.history) - 1, self.time_left()), strict=True)
            if state.round == 0 and (of := scored_on(self.history[-1], self.part)):
                self.console.print(f"accuracy and loss: {of}", soft_wrap=True)
            self.console.print(" | ".join(f"{name} {value}" for name, value in cells), soft_wrap=True)
        for failure in state.history[-1].get("failures", ()):
            text = f"round {state.round}: {failure['client']}, {failure['stage']}: {failure['reason']}"
            self.console.print(text, style="yellow", soft_wrap=True)
        if "unscored" in state.history[-1]:
            text = f"round {state.round}: clients' scores are not told: {state.history[-1]['unscored']}"
            self.console.print(text, style="yellow", soft_wrap=True)
        if "stopped" in state.history[-1] and state.round < self.rounds:
            text = f"round {state.round} is the last: {state.history[-1]['stopped']}"
            self.console.print(text, soft_wrap=True)

    def time_left(self) -> str:
        """From the rounds that this process has run; the last line may be of the round before the one at work."""
        line, now = int(self.history[-1]["round"]), time.monotonic()
        if line >= self.rounds:
            return clock(0)
        if not self._begun:
            return "..."
        first, at = min(self._begun), max(*self._begun, line + 1)
        if at == first:
            return "..."
        began = self._begun.get(at, now)
        a_round = (began - self._begun[first]) / (at - first)
        return clock(max(0.0, a_round * (self.rounds + 1 - at) - (now - began)))

    def _refresh(self, *, at_once: bool = False) -> None:
        """A notebook is told when to look again."""
        if self._cell and (at_once or time.monotonic() - self._shown > REFRESH):
            self._shown = time.monotonic()
            self._cell.update(self)

    def __rich__(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD)
        for name in COLUMNS:
            table.add_column(name, justify="right")
        newest = len(self.history) - 1
        for index in range(max(0, newest + 1 - ROWS), newest + 1):
            table.add_row(*row(self.history, index, self.time_left() if index == newest else ""))
        told = [of for line in self.history if (of := scored_on(line, self.part))]
        table.caption = f"accuracy and loss: {told[-1]}" if told else None
        return Group(table, self._bar)


COLUMNS = ("round", "accuracy", "worst client", "loss", "routing divergence", "sent up", "time left")


def row(history: Sequence[Metrics], index: int, time_left: str) -> tuple[str, ...]:
    """The cells of one round, in the order of `COLUMNS`."""
    line = history[index]
    sent = sum(past.get("bytes_up", 0) for past in history[: index + 1])
    return (
        str(line["round"]),
        percent(accuracy_of(line)),
        percent(line.get("client_accuracy_worst")),
        nats(loss_of(line)),
        f"{line['routing_divergence_nats']:.4f}" if "routing_divergence_nats" in line else "-",
        size(sent),
        time_left,
    )
