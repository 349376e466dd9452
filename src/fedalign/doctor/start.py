"""A configuration to start from, of a file as people have it: each choice with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedalign.config.run import Config, DataConfig
from fedalign.config.toml import load_config, parse_config
from fedalign.data.formats import FORMATS, examples_of, unread_columns
from fedalign.data.partition import partition
from fedalign.data.sources import Row, read_rows
from fedalign.doctor.estimate import exchange_nbytes, parameter_counts, server_nbytes, training_nbytes
from fedalign.doctor.machine import free_memory
from fedalign.doctor.model import skeleton_bench
from fedalign.doctor.recognise import recognise
from fedalign.errors import UserError
from fedalign.units import size

PER_OWNER = 5  # rows on average, at least, of a column that might name owners
ROOM = 1.3  # of what is counted: activations come on top


TUNINGS: tuple[tuple[dict[str, Any], float], ...] = (  # the first that fits this machine, and its learning rate
    ({"kind": "full"}, 1e-4),
    ({"kind": "lora"}, 2e-4),
    ({"kind": "lora", "dtype": "bfloat16"}, 2e-4),
)

LEAST: tuple[dict[str, Any], ...] = (  # examples of a client: with fewer than two nothing can be held out
    {},
    {"min_examples": 2},
    {"min_examples": 1, "held_out": 0.0},
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
    flaws: list[str] = []
    rows = list(read_rows(source, Config().data, "train", flaws))
    known = recognise(source, rows)
    kept, tables, unread = known.kept, known.tables, ""
    every = len(rows) + len(flaws)
    if len(kept) < every:
        tables["on_bad_row"] = "skip"
        unread = f"; {every - len(kept):,} of {every:,} rows cannot be read and are left out: fedalign data lists them"
    clients, count, dealt = _clients(source, kept, tables)
    tuning, learning_rate, tuned = _tuning(model, count)
    lacks = _lacks_chat_template(model, tables)
    if lacks:
        tables["chat_template"] = "chatml"
    long = _too_long(model, kept, tables)
    if long:
        tables["too_long"] = "truncate"
    reasons = {
        "model": "a hub id or a folder" if model else "the demo's small model: give your own with --model",
        "data": f"recognised by its columns: {known.told}{unread}{lacks}{long}",
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


def _lacks_chat_template(model: str | None, tables: Mapping[str, Any]) -> str:
    """That the data are chats and the model has no template for them; else empty."""
    config = load_config({"model": {"path": model or "demo"}, "data": tables})
    if not config.data.has_chats or skeleton_bench(config).tokenizer.chat_template:
        return ""
    return "; the model has no chat template, so chats are written as ChatML"


def _too_long(model: str | None, rows: Sequence[Row], tables: Mapping[str, Any]) -> str:
    """That some examples are longer than the model reads, where it can be mended by cutting prompts; else empty."""
    config = load_config({"model": {"path": model or "demo"}, "data": tables})
    encoder = skeleton_bench(config).encoder
    examples = [one for one in examples_of(rows, config.data, "train") if one.answer]

    def reads_all() -> bool:
        try:
            encoder.encode(examples)
        except UserError:  # anything but lengths is told by whoever reads them
            return False
        return True

    if reads_all():
        return ""
    encoder.too_long = "truncate"
    told = f"; some are longer than the {encoder.max_length:,} tokens that the model reads: their prompts are cut"
    return told if reads_all() else ""


def _clients(source: str, rows: Sequence[Row], tables: Mapping[str, Any]) -> tuple[dict[str, Any], int, str]:
    """How the rows are dealt out, to how many, and why."""
    config = load_config({"data": tables})
    examples = [one for one in examples_of(rows, config.data, "train") if one.answer]
    unowned = _unowned(source, rows, config.data)
    for keys, reason in _ways(source, examples, FORMATS[config.data.kind].classes, unowned):
        tried = load_config({"data": tables, "clients": keys})
        try:
            parts = partition(examples, tried.clients, tried.run.seed)
        except UserError:
            continue
        return keys, len(parts), reason
    raise UserError(f"{source!r}: {len(examples)} examples are too few to be dealt out to two clients.")


def _unowned(source: str, rows: Sequence[Row], data: DataConfig) -> str:
    """Why nobody is known to own a row, and which column nothing reads might say it."""
    told = "no column is called `client`" + ("" if Path(source).expanduser().is_dir() else ", and it is one file")
    for column in unread_columns(rows, data):
        names = Counter(str(row.values.get(column)) for row in rows)
        if 1 < len(names) <= len(rows) / PER_OWNER:
            return f"{told}; if `{column}` says whose a row is: [data.columns] client = {column!r}"
    return told


def _ways(source: str, examples: list[Any], has_classes: bool, unowned: str) -> Iterator[tuple[dict[str, Any], str]]:
    for least in LEAST:
        if len({example.client for example in examples if example.client}) > 1:
            yield {"partition": "natural", **least}, "the column `client` says whose a row is"
        if Path(source).expanduser().is_dir() and len({example.file for example in examples}) > 1:
            yield {"partition": "files", **least}, "a file each"
    for least in LEAST:
        for count in (10, 5, 2):
            if has_classes:
                yield (
                    {"partition": "dirichlet", "count": count, "alpha": 1.0, **least},
                    f"dealt by label, a little skewed, since {unowned}",
                )
            yield {"partition": "iid", "count": count, **least}, f"dealt evenly, since {unowned}"


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
