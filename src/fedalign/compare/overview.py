"""The live view of a comparison: a line an algorithm, a column a seed, and the time left."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedalign.compare.plan import line_name
from fedalign.compare.schedule import Task
from fedalign.server.scores import accuracy_of, loss_of, measure_of
from fedalign.units import clock, percent

STYLES = {"waiting": "dim", "running": "cyan", "finished": "green", "failed": "bold red"}
MARGIN = 8  # lines of the terminal that are left to other things


class Overview:
    """A `schedule.Watcher` for a terminal; where output goes to a file it prints a line for each finished run."""

    def __init__(self, console: Console, title: str, tasks: Sequence[Task]) -> None:
        self.console, self.title, self.tasks = console, title, tasks
        self._started = time.monotonic()
        self._made_before = self._made()
        self._live = Live(get_renderable=self.render, console=console, refresh_per_second=2)

    def __enter__(self) -> Overview:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def look(self) -> None:
        """The live view renders itself."""

    def ended(self, task: Task) -> None:
        """A line for it, where nobody sees the live view; a failure is told in any case."""
        if task.state == "failed":
            text = f"{task.cell.name}: failed: {task.reason} (all it said: {task.log})"
            self.console.print(Text(text, style="red"), soft_wrap=True)  # a `style` would colour the live view, too
        elif not self.console.is_terminal:
            text = f"{self._counted()} {task.cell.name}: {score(task)}, {clock(task.seconds)}, left {self.time_left()}"
            self.console.print(text, soft_wrap=True)

    def time_left(self) -> str:
        """From the rounds that all runs together have made since the start."""
        made = self._made() - self._made_before
        left = sum(task.rounds_left for task in self.tasks if task.state in ("waiting", "running"))
        return clock((time.monotonic() - self._started) / made * left) if made > 0 else "..."

    def render(self) -> RenderableType:
        """The table as it is now."""
        seeds = sorted({task.cell.seed for task in self.tasks})
        table = Table(box=box.SIMPLE_HEAD, title=self.title, title_justify="left")
        table.add_column("")
        for seed in seeds:
            table.add_column(f"seed {seed}", justify="right")
        lines: dict[str, dict[int, Task]] = {}
        for task in self.tasks:
            name = ", ".join([line_name(task.cell.choice.label, task.cell.point), *task.cell.tried])
            lines.setdefault(name, {})[task.cell.seed] = task
        shown, hidden = self._that_fit(lines)
        for name in shown:
            cells = [_cell(lines[name][seed]) if seed in lines[name] else Text("-") for seed in seeds]
            table.add_row(Text(name), *cells)
        more = f", {hidden} more lines" if hidden else ""
        return Group(table, Text(f"{self._counted()} runs done, time left {self.time_left()}{more}"))

    def _that_fit(self, lines: dict[str, dict[int, Task]]) -> tuple[list[str], int]:
        """Where something goes on comes first if not all lines fit; the order stays."""
        room = max(1, self.console.height - MARGIN)
        busy = sorted(lines, key=lambda name: not any(task.state == "running" for task in lines[name].values()))
        chosen = set(busy[:room])
        return [name for name in lines if name in chosen], len(lines) - len(chosen)

    def _made(self) -> int:
        return sum(task.cell.config.run.rounds - task.rounds_left for task in self.tasks)

    def _counted(self) -> str:
        return f"{sum(task.state in ('finished', 'failed') for task in self.tasks)}/{len(self.tasks)}"


def score(task: Task) -> str:
    """How good the model of a run is so far."""
    scored = [line for line in task.history if loss_of(line) is not None]
    if not scored:
        return "not scored yet"
    last = scored[-1]
    if measure_of(last, task.cell.config.evaluation.best) == "loss":
        return f"loss {loss_of(last):.3f}"
    return f"accuracy {percent(accuracy_of(last))}"


def _cell(task: Task) -> Text:
    if task.state == "failed":
        return Text("failed", style=STYLES["failed"])
    if not task.history:
        return Text("starts" if task.state == "running" else "waits", style=STYLES[task.state])
    rounds = "" if task.state == "finished" else f"{task.history[-1]['round']}/{task.cell.config.run.rounds} "
    return Text(rounds + score(task).removeprefix("accuracy "), style=STYLES[task.state])
