"""`fedalign config`, `algorithms`, `formats`, `families`: every choice there is, and its meaning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from fedalign.cli.terminal import SetOption, out, say
from fedalign.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fedalign.config.run import Config

CONFIG_EXAMPLES = """
[bold]Examples[/bold]

  fedalign config --all               every key, its default and its meaning

  fedalign config my.toml             keys of that file that differ from their defaults

  fedalign config --all > my.toml     a file to start from
"""
ALGORITHMS_EXAMPLES = """
[bold]Examples[/bold]

  fedalign algorithms                 all of them, those of installed packages too

  fedalign algorithms fedalign_moe    its options, defaults and choices
"""
FORMATS_EXAMPLES = "[bold]Example[/bold]\n\n  fedalign formats"
FAMILIES_EXAMPLES = "[bold]Example[/bold]\n\n  fedalign families"


def config(
    source: Annotated[Path | None, typer.Argument(metavar="CONFIG", help='TOML file, or "demo".')] = None,
    set_: SetOption = None,
    every: Annotated[bool, typer.Option("--all", help="Every key, also those at their defaults.")] = False,
) -> None:
    """Print a configuration as TOML, each key with its meaning."""
    from fedalign.config.toml import HEAD, explained, load_config

    given = load_config(source, set_ or ())
    say(HEAD + explained(given) if every or source is None else _differing(given) or "# every key is at its default")


def _differing(given: Config) -> str:
    """TOML of the keys whose values are not the defaults."""
    import tomli_w

    from fedalign.config.run import Config

    default = Config().model_dump(mode="json")
    tables = {
        section: {
            name: value for name, value in keys.items() if value is not None and default[section].get(name) != value
        }
        for section, keys in given.model_dump(mode="json", exclude={"algorithm"}).items()
    }
    if given.algorithm != Config().algorithm:
        tables["algorithm"] = {"name": given.algorithm.name, **given.algorithm.chosen}
    return tomli_w.dumps({section: keys for section, keys in tables.items() if keys})


def algorithms(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One of them, with its options.")] = None,
) -> None:
    """List the algorithms that algorithm.name takes, or the options of one."""
    from fedalign.algorithms import choices, described, every_name, make, summary

    if name is not None:
        algorithm = make(name, {})
        say(f"{name}: {summary(name)}")
        rows = [(key, str(value), " | ".join(choices(hint)), means) for key, value, hint, means in described(algorithm)]
        print_columns(("option", "default", "choices", "meaning"), rows)
        return
    rows = [
        (
            each,
            summary(each),
            ", ".join(sorted(make(each, {}).asks)) or "nothing more",
            str(len(described(make(each, {})))),
        )
        for each in every_name()
    ]
    print_columns(("algorithm", "summary", "asks clients for", "options"), rows)
    say("Options of one: fedalign algorithms NAME. In a configuration they stand in [algorithm], below its name.")


def formats() -> None:
    """List the kinds of data that data.kind takes, with the columns that each reads."""
    from fedalign.config.run import SPELLINGS, DataConfig
    from fedalign.data.formats import FORMATS, every_kind

    rows = []
    for name in [*every_kind(), *SPELLINGS]:
        try:
            data = DataConfig.model_validate({"kind": name})
            form = FORMATS[data.kind]
        except UserError as error:  # a package that is broken is no reason to hide the others
            rows.append((name, str(error), "", ""))
            continue
        told = form.told if name == data.kind else f"{form.told}, spelt another way"
        columns = "any" if form.reads_all else ", ".join(sorted(form.columns(data, data.template)))
        prompt = "the model's chat template" if form.prompt is None else data.template or form.prompt
        rows.append((name, told, columns, prompt.replace("\n", "\\n")))
    print_columns(("data.kind", "rows", "columns", "default prompt"), rows)


def families() -> None:
    """List the model families known by name; all others are found by search."""
    from fedalign.moe.families import REFUSED, every_family, family_row

    rows = []
    for name in every_family():
        try:
            row = family_row(name)
        except UserError as error:
            rows.append((name, str(error), "", ""))
            continue
        assert row is not None
        rows.append((name, row.router, row.experts or "the router's block", row.scoring))
    print_columns(("family", "router", "experts", "scoring"), rows)
    print_columns(("refused family", "reason"), REFUSED.items())
    say("Other families are searched for routers and experts: fedalign inspect MODEL tells what is found.")


def print_columns(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table with a head; names, in the first column, stay whole."""
    table = Table(box=box.SIMPLE_HEAD)
    for number, head in enumerate(heads):
        table.add_column(head, overflow="fold", no_wrap=not number)
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)
