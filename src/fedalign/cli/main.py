"""The command line, put together. A user's mistake is one message, exit code 2; a fault of ours another, 3."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, NoReturn

import typer

from fedalign import __version__
from fedalign.cli.catalog import (
    ALGORITHMS_EXAMPLES,
    CONFIG_EXAMPLES,
    FAMILIES_EXAMPLES,
    FORMATS_EXAMPLES,
    algorithms,
    config,
    families,
    formats,
)
from fedalign.cli.compare import COMPARE_EXAMPLES, compare
from fedalign.cli.data import DATA_EXAMPLES, data
from fedalign.cli.doctor import DOCTOR_EXAMPLES, doctor
from fedalign.cli.export import EXPORT_EXAMPLES, export
from fedalign.cli.inference import CHAT_EXAMPLES, EVALUATE_EXAMPLES, GENERATE_EXAMPLES, chat, evaluate, generate
from fedalign.cli.init import INIT_EXAMPLES, init
from fedalign.cli.inspect import INSPECT_EXAMPLES, inspect
from fedalign.cli.new import new_app
from fedalign.cli.report import REPORT_EXAMPLES, report
from fedalign.cli.run import RUN_EXAMPLES, run
from fedalign.cli.site import SITES_EXAMPLES, site_app, sites
from fedalign.cli.terminal import err, out
from fedalign.cli.upcycle import UPCYCLE_EXAMPLES, upcycle
from fedalign.errors import Stopped, UserError
from fedalign.files import trouble

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated fine-tuning of Mixture-of-Experts language models: align routing, average experts that agree.",
)
app.add_typer(site_app, name="site")
app.add_typer(new_app, name="new")


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and context.invoked_subcommand != "run":
        raise UserError(f"fedalign {context.invoked_subcommand}: torchrun is for `fedalign run` alone. Leave it out.")


COMMANDS: tuple[tuple[Callable[..., None], str], ...] = (
    (run, RUN_EXAMPLES),
    (init, INIT_EXAMPLES),
    (data, DATA_EXAMPLES),
    (inspect, INSPECT_EXAMPLES),
    (compare, COMPARE_EXAMPLES),
    (doctor, DOCTOR_EXAMPLES),
    (sites, SITES_EXAMPLES),
    (export, EXPORT_EXAMPLES),
    (report, REPORT_EXAMPLES),
    (upcycle, UPCYCLE_EXAMPLES),
    (chat, CHAT_EXAMPLES),
    (generate, GENERATE_EXAMPLES),
    (evaluate, EVALUATE_EXAMPLES),
    (config, CONFIG_EXAMPLES),
    (algorithms, ALGORITHMS_EXAMPLES),
    (formats, FORMATS_EXAMPLES),
    (families, FAMILIES_EXAMPLES),
)
for command, examples in COMMANDS:
    app.command(epilog=examples)(command)


def main() -> None:
    """Entry point of the `fedalign` command."""
    # where it is installed, peft loads it, and a CPU with bfloat16 is told to install what only helps without CUDA
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        with _stoppable(), _threads_in_a_line():
            app()
    except UserError as error:
        _refuse(str(error))
    except Stopped as stop:
        err.print(f"Ended by {stop}. What was complete is kept; give the command again.")
        sys.exit(stop.code)
    except Exception as error:
        told = trouble(error) if isinstance(error, OSError) else None
        if told is None:
            _give_up(error)
        _refuse(f"{told}. What was complete is kept; make room or give another folder, then give the command again.")


def _give_up(error: Exception) -> NoReturn:
    """The last resort: a fault of ours, or of a library."""
    from fedalign.cli.failure import without_secrets, written

    places = "".join(f"{note}: " for note in getattr(error, "__notes__", ()) if "\n" not in note)
    told = " ".join(without_secrets(f"{places}{type(error).__name__}: {error}").split())[:200]
    err.print("Error:", style="bold red", end=" ")
    err.print(f"{told} The full report: {written(error)}", soft_wrap=True)
    sys.exit(3)


def _refuse(message: str) -> NoReturn:
    err.print("Error:", style="bold red", end=" ")
    err.print(message, soft_wrap=True)
    sys.exit(2)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Signals that would end this process at once raise `Stopped`, so that what is held is let go."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    kinds = [kind for kind in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(kind) == signal.SIG_DFL]
    for kind in kinds:
        signal.signal(kind, stop)
    try:
        yield
    finally:
        for kind in kinds:
            signal.signal(kind, signal.SIG_DFL)


@contextmanager
def _threads_in_a_line() -> Iterator[None]:
    """Errors of the disk in a library's thread, such as TensorBoard's writer, are one line without a traceback."""

    def tell(about: threading.ExceptHookArgs) -> None:
        told = about.exc_value and trouble(about.exc_value)
        if told is None:
            before(about)
        else:
            err.print(f"{about.thread.name if about.thread else 'a thread'}: {told}", soft_wrap=True)

    before, threading.excepthook = threading.excepthook, tell
    try:
        yield
    finally:
        threading.excepthook = before
