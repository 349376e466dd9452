"""The command line of sites: `fedalign site init`, `site serve` and `fedalign doctor`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedalign.cli.terminal import InsecureAnywhere, print_table, say

if TYPE_CHECKING:
    from fedalign.config.site import SiteFolder


site_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A site: one house that keeps its data and takes part in runs.",
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
    _print_site(init_site(name, folder or Path(folder_name(name)), wishes))


def _print_site(site: SiteFolder) -> None:
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
        ],
    )
    say(f"What tells this site's words, [consent] in site.toml: {site.config.consent.told}.\n")
    say("Send the coordinator this name and this public key, nothing else:\n")
    say(f"  {site.config.name}")
    say(f"  {public.read_text(encoding='utf-8').strip()}\n")
    say("who registers the site with it:\n")
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
