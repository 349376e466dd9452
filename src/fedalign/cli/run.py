"""`fedalign run`: from a configuration to a finished run."""

from __future__ import annotations

import json
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedalign.cli.terminal import InsecureAnywhere, SetOption, at_home, busy, out, print_table, say
from fedalign.errors import Stopped, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from fedalign.cli.live import LiveTable
    from fedalign.config.run import Config
    from fedalign.config.toml import Overrides, Source
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

  fedalign run my.toml --set model.path=runs/a --join bank-d
                                      bank-d joins the finished model of sites' own experts in runs/a
"""


def run(
    config: Annotated[Path | None, typer.Argument(help='TOML file, or "demo".', show_default=False)] = None,
    set_: SetOption = None,
    out_: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where results go; without it: runs/NAME-ALGORITHM-SEED."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Resume that run after its last complete round.")
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(
            "--join",
            metavar="NAME,NAME",
            help="Who joins a finished model, a run's or a folder's at model.path: each gets an expert of its own, and "
            "nobody else trains.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that --out holds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate memory, time and bytes; train nothing.")] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not check model/ against plain transformers and peft at the end.")
    ] = False,
    insecure_anywhere: InsecureAnywhere = False,
) -> None:
    """Fine-tune one MoE model across clients that keep their data."""
    who = [] if join is None else _named(join)
    if who and resume is not None:
        raise UserError("--join: begins a new run, and --resume goes on with one. Leave one of them out.")
    words = [*_joining(who), *(set_ or []), *(["run.check=false"] if no_check else [])]
    settings, folder = asked(config, words, out_, resume, overwrite, dry_run)
    from fedalign.moe.load import quiet

    quiet()
    if dry_run:
        with TemporaryDirectory() as place:
            _rehearse(_joined(settings, who, Path(place) / "model", overwrite) if who else settings, folder)
        return
    grown = folder.path.with_name(f"{folder.path.name}-start") if who else None
    is_new = grown is not None and not grown.exists()
    if grown is not None:
        settings = _joined(settings, who, grown, overwrite)
    how = Beginning(fresh=resume is None, overwrite=overwrite)
    if resume is not None and (done := folder.finished()) >= settings.run.rounds:
        go_on = f"fedalign run --resume {shlex.quote(str(resume))} --set run.rounds={2 * done}"
        say(f"All {done} rounds are complete. For more: {go_on}")
    elif resume is not None and (why := folder.stopped(settings)):
        say(f"{why}. To go on: fedalign run --resume {shlex.quote(str(resume))} --set run.patience=0")
    try:
        summary = carry_out(settings, folder, out, how, insecure_anywhere=insecure_anywhere)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Stopped as stop:
        raise typer.Exit(stop.code) from None
    finally:
        if grown is not None and is_new and not folder.config.exists():  # or the command, mended, would be refused
            shutil.rmtree(grown)
    _print_summary(summary, folder)
    if settings.federation.engine == "in_process":  # the others are not for comparing
        whole = " --set run.patience=0" if settings.run.patience else ""  # runs that are compared take the same rounds
        lines = _with_baseline(summary["algorithm"])
        say(f"Compare   fedalign compare {shlex.quote(str(folder.config))} --algorithms {lines}{whole}")


def asked(
    source: Source | None,
    overrides: Overrides,
    out: Path | None,
    resume: Path | None,
    overwrite: bool,
    dry_run: bool = False,
) -> tuple[Config, RunFolder]:
    """The configuration and the folder of a run; nothing is loaded or written yet.

    Raises:
        UserError: It does not go together, something would be lost, or torchrun cannot run it.
    """
    from fedalign.config.toml import load_config, stem

    out, resume = at_home(out), at_home(resume)
    if resume is None and source is None:
        raise UserError('fedalign run: no configuration. Give a TOML file, the word "demo", or --resume DIR.')
    if resume is not None and (source is not None or out is not None or overwrite or dry_run):
        raise UserError("--resume: takes the run's folder alone. Leave out CONFIG, --out, --overwrite, --dry-run.")
    given = None if source is None else load_config(source, overrides)  # a wrong word is told before torch loads
    from fedalign import parallel
    from fedalign.client.workbench import check_shardable
    from fedalign.files import refuse_source
    from fedalign.moe.load import model_path
    from fedalign.server.results import RunFolder
    from fedalign.server.run import resumed_config

    if resume is not None:
        settings, folder = resumed_config(resume, overrides), RunFolder(resume)
        folder.check_idle(rounds=settings.federation.engine == "in_process")  # a coordinator may go on alone
    else:
        assert given is not None
        assert source is not None
        settings = given
        folder = RunFolder(out or Path("runs") / f"{stem(source)}-{settings.algorithm.name}-{settings.run.seed}")
        if not dry_run:
            folder.check_idle()
            folder.check_free(overwrite)
            refuse_source(folder.path, model_path(settings.model.path), "model.path =")
    if parallel.launched() > 1:
        if dry_run:
            raise UserError(f"--dry-run: not in {parallel.launched()} processes. Leave torchrun out.")
        check_shardable(settings)
    return settings, folder


def _named(join: str) -> list[str]:
    from fedalign.moe.site_experts import named

    return named("--join", join)


def _joining(who: Sequence[str]) -> list[str]:
    """Overrides of a run in which these alone train experts of their own; the user's own come after them."""
    return ['algorithm.name="site_experts"', f"clients.only={json.dumps(list(who))}"] if who else []


