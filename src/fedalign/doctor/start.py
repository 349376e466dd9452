"""A configuration to start from, of a file as people have it: each choice with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedalign.config.run import Config
from fedalign.config.toml import load_config, parse_config
from fedalign.data.formats import FORMATS, examples_of, sift
from fedalign.data.partition import partition
from fedalign.data.sources import Row, read_rows
from fedalign.doctor.estimate import exchange_nbytes, parameter_counts, server_nbytes, training_nbytes
from fedalign.doctor.machine import free_memory
from fedalign.doctor.model import skeleton_bench
from fedalign.errors import UserError
from fedalign.units import size

ROOM = 1.3  # of what is counted: activations come on top


@dataclass(frozen=True)
class Spelling:
    """How a kind of data is spelt in files that people have."""

    told: str
    needs: frozenset[str]  # columns
    kind: str
    columns: Mapping[str, str] = field(default_factory=dict)  # role -> column, where they differ
    template: str | None = None


def _spelling(told: str, kind: str, *needs: str, template: str | None = None, **columns: str) -> Spelling:
    return Spelling(told, frozenset(needs), kind, columns, template)


SPELLINGS = (  # the most particular first
    _spelling("chats", "chat", "messages"),
    _spelling("questions with choices", "multiple_choice", "question", "choices", "answer"),
    _spelling(
        "Alpaca: instruction, input, output",
        "instruction",
        *("instruction", "input", "output"),
        template="{instruction}\n{input}\nResponse:",
        response="output",
    ),
    _spelling("instructions", "instruction", "instruction", "output", prompt="instruction", response="output"),
    _spelling("prompts with a response", "instruction", "prompt", "response"),
    _spelling("prompts with a completion", "instruction", "prompt", "completion", response="completion"),
    _spelling("questions with an answer", "instruction", "question", "answer", prompt="question", response="answer"),
    _spelling("texts with a class", "classification", "text", "label"),
    _spelling("plain text", "text", "text"),
)
TUNINGS: tuple[tuple[dict[str, Any], float], ...] = (  # the first that fits this machine, and its learning rate
    ({"kind": "full"}, 1e-4),
    ({"kind": "lora"}, 2e-4),
    ({"kind": "lora", "dtype": "bfloat16"}, 2e-4),
)


@dataclass(frozen=True)
class Start:
    """A configuration, and why it is what it is: section -> reason."""

    tables: Mapping[str, dict[str, Any]]
    reasons: Mapping[str, str]

    def to_toml(self) -> str:
        """As a file that a person goes on with."""
        return "\n".join(
            f"# {self.reasons[section]}\n{tomli_w.dumps({section: dict(keys)})}"
            for section, keys in self.tables.items()
        )


def start(source: str, model: str | None) -> Start:
    """A configuration for this data, this model and this machine.

    Raises:
        UserError: No kind fits the columns, nothing can be read, or no tuning of the model fits into memory.
    """
    rows = list(read_rows(source, Config().data, "train"))
    spelling, tables, kept = _data(source, rows)
    clients, count, dealt = _clients(source, kept, tables)
    unread = f"; {len(rows) - len(kept):,} of {len(rows):,} rows cannot be read: fedalign data lists them"
    tuning, learning_rate, tuned = _tuning(model, count)
    reasons = {
        "model": "a hub id or a folder" if model else "the demo's small model: give your own with --model",
        "data": f"recognised by its columns: {spelling.told}{unread if len(kept) < len(rows) else ''}",
        "clients": f"{dealt}: {count} clients",
        "tuning": tuned,
        "training": "a rate for this kind of tuning; compare --tune chooses a better one",
    }
    found = {
        "model": {"path": model or "demo"},
        "data": tables,
        "clients": clients,
        "tuning": tuning,
        "training": {"learning_rate": learning_rate},
    }
    parse_config(found)
    return Start(found, reasons)


def _data(source: str, rows: list[Row]) -> tuple[Spelling, dict[str, Any], list[Row]]:
    """The first spelling whose columns are there and that reads something, and the rows that it reads."""
    there = {str(name) for row in rows for name in row.values}
    for spelling in SPELLINGS:
        if not spelling.needs <= there:
            continue
        tables: dict[str, Any] = {"train": source, "kind": spelling.kind}
        if spelling.template:
            tables["template"] = spelling.template
        if spelling.columns:
            tables["columns"] = dict(spelling.columns)
        kept, broken = sift(rows, load_config({"data": tables}).data, "train")
        if not kept:
            raise UserError(f"{source!r}: looks like {spelling.told}, but no row can be read: {broken[0]}")
        return spelling, tables, kept
    known = "; ".join(", ".join(sorted(one.needs)) for one in SPELLINGS)
    raise UserError(
        f"{source!r}: has columns {', '.join(sorted(there))}, of which no kind of data is made. Known are: {known}. "
        "Rename them, or write data.kind and [data.columns] yourself: see fedalign formats."
    )


def _clients(source: str, rows: list[Row], tables: Mapping[str, Any]) -> tuple[dict[str, Any], int, str]:
    """How the rows are dealt out, to how many, and why."""
    config = load_config({"data": tables})
    examples = [one for one in examples_of(rows, config.data, "train") if one.answer]
    for keys, reason in _ways(source, examples, FORMATS[config.data.kind].classes):
        tried = load_config({"data": tables, "clients": keys})
        try:
            parts = partition(examples, tried.clients, tried.run.seed)
        except UserError:
            continue
        return keys, len(parts), reason
    raise UserError(f"{source!r}: {len(examples)} examples are too few to be dealt out to two clients.")


def _ways(source: str, examples: list[Any], has_classes: bool) -> Iterator[tuple[dict[str, Any], str]]:
    for least in ({}, {"min_examples": 1}):
        if len({example.client for example in examples if example.client}) > 1:
            yield {"partition": "natural", **least}, "the column `client` says whose a row is"
        if Path(source).expanduser().is_dir() and len({example.file for example in examples}) > 1:
            yield {"partition": "files", **least}, "a file each"
    for count in (10, 5, 2):
        for least in ({}, {"min_examples": 1}):
            if has_classes:
                yield (
                    {"partition": "dirichlet", "count": count, "alpha": 1.0, **least},
                    "dealt by label, a little skewed",
                )
            yield {"partition": "iid", "count": count, **least}, "dealt evenly, for want of an owner column or files"


def _tuning(model: str | None, clients: int) -> tuple[dict[str, Any], float, str]:
    """The largest tuning that fits into this machine's memory."""
    free, tried = free_memory(), list[str]()
    for tuning, learning_rate in TUNINGS:
        config = load_config({"model": {"path": model or "demo"}, "tuning": tuning})
        bench = skeleton_bench(config)
        _, trained = parameter_counts(bench)
        needed = training_nbytes(bench) + exchange_nbytes(trained, config) + server_nbytes(trained, config, clients)
        needed = int(ROOM * needed)
        told = " ".join(tuning.values())
        if free is None or needed < free:
            there = "" if free is None else f", {size(free)} are free here"
            before = f"; {'; '.join(tried)}" if tried else ""
            return tuning, learning_rate, f"about {size(needed)} of memory with activations{there}{before}"
        tried.append(f"{told} would take {size(needed)}")
    assert free is not None
    raise UserError(f"--model {model!r}: {'; '.join(tried)}, and {size(free)} are free here. Choose a smaller model.")
