"""Recognition of people's own files: their kind and columns, and how they are written."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedalign.config.run import DataConfig
from fedalign.config.toml import load_config
from fedalign.data.formats import FORMATS, sift
from fedalign.data.sources import Row, read_rows, written_as
from fedalign.errors import UserError

Tables = dict[str, Any]  # keys of [data]
FIRST = 20  # rows of a file that tell its kind
CHOICES = ("A", "a", "option_a", "option_A", "choice_a", "choice_A", "option1", "option_1", "choice1", "choice_1")


@dataclass(frozen=True)
class Spelling:
    """How a kind of data is spelt in files that people have."""

    told: str
    needs: frozenset[str]  # columns
    tables: Tables
    fits: Callable[[Mapping[str, Any]], bool] = lambda values: True  # what stands in them


def _spelling(told: str, kind: str, *needs: str, fits: Any = None, **columns: str) -> Spelling:
    tables: Tables = {"kind": kind} | ({"columns": columns} if columns else {})
    return Spelling(told, frozenset(needs), tables, fits or (lambda values: True))


def _chats(*columns: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: all(isinstance(values.get(column), list) for column in columns)


SPELLINGS = (  # the most particular first
    _spelling("chats", "chat", "messages"),
    _spelling("ShareGPT: conversations", "sharegpt", "conversations"),
    _spelling(
        "pairs of chats that go on from a prompt, the chosen one is trained",
        "preference_chat",
        *("prompt", "chosen", "rejected"),
        fits=_chats("prompt", "chosen"),
        history="prompt",
    ),
    _spelling(
        "pairs of chats, the chosen one is trained", "preference_chat", "chosen", "rejected", fits=_chats("chosen")
    ),
    _spelling("pairs of answers, the chosen one is trained", "preference", "prompt", "chosen", "rejected"),
    _spelling("questions with choices", "multiple_choice", "question", "choices", "answer"),
    _spelling("questions with choices", "multiple_choice", "question", "choices", "answerKey", answer="answerKey"),
    _spelling("Alpaca: instruction, input, output", "alpaca", "instruction", "input", "output"),
    _spelling("instructions", "instruction", "instruction", "output", prompt="instruction", response="output"),
    _spelling("prompts with a response", "instruction", "prompt", "response"),
    _spelling("prompts with a completion", "instruction", "prompt", "completion", response="completion"),
    _spelling("questions with an answer", "instruction", "question", "answer", prompt="question", response="answer"),
    _spelling("texts with a class", "classification", "text", "label"),
    _spelling("plain text", "text", "text"),
)


@dataclass(frozen=True)
class Recognised:
    """The kind that the rows of a source are taken for."""

    told: str
    tables: Tables
    kept: Sequence[Row]  # rows that are read so


def recognise(source: str, rows: Sequence[Row]) -> Recognised:
    """The keys of [data] that read these rows; files that differ have theirs in `files`.

    Raises:
        UserError: No kind fits the columns, or nothing can be read.
    """
    by_file: dict[str, list[Row]] = {}
    for row in rows:
        by_file.setdefault(row.source, []).append(row)
    spellings = {file: _of_rows(source if len(by_file) == 1 else file, those) for file, those in by_file.items()}
    most = Counter({file: len(those) for file, those in by_file.items()})
    base = max(spellings.values(), key=lambda one: sum(most[file] for file in spellings if spellings[file] == one))
    tables: Tables = {"train": source, **base.tables}
    own = {file: _difference(one, base) for file, one in spellings.items()}
    for file, keys in _writing([Path(file) for file in by_file if Path(file).is_file()]).items():
        (tables if file is None else own[file]).update(keys)
    named = {Path(file).name: keys for file, keys in own.items() if keys}
    if named:
        tables["files"] = named
    told = "; ".join(dict.fromkeys(one.told for one in (base, *spellings.values())))
    data = load_config({"data": tables}).data
    renamed = list(read_rows(source, data, "train", [])) if named else rows  # columns of each file under common names
    kept, broken = sift(renamed, data, "train")
    if not kept:
        raise UserError(f"{source!r}: looks like {told}, but no row can be read: {broken[0]}")
    return Recognised(told + _told_writing(tables), tables, kept)


def _of_rows(source: str, rows: Sequence[Row]) -> Spelling:
    """The first spelling whose columns are there, and hold what they must."""
    there = {str(name) for row in rows for name in row.values}
    first = [row.values for row in rows[:FIRST]]
    for spelling in _with_choices(there):
        if spelling.needs <= there and all(map(spelling.fits, first)):
            return spelling
    known = "; ".join(dict.fromkeys(", ".join(sorted(one.needs)) for one in SPELLINGS))
    raise UserError(
        f"{source!r}: has columns {', '.join(sorted(there))}, of which no kind of data is made. Known are: {known}. "
        "Rename them, or write data.kind and [data.columns] yourself: see fedalign formats."
    )


def _with_choices(there: set[str]) -> Iterator[Spelling]:
    """Before all others, questions whose choices have a column each, such as A, B, C and D."""
    for first in CHOICES:
        every = [first[:-1] + chr(ord(first[-1]) + i) for i in range(9)]
        count = next((i for i, name in enumerate(every) if name not in there), len(every))
        if count > 1:
            told, columns = "questions with a column for each choice", ",".join(every[:count])
            yield _spelling(told, "multiple_choice", "question", "answer", *every[:count], choices=columns)
    yield from SPELLINGS


def _difference(one: Spelling, base: Spelling) -> Tables:
    """The keys of [data.files] for a file, where [data] says what its base is."""
    if one == base:
        return {}
    mine, theirs = (DataConfig.model_validate(spelling.tables) for spelling in (one, base))
    named = ((role, getattr(mine.columns, role)) for role in type(mine.columns).model_fields)
    columns = {role: name for role, name in named if name and name != getattr(theirs.columns, role)}
    form, found = FORMATS[mine.kind], Tables()
    if mine.kind != theirs.kind:
        found["kind"] = mine.kind
    prompt = {field for _, field, _, _ in string.Formatter().parse(form.prompt or "") if field}
    if mine.template or (theirs.template and mine.kind == theirs.kind):
        written = {role: f"{{{getattr(mine.columns, role)}}}" for role in prompt}
        found["template"] = mine.template or (form.prompt or "").format(**written)
    if read := {role: name for role, name in columns.items() if role in (*prompt, *form.roles)}:
        found["columns"] = read
    return found


def _writing(files: Sequence[Path]) -> Mapping[str | None, Tables]:
    """Delimiter and encoding where they are not the usual ones: of all files under None, or of each that differs."""
    told: dict[str | None, Tables] = {str(file): _unusual(file) for file in files}
    if len({str(keys) for keys in told.values()}) == 1:
        return {None: next(iter(told.values()))}
    return {file: keys for file, keys in told.items() if keys}


def _unusual(file: Path) -> Tables:
    written = written_as(file)
    encoding = written.encoding.removesuffix("-sig")
    return {
        **({"delimiter": written.delimiter} if written.delimiter not in ("", ",") else {}),
        **({"encoding": encoding} if encoding not in ("", "utf-8") else {}),
    }


def _told_writing(tables: Tables) -> str:
    parts = [f"cells parted by {tables['delimiter']!r}"] if "delimiter" in tables else []
    parts += [f"encoded in {tables['encoding']}"] if "encoding" in tables else []
    parts += [f"{len(tables['files'])} files differ from the rest: [data.files]"] if "files" in tables else []
    return "".join(f"; {part}" for part in parts)