def _joined(settings: Config, who: Sequence[str], place: Path, overwrite: bool) -> Config:
    """The settings of a run from the finished model with an expert for each who joins, which is written to `place`.

    Raises:
        UserError: Others would train, too, or would have to be asked; or the model cannot have more experts.
    """
    from fedalign.data.deal import split_among_clients
    from fedalign.export.leaving import ALGORITHM
    from fedalign.export.write import find_snapshot
    from fedalign.files import check_free, refuse_source, replacing
    from fedalign.moe.load import model_path
    from fedalign.moe.upcycle import DenseSource, write_grown
    from fedalign.server.results import RunFolder

    said, path = f"--join {','.join(who)}", settings.model.path
    shared = settings.algorithm.build().shared
    if settings.algorithm.name != ALGORITHM or shared != "frozen":
        chosen = f"algorithm.name = {settings.algorithm.name!r}" + (f", shared = {shared!r}" if shared else "")
        raise UserError(
            f'{said}: {chosen} would train what others have. Choose algorithm.name = "{ALGORITHM}" with shared = '
            '"frozen", or leave it out.'
        )
    if set(settings.clients.only) != set(who):
        raise UserError(f"{said}: clients.only = {', '.join(settings.clients.only)} says otherwise. Leave one out.")
    if settings.model.weights_hash is not None:
        raise UserError(f"{said}: model.weights_hash is of the model without its expert. Leave it out.")
    model, run = model_path(path), RunFolder(Path(path).expanduser())
    if run.config.is_file():
        kept = find_snapshot(run.path, best=False).kept if run.finished() else None
        if kept is None:  # a run that goes on for more rounds has a model, and not its last one
            go_on = f"fedalign run --resume {shlex.quote(path)}"
            raise UserError(f"{said}: the run in {path!r} is not finished. Go on with it: {go_on}")
        model = str(kept)
    if settings.federation.engine == "flower":
        raise UserError(
            f"{said}: the site needs the model before the run begins. Make it with: fedalign upcycle "
            f"{shlex.quote(model)} --site-experts {shlex.quote(','.join(who))} --out DIR; give it to the site, "
            f"and run with model.path = DIR, {_joining(who)[1]}, federation.min_sites = {len(who)} and "
            "model.weights_hash, which fedalign doctor prints."
        )
    check_free(place, "model", overwrite)
    refuse_source(place, path, "model.path =", "the folder of --join,")
    source = DenseSource.find(model, settings.model.revision)
    split_among_clients(settings)  # a name that no client has is told before anything is written
    with out.status("Adding experts ..."), replacing(place, "model") as fresh:
        write_grown(source, who, 0, fresh)  # the seed of `upcycle`, whatever the run's: as if all had begun together
    say(f"{said}: an expert a layer each, beside those of {model}, which stay as they are; it starts from {place}")
    return settings.model_copy(
        update={"model": settings.model.model_copy(update={"path": str(place), "revision": None})}
    )


