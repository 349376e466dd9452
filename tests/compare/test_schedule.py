"""Runs side by side: small stand-ins for `fedalign run` in real processes."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from fedalign.compare import schedule
from fedalign.compare.folder import ComparisonFolder
from fedalign.compare.overview import Overview
from fedalign.compare.plan import cells
from fedalign.compare.schedule import Task, run_all, slots_for
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from tests.compare.conftest import Ask

STAND_IN = textwrap.dedent(
    """
    import json, os, pathlib, sys, time
    folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
    (folder / "environment.json").write_text(json.dumps(dict(os.environ)))
    (folder / "started").write_text(str(time.time()))
    if kind == "refuses":
        print("loading"); print("Error: round 1: 0 of 3 clients\\ncan be used", file=sys.stderr); sys.exit(2)
    if kind == "breaks":
        raise ValueError("deep inside")
    if kind == "dies":
        os.kill(os.getpid(), 9)
    if kind == "silent":
        sys.exit(3)
    lines = ""
    for number in range(3):
        lines += json.dumps({"round": number, "accuracy": 0.1 * number, "loss_nats": 1.0}) + "\\n"
        (folder / "metrics.jsonl").write_text(lines)
        time.sleep(600 if kind == "hangs" else 0.3)
    (folder / "summary.json").write_text("{}")
    (folder / "ended").write_text(str(time.time()))
    """
)


class Quiet:
    """A watcher that remembers who ended."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def look(self) -> None:
        pass

    def ended(self, task: Task) -> None:
        self.names.append(task.cell.name)


def tasks_in(out: Path, ask: Ask, algorithms: str = "fedavg", seeds: str = "2") -> list[Task]:
    folder = ComparisonFolder(out)
    return [Task(cell, folder.run(cell, "runs"), folder.log(cell, "runs")) for cell in cells(ask(algorithms, seeds))]


def run(tasks: Sequence[Task], jobs: int = 2, kinds: Sequence[str] = (), watch: schedule.Watcher | None = None) -> None:
    by_task = dict(zip(map(id, tasks), kinds, strict=False))

    def command(task: Task) -> list[str]:
        return [sys.executable, "-c", STAND_IN, str(task.folder.path), by_task.get(id(task), "works")]

    run_all(tasks, [{}] * jobs, watch or Quiet(), command=command)


def overlap(first: Task, second: Task) -> bool:
    spans = [
        [float((task.folder.path / name).read_text()) for name in ("started", "ended")] for task in (first, second)
    ]
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def test_runs_go_side_by_side_and_no_more_than_asked_for(ask: Ask, tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path, ask)
    run(tasks, jobs=2)
    assert [task.state for task in tasks] == ["finished", "finished"]
    assert overlap(*tasks)
    assert [line["round"] for line in tasks[0].history] == [0, 1, 2]
    one_by_one = tasks_in(tmp_path / "one", ask)
    run(one_by_one, jobs=1)
    assert not overlap(*one_by_one)


def test_a_run_has_its_configuration_its_thread_and_its_gpu(ask: Ask, tmp_path: Path) -> None:
    (task,) = tasks_in(tmp_path, ask, seeds="1")

    def command(task: Task) -> list[str]:
        return [sys.executable, "-c", STAND_IN, str(task.folder.path), "works"]

    run_all([task], [{"CUDA_VISIBLE_DEVICES": "3"}], Quiet(), command=command)
    assert load_config(task.folder.config) == task.cell.config
    environment = json.loads((task.folder.path / "environment.json").read_text())
    assert (environment["OMP_NUM_THREADS"], environment["CUDA_VISIBLE_DEVICES"]) == ("1", "3")


def test_a_failure_is_told_and_the_others_go_on(ask: Ask, tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path, ask, seeds="5")
    watch = Quiet()
    run(tasks, jobs=5, kinds=["refuses", "breaks", "dies", "silent", "works"], watch=watch)
    assert [task.state for task in tasks] == ["failed"] * 4 + ["finished"]
    assert [task.killed for task in tasks] == [False, False, True, False, False]
    assert [task.reason for task in tasks[:4]] == [
        "round 1: 0 of 3 clients can be used",
        "ValueError: deep inside",
        "ended by SIGKILL; if memory ran out, give fewer --jobs",
        "exit code 3, and it said nothing",
    ]
    assert len(watch.names) == 5


def test_finished_runs_are_not_made_again(ask: Ask, tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path, ask)
    tasks[0].state = "finished"
    run(tasks)
    assert not tasks[0].folder.path.exists()
    assert tasks[1].state == "finished"


