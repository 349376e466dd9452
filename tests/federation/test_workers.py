"""Clients side by side: the bytes of one after another, and no process that outlives its work."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from fedalign.cli.main import main
from fedalign.client.memory import ClientData
from fedalign.client.trainer import Trainer
from fedalign.config.toml import load_config
from fedalign.errors import TrainingFailedError, UserError, within
from fedalign.federation.in_process import prepare
from fedalign.federation.workers import Workers, check_workers
from fedalign.files import rounds_in
from fedalign.protocol import Broadcast, Statistics
from fedalign.server.results import RunFolder
from fedalign.server.run import execute
from tests.server.test_run import Silent, metrics, model_bytes, resume

PATIENCE = 60.0  # seconds, of a busy machine


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def run(out: Path, settings: list[str], *more: str, watch: Silent | None = None) -> None:
    every = ("run.device=cpu", "run.rounds=2", "training.epochs=1", "run.threads=1", "evaluation.batch_tokens=300")
    config = load_config(None, [*settings, *every, *more])
    folder = RunFolder(out)
    prepared = prepare(config, folder.clients)
    folder.begin(config)
    with prepared.workers:
        execute(prepared, folder, watch or Silent())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    out = tmp_path_factory.mktemp("runs") / "alone"
    run(out, settings)
    return out


def same(one: Path, other: Path) -> bool:
    return metrics(one) == metrics(other) and all(
        model_bytes(one / kind) == model_bytes(other / kind) for kind in ("model", "best")
    )


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_no_byte(alone: Path, settings: list[str], tmp_path: Path, workers: int) -> None:
    run(tmp_path / "run", settings, f"run.workers={workers}")
    assert same(tmp_path / "run", alone)


@pytest.mark.parametrize(
    "choice",
    [
        ("tuning.kind=lora", "algorithm.gate=local", "wire.dtype=int8"),
        ("algorithm.name=scaffold", "training.optimizer=sgd"),
        ("algorithm.name=pfl_moe", "training.keep_optimizer=true"),
    ],
)
def test_what_clients_keep_is_the_same(settings: list[str], tmp_path: Path, choice: tuple[str, ...]) -> None:
    run(tmp_path / "one", settings, *choice)
    run(tmp_path / "two", settings, *choice, "run.workers=2")
    assert same(tmp_path / "two", tmp_path / "one")
    kept = [model_bytes(path / "clients") for path in (tmp_path / "one", tmp_path / "two")]
    assert kept[0] == kept[1]


def test_a_client_that_fails_is_told_in_its_place(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Trainer.train

    def fail(self: Trainer, client: ClientData, broadcast: Broadcast) -> Statistics:
        if client.name != "client-02":
            raise TrainingFailedError(f"{client.name} fails")
        return train(self, client, broadcast)

    monkeypatch.setattr(Trainer, "train", fail)
    for workers in (1, 2):
        run(tmp_path / str(workers), settings, f"run.workers={workers}")
    assert [failure["client"] for failure in metrics(tmp_path / "2")[1]["failures"]] == ["client-00", "client-01"]
    assert same(tmp_path / "2", tmp_path / "1")


def test_an_error_of_a_client_is_the_runs(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Trainer, client: ClientData, broadcast: Broadcast) -> Statistics:
        raise UserError(f"{client.name}: damaged")

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(UserError) as told:
        run(tmp_path / "run", settings, "run.workers=2")
    assert str(told.value) in [f"client-0{number}: damaged" for number in range(3)]


def test_a_worker_that_is_killed_ends_the_run_which_resumes_to_the_same_bytes(
    alone: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Trainer.train

    def die(self: Trainer, client: ClientData, broadcast: Broadcast) -> Statistics:
        if (broadcast.round, client.name) == (2, "client-01"):
            os.kill(os.getpid(), signal.SIGKILL)
        return train(self, client, broadcast)

    monkeypatch.setattr(Trainer, "train", die)
    with pytest.raises(UserError, match=r"run.workers = 2: .* ended by SIGKILL. If memory ran out, choose fewer"):
        run(tmp_path / "run", settings, "run.workers=2")
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert same(tmp_path / "run", alone)


# ------------------------------------------------------------------------------------------------ whole commands


def command(log: Path, arguments: list[str]) -> None:
    """`fedalign ARGUMENTS` in a fork of the tests, as a terminal starts it: nothing is imported again."""
    os.setpgid(0, 0)
    to = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(to, 1)
    os.dup2(to, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["fedalign", *arguments]
    main()


def kill_one_worker(process: psutil.Process, workers: list[psutil.Process]) -> None:
    workers[0].kill()


def interrupt_all(process: psutil.Process, workers: list[psutil.Process]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def stop_all(process: psutil.Process, workers: list[psutil.Process]) -> None:
    os.killpg(process.pid, signal.SIGTERM)


def kill_the_first(process: psutil.Process, workers: list[psutil.Process]) -> None:
    process.kill()


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (interrupt_all, 130, "Interrupted. Complete rounds are kept; go on with"),
        (stop_all, 143, "Ended by SIGTERM. Complete rounds are kept; go on with"),
        (kill_one_worker, 2, "Error: run.workers = 2: a worker was ended by SIGKILL."),
        (kill_the_first, -9, ""),
    ],
)
def test_nothing_runs_on(
    settings: list[str],
    tmp_path: Path,
    end: Callable[[psutil.Process, list[psutil.Process]], None],
    code: int,
    said: str,
) -> None:
    out = tmp_path / "run"
    arguments = ["run", os.devnull, "--out", str(out)]
    for setting in (*settings, "run.device=cpu", "run.workers=2", "run.threads=1", "run.rounds=40"):
        arguments += ["--set", setting]
    started = multiprocessing.get_context("fork").Process(target=command, args=(tmp_path / "log", arguments))
    started.start()
    assert started.pid is not None
    first = psutil.Process(started.pid)
    try:
        until((out / "checkpoint" / "round-00001").exists)
        until(first.children)
        workers = first.children()
        end(first, workers)
        started.join(PATIENCE)
        assert started.exitcode == code
        until(lambda: not any(worker.is_running() for worker in workers))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    log = (tmp_path / "log").read_text()
    assert said in " ".join(log.split())
    assert "Traceback" not in log
    with RunFolder(out).worked():  # the lock is free
        assert max(number for number, _ in rounds_in(out / "checkpoint")) >= 1


# ------------------------------------------------------------------------------------------------ one call


def test_results_come_in_order_and_the_largest_begins(tmp_path: Path) -> None:
    here = os.getpid()

    def note(item: int) -> int:
        with (tmp_path / "begun").open("a") as file:
            file.write(f"{item}\n")
        assert os.getpid() != here
        return -item

    with Workers(2) as workers:
        found = list(workers.map(note, [1, 9, 3, 5], lambda item: item))
    begun = (tmp_path / "begun").read_text().split()
    assert sorted(begun) == ["1", "3", "5", "9"]
    assert begun[0] in "95"  # either may be a little faster
    assert begun[-1] in "13"
    assert found == [-1, -9, -3, -5]
    assert list(Workers(2).map(lambda item: os.getpid(), [1], lambda item: 1)) == [os.getpid()]
    assert list(Workers(2).map(lambda item: item, [], lambda item: 1)) == []


def test_each_has_one_thread_and_its_lines_are_told_here(caplog: pytest.LogCaptureFixture) -> None:
    def work(item: int) -> int:
        logging.getLogger("fedalign.some").warning("client %d", item)
        return torch.get_num_threads()

    assert list(Workers(2).map(work, range(3), lambda item: 1)) == [1, 1, 1]
    assert sorted(record.getMessage() for record in caplog.records) == ["client 0", "client 1", "client 2"]


class OddError(Exception):
    """An error that cannot be unpickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__("odd")