@dataclass(frozen=True)
class Beginning:
    """How a run begins."""

    fresh: bool  # else it is gone on with
    overwrite: bool = False


def carry_out(
    settings: Config, folder: RunFolder, console: Console, how: Beginning, *, insecure_anywhere: bool
) -> dict[str, Any]:
    """Go all rounds on the configured engine, and tell how it goes; returns the summary.

    Raises:
        UserError: Something in it does not fit together, the run failed, or another process is at work in its folder.
        KeyboardInterrupt, Stopped: It was broken off; complete rounds are kept.
    """
    if settings.federation.engine != "in_process":
        return _on_flower(settings, folder, console, how, insecure_anywhere=insecure_anywhere)
    from fedalign import parallel
    from fedalign.server.run import execute

    with parallel.together(settings.run.device):
        console.quiet |= not parallel.is_first()
        prepared = _load(settings, folder, console)
        with prepared.workers:
            return _watched(settings, folder, console, how, lambda table: execute(prepared, folder, table))


def _load(settings: Config, folder: RunFolder, console: Console) -> Prepared:
    from fedalign.federation.in_process import prepare

    with busy("Loading the model and the data ...", console):
        prepared = prepare(settings, folder.clients)
    _print_headline(prepared, console)
    return prepared


def _rehearse(settings: Config, folder: RunFolder) -> None:
    from fedalign.doctor.estimate import estimate

    prepared = _load(settings, folder, out)
    with busy("Measuring one forward and backward pass ..."):
        expected = estimate(prepared)
    _print_estimate(expected)


def _on_flower(
    settings: Config, folder: RunFolder, console: Console, how: Beginning, *, insecure_anywhere: bool
) -> dict[str, Any]:
    from fedalign.config.unused import unused
    from fedalign.federation.flower import launch
    from fedalign.federation.flower.programs import check_plaintext, require_flower

    options = settings.federation
    require_flower(options.engine)
    reached = f"simulated on this machine in {options.workers} processes"
    if options.engine == "flower":
        check_plaintext(options.superlink, options.root_certificates, insecure_anywhere)
        reached = f"SuperLink {options.superlink}, at least {options.min_sites} sites"
    say(f"{settings.algorithm.name}: sites behind Flower, {reached}; {settings.guard}", console)
    if settings.privacy.on:
        say(settings.privacy.told, console)
    if settings.privacy.masked:
        say(settings.privacy.hidden, console)
    for note in unused(settings):
        say(note, console)
    return _watched(
        settings,
        folder,
        console,
        how,
        lambda table: launch.run(settings, folder, table, lambda note: say(note, console)),
    )


def _watched(
    settings: Config, folder: RunFolder, console: Console, how: Beginning, rounds: Callable[[LiveTable], dict[str, Any]]
) -> dict[str, Any]:
    """Go round with the live table; the folder is held meanwhile."""
    from fedalign.cli.live import LiveTable
    from fedalign.files import trouble

    again = f"go on with: fedalign run --resume {shlex.quote(str(folder.path))}"
    try:
        with _held(folder, settings, how), LiveTable(console, settings.run.rounds, settings.evaluation.part) as table:
            return rounds(table)
    except KeyboardInterrupt:
        say(f"\nInterrupted. Complete rounds are kept; {again}", console)
        raise
    except Stopped as stop:
        say(f"\nEnded by {stop}. {_left(settings, stop)}; {again}", console)
        raise
    except Exception as error:
        told = trouble(error)
        if told is None:
            raise
        place = "" if str(folder.path) in told else f"{str(folder.path)!r}: "
        kept = f"Complete rounds are kept; once it can be written to, {again}"
        raise UserError(f"{place}{told}. {kept if folder.config.exists() else 'Nothing was begun.'}") from None


@contextmanager
def _held(folder: RunFolder, settings: Config, how: Beginning) -> Iterator[None]:
    """Lock the run's folder, and begin a new run; on Flower the coordinator locks it for the rounds."""
    from fedalign import parallel

    with folder.watched():
        if how.fresh:
            with folder.worked():
                if parallel.is_first():
                    folder.check_free(how.overwrite)  # once more: somebody may have been faster
                folder.begin(settings)
        if settings.federation.engine != "in_process":
            yield
            return
        with folder.worked():
            yield


