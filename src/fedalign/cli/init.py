"""`fedalign init`: a configuration to start from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fedalign.cli.terminal import busy, say
from fedalign.errors import UserError

INIT_EXAMPLES = """
[bold]Examples[/bold]

  fedalign init notes.jsonl                                     notes.toml, on the demo's small model

  fedalign init sites/ --model allenai/OLMoE-1B-7B-0924         a file a client; tuning chosen for this machine's memory

  fedalign init notes.csv --to my.toml
"""


def init(
    source: Annotated[str, typer.Argument(metavar="FILE|FOLDER", help="Your data.")],
    model: Annotated[str | None, typer.Option("--model", metavar="PATH_OR_HUB_ID", help="What to tune.")] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE.toml", help="Where to write; without it: the data's name.")
    ] = None,
) -> None:
    """Write a configuration that fits your data, the model and this machine, each choice with its reason."""
    from fedalign.config.run import DataConfig
    from fedalign.data.sources import read_rows
    from fedalign.files import write_text

    place = to or Path(f"{Path(source).expanduser().resolve().stem}.toml")
    if place.exists():
        raise UserError(f"--to {str(place)!r}: is there already, and nothing is overwritten. Give another name.")
    next(read_rows(source, DataConfig(), "train"), None)  # a wrong word is told before torch loads
    from fedalign.doctor.start import start
    from fedalign.moe.load import quiet

    quiet()
    with busy("Reading ..."):
        made = start(source, model)
    write_text(place, made.to_toml())
    for section, reason in made.reasons.items():
        say(f"{section:<9} {reason}")
    quoted = shlex.quote(str(place))
    say(f"\nWritten to {place}. Look: fedalign data {quoted}\nThen:  fedalign run {quoted} --dry-run")
