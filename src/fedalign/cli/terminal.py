"""How the command line speaks: plain lines and tables of names and values."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedalign.units import size


def console(**how: Any) -> Console:
    """A console that shows text as it is: a name in [brackets] stays, and the :AB: of a fingerprint is no emoji."""
    return Console(highlight=False, markup=False, emoji=False, **how)


out = console()
err = console(stderr=True)
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the configuration; may be repeated."),
]
InsecureAnywhere = Annotated[
    bool,
    typer.Option(
        "--insecure-anywhere",
        help="Reach a SuperLink on another machine without TLS. Whoever is on the way can then read and change "
        "weights, statistics and the code that sites run.",
    ),
]


def at_home(path: Path | None) -> Path | None:
    """A path with ~ as the home of the user, which a shell leaves as it is in --out=~/x."""
    return None if path is None else path.expanduser()


def on_disk(folder: Path) -> str:
    """Bytes of all files in a folder, for people."""
    return size(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A titled table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE_HEAD)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    out.print(table)


def say(text: str, console: Console = out) -> None:
    """Text as it is, so that what is copied from it has no line breaks of ours."""
    console.print(text, soft_wrap=True)


def busy(text: str, console: Console = out) -> AbstractContextManager[object]:
    """Say so while it takes, where lines can be taken back: a notebook would want ipywidgets for it."""
    return console.status(text) if console.is_terminal else nullcontext()