def _left(settings: Config, stop: Stopped) -> str:
    """A line on the state of a run whose process was asked to end, or lost its terminal."""
    on_its_own = settings.federation.engine == "flower" and stop.lost_terminal
    return "The run goes on at the SuperLink" if on_its_own else "Complete rounds are kept"


def _print_headline(prepared: Prepared, console: Console) -> None:
    from fedalign.config.unused import unused
    from fedalign.moe.load import hardware, pick_device

    moe, config = prepared.bench.moe, prepared.config
    device = pick_device(config.run.device)
    examples = [client.examples for client in prepared.clients.values()]
    parameters = sum(p.numel() for p in moe.model.parameters())
    held = " to ".join(str(count) for count in sorted({min(examples), max(examples)}))
    clients = f"{len(examples)} client{'s' if len(examples) > 1 else ''}"
    clients += "" if config.privacy.on else f" with {held} examples"  # which noise hides
    say(
        f"{config.algorithm.name}: {clients}, "
        f"{moe.family} with {parameters / 1e6:.1f}M parameters "
        f"({moe.layout.layers} MoE layers x {moe.experts} experts, top-{moe.top_k}), on {device}: {hardware(device)}",
        console,
    )
    if config.tuning.kind != "full":
        say(f"tuning {config.tuning.kind}: {sum(moe.layout.sizes.values()) / 1e6:.2f}M parameters are trained", console)
    if config.robust != "none":
        say(config.guard, console)
    if config.privacy.on:
        say(config.privacy.told, console)
    if config.privacy.masked:
        say(config.privacy.hidden, console)
    if why := prepared.leaving_not_told:
        say(f"no leaving.json, which tells what clients lose when an owner of experts leaves: {why}", console)
    for note in (*unused(config), *([str(moe.saved)] if moe.saved else []), *moe.notes):
        say(note, console)


def _print_estimate(estimate: Estimate) -> None:
    from fedalign.units import clock, size

    examples = list(estimate.examples.values())
    rows = [
        ("parameters", f"{estimate.parameters:,}, of which trained {estimate.trained:,}"),
        ("clients", f"{estimate.clients}, asked each round {estimate.clients_a_round}"),
        ("training examples", f"{sum(examples):,} in all, {min(examples):,} to {max(examples):,} a client"),
        ("sent down", f"{_by_round(estimate.bytes_down)}; less where a round leaves groups as they are"),
        ("sent up", f"{_by_round(estimate.bytes_up)}; less where a plan asks for fewer groups"),
        ("statistics of a client", size(estimate.bytes_statistics_a_client)),
        ("memory", f"about {size(estimate.memory)}, activations of one batch included"),
        ("time a round", f"about {clock(estimate.seconds_a_round)} (from one measured pass)"),
        ("time of the run", f"about {clock(estimate.seconds)}"),
    ]
    print_table("dry run: nothing was trained or written", rows)


def _by_round(nbytes: Sequence[int], most: int = 3) -> str:
    """Bytes at most, from round 0 on: of the run, and of its rounds, where not too many of these differ.

    >>> _by_round([0, 2000, 3000, 3000, 5000])
    'at most 13.0 kB: 2.0 kB in round 1, 3.0 kB in each of rounds 2 to 3, 5.0 kB in round 4'
    >>> _by_round([0, 2000, 2001]), _by_round([1000, 2000, 1000, 3000, 5000])
    ('at most 2.0 kB a round', 'at most 12.0 kB, and 5.0 kB in a round')
    """
    from fedalign.units import size

    sizes = enumerate(map(size, nbytes))  # what reads alike is said once
    told = [(shown, [number for number, _ in alike]) for shown, alike in groupby(sizes, itemgetter(1))]
    told = [(shown, numbers) for shown, numbers in told if shown != size(0) or numbers[0]]  # none before the first
    if len(told) > most:
        return f"at most {size(sum(nbytes))}, and {size(max(nbytes))} in a round"
    if len(told) == 1:
        return f"at most {told[0][0]} a round"
    parts = (
        f"{shown} in " + (f"each of rounds {first} to {last}" if last > first else f"round {first}")
        for shown, first, last in ((shown, numbers[0], numbers[-1]) for shown, numbers in told)
    )
    return f"at most {size(sum(nbytes))}: {', '.join(parts)}"