def test_errors_come_over_with_where_they_were_raised() -> None:
    def work(item: int) -> int:
        with within("`begin` of mine"):
            raise (OSError(28, "No space left on device") if item else OddError(1, 2))

    with pytest.raises(RuntimeError, match="OddError: odd") as told:
        list(Workers(2).map(work, [0, 0], lambda item: 1))
    assert told.value.__notes__[0] == "`begin` of mine"
    assert "in work" in told.value.__notes__[1]
    with pytest.raises(OSError, match="No space left") as full:
        list(Workers(2).map(work, [1, 1], lambda item: 1))
    assert full.value.errno == 28
    assert full.value.__notes__[0] == "`begin` of mine"


def test_who_leaves_early_leaves_nobody_behind() -> None:
    with Workers(2) as workers:
        results = workers.map(time.sleep, [0, 1000, 1000], lambda item: 1)
        assert next(results) is None
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (["run.threads=4"], "run.threads = 4: with run.workers = 2 each worker has one thread. Leave it out, or"),
        (["federation.engine=simulation"], "federation.workers does that. Choose 1"),
        (["federation.engine=flower"], "sites have their own machines. Choose 1"),
    ],
)
def test_what_does_not_go_together(choice: list[str], said: str) -> None:
    with pytest.raises(UserError) as told:
        load_config(None, ["run.workers=2", *choice])
    assert said in str(told.value)


def test_workers_are_for_cpus_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"run.workers = 2: .* run.device is 'cuda' here. Choose run.workers = 1, or"):
        check_workers(2, "cuda")
    check_workers(1, "cuda")
    check_workers(2, "cpu")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="works on Linux alone"):
        check_workers(2, "cpu")
