"""`fedalign data`: what the model sees of a file, and what it does not."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedalign.cli.terminal import SetOption, busy, out, print_table, say
from fedalign.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fedalign.config.run import Config
    from fedalign.data.sources import Row
    from fedalign.doctor.overview import Lengths, Overview

DATA_EXAMPLES = """
[bold]Examples[/bold]

  fedalign data my.toml               the data of a configuration, as its model reads it

  fedalign data notes.jsonl           any file or folder; its kind is guessed from the columns

  fedalign data notes.csv --model allenai/OLMoE-1B-7B-0924 --set data.columns.text=note
"""
BAR = 40  # characters of the longest
MANY = 30  # classes or clients that are shown; --all shows all


def data(
    source: Annotated[str, typer.Argument(metavar="CONFIG.toml|FILE|FOLDER", help="What to look at.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="PATH_OR_HUB_ID", help="Whose tokenizer and length to use.")
    ] = None,
    set_: SetOption = None,
    every: Annotated[bool, typer.Option("--all", help="All broken rows, classes and clients.")] = False,
) -> None:
    """Show what is read of your data: files, columns, broken rows, classes, clients, lengths, and three examples.

    Exit code 1: some rows cannot be read, or are longer than the model allows.
    """
    settings, is_own = _settings(source, model, set_ or [])  # a wrong word is told before torch loads
    from fedalign.doctor.overview import overview
    from fedalign.moe.load import quiet

    quiet()
    with busy("Reading ..."):
        is_dealt = is_own or any(override.startswith("clients.") for override in set_ or [])
        found = overview(settings, is_own or model is not None, is_dealt)
    _print(found, settings, every)
    if found.broken or found.unfit or (found.lengths and found.lengths.too_long):
        raise typer.Exit(1)


def _settings(source: str, model: str | None, overrides: list[str]) -> tuple[Config, bool]:
    """The configuration to read with, and whether it is the user's own."""
    from fedalign.config.toml import as_texts, load_config

    more = [*as_texts({"model.path": model} if model else {}), *overrides]
    if source == "demo" or Path(source).suffix == ".toml":
        return load_config(source, more), True
    named = [*as_texts({"data.train": source}), *more]
    settings = load_config(None, named)
    if any(override.startswith("data.kind") for override in overrides):
        return settings, False
    from fedalign.data.sources import read_rows

    rows = list(read_rows(source, settings.data, "train", []))  # what cannot be read is told later
    from fedalign.doctor.data import guess_kind
    from fedalign.doctor.recognise import Recognised, recognise

    known: Recognised | None
    if not any(override.startswith(("data.columns", "data.template")) for override in overrides):
        try:
            known = recognise(source, rows)
        except UserError:  # some files have no spelling that is known: as the others are, or as the first rows could be
            fitting = _recognised(rows)
            known = recognise(source, fitting) if fitting else None
        if known is not None:
            say(f"recognised by its columns: {known.told}")
            return load_config({"data": known.tables}, named), False
    return load_config(None, [*named, f"data.kind={guess_kind(settings.data)}"]), False


def _recognised(rows: Sequence[Row]) -> list[Row]:
    """The rows of files whose columns are a spelling that is known."""
    from fedalign.doctor.recognise import recognise

    by_file: dict[str, list[Row]] = {}
    for row in rows:
        by_file.setdefault(row.source, []).append(row)
    found: list[Row] = []
    for file, those in by_file.items():
        with contextlib.suppress(UserError):
            recognise(file, those)
            found += those
    return found


def _print(found: Overview, settings: Config, every: bool) -> None:
    most = len(found.classes) + len(found.clients) if every else MANY
    files = ", ".join(f"{name} ({rows:,})" for name, rows in list(found.files.items())[:MANY])
    more = f" and {len(found.files) - MANY} more" if len(found.files) > MANY else ""
    rows = [
        ("files, rows", files + more),
        ("read as", f"{found.kind}: {found.examples:,} examples"),
        *([("taken", f"{found.taken:,} of them (data.max_train)")] if found.taken < found.examples else []),
        *([("nothing to learn", f"{len(found.empty):,} examples, left out")] if found.empty else []),
    ]
    print_table(found.source, rows)
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("column", "filled", ""):
        table.add_column(head, justify="right" if head == "filled" else "left")
    for name, column in found.columns.items():
        used = "read" if column.is_read else "not used" if column.filled else "empty"
        table.add_row(Text(name), f"{column.filled:,}", Text(used, style="bold yellow" if used == "not used" else ""))
    out.print(table)
    if found.unread:
        say(
            f"Warning: nothing uses {', '.join(found.unread)}. To use a column, write it into data.template as "
            "{column}, or name it under [data.columns]."
        )
    _print_problems("cannot be read", found.broken, every)
    if found.unfit:
        for line in found.unfit:
            say(line)
    if found.unfit and len(found.files) > 1:
        say(
            'Say what stands in a file under [data.files."NAME"] (kind, columns), or rename its columns: `fedalign '
            "init` writes that for spellings it knows, and `fedalign formats` lists them."
        )
    if found.lengths:
        _print_problems(f"longer than {found.lengths.limit:,} tokens", found.lengths.too_long, every)
        _print_lengths(found.lengths, settings)
    _print_counts("classes", found.classes, most)
    _print_counts("clients", found.clients, most)
    if found.undealt:
        say(f"clients: {found.undealt}")
    if found.examples and not found.shown:
        say("No example is shown: the model's own chat template writes them. Name a model: --model PATH_OR_HUB_ID")
    for number, pieces in enumerate(found.shown, 1):
        text = Text()
        for piece, is_answer in pieces:
            text.append(piece, style="bold green" if is_answer else "")
        out.print(Panel(text, title=f"example {number}; what is learnt in green", border_style="dim"))


def _print_problems(what: str, told: tuple[str, ...], every: bool) -> None:
    if told:
        say(f"{len(told):,} {'row' if len(told) == 1 else 'rows'} {what}:")
        for line in told if every else told[:MANY]:
            say(f"  {line}")
        if len(told) > MANY and not every:
            say(f"  and {len(told) - MANY:,} more: --all shows them")


def _print_lengths(lengths: Lengths, settings: Config) -> None:
    bars = lengths.histogram()
    highest = max(count for _, _, count in bars)
    limit = f"{lengths.limit:,} at most" if lengths.limit else "no limit"
    rows = [(f"{low:,} to {high:,}", f"{'█' * round(BAR * count / highest)} {count:,}") for low, high, count in bars]
    print_table(f"tokens of an example, {limit} ({settings.model.path})", rows)


def _print_counts(what: str, table: Mapping[str, int], most: int) -> None:
    if not table:
        return
    highest = max(table.values())
    ordered = sorted(table.items(), key=lambda pair: -pair[1])[:most]
    rows = [(name, f"{'█' * round(BAR * count / highest)} {count:,}") for name, count in ordered]
    more = f", the largest {most}" if len(table) > most else ""
    print_table(f"{len(table):,} {what}{more}", rows)
