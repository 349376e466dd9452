"""Work side by side: processes that hold all that this one holds, and share its memory until they write to it.

Each call forks its processes, and ends them. So they inherit model, data and broadcast, and nothing is sent to them;
what they answer comes back through pipes. They have one thread each: threads of OpenMP do not survive a fork, which is
why PyTorch's own DataLoader works so, too. Ctrl-C and its like reach this process alone, which ends the others; if it
is killed itself they end at once.
"""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, Self, TypeVar

import torch

from fedalign.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
ASIDE = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)  # a terminal or a service manager sends them to all at once


class Workers:
    """At most so many processes beside this one; with 1, work is done here. A context that none of them outlives.

    Args:
        count: of the processes.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._running: dict[Connection, ForkProcess] = {}  # by the pipe that it answers through

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def map(self, work: Callable[[T], R], items: Sequence[T], size: Callable[[T], int]) -> Iterator[R]:
        """The results of `work` in the order of `items`; it begins at once, and with what is largest.

        What `work` changes in memory is lost, unless there is one worker or one item.

        Raises:
            UserError: A process was ended by somebody else.
            Exception: Whatever `work` raises, as soon as it does.
        """
        self.end()
        if min(self.count, len(items)) < 2:
            return map(work, items)
        order = sorted(range(len(items)), key=lambda index: -size(items[index]))
        begun = multiprocessing.get_context("fork").Value("q", 0)

        def claimed() -> Iterator[int]:
            while True:
                with begun.get_lock():
                    turn, begun.value = begun.value, begun.value + 1
                if turn >= len(order):
                    return
                yield order[turn]

        with _later():
            for _ in range(min(self.count, len(items))):
                self._start(lambda: ((index, work(items[index])) for index in claimed()))
        return self._in_order(len(items))

    def end(self) -> None:
        """End all processes that are left."""
        while self._running:
            pipe, process = self._running.popitem()
            process.kill()
            process.join()
            pipe.close()

    def _start(self, answers: Callable[[], Iterator[tuple[int, Any]]]) -> None:
        fork = multiprocessing.get_context("fork")
        here, there = fork.Pipe(duplex=False)
        process = fork.Process(target=_answer, args=(there, answers), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
            process.start()
        self._running[here] = process
        there.close()  # so that its end is heard here

    def _in_order(self, count: int) -> Iterator[Any]:
        arrived: dict[int, Any] = {}
        try:
            for index in range(count):
                while index not in arrived:
                    for pipe in wait(list(self._running)):
                        assert isinstance(pipe, Connection)
                        self._hear(pipe, arrived)
                yield arrived.pop(index)
        finally:
            self.end()

    def _hear(self, pipe: Connection, arrived: dict[int, Any]) -> None:
        """Take one message: an index and its result, a line of a log, or an error; or the end."""
        try:
            message = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            process = self._running.pop(pipe)
            pipe.close()
            process.join()
            if process.exitcode or not self._running:
                raise UserError(f"run.workers = {self.count}: {_how(process.exitcode)}") from None
            return
        if isinstance(message, logging.LogRecord):
            logging.getLogger(message.name).handle(message)
        elif isinstance(message, Exception):
            raise message
        else:
            index, result = message
            arrived[index] = result


def check_workers(count: int, device: str) -> None:
    """Refuse several workers where they cannot be forked.

    Args:
        count: of workers.
        device: where clients train, as `pick_device` says.

    Raises:
        UserError: On a GPU, or not on Linux.
    """
    if count == 1:
        return
    if device != "cpu":
        raise UserError(
            f"run.workers = {count}: side by side clients train on the CPU, and run.device is {device!r} here. Choose "
            'run.workers = 1, or run.device = "cpu".'
        )
    if sys.platform != "linux":
        raise UserError(f"run.workers = {count}: works on Linux alone. Choose 1.")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _how(code: int | None) -> str:
    """A line on the end of a process."""
    ended = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
    memory = " If memory ran out, choose fewer." if code == -signal.SIGKILL else ""
    return f"a worker {ended}.{memory} The last complete round is kept."


@contextmanager
def _later() -> Iterator[None]:
    """Signals in the meantime are handled afterwards: what a handler raises in a fork's own callbacks would be lost."""
    if threading.current_thread() is not threading.main_thread():  # no handler ever runs in another
        yield
        return
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: noted.append(number)) for number in ASIDE}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for late in noted:
            signal.raise_signal(late)


def _answer(there: Connection, answers: Callable[[], Iterator[tuple[int, Any]]]) -> None:
    """A worker's whole life: work, and send, which waits for nobody."""
    for number in ASIDE:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(max_workers=1) as sender:
        logging.getLogger().handlers = [_Forwarding(lambda record: sender.submit(there.send_bytes, record))]
        logging.captureWarnings(True)
        try:
            for answer in answers():
                sender.submit(there.send_bytes, pickle.dumps(answer))
        except Exception as error:
            sender.submit(there.send_bytes, _pickled(error))


def _end_with(sentinel: int) -> None:
    """Wait for the end of the process that began this one, and end."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _pickled(error: Exception) -> bytes:
    """An error, with a note of where it was raised; one that does not survive the way as a RuntimeError."""
    told = RuntimeError(f"{type(error).__name__}: {error}")
    for note in getattr(error, "__notes__", ()):
        told.add_note(note)
    for one in (error, told):
        one.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class makes fail
        return pickle.dumps(told)
    return pickle.dumps(error)


class _Forwarding(logging.handlers.QueueHandler):
    """Log lines go where those of the first process go: it alone writes to the terminal."""

    def __init__(self, send: Callable[[bytes], object]) -> None:
        super().__init__(queue=None)  # type: ignore[arg-type] # there is a pipe in its place
        self.send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send one."""
        self.send(pickle.dumps(record))
