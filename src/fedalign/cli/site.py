"""The command line of sites: `fedalign site ...`, and `fedalign sites` at the coordinator."""

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
from fedalign.files import folder_name

if TYPE_CHECKING:
    from fedalign.client.log import Entry
    from fedalign.config.site import SiteFolder
    from fedalign.federation.flower.invitation import Invitation


site_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A site: one organisation that keeps its data and takes part in runs.",
)
INVITE_EXAMPLES = """
[bold]Examples[/bold]

  fedalign site invite hospital-a federation.toml                  writes invite-hospital-a.toml

  fedalign site invite hospital-a federation.toml --to a.toml
"""
SITES_EXAMPLES = """
[bold]Examples[/bold]

  fedalign sites federation.toml

  fedalign sites federation.toml --json                            for other programs
"""
INIT_EXAMPLES = """
[bold]Examples[/bold]

  fedalign site init --invite invite-hospital-a.toml --data notes.jsonl

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


Coordinator = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The coordinator's configuration.")]


@site_app.command(epilog=INVITE_EXAMPLES)
def invite(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the coordinator calls the new site.")],
    config: Coordinator,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="The file to write; without it: invite-NAME.toml.")
    ] = None,
) -> None:
    """At the coordinator: write the one file that a new site needs. Nothing in it is secret."""
    from fedalign.config.toml import load_config
    from fedalign.federation.flower.invitation import invite as write
    from fedalign.federation.flower.programs import register_command

    invitation, file = write(name, load_config(config).federation, to and to.expanduser())
    say(f"{file}: for {name}, with the address {invitation.superlink} and what to do there. Nothing in it is secret.")
    _say_fingerprints(invitation)
    say(f"\nWhen {name} has sent its key.pub, save it as {folder_name(name)}.pub, and register it:\n")
    say(f"  {register_command(name)}")


def _say_fingerprints(invitation: Invitation) -> None:
    for fingerprint in invitation.fingerprints:
        say(f"The coordinator's certificate, for both sides to compare by telephone (SHA-256):\n  {fingerprint}")


def sites(
    config: Coordinator,
    as_json: Annotated[bool, typer.Option("--json", help="One object for each key.")] = False,
) -> None:
    """At the coordinator: who is registered under which name, with which key, and who of them is connected."""
    from fedalign.config.toml import load_config
    from fedalign.federation.flower.programs import check_plaintext, registered, require_flower

    link = load_config(config).federation
    require_flower("flower")
    check_plaintext(link.superlink, link.root_certificates, insecure_anywhere=False)
    found = registered(link.superlink, link.root_certificates)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("site", "", "since (UTC)", "key", "node"):
        table.add_column(column, overflow="fold")
    for site in found:
        status = Text(CONNECTED.get(site["status"], site["status"]), "green" if site["status"] == "online" else "")
        table.add_row(
            Text(site["name"] or "(no name)"), status, site["since"], site["key"] or "(none)", str(site["node"])
        )
    out.print(table)
    kept = [site["status"] for site in found if site["status"] != "unregistered"]
    say(f"{kept.count('online')} of {len(kept)} connected; federation.min_sites = {link.min_sites}.")


CONNECTED = {  # Flower's words
    "online": "connected",
    "offline": "not connected",
    "registered": "never connected",
    "unregistered": "revoked",
}


@site_app.command(epilog=INIT_EXAMPLES)
def init(
    data: Annotated[
        Path,
        typer.Option("--data", metavar="FILE", help="A .jsonl, .json, .csv or .parquet file, or a folder of them."),
    ],
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="What the coordinator calls this site; --invite says it, too."),
    ] = None,
    invited: Annotated[
        Path | None, typer.Option("--invite", metavar="FILE", help="The invitation that the coordinator has sent.")
    ] = None,
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
    from fedalign.federation.flower.invitation import read_invitation
    from fedalign.federation.flower.new_site import Wishes, init_site, parse_columns

    invitation = read_invitation(invited.expanduser()) if invited else None
    if invitation is not None and name not in (None, invitation.name):
        raise UserError(f"{name!r}: the invitation is for {invitation.name!r}. Leave the name out.")
    name = invitation.name if invitation is not None else name
    if name is None:
        raise UserError("fedalign site init: no name. Give one, or the coordinator's invitation with --invite.")
    wishes = Wishes(data, model, device, parse_columns(column or []), superlink, root_certificates, invitation)
    _print_site(init_site(name, folder.expanduser() if folder else Path(folder_name(name)), wishes))
    if invitation is not None:
        say("")
        _say_fingerprints(invitation)


def _print_site(site: SiteFolder) -> None:
    from fedalign.federation.flower.new_site import readable_columns
    from fedalign.federation.flower.programs import QUIET, is_loopback, register_command

    link = site.config.coordinator
    public = site.path / f"{link.key}.pub"
    folder = shlex.quote(str(site.path))
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
    say(f"who saves the key as {folder_name(site.config.name)}.pub, and registers the two together:\n")
    say(f"  {register_command(site.config.name)}\n")
    in_the_clear = not link.root_certificates and not is_loopback(link.superlink)
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
        shown(entry.verb) + (", evaluate" if entry.scored else ""),
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
    taken = f"fedalign export RUN --without {shlex.quote(folder.config.name)} --to DIR"
    say(f"If an expert of its model is this site's own, the coordinator should now take it out: {taken}")
    say("Then it deletes the whole model and RUN. What remains of a site that has left: docs/opting-out.md.")
