"""`fedalign chat`, `generate`, `evaluate`: a tuned model answers a person, a file of prompts, or a test set."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from fedalign.cli.terminal import SetOption, at_home, busy, err, out, print_table, say
from fedalign.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fedalign.client.workbench import Workbench
    from fedalign.config.run import DataConfig
    from fedalign.inference.scores import Scores
    from fedalign.inference.talk import Talk

CHAT_EXAMPLES = """
[bold]Examples[/bold]

  fedalign chat runs/a                  what was tuned: chat, instructions, or classes with their probabilities

  fedalign chat runs/a --best           the best round instead of the last

  fedalign chat allenai/OLMoE-1B-7B-0924-Instruct --set data.kind=chat
"""
GENERATE_EXAMPLES = """
[bold]Examples[/bold]

  fedalign generate runs/a --prompts questions.jsonl --to answers.jsonl

  fedalign generate runs/a --prompts questions.txt       a prompt a line

  fedalign generate runs/a --prompts questions.jsonl --to answers.jsonl --resume      after Ctrl-C or a crash
"""
EVALUATE_EXAMPLES = """
[bold]Examples[/bold]

  fedalign evaluate runs/a                            the run's own test set, before and after tuning

  fedalign evaluate runs/a --data my-site.jsonl       another file, of the same columns

  fedalign evaluate models/a --data my-site.jsonl --leaving each      and without each site that owns experts

  fedalign evaluate models/a --data test.csv --set data.kind=instruction --set evaluation.generate=true --json

  fedalign evaluate runs/a --harness arc_easy,piqa    tasks of lm-evaluation-harness; your own: --tasks-in DIR