def _print_summary(summary: dict[str, Any], folder: RunFolder) -> None:
    from fedalign.units import clock, nats, percent, size

    rows = [
        ("accuracy", _from_to(summary["initial_accuracy"], summary["final_accuracy"], percent)),
        ("loss, nats a token", _from_to(summary["initial_loss"], summary["final_loss"], nats)),
        ("best", _best(summary)),
        ("ended early", summary["stopped"] or ""),
        ("scored on", summary["scored_on"] or f"nothing: no test set, and {_unscored(summary)}"),
        ("by client", _by_client(summary["client_accuracies"], summary["client_examples"])),
        ("sent up / down", f"{size(summary['bytes_up'])} / {size(summary['bytes_down'])}"),
        ("faults", _counted(summary["failures"])),
        ("privacy", _spent(summary)),
        ("time", clock(summary["seconds"])),
        ("model/ checked", summary["checked"] or "not at all"),
    ]
    rows = [(name, value) for name, value in rows if value]
    rounds = summary["rounds"]
    print_table(f"{summary['algorithm']} after {rounds} round{'s' if rounds > 1 else ''}", rows)
    say(f"Results   {folder.path}: model/ and best/ (load them with transformers), summary.json, metrics.jsonl")
    if folder.leaving.exists():
        say(f"Leaving   {folder.leaving}: what each client loses when another leaves; fedalign report shows it")
    if any(folder.path.glob("events.out.tfevents.*")):
        say(f"Look      tensorboard --logdir {shlex.quote(str(folder.path))}")


def _with_baseline(name: str) -> str:
    """Algorithms for a comparison with this one."""
    from fedalign.algorithms import BASELINE
    from fedalign.config.run import AlgorithmConfig

    return f"{BASELINE},{name if name != BASELINE else AlgorithmConfig().name}"


def _unscored(summary: Mapping[str, Any]) -> str:
    """Why clients have no score."""
    return summary.get("unscored") or "no client's held-out rows"


def _from_to(first: float | None, last: float | None, told: Callable[[float | None], str]) -> str:
    """The start beside the end; empty where nothing was scored."""
    return "" if first is None and last is None else f"{told(first)} -> {told(last)}"


def _best(summary: Mapping[str, Any]) -> str:
    """The best round, if any was scored, and by which measure."""
    from fedalign.server.scores import best_called
    from fedalign.units import nats, percent

    number, by = summary["best_round"], summary["best_by"]
    if number is None:
        return ""
    score = percent(summary["best_accuracy"]) if by == "accuracy" else nats(summary["best_loss"])
    return f"{best_called(by)}, {score}, {f'in round {number}' if number else 'at the start: no round was better'}"


def _by_client(accuracies: Mapping[str, float], rows: Mapping[str, int], most: int = 12) -> str:
    """Accuracy of each client and of how many rows, of the first few if there are many."""
    from fedalign.units import percent

    shown = [
        f"{name} {percent(accuracy)}" + (f" of {rows[name]}" if name in rows else "")
        for name, accuracy in list(accuracies.items())[:most]
    ]
    return ", ".join(shown) + (f", and {len(accuracies) - most} more" if len(accuracies) > most else "")


def _spent(summary: Mapping[str, Any]) -> str:
    """The epsilon and delta that noise has cost; empty: nobody told."""
    epsilon, delta = summary["privacy_epsilon"], summary["privacy_delta"]
    if delta is None:
        return ""
    if epsilon is None:
        return "a client may have spent more epsilon than it told; its own privacy.jsonl says how much"
    return f"epsilon up to {epsilon:.3g} at delta {delta:g} for one example"


def _counted(failures: Sequence[Mapping[str, Any]]) -> str:
    """How often each client failed; the reasons are in summary.json."""
    counts = Counter(str(failure["client"]) for failure in failures)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())
