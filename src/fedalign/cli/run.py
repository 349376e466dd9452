"""`fedalign run`: from a configuration to a finished run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedalign.cli.terminal import out, print_table, say
from fedalign.errors import UserError

if TYPE_CHECKING:
    from fedalign.cli.live import LiveTable
    from fedalign.config.run import Config
    from fedalign.doctor.estimate import Estimate
    from fedalign.federation.in_process import Prepared
    from fedalign.server.results import RunFolder


RUN_EXAMPLES = """
[bold]Examples[/bold]

  fedalign run demo                   the embedded data and model, a few minutes

  fedalign run my.toml --out runs/a   your data, your model

  fedalign run my.toml --set training.learning_rate=2e-5 --set run.seed=1

  fedalign run my.toml --dry-run      what it would take, without training

  fedalign run --resume runs/a        after a crash or Ctrl-C
"""


def run(
    config: Annotated[Path | None, typer.Argument(help='TOML file, or "demo".', show_default=False)] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key; may be repeated.")
    ] = None,
    out_: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where results go; without it: runs/NAME-ALGORITHM-SEED."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Go on after the last complete round of that run.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that --out holds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the run would take; train nothing.")] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not hold model/ against plain transformers and peft at the end.")
    ] = False,
    insecure_anywhere: Annotated[
        bool,
        typer.Option(
            "--insecure-anywhere",
            help="Reach a SuperLink on another machine without TLS. Whoever is on the way can then read and change "
            "weights, statistics and the code that sites run.",
        ),
    ] = False,
) -> None:
    """Fine-tune one MoE model across clients that keep their data."""
    from fedalign import parallel  # torch and transformers load only when something is run
    from fedalign.client.workbench import check_shardable
    from fedalign.config.toml import load_config
    from fedalign.demo import DEMO
    from fedalign.moe.load import quiet
    from fedalign.server import run as runs
    from fedalign.server.results import RunFolder

    quiet()
    overrides = [*(set_ or []), *(["run.check=false"] if no_check else [])]
    if resume is not None:
        if config is not None or out_ is not None or overwrite or dry_run:
            raise UserError("--resume: takes the run's folder alone. Leave out CONFIG, --out, --overwrite, --dry-run.")
        settings, folder = runs.resumed_config(resume, overrides), RunFolder(resume)
    else:
        if config is None:
            raise UserError('fedalign run: no configuration. Give a TOML file, the word "demo", or --resume DIR.')
        settings = load_config(DEMO if config == Path("demo") and not config.exists() else config, overrides)
        name = f"{config.stem}-{settings.algorithm.name}-{settings.run.seed}"
        folder = RunFolder(out_ or Path("runs") / name)
        if not dry_run:
            folder.check_free(overwrite)
    if parallel.launched() > 1:
        if dry_run:
            raise UserError(f"--dry-run: not in {parallel.launched()} processes. Leave torchrun out.")
        check_shardable(settings)
    if settings.federation.engine != "in_process" and not dry_run:
        _run_on_flower(settings, folder, fresh=resume is None, insecure_anywhere=insecure_anywhere)
        return
    with parallel.together(settings.run.device):
        out.quiet = not parallel.is_first()
        _run_here(settings, folder, fresh=resume is None, dry_run=dry_run)


def _run_here(settings: Config, folder: RunFolder, *, fresh: bool, dry_run: bool) -> None:
    from fedalign.doctor.estimate import estimate
    from fedalign.federation.in_process import prepare

    with out.status("Loading the model and the data ..."):
        prepared = prepare(settings, folder.clients)
    _print_headline(prepared)
    if dry_run:
        with out.status("Measuring one forward and backward pass ..."):
            expected = estimate(prepared)
        _print_estimate(expected)
        return
    if fresh:
        folder.begin(settings)
    _execute(prepared, folder)


def _run_on_flower(settings: Config, folder: RunFolder, *, fresh: bool, insecure_anywhere: bool) -> None:
    from fedalign.federation.flower import launch

    options = settings.federation
    launch.require_flower(options.engine)
    reached = f"simulated on this machine in {options.workers} processes"
    if options.engine == "flower":
        launch.check_plaintext(options.superlink, options.root_certificates, insecure_anywhere)
        reached = f"SuperLink {options.superlink}, at least {options.min_sites} sites"
    if fresh:
        folder.begin(settings)
    say(f"{settings.algorithm.name}: sites behind Flower, {reached}")
    _watched(folder, settings, lambda table: launch.run(settings, folder, table))


def _execute(prepared: Prepared, folder: RunFolder) -> None:
    from fedalign.server.run import execute

    _watched(folder, prepared.config, lambda table: execute(prepared, folder, table))


def _watched(folder: RunFolder, settings: Config, rounds: Callable[[LiveTable], dict[str, Any]]) -> None:
    """Go round with the live table, then say how it went."""
    from fedalign.cli.live import LiveTable

    try:
        with LiveTable(out, settings.run.rounds) as table:
            summary = rounds(table)
    except KeyboardInterrupt:
        say(f"\nInterrupted. Complete rounds are kept; go on with: fedalign run --resume {folder.path}")
        raise typer.Exit(130) from None
    _print_summary(summary, folder)
    if settings.federation.engine == "in_process":  # the others are not for comparing
        say(f"Compare   fedalign compare {folder.config} --algorithms {_with_baseline(summary['algorithm'])}")


def _print_headline(prepared: Prepared) -> None:
    moe, config = prepared.bench.moe, prepared.config
    examples = [len(client.train) for client in prepared.clients.values()]
    parameters = sum(p.numel() for p in moe.model.parameters())
    say(
        f"{config.algorithm.name}: {len(examples)} clients with {min(examples)} to {max(examples)} examples, "
        f"{moe.family} with {parameters / 1e6:.1f}M parameters "
        f"({moe.layout.layers} MoE layers x {moe.experts} experts, top-{moe.top_k})"
    )
    if config.tuning.kind != "full":
        say(f"tuning {config.tuning.kind}: {sum(moe.layout.sizes.values()) / 1e6:.2f}M parameters are trained")
    for note in (*([str(moe.saved)] if moe.saved else []), *moe.notes):
        say(note)


def _print_estimate(estimate: Estimate) -> None:
    from fedalign.units import clock, size

    examples = list(estimate.examples.values())
    rows = [
        ("parameters", f"{estimate.parameters:,}, of which trained {estimate.trained:,}"),
        ("clients", f"{estimate.clients}, asked each round {estimate.clients_a_round}"),
        ("training examples", f"{sum(examples):,} in all, {min(examples):,} to {max(examples):,} a client"),
        ("sent down a round", size(estimate.bytes_down_a_round)),
        ("sent up a round", f"at most {size(estimate.bytes_up_a_round_at_most)}"),
        ("statistics of a client", size(estimate.bytes_statistics_a_client)),
        ("memory", f"about {size(estimate.memory)} and activations"),
        ("time a round", f"about {clock(estimate.seconds_a_round)} (from one measured pass)"),
        ("time of the run", f"about {clock(estimate.seconds)}"),
    ]
    print_table("dry run: nothing was trained or written", rows)


def _print_summary(summary: dict[str, Any], folder: RunFolder) -> None:
    from fedalign.units import clock, percent, size

    rows = [
        ("accuracy", f"{percent(summary['initial_accuracy'])} -> {percent(summary['final_accuracy'])}"),
        ("best", _best(summary)),
        ("loss", f"{_nats(summary['initial_loss'])} -> {_nats(summary['final_loss'])} nats a token"),
        ("by client", _by_client(summary["client_accuracies"])),
        ("sent up / down", f"{size(summary['bytes_up'])} / {size(summary['bytes_down'])}"),
        ("faults", _counted(summary["failures"])),
        ("time", clock(summary["seconds"])),
        ("model/ checked", summary["checked"] or "not at all"),
    ]
    rows = [(name, value) for name, value in rows if value]
    print_table(f"{summary['algorithm']} after {summary['rounds']} rounds", rows)
    say(f"Results   {folder.path}: model/ and best/ (load them with transformers), summary.json, metrics.jsonl")
    say(f"Look      tensorboard --logdir {folder.path}")


def _with_baseline(name: str) -> str:
    """What a comparison of this algorithm would take."""
    from fedalign.algorithms import BASELINE
    from fedalign.config.run import AlgorithmConfig

    return f"{BASELINE},{name if name != BASELINE else AlgorithmConfig().name}"


def _best(summary: Mapping[str, Any]) -> str:
    """The best round, if any was scored."""
    from fedalign.units import percent

    number = summary["best_round"]
    return "" if number is None else f"{percent(summary['best_accuracy'])} in round {number}"


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _by_client(accuracies: Mapping[str, float], most: int = 12) -> str:
    """Accuracy of each client, of the first few if there are many."""
    from fedalign.units import percent

    shown = [f"{name} {percent(accuracy)}" for name, accuracy in list(accuracies.items())[:most]]
    return ", ".join(shown) + (f", and {len(accuracies) - most} more" if len(accuracies) > most else "")


def _counted(failures: Sequence[Mapping[str, Any]]) -> str:
    """How often each client failed; the reasons are in summary.json."""
    counts = Counter(str(failure["client"]) for failure in failures)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())