PARENT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from fedalign.compare.folder import ComparisonFolder
from fedalign.compare.plan import cells, make_design, parse_algorithms
from fedalign.config.toml import load_config
from tests.compare.test_schedule import run, Quiet, STAND_IN
from fedalign.compare.schedule import Task, run_all
folder = ComparisonFolder(Path({out!r}))
design = make_design(load_config(None, ["run.rounds=2"]), parse_algorithms(["fedavg"]), {{}}, (0, 1), False)
tasks = [Task(cell, folder.run(cell, "runs"), folder.log(cell, "runs")) for cell in cells(design)]
with folder.locked() as lock:
    def command(task):
        return [sys.executable, "-c", STAND_IN, str(task.folder.path), "hangs"]
    run_all(tasks, [{{}}, {{}}], Quiet(), held=[lock], command=command)
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_is_left_behind_unless_nobody_can_end_it(tmp_path: Path, kind: signal.Signals) -> None:
    script = PARENT.format(root=str(Path(__file__).parents[2]), out=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    runs = [tmp_path / "runs" / "fedavg" / f"seed-{seed}" for seed in (0, 1)]
    deadline = time.monotonic() + 60
    while not all((path / "started").exists() for path in runs):
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(kind)
    parent.wait(20)
    folder = ComparisonFolder(tmp_path)
    if kind != signal.SIGKILL:
        with folder.locked():  # the children held it open, too
            return
    with pytest.raises(UserError, match="runs that it left behind"), folder.locked():
        pass
    end_children(tmp_path)


def end_children(out: Path) -> None:
    """Those stand-ins whose command line names a run of `out`."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.startswith(f"{out}/runs/".encode()) for word in words):
            os.kill(int(entry.name), signal.SIGKILL)


def test_as_many_at_a_time_as_there_are_gpus_or_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "cores", lambda: 8)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(slots_for(load_config(None, ["run.threads=1"]), None)) == 8
    assert len(slots_for(load_config(None, ["run.threads=4"]), None)) == 2
    assert len(slots_for(load_config(None, ["run.threads=16"]), None)) == 1
    assert len(slots_for(load_config(None, ["run.threads=1", "run.workers=4"]), None)) == 2
    assert slots_for(load_config(), 3) == [{}, {}, {}]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    gpus = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert slots_for(load_config(), None) == gpus
    assert slots_for(load_config(), 3) == [*gpus, gpus[0]]
    assert slots_for(load_config(None, ["run.device=cuda:1"]), None) == [{}]
    assert len(slots_for(load_config(None, ["run.device=cpu"]), None)) == 8
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_for(load_config(), None)] == ["5", "7"]


def test_the_overview_shows_each_run_and_the_time_left(ask: Ask, tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path, ask, "fedavg,fedprox", "2")
    shown = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    overview = Overview(shown, "Comparison", tasks)
    assert overview.time_left() == "..."
    waiting, running, done, failed = tasks
    running.state, running.history = "running", [{"round": 1, "accuracy": 0.25, "loss_nats": 1.0}]
    done.state, done.history = "finished", [{"round": 2, "accuracy": 0.5, "loss_nats": 1.0}]
    failed.state, failed.reason = "failed", "it broke"
    overview._started = time.monotonic() - 50  # in which 3 rounds were made; 1 and 2 are left
    assert overview.time_left() == "0:50"
    shown.print(overview.render())
    text = shown.file.getvalue()  # type: ignore[attr-defined] # a StringIO
    rows = [line.split() for line in text.splitlines() if "fed" in line]
    assert rows == [["fedavg", "waits", "50.0", "%"], ["fedprox", "1/2", "25.0", "%", "failed"]]
    assert "2/4 runs done, time left 0:50" in text
    assert waiting.rounds_left == 2


def test_without_a_terminal_there_is_a_line_for_each_run(ask: Ask, tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path, ask)
    console = Console(file=io.StringIO(), width=40)
    with Overview(console, "Comparison", tasks) as overview:
        run(tasks, jobs=1, kinds=["works", "refuses"], watch=overview)
    first, second = console.file.getvalue().splitlines()  # type: ignore[attr-defined] # a StringIO
    assert first.startswith("1/2 fedavg, seed 0: accuracy 20.0 %, 0:0")
    assert second.startswith("fedavg, seed 1: failed: round 1: 0 of 3 clients can be used (all it said: ")
