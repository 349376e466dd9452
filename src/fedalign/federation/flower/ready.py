"""A site's ClientApps, forked from one process that has imported everything: a message needs no new interpreter.

Flower's SuperExec starts a program called `flwr-clientapp` for each message. At a site that is served, the first one on
its PATH is ours (`hand_over`), which gives its arguments to the process here; its fork goes on as Flower's own program
would. Where that is not to be had, Flower's own program is started as ever.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from fedalign.federation.flower import hand_over
from fedalign.federation.flower.programs import executable

PROGRAM = "flwr-clientapp"
CLIENT_APP = "fedalign.federation.flower.client_app"  # it and the next import flwr, which who starts this need not
WAITS = "fedalign.federation.flower.waits"
TASK_SECONDS = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"  # between two looks of the SuperExec for a message that has come
LARGEST = 1 << 16  # bytes of arguments
# glibc keeps freed blocks, on each thread, unless they are larger than a bound, which grows with what is freed. So it
# kept Flower's chunks of 5 MB, a third of a ClientApp's memory. A bound that is set does not grow.
BOUND, BOUND_NBYTES = "MALLOC_MMAP_THRESHOLD_", 1 << 20


@contextlib.contextmanager
def ready(environment: Mapping[str, str]) -> Iterator[tuple[dict[str, str], int]]:
    """A process that is ready for a SuperNode's messages, as long as it or the SuperNode holds the descriptor.

    Yields the environment in which the SuperNode hands messages to it, and the descriptor, to be inherited.
    """
    alive, held = os.pipe()
    with contextlib.ExitStack() as ending:
        ending.callback(os.close, alive)
        ending.callback(os.close, held)
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="fedalign-")))  # nobody else may enter
        place, program = folder / "socket", folder / PROGRAM  # a socket's path must be short
        handed = [sys.executable, "-IS", hand_over.__file__, str(place), executable(PROGRAM, environment)]
        program.write_text(f'#!/bin/sh\nexec {shlex.join(handed)} "$@"\n', encoding="utf-8")
        program.chmod(0o700)
        environment = {TASK_SECONDS: "0.1", BOUND: str(BOUND_NBYTES), **environment}
        if sys.platform == "linux":  # elsewhere a fork of what uses the system's own libraries may crash
            command = [sys.executable, "-m", __name__, str(place)]
            process = subprocess.Popen(command, env=environment, stdin=alive, start_new_session=True)
            ending.callback(process.wait)
            ending.callback(process.kill)
        yield {**environment, "PATH": os.pathsep.join([str(folder), environment["PATH"]])}, held


def main(place: str) -> None:
    """Import what a ClientApp needs, then fork one for each task, until standard input ends."""
    (program,) = metadata.entry_points(group="console_scripts", name=PROGRAM)
    run = program.load()
    importlib.import_module(CLIENT_APP)
    importlib.import_module(WAITS).shorten()
    gc.freeze()  # a fork's collector need not touch what is there, which would copy it
    sys.argv = [PROGRAM, *_task(place)]
    run()


def _task(place: str) -> Sequence[str]:
    """The arguments of a task: this returns in a fork alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            with contextlib.suppress(OSError, ValueError), listener.accept()[0] as connection:
                arguments = _read(connection)
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
                    return arguments
                connection.sendall(hand_over.TAKEN)
    sys.exit()


def _read(connection: socket.socket) -> list[str]:
    connection.settimeout(hand_over.SECONDS / 2)
    text = b""
    while part := connection.recv(LARGEST):
        text += part
        if len(text) > LARGEST:
            raise ValueError("more than any task has")
    arguments = json.loads(text)
    if not isinstance(arguments, list) or not all(isinstance(one, str) for one in arguments):
        raise ValueError("not a task")
    return arguments


if __name__ == "__main__":
    main(*sys.argv[1:])
