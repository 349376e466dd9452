"""`fedalign doctor`: checks before a run, and what leaves a site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedalign.cli.terminal import SetOption, out, say
from fedalign.errors import UserError

if TYPE_CHECKING:
    from fedalign.config.run import Config
    from fedalign.config.site import SiteFolder
    from fedalign.doctor.report import Check, Examination
    from fedalign.doctor.what_leaves import Sent


DOCTOR_EXAMPLES = """
[bold]Examples[/bold]

  fedalign doctor --site hospital-a federation.toml      a site, for this run

  fedalign doctor --site hospital-a                      a site, as far as it is known without the run

  fedalign doctor federation.toml                        the coordinator

  fedalign doctor --site hospital-a federation.toml --what-leaves

  fedalign doctor federation.toml --set algorithm.name=fedavg --what-leaves      before you decide
"""
STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}
PREVIEW = 600  # characters of a piece of the example that are shown at most
HIDDEN = "(tells of the data: shown on a terminal only)"


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG.toml", help='The coordinator\'s configuration, or "demo".', show_default=False),
    ] = None,
    site: Annotated[
        Path | None, typer.Option("--site", metavar="DIR", help="A site's folder, or its site.toml.")
    ] = None,
    set_: SetOption = None,
    leaves: Annotated[
        bool, typer.Option("--what-leaves", help="List every field that leaves a site, and its size; check nothing.")
    ] = False,
) -> None:
    """Check a site, or the coordinator (CONFIG.toml alone), before anything is trained.

    Exit code 1: something would not work.
    """
    from fedalign.config.site import SiteFolder
    from fedalign.config.toml import load_config

    if set_ and config is None:
        raise UserError(f"--set {set_[0]}: changes a key of a configuration, and none is given: name CONFIG.toml too.")
    settings = load_config(config, set_ or ()) if config is not None else None
    folder = SiteFolder.load(site) if site is not None else None
    if settings is None and folder is None and not leaves:
        raise UserError("fedalign doctor: nothing to look at. Give a site (--site DIR), a CONFIG.toml, or both.")

    from fedalign.doctor import examine_coordinator, examine_site  # these load torch: a wrong word was told before
    from fedalign.moe.load import quiet

    quiet()
    if leaves:
        _what_leaves(folder, settings)
        return
    with out.status("Looking ..."):
        if folder is not None:
            found = examine_site(folder, settings)
        else:
            assert config is not None
            assert settings is not None
            results = Path("runs") / f"{config.stem}-{settings.algorithm.name}-{settings.run.seed}"
            found = examine_coordinator(settings, results)
    _print_examination(f"site {folder.config.name}" if folder is not None else f"coordinator, {config}", found)
    if found.failed:
        raise typer.Exit(1)


def _print_examination(title: str, found: Examination) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE_HEAD)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for check in found.checks:
        table.add_row(Text(check.verdict, style=STYLES[check.verdict]), check.name, _found(check))
    out.print(table)
    if found.preview and out.is_terminal:
        _print_preview(found.preview)
    if found.hashes:
        say("Hashes, which the coordinator and its sites must share:")
        for name, value in found.hashes.items():
            say(f"  {name:<13} {value}")
        if "weights" in found.hashes:
            say("To refuse other weights, the coordinator sets:")
            say(f'  model.weights_hash = "{found.hashes["weights"]}"')
        say("")
    _print_verdict(found)


def _found(check: Check) -> Text:
    text = Text(check.found if out.is_terminal or not check.private else HIDDEN)
    return text.append(f"\n{check.remedy}", style="italic") if check.remedy else text


def _print_preview(preview: list[tuple[str, bool]]) -> None:
    text = Text()
    for piece, is_answer in preview:
        shown = piece if len(piece) <= PREVIEW else f"{piece[: PREVIEW // 2]} [...] {piece[-PREVIEW // 2 :]}"
        text.append(shown, style="bold green" if is_answer else "")
    title = "the first example as the model reads it, what it learns to say in green"
    out.print(Panel(text, title=title, subtitle="shown here alone: do not pass it on", border_style="dim"))


def _print_verdict(found: Examination) -> None:
    failed, warnings = (sum(check.verdict == verdict for check in found.checks) for verdict in ("failed", "warning"))
    told = f"{warnings} warning{'' if warnings == 1 else 's'}"
    if failed:
        out.print(f"Not ready: {failed} failed, {told}.", style="bold red")
    elif warnings:
        out.print(f"Ready, with {told}.", style="yellow")
    else:
        out.print("Ready.", style="bold green")


def _what_leaves(folder: SiteFolder | None, settings: Config | None) -> None:
    from fedalign.config.run import Config
    from fedalign.doctor.model import skeleton_bench
    from fedalign.doctor.what_leaves import BESIDES, NEVER, masks_told, tokens_told, what_leaves
    from fedalign.protocol import DEALT

    if settings is None and (folder is None or folder.config.model.path is None):
        raise UserError("fedalign doctor --what-leaves: no model to say it for. Give the coordinator's CONFIG.toml.")
    local = settings or Config()
    name, consent = "SITE", DEALT  # of a site that nobody has named: what it may consent to
    if "data" in local.asks:
        raise UserError(
            f'algorithm.name = "{local.algorithm.name}": pools the data of all clients in one process, and no site '
            "could take part. Choose another algorithm."
        )
    if folder is not None:
        local, name, consent = folder.localise(local), folder.config.name, folder.consent
    with out.status("Reading the model's configuration ..."):
        moe = skeleton_bench(local).moe
    if folder is None:
        name = next(iter(moe.layout.owners), name)  # where sites own experts, of one that does
    say(f"What leaves {name} when it trains {local.model.path} ({moe.family}). {NEVER}\n")
    if masks := masks_told(local, folder.config.privacy.node_keys if folder else {}):
        say(f"{masks}\n")
    say(tokens_told(name, moe.layout, local, consent, if_it_consents=folder is None) + "\n")
    for sent in what_leaves(name, moe, local, consent):
        _print_sent(sent)
    say(BESIDES)


def _print_sent(sent: Sent) -> None:
    from fedalign.units import size

    out.print(Text(f"{sent.name}: {sent.when}", style="bold"))
    say(sent.tells)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("field", style="bold", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    table.add_column("shape", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for one in sent.fields:
        table.add_row(one.name, Text(one.meaning), Text(one.shape), size(one.nbytes))
    table.add_section()
    table.add_row("all", "", "", size(sent.nbytes))
    out.print(table)
