"""The command line of sites: `fedalign site init`, `site serve` and `fedalign doctor`."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from fedalign.cli.terminal import InsecureAnywhere, out, print_table, say
from fedalign.errors import UserError

if TYPE_CHECKING:
    from fedalign.client.log import Entry
    from fedalign.config.site import SiteFolder


site_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A site: one organisation that keeps its data and takes part in runs.",
)
INIT_EXAMPLES = """
[bold]Examples[/bold]

  fedalign site init hospital-a --data /srv/notes.jsonl

  fedalign site init hospital-a --data notes/ --column text=note --column label=code --model /srv/OLMoE

  fedalign site init hospital-a --data notes.csv --superlink fl.example.org:8000 --root-certificates ca.crt
"""
SERVE_EXAMPLES = """
[bold]Examples[/bold]

  fedalign site serve hospital-a                    Ctrl-C or SIGTERM ends it

  fedalign site serve hospital-a --trainer-only     beside a flower-supernode of your own
"""
LOG_EXAMPLES = """
[bold]Examples[/bold]

  fedalign site log hospital-a

  fedalign site log hospital-a --json               a line of JSON for each answer, for other programs
"""
WITHDRAW_EXAMPLES = """
[bold]Examples[/bold]

  fedalign site withdraw hospital-a --run 5f0c2a91d3e7b846          KEY stands in `fedalign site log`
"""
Site = Annotated[Path, typer.Argument(metavar="[DIR]", help="The site's folder, or its site.toml.", show_default=".")]


@site_app.command(epilog=INIT_EXAMPLES)
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the coordinator calls this site.")],
    data: Annotated[
        Path,
        typer.Option("--data", metavar="FILE", help="A .jsonl, .json, .csv or .parquet file, or a folder of them."),
    ],
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="The folder to make; without it: NAME.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="PATH", help="This site's own copy of the model.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ... or split")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="ROLE=NAME", help="What a column is called here; may be repeated."),
    ] = None,
    superlink: Annotated[
        str | None, typer.Option("--superlink", metavar="HOST:PORT", help="Where the coordinator is reached.")
    ] = None,
    root_certificates: Annotated[
        Path | None, typer.Option("--root-certificates", metavar="FILE", help="The coordinator's ca.crt.")
    ] = None,
) -> None:
    """Make a site: a folder with site.toml and a pair of keys. Nothing is overwritten."""
    from fedalign.federation.flower.new_site import Wishes, init_site, parse_columns
    from fedalign.files import folder_name

    wishes = Wishes(data, model, device, parse_columns(column or []), superlink, root_certificates)
    _print_site(init_site(name, folder.expanduser() if folder else Path(folder_name(name)), wishes))


def _print_site(site: SiteFolder) -> None:
    from fedalign.federation.flower.new_site import readable_columns
    from fedalign.federation.flower.programs import QUIET

    link = site.config.coordinator
    public = site.path / f"{link.key}.pub"
    name, folder = shlex.quote(site.config.name), shlex.quote(str(site.path))
    print_table(
        f"site {site.config.name}",
        [
            ("folder", str(site.path)),
            ("site.toml", "what this site decides itself; every key is explained there"),
            (link.key, "the private key: it stays here"),
            (public.name, "its public half: for the coordinator"),
            ("data", "its first rows can be read"),
            ("columns", f"a coordinator can have these read, no others: {', '.join(readable_columns(site.config))}"),
        ],
    )
    say(f"What tells this site's words, [consent] in site.toml: {site.config.consent.told}.\n")
    say("Send the coordinator this name and this public key, nothing else:\n")
    say(f"  {site.config.name}")
    say(f"  {public.read_text(encoding='utf-8').strip()}\n")
    say("who registers the two together:\n")
    say(f"  flwr supernode register {public.name} --name {name}\n")
    in_the_clear = not link.root_certificates and not link.superlink.startswith(("127.", "localhost:"))
    if in_the_clear:
        say("Get ca.crt from the coordinator, and name it in site.toml: coordinator.root_certificates.\n")
    say("Then look whether all is well, with the coordinator's configuration if you have it:\n")
    say(f"  fedalign doctor --site {folder}\n")
    say("and go on duty:\n")
    say(f"  fedalign site serve {folder}\n")
    if not in_the_clear:
        say("or with Flower's own program alone:\n")
        say(f"  export {' '.join(f'{key}={value}' for key, value in QUIET.items())}")
        say(f"  {shlex.join(site.supernode_command())}")


@site_app.command(epilog=SERVE_EXAMPLES)
def serve(
    site: Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder, or its site.toml.")],
    trainer_only: Annotated[
        bool, typer.Option("--trainer-only", help="Leave Flower's SuperNode to whoever starts it.")
    ] = False,
    insecure_anywhere: InsecureAnywhere = False,
) -> None:
    """Go on duty: Flower's SuperNode, and a trainer that keeps the model loaded between messages."""
    from fedalign.config.site import SiteFolder
    from fedalign.federation.flower.serve import serve_site

    serve_site(SiteFolder.load(site), supernode=not trainer_only, insecure_anywhere=insecure_anywhere, tell=say)


@site_app.command(epilog=LOG_EXAMPLES)
def log(
    site: Site = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="The lines as they stand in log.jsonl.")] = False,
) -> None:
    """Show every answer that has left the site: when, for which run, what, and how large."""
    from fedalign.client.log import SiteLog
    from fedalign.config.site import SiteFolder

    lines = SiteLog(SiteFolder.load(site).path)
    try:
        entries = list(lines.entries())
    except ValueError as error:
        raise UserError(f"{lines.file}: line {error}: not a line of a site's log. Mend or move the file.") from None
    if as_json:
        for entry in entries:
            print(json.dumps(asdict(entry)))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for name in LOG_COLUMNS:
        table.add_column(name, justify="right" if name in ("round", "size", "examples") else "left", overflow="fold")
    for entry in entries:
        table.add_row(*map(Text, _log_row(entry)))
    out.print(table)


LOG_COLUMNS = ("when", "run", "round", "asked for", "what left", "size", "examples")


def _log_row(entry: Entry) -> tuple[str, ...]:
    from fedalign.units import shown, size

    left = f"refused: {entry.refused}" if entry.refused else ", ".join(entry.fields)
    return (
        shown(entry.when),
        shown(entry.run),
        "" if entry.round is None else str(entry.round),
        shown(entry.verb),
        shown(left),
        size(entry.bytes),
        "" if entry.examples is None else str(entry.examples),
    )


@site_app.command(epilog=WITHDRAW_EXAMPLES)
def withdraw(
    site: Site = Path(),
    run: Annotated[
        str, typer.Option("--run", metavar="KEY", help="The run's key, as `fedalign site log` shows it.")
    ] = "",
) -> None:
    """End this site's part in a run: forget what was kept for it, and refuse whatever it asks from now on."""
    from fedalign.config.site import SiteFolder
    from fedalign.federation.site import withdraw as leave

    folder = SiteFolder.load(site)
    leave(folder, run)
    say(f"{folder.config.name} has withdrawn from run {run}: what it kept for it is gone, and it answers no more.")
    say("What left before cannot be called back: ask the coordinator. fedalign site log says what that was.")
