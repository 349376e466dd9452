"""The command line of reports: `fedalign report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedalign.cli.terminal import out, say

REPORT_EXAMPLES = """
[bold]Examples[/bold]

  fedalign report runs/skew                a comparison, finished or still at work

  fedalign report runs/a                   one run

  fedalign report runs/a runs/b --out both.html
"""


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="A comparison's folder, or run folders.", show_default=False)
    ],
    out_: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page; without it: DIR/report.html, here for several folders."),
    ] = None,
) -> None:
    """Make one page of figures and tables that opens offline in any browser."""
    from fedalign.report import default_out, write_report

    folders = [folder.expanduser() for folder in folders]
    page = out_.expanduser() if out_ else default_out(folders)
    missing = write_report(folders, page)
    for line in missing:
        out.print(line, style="yellow", soft_wrap=True)
    say(f"Report    {page} ({page.stat().st_size / 1e6:.1f} MB): open it in a browser")
