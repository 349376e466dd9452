"""The command line of exports: `fedalign export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedalign.cli.terminal import busy, on_disk, out, print_table, say
from fedalign.errors import UserError

if TYPE_CHECKING:
    from fedalign.export.leaving import Leaving, Left
    from fedalign.export.push import Push
    from fedalign.export.write import Exported

EXPORT_EXAMPLES = """
[bold]Examples[/bold]

  fedalign export runs/a --to models/a                       the final model; of a LoRA run the adapter

  fedalign export runs/a --to models/a --best                that of the best round

  fedalign export runs/a --to models/a --merge               the adapter in its base's weights

  fedalign export runs/a --to models/a --dtype bfloat16      half the size

  fedalign export runs/a --to models/a --clients             and a model for each client, with its personal parts

  fedalign export runs/a --to models/a --push me/model       and to the Hugging Face Hub, as a private repository

  fedalign export runs/a --to models/b --without hospital-b  a site leaves, and takes its own expert along
"""


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A run's folder, finished or not; with --without or --only also a model's.",
            show_default=False,
        ),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where the model goes.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the adapter to its base's weights: a checkpoint without peft.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="bfloat16|float16|float32",
            help="Round the weights, routers too; of an adapter its factors alone. Without it: as trained.",
        ),
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The model of the best round by evaluation.best, not of the last one.")
    ] = False,
    clients: Annotated[
        bool,
        typer.Option(
            "--clients", help="Also a folder for each client that has personal parts (gate = local, pfl_moe)."
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="PATH_OR_HUB_ID",
            help="Where the adapter's base is now; without it: model.path of the run. It is compared with what the "
            "adapter was trained on.",
        ),
    ] = None,
    data_license: Annotated[
        str | None, typer.Option("--data-license", metavar="TEXT", help="Of what was trained on, for the card.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="OWNER/NAME", help="Also a repository of the Hugging Face Hub; a private one."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: all may read it.")] = False,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="SITE,...", help="Leave out the experts of these sites; exact, no training."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="SITE,...", help="Keep the experts of these sites alone, and the public ones."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model that --to holds; with --push, the repository's too.")
    ] = False,
) -> None:
    """Export a run as a checkpoint or an adapter that plain transformers or peft load, with a model card.

    Without --merge and --dtype, weights are copied as they are, and what was scored is what is loaded.
    """
    from fedalign.export.leaving import Leaving
    from fedalign.export.write import Wanted
    from fedalign.export.write import export as write
    from fedalign.moe.load import quiet

    quiet()
    run, to = run.expanduser(), to.expanduser()
    leaving = Leaving(without or (), only or ())
    of_model = any((run / name).is_file() for name in ("config.json", "adapter_config.json"))
    if leaving and of_model and not (run / "config.toml").exists():
        given = {"--merge": merge, "--dtype": dtype, "--best": best, "--clients": clients, "--base": base}
        of_run = given | {"--data-license": data_license, "--push": push, "--public": public}
        _export_folder(run, to, leaving, overwrite=overwrite, of_run=[flag for flag, value in of_run.items() if value])
        return
    wanted = Wanted(run, to, merge, dtype, best, clients, base, overwrite, data_license, leaving)
    hub = _hub(push, public=public, overwrite=overwrite, clients=clients)
    with out.status("Looking at the run ...") as status:
        exported = write(wanted, status.update)
    _print(exported, to)
    if hub is not None:
        with busy(f"Pushing to {hub.repo} ..."):
            address = hub.send(to, exported.made)
        say(f"Pushed    {address}, {'public' if public else 'private'}")


def _export_folder(model: Path, to: Path, leaving: Leaving, *, overwrite: bool, of_run: Sequence[str]) -> None:
    """Of a model's folder, which is no run's, the part that stays."""
    from fedalign.export.card import CARD
    from fedalign.export.leaving import export_folder

    if of_run:
        raise UserError(f"{of_run[0]}: goes with a run's folder, and {str(model)!r} is a model's. Leave it out.")
    with out.status("Copying what stays ..."):
        left = export_folder(model, to, leaving, overwrite=overwrite)
    print_table(f"{model}: exported", [("left", str(left)), ("experts", _experts(left)), ("size", on_disk(to))])
    for note in left.notes:
        out.print(note, style="yellow", soft_wrap=True)
    say(f"Written   {to}, with a model card: {CARD}")


def _experts(left: Left) -> str:
    return f"{len(left.cut.stay)} of {left.cut.experts} in each layer stay, as they were"


def _hub(push: str | None, *, public: bool, overwrite: bool, clients: bool) -> Push | None:
    """Where to push, after a look at whether that is possible."""
    from fedalign.export.push import Push

    if push is None:
        if public:
            raise UserError("--public: goes with --push OWNER/NAME.")
        return None
    if clients:
        raise UserError("--clients: models of single clients are theirs to give away. Not with --push: leave one out.")
    hub = Push(push, public, overwrite)
    hub.check()
    return hub


def _print(exported: Exported, to: Path) -> None:
    from fedalign.export.card import CARD, OWN_MODEL, scored_own
    from fedalign.server.scores import accuracy_of, loss_of
    from fedalign.units import nats, percent

    made, snapshot = exported.made, exported.snapshot
    accuracy, loss = accuracy_of(exported.trained.scored), loss_of(exported.trained.scored)
    of_whole = ", with all experts" if exported.left is not None else ""
    if made.personal is None and "loss_nats" not in exported.trained.scored and scored_own(snapshot.config):
        of_whole += f", {OWN_MODEL}"
    rows = [
        ("what", f"{FORMS[made.form]}, {made.dtype}"),
        ("round", f"{snapshot.round} of {snapshot.config.run.rounds}{exported.trained.chosen}"),
        ("accuracy", f"{percent(accuracy)}{of_whole}" if accuracy is not None else ""),
        ("loss", f"{nats(loss)} nats a token{of_whole}" if loss is not None else ""),
        ("of clients", _of_clients(exported)),
        ("left", str(exported.left or "")),
        ("experts", _experts(exported.left) if exported.left is not None else ""),
        ("size", on_disk(to)),
    ]
    print_table(f"{snapshot.config.algorithm.name}: exported", [row for row in rows if row[1]])
    for note in exported.notes:
        out.print(note, style="yellow", soft_wrap=True)
    say(f"Written   {to}, with a model card: {CARD}")
    say("Load      " + "\n          ".join(made.load(str(to))))


FORMS = {"checkpoint": "checkpoint", "merged": "checkpoint, adapter merged", "adapter": "adapter (peft)"}


def _of_clients(exported: Exported) -> str:
    if not exported.clients:
        return ""
    without = f"; {exported.without} have nothing of their own" if exported.without else ""
    return f"{exported.clients} models in clients/{without}"