"""
Place = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, an exported folder, any model, or a hub id.")]
Best = Annotated[bool, typer.Option("--best", help="Of a run: the best round by evaluation.best instead of the last.")]
Start = Annotated[bool, typer.Option("--start", help="Of a run: the model that it started from.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")]
Most = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")]
MOST = 256


def chat(
    model: Place,
    best: Best = False,
    start: Start = False,
    max_new_tokens: Most = MOST,
    temperature: Temperature = 0.0,
    device: DeviceOption = "auto",
    set_: SetOption = None,
) -> None:
    """Talk to a tuned model; end with Ctrl-D, begin anew with /new.

    What is typed is put as it was in training. A classifier answers with its classes and their probabilities.
    """
    from fedalign.inference.talk import Sampling, Talk, check_classes
    from fedalign.units import percent

    sampling = Sampling(max_new_tokens, temperature)
    bench = _loaded(model, best, start, device, set_)
    check_classes(bench.config.data)
    talk = Talk(bench, sampling)
    kind = bench.config.data.kind
    asked = "a message" if kind == "chat" else talk.role
    say(f"{model}, tuned for {kind}. Type {asked}; /new begins anew, Ctrl-D ends.")
    for line in _typed():
        if line == "/new":
            talk.messages.clear()
            continue
        try:
            found = talk.classes({talk.role: line})
            if found is not None:
                print_table("", [(name, percent(share)) for name, share in list(found.items())[:10]])
                continue
            talk.remember(line, talk.answer({talk.role: line}, lambda piece: out.out(piece, end="")))
        except UserError as error:  # the next question may be a better one
            err.print(str(error), soft_wrap=True)


def generate(
    model: Place,
    prompts: Annotated[
        Path,
        typer.Option("--prompts", metavar="FILE", help="A .txt of a prompt a line, or a data file as in training."),
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="A .jsonl to write; without it: the terminal.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the answers that a run left that broke off.")] = False,
    best: Best = False,
    start: Start = False,
    max_new_tokens: Most = MOST,
    temperature: Temperature = 0.0,
    device: DeviceOption = "auto",
    set_: SetOption = None,
) -> None:
    """Answer every prompt of a file: each row as it is, with `generated` added.

    Answers are kept in FILE.part as they come. Once all are there, they are FILE.
    """
    from dataclasses import replace

    from fedalign.data.sources import own_names
    from fedalign.inference.answers import AnswerFile, made_of
    from fedalign.inference.load import Source, configured
    from fedalign.inference.talk import Sampling, Talk

    if resume and to is None:
        raise UserError("--resume: nothing is kept without --to. Give the --to of the run that broke off.")
    sampling = Sampling(max_new_tokens, temperature)
    to = at_home(to)
    kept = AnswerFile(to) if to is not None else None
    if kept is not None:
        kept.check(resume=resume)
    config = configured(Source(model, best, start, device, set_ or ()))  # a wrong file is told before a model is loaded
    rows, data = _prompts(prompts, config.data)
    bench = replace(_loaded(model, best, start, device, set_), config=config.model_copy(update={"data": data}))
    talk = Talk(bench, sampling)
    asked = [{talk.role: row[""]} for row in rows] if prompts.suffix.lower() == ".txt" else rows
    names = own_names(prompts, config.data)
    if kept is None:
        for line in _answered(talk, asked, prompts, names, kept=False):
            say(json.dumps(line, ensure_ascii=False))
        return
    with kept.writing(made_of(talk.bench, talk.sampling, asked), resume=resume) as answers:
        if done := len(answers.lines):
            say(f"{done:,} of {len(asked):,} answers were there already.")
        try:
            for line in _answered(talk, asked, prompts, names, done, kept=True):
                answers.add(line)
        except BaseException:  # whatever ends it, Ctrl-C too
            if answers.lines:
                err.print(f"{len(answers.lines):,} of {len(asked):,} answers are kept; go on with --resume.")
            raise
    say(f"{len(asked):,} answers in {to}")


def _prompts(prompts: Path, data: DataConfig) -> tuple[list[dict[str, Any]], DataConfig]:
    """The rows of a file, bare lines of text under the name of no column, and how their prompts are made."""
    from fedalign.data.sources import own_names, read_file, read_lines
    from fedalign.inference.answers import GENERATED

    rows: list[dict[str, Any]] = []
    if prompts.suffix.lower() != ".txt":
        read = list(read_file(prompts, data, prompts.stem))
        rows = [dict(row.values) for row in read]
        kind, template = read[0].kind or data.kind, read[0].template  # alike for all rows of a file
        shared = data.template if kind == data.kind else None
        data = data.model_copy(update={"kind": kind, "template": shared if template is None else template})
    elif prompts.is_file():
        rows = [{"": line} for line in read_lines(prompts, data)]
    if not rows:
        raise UserError(f"--prompts {str(prompts)!r}: holds no prompt, or is not there.")
    names = own_names(prompts, data)
    if any(names.get(column, column) == GENERATED for row in rows for column in row):
        raise UserError(f"--prompts {str(prompts)!r}: has a column {GENERATED!r}, where the answers go. Rename it.")
    return rows, data


def _answered(
    talk: Talk, asked: list[dict[str, Any]], prompts: Path, names: Mapping[str, str], done: int = 0, *, kept: bool
) -> Iterator[dict[str, Any]]:
    """Each row with its answer, after the first `done`; a bar shows how far it is, beside what is written.

    `names`: of columns that the file calls otherwise than they are read.
    """
    from rich.progress import track

    from fedalign.inference.answers import GENERATED

    left = track(
        asked[done:],
        "Answering",
        total=len(asked),
        completed=done,
        console=err,
        transient=True,
        disable=not err.is_terminal or (out.is_terminal and not kept),
    )
    for number, row in enumerate(left, done + 1):
        try:
            yield {names.get(column, column): value for column, value in row.items()} | {GENERATED: talk.answer(row)}
        except KeyError as error:
            raise UserError(
                f"{prompts}, row {number}: no column {error}. There are: {', '.join(row)}. Say which one to read "
                "with --set data.columns.NAME=COLUMN."
            ) from None


def evaluate(
    model: Place,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Score all its rows; without: the run's own test set.")
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option("--harness", metavar="TASKS", help="Instead: tasks of lm-evaluation-harness (extra `harness`)."),
    ] = None,
    tasks_in: Annotated[
        Path | None, typer.Option("--tasks-in", metavar="DIR", help="With --harness: your own tasks, YAML files.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="With --harness: so many examples of each task alone.")
    ] = None,
    leaving: Annotated[
        str | None,
        typer.Option(
            "--leaving",
            metavar="NAME,NAME|each",
            help="Beside it, in place of its start: the model without each of these owners of experts, in turn.",
        ),
    ] = None,
    best: Best = False,
    alone: Annotated[bool, typer.Option("--alone", help="Of a run: not beside its start.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers as JSON.")] = False,
    device: DeviceOption = "auto",
    set_: SetOption = None,
) -> None:
    """Score a model on a file: accuracy by class, confusion, exact match, perplexity; a run beside its start."""
    if harness is None and (tasks_in is not None or limit is not None):
        raise UserError(f"{'--limit' if tasks_in is None else '--tasks-in'}: goes with --harness TASKS.")
    if harness is not None and data is not None:
        raise UserError("--data: not with --harness, whose tasks have data of their own. Leave one out.")
    if leaving is not None:
        if harness is not None:
            raise UserError("--leaving: not with --harness. Leave one out.")
        _evaluate_leaving(_loaded(model, best, False, device, set_), leaving, data, set_, as_json=as_json)
        return
    both = not alone and (Path(model).expanduser() / "config.toml").is_file()

    def scored(by: Callable[[Workbench], Any]) -> dict[str, Any]:
        tuned = {"tuned": by(_loaded(model, best, False, device, set_))}
        return {"start": by(_loaded(model, False, True, device, set_)), **tuned} if both else tuned

    if harness is not None:
        _evaluate_on_tasks(scored, harness, at_home(tasks_in), limit, as_json=as_json)
        return
    from fedalign.inference.scores import score

    examples: list[Any] = []  # read once, for both

    def by(bench: Workbench) -> Scores:
        examples[:] = examples or _examples(bench, data, set_)
        return score(bench, examples)

    scores = scored(by)
    if as_json:
        out.print_json(json.dumps({name: _numbers(one) for name, one in scores.items()}))
        return
    _print_scores(scores)


def _numbers(scores: Scores) -> dict[str, Any]:
    """All that there is of scores, for a program to read."""
    from dataclasses import asdict

    return asdict(scores) | {"perplexity": scores.perplexity}


def _evaluate_leaving(
    bench: Workbench, leaving: str, data: str | None, set_: Sequence[str] | None, *, as_json: bool
) -> None:
    """Scores of a model, and without the experts of owners, one at a time."""
    from dataclasses import replace

    from fedalign.client.leaving import by_leaving
    from fedalign.inference.scores import score
    from fedalign.moe.site_experts import among

    owners = bench.moe.layout.owners
    names = list(owners) if leaving == "each" and owners else among("--leaving", [leaving], owners)
    examples = _examples(bench, data, set_)
    scores = dict(by_leaving(bench.moe, names, lambda moe: score(replace(bench, moe=moe), examples)))
    whole = scores.pop(None)
    if as_json:
        without = {name: _numbers(one) for name, one in scores.items()}
        out.print_json(json.dumps({"whole": _numbers(whole), "without": without}))
        return
    _print_leaving(whole, {str(name): one for name, one in scores.items()})


def _print_leaving(whole: Scores, without: Mapping[str, Scores]) -> None:
    from fedalign.units import moved, nats, percent

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(f"{whole.examples:,} examples")
    for name in ("accuracy", "points", "loss, nats a token", "change"):
        table.add_column(name, justify="right")
    table.add_row("the whole model", percent(whole.accuracy), "", nats(whole.loss), "")
    for name, one in without.items():
        points, change = moved(whole.accuracy, one.accuracy, 100, 1), moved(whole.loss, one.loss, 1, 3)
        table.add_row(Text(f"without {name}"), percent(one.accuracy), points, nats(one.loss), change)
    out.print(table)
    say(f"One example is {100 / whole.examples:.1f} points: what a few of them make is chance.")


def _evaluate_on_tasks(
    scored: Callable[[Callable[[Workbench], Any]], dict[str, Any]],
    names: str,
    folder: Path | None,
    limit: int | None,
    *,
    as_json: bool,
) -> None:
    from fedalign.inference.harness import Tasks, numbers

    asked = Tasks([name.strip() for name in names.split(",")], folder, limit)
    asked.check()
    with busy("Loading tasks ..."):
        tasks = asked.load()
    results = scored(tasks.score)
    if as_json:
        out.print_json(json.dumps(results, default=str))
        return
    table = Table("lm-evaluation-harness", box=box.SIMPLE_HEAD)
    for name in results:
        table.add_column(name, justify="right")
    columns = [numbers(found) for found in results.values()]
    for name in columns[-1]:
        table.add_row(Text(name), *(f"{column[name]:.4f}" for column in columns))
    out.print(table)


def _loaded(model: str, best: bool, start: bool, device: str, set_: list[str] | None) -> Workbench:
    from fedalign.inference.load import Source, load
    from fedalign.moe.load import quiet

    quiet()
    with busy(f"Loading {model} ..."):
        return load(Source(model, best, start, device, set_ or ()))


def _examples(bench: Workbench, data: str | None, set_: Sequence[str] | None) -> Any:
    """The examples to score on: of a file that the user names all, whatever `data.max_test` of the run was."""
    from fedalign.config.toml import as_texts
    from fedalign.data.formats import load_examples
    from fedalign.inference.talk import check_classes

    config = bench.config
    check_classes(config.data)
    if data is not None:
        asked = any(text.partition("=")[0].strip() == "data.max_test" for text in as_texts(set_ or ()))
        most = config.data.max_test if asked else 0
        own = config.data.model_copy(update={"test": data, "train": data, "max_test": most})
        config = config.model_copy(update={"data": own})
    source = data or config.data.test or config.data.train
    examples = load_examples(source, config.data, "test", config.run.seed)
    if not examples:
        raise UserError(f"{source!r}: holds no test set. Give a file with --data.")
    return examples


def _typed() -> Any:
    """Lines as they are typed, empty ones and what is no UTF-8 left out."""
    while sys.stdin is not None:  # it may be closed
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            line.encode()  # what a terminal of another encoding sends may stand in it as half characters
        except EOFError:
            return
        except UnicodeError:
            err.print("That was no UTF-8, and is left out. Type it again.")
            continue
        if line:
            yield line


def _print_scores(scores: dict[str, Scores]) -> None:
    from fedalign.units import nats, percent

    last = scores["tuned"]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(f"{last.examples:,} examples")
    for name in scores:
        table.add_column(name, justify="right")
    what = "accuracy" if last.confusion or not last.answered else "right answers"
    table.add_row(what, *(percent(one.accuracy) for one in scores.values()))
    table.add_row("loss, nats a token", *(nats(one.loss) for one in scores.values()))
    table.add_row("perplexity", *(f"{one.perplexity:.2f}" for one in scores.values()))
    for i, about in enumerate(last.classes):
        shares = (percent(one.classes[i].recall) for one in scores.values())
        table.add_row(Text(f"recall of {about.name}, {about.examples:,}"), *shares)
    out.print(table)
    if last.confusion:
        _print_confusion(last.confusion)
    for one in last.answered[:3]:
        say(f"\n{one.prompt}\n  expected: {one.expected}\n  given:    {one.given}")


def _print_confusion(confusion: Any, most: int = 12) -> None:
    names = list(confusion)
    if len(names) > most:
        worst = sorted(
            ((count, true, given) for true, row in confusion.items() for given, count in row.items() if true != given),
            reverse=True,
        )[:most]
        rows = [(f"{true} taken for {given}", f"{count:,}") for count, true, given in worst if count]
        print_table("the most frequent confusions (--json has all)", rows)
        return
    table = Table(title="true class by line, given class by column", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column()
    for name in names:
        table.add_column(Text(name), justify="right")
    for true in names:
        table.add_row(Text(true), *(f"{confusion[true][given]:,}" for given in names))
    out.print(table)
