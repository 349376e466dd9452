"""The command line of comparisons: `fedalign compare`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.table import Table as TerminalTable
from rich.text import Text

from fedalign.cli.terminal import at_home, out, say
from fedalign.errors import Stopped, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from fedalign.compare.comparison import Comparison, Outcome
    from fedalign.compare.plan import Design
    from fedalign.compare.tables import Table, TableCell
    from fedalign.config.toml import Overrides, Source

COMPARE_EXAMPLES = """
[bold]Examples[/bold]

  fedalign compare demo --algorithms fedavg,fedprox,fedalign_moe --seeds 5

  fedalign compare my.toml --algorithms fedavg,fedalign_paper,fedalign_moe,fedalign_moe:experts=average

  fedalign compare my.toml --algorithms fedavg,fedprox:mu=0.1 --set clients.alpha=0.1,1.0 --out runs/skew

  fedalign compare my.toml --ablation --seeds 3,7,11

  fedalign compare my.toml --algorithms fedavg,fedprox --tune

  fedalign compare my.toml --algorithms fedavg,by_use --seeds 5 --figure rounds.pdf --spread std

  fedalign compare --resume runs/skew           or the same command again: finished runs are kept
"""


def compare(
    config: Annotated[Path | None, typer.Argument(help='TOML file, or "demo".', show_default=False)] = None,
    algorithms: Annotated[
        list[str] | None,
        typer.Option(
            "--algorithms",
            metavar="NAME,NAME:OPTION=VALUE",
            help="What to compare; each may set options of its own, such as fedprox:mu=0.1, also of the sections "
            "training, wire, server and statistics. Quote values that hold a comma or a colon.",
        ),
    ] = None,
    ablation: Annotated[bool, typer.Option("--ablation", help="Compare the paper's five steps to the method.")] = False,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="N|A,B,C", help="How many, or which; without it: 3.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE,VALUE",
            help="Change one key for all runs; several values: every combination is compared. May be repeated. "
            "Quote values that hold a comma; a TOML list is one value.",
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="First choose learning rate and strength of every algorithm on a part of the training data.",
        ),
    ] = False,
    out_: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where results go; without it: runs/compare-NAME or ablation-NAME."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Resume the comparison in that folder.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", min=1, help="Runs side by side; without it: one a GPU, or one a core.", show_default=False
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the comparison that --out holds.")] = False,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", metavar="FILE", help="Draw the score by round for a paper: .pdf, .svg or .png."),
    ] = None,
    spread: Annotated[
        Literal["ci", "std"],
        typer.Option("--spread", help="In table.tex: 95 % intervals of means, or standard deviations over seeds."),
    ] = "ci",
) -> None:
    """Compare algorithms over seeds: same start, partition and order of batches; means with their intervals.

    A run is an ordinary `fedalign run`, with one thread unless run.threads says more. Exit code 1: some runs failed.
    """
    comparison = asked(config, algorithms or [], ablation, seeds, set_ or [], tune, out_, resume, overwrite, jobs, out)
    from fedalign.moe.load import quiet

    quiet()
    comparison = replace(comparison, figure=figure, spread=spread)
    try:
        outcome = carry_out(comparison, overwrite)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Stopped as stop:
        raise typer.Exit(stop.code) from None
    if figure is not None:
        say(f"Figure    {figure}")
    _print_outcome(outcome, comparison)
    if outcome.failed:
        raise typer.Exit(1)


def asked(
    source: Source | None,
    algorithms: Sequence[str],
    ablation: bool,
    seeds: str | None,
    overrides: Overrides,
    tune: bool,
    out: Path | None,
    resume: Path | None,
    overwrite: bool,
    jobs: int | None,
    console: Console,
) -> Comparison:
    """The comparison and its folder; nothing is made or written yet.

    Raises:
        UserError: It does not go together, or there is nothing to go on with.
    """
    from fedalign.compare import plan
    from fedalign.config.toml import as_texts, load_config, stem

    out, resume = at_home(out), at_home(resume)
    given = source is not None or algorithms or ablation or overrides or tune or out or overwrite
    if resume is not None and (given or seeds is not None):
        raise UserError("--resume: takes the comparison's folder and --jobs alone. Leave out everything else.")
    if resume is not None:
        return _comparison(None, resume, jobs, console)
    if source is None:
        raise UserError('fedalign compare: no configuration. Give a TOML file, the word "demo", or --resume DIR.')
    if ablation == bool(algorithms):
        raise UserError(
            "fedalign compare: what is to be compared? Give either --algorithms, for example fedavg,fedalign_moe, "
            "or --ablation."
        )
    choices = plan.ablation() if ablation else plan.parse_algorithms(algorithms)
    single, grid = plan.parse_grid(as_texts(overrides))
    which = plan.parse_seeds("3" if seeds is None else seeds)
    design = plan.make_design(load_config(source, single), choices, grid, which, tune)
    folder = out or Path("runs") / f"{'ablation' if ablation else 'compare'}-{stem(source)}"
    return _comparison(design, folder, jobs, console)


def _comparison(design: Design | None, path: Path, jobs: int | None, console: Console) -> Comparison:
    """Of a design, or of that which stands in the folder; from here on torch is loaded."""
    from fedalign.compare.comparison import Comparison
    from fedalign.compare.folder import ComparisonFolder

    folder = ComparisonFolder(path)
    return Comparison(design or folder.read(), folder, jobs, console, partial(say, console=console))


def carry_out(comparison: Comparison, overwrite: bool) -> Outcome:
    """Make it and its report, and tell how it goes.

    Raises:
        KeyboardInterrupt, Stopped: It was broken off; finished runs and rounds are kept.
    """
    from fedalign.compare.plan import cells
    from fedalign.compare.tune import tuning_cells
    from fedalign.config.unused import unused
    from fedalign.report import default_out, write_report

    design, folder = comparison.design, comparison.folder.path
    runs = len(design.choices) * len(design.points) * len(design.seeds)
    points = f"grid points {len(design.points)}, " if design.grid else ""
    size = f"algorithms {len(design.choices)}, {points}seeds {len(design.seeds)}: {runs} runs"
    before = f" after {len(tuning_cells(design))} runs of tuning" if design.tune else ""
    comparison.tell(f"{size}{before} in {folder}")
    for note in dict.fromkeys(note for cell in cells(design) for note in unused(cell.config)):
        comparison.tell(note)
    kept = f"Finished runs and rounds are kept; go on with: fedalign compare --resume {shlex.quote(str(folder))}"
    try:
        outcome = comparison.run(overwrite)
    except KeyboardInterrupt:
        comparison.tell(f"\nInterrupted. {kept}")
        raise
    except Stopped as stop:
        comparison.tell(f"\nEnded by {stop}. {kept}")
        raise
    try:
        problems = write_report([folder], default_out([folder]))
    except UserError as error:  # not one run to report on: the reasons follow
        problems = [str(error)]
    for problem in problems:
        comparison.tell(f"report: {problem}")
    return outcome


def _print_outcome(outcome: Outcome, comparison: Comparison) -> None:
    folder = comparison.folder
    if out.is_terminal:
        for table in outcome.tables:
            _print_table(table)
        for note in outcome.notes:
            say(note)
    else:
        say(folder.markdown.read_text(encoding="utf-8"))
    made = (folder.markdown, folder.latex, folder.results, folder.path / "report.html")
    there = [file.name for file in made if file.exists()] + ["runs/"] * (folder.path / "runs").exists()
    say(f"Results   {folder.path}: {', '.join(there)}")
    if outcome.failed:
        again = shlex.quote(str(folder.path))
        out.print(f"{len(outcome.failed)} failed; try them again: fedalign compare --resume {again}", style="bold red")


def _print_table(table: Table) -> None:
    shown = TerminalTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, title in enumerate(table.header):
        shown.add_column(title, justify="right" if i else "left")
    for title, lines in table.sections:
        shown.add_section()
        if title:
            shown.add_row(Text(title, style="italic"))
        for line in lines:
            shown.add_row(*(_in_terminal(cell) for cell in line))
    out.print(shown)


def _in_terminal(cell: TableCell) -> Text:
    from fedalign.compare.tables import MARK

    return Text(f"{cell.text} {MARK}" if cell.marked else cell.text, style="bold" if cell.bold else "")
