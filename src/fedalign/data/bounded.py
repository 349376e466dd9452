"""Bounds on the time and the memory of a program that somebody else wrote, such as a chat template."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
AGAIN = 1.0  # seconds; longer than what is stopped takes to notice
_ONE = threading.Lock()  # memory is bounded for the whole process


class _OverdueError(BaseException):
    """Not an Exception: no library on the way takes it for one of its own."""


def bounded(program: Callable[[], T], seconds: float, memory: int) -> T:
    """The result of `program`, which is stopped after `seconds`, or where it asks for `memory` bytes more.

    It may run in any thread. A single operation in C is not stopped before it ends. Memory is bounded on Linux alone.

    Raises:
        TimeoutError: It took longer.
        MemoryError: It asked for more.
    """
    if not sys.platform.startswith("linux"):
        return _timed(program, seconds)
    import resource

    with _ONE:
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        limits = [used + memory, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
        try:
            return _timed(program, seconds)
        finally:  # first of all: without memory nothing else could be done
            resource.setrlimit(resource.RLIMIT_AS, before)


def _timed(program: Callable[[], T], seconds: float) -> T:
    thread, is_over, turn = threading.get_ident(), threading.Event(), threading.Lock()

    def stop() -> None:
        is_over.wait(seconds)
        while True:  # raised where an object is being finalised, it is lost: then again
            with turn:
                if is_over.is_set():
                    return
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_OverdueError))
            is_over.wait(AGAIN)

    clock = threading.Thread(target=stop, daemon=True)
    clock.start()
    try:
        try:
            return program()
        finally:  # what was raised by now arrives in here, before the outer block is left
            with turn:
                is_over.set()
    except _OverdueError:
        raise TimeoutError(f"it took more than {seconds:g} seconds") from None
