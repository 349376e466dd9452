"""A row of the user's data -> an example: a prompt, an answer, what may be chosen and who owns it.

One function and one line of `FORMATS` for each kind. Whatever is wrong with a row is told with its file, its number
(counted from 1, a csv header not counted), the value, the rule and the choices.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from fedalign.data import docstrings
from fedalign.errors import UserError

if TYPE_CHECKING:
    from fedalign.config import DataConfig

Split = Literal["train", "test"]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Example:
    """What the model reads and should say. The loss is on the answer alone."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()  # all possible answers, in a fixed order, where there are such
    label: str = ""  # class name, for partitions by label; "" if there is none
    client: str = ""  # value of the client column, "" without one
    file: str = ""  # stem of the file it was read from
    messages: tuple[tuple[str, str], ...] = ()  # chat: (role, content); the answers are the assistant's turns


@dataclass(frozen=True)
class Row:
    """One row, and where it stands, so that an error can say so."""

    values: Mapping[str, Any]
    source: str
    number: int
    file: str = ""

    def fail(self, problem: str) -> NoReturn:
        """Raise a `UserError` that names this row."""
        raise UserError(f"{self.source}, row {self.number}: {problem}")

    def get(self, column: str) -> Any:
        """A column's value; an error lists the columns that are there."""
        if column not in self.values:
            there = ", ".join(self.values) or "none"
            self.fail(f"no column {column!r}. There are: {there}. Say which one to read under [data.columns].")
        if self.values[column] is None:
            self.fail(f"column {column!r} is empty. Fill it or leave the row out.")
        return self.values[column]

    def text(self, column: str) -> str:
        """A column that must hold text with something in it."""
        value = self.get(column)
        if not isinstance(value, str):
            self.fail(f"{column} = {value!r}: must be text, not {type(value).__name__}.")
        return value.strip() or self.fail(f"column {column!r} is empty. Fill it or leave the row out.")


def load_examples(source: str, data: DataConfig, split: Split, seed: int) -> list[Example]:
    """All examples of one split of `source`, or `max_train` / `max_test` of them drawn at random.

    Args:
        source: "docstrings"; a .jsonl, .json, .csv or .parquet file; a folder of them; or a hub id. A folder's split
            is its subfolder of the split's name (`data.train_split`, `data.test_split`), or its files whose names
            begin with it, or, for training, all its files. A folder or file without a test split has an empty one,
            unless it is named by `data.test`: then all of it is the test split.
        data: kind, columns, labels, template and limits.
        split: "train" or "test".
        seed: of the draw; the same seed draws the same examples.

    Raises:
        UserError: whatever is wrong with the source or a row of it.
    """
    rows = list(read_rows(source, data, split))
    if not rows:
        return []
    _check_named_columns(rows[0], data)
    to_example = FORMATS[data.kind]
    examples = [_with_owner(to_example(row, data), row, data) for row in rows]
    if data.kind == "classification":
        examples = _with_classes(examples, rows, data, split)
    limit = data.max_train if split == "train" else data.max_test
    if not limit or limit >= len(examples):
        return examples
    chosen = random.Random(f"{seed} {split}").sample(range(len(examples)), limit)
    return [examples[i] for i in sorted(chosen)]


# ---------------------------------------------------------------------------------------------------------- kinds


def classification(row: Row, data: DataConfig) -> Example:
    """Text and label: the answer is the label's name."""
    prompt = _prompt(row, data, "{text}\nLabel:", text=data.columns.text)
    label = _label(row, data.columns.label, data)
    return Example(prompt, _answer(prompt, label), label=label)


def instruction(row: Row, data: DataConfig) -> Example:
    """Prompt and response."""
    prompt = _prompt(row, data, "Instruction: {prompt}\nResponse:", prompt=data.columns.prompt)
    return Example(prompt, _answer(prompt, row.text(data.columns.response)))


def chat(row: Row, data: DataConfig) -> Example:
    """Messages with a role and content each; every assistant's turn is an answer."""
    column = data.columns.messages
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        row.fail(f"{column} = {_short(turns)}: must be a list of messages, each with 'role' and 'content'.")
    messages = tuple(_message(row, column, turn) for turn in turns)
    answers = [content for role, content in messages if role == "assistant"]
    if not answers:
        row.fail(f"{column} has no message of role 'assistant'; there is nothing to learn from it.")
    return Example("", answers[-1], messages=messages)


def multiple_choice(row: Row, data: DataConfig) -> Example:
    """Question, choices and the right one: its index (from 0), its letter (from A) or its text."""
    columns = data.columns
    prompt = _prompt(row, data, "Question: {question}\nAnswer:", question=columns.question)
    choices = row.get(columns.choices)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        row.fail(f"{columns.choices} = {_short(choices)}: must be a list of two or more texts.")
    answers = tuple(_answer(prompt, choice.strip()) for choice in choices)
    return Example(prompt, answers[_choice(row, columns.answer, choices)], choices=answers)


def text(row: Row, data: DataConfig) -> Example:
    """Plain text to model: all of it is answer."""
    return Example("", _prompt(row, data, "{text}", text=data.columns.text))


FORMATS: dict[str, Callable[[Row, DataConfig], Example]] = {
    "classification": classification,
    "instruction": instruction,
    "chat": chat,
    "multiple_choice": multiple_choice,
    "text": text,
}


def _prompt(row: Row, data: DataConfig, default: str, **roles: str) -> str:
    """The kind's default template over its own words, or the user's over the columns of the row."""
    if data.template is None:
        return default.format(**{role: row.text(column) for role, column in roles.items()})
    try:
        return data.template.format_map(_Columns(row))
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"data.template = {data.template!r}: {error}. Write {{column}} for a column, {{{{ for a brace."
        ) from None


class _Columns(dict[str, Any]):
    def __init__(self, row: Row) -> None:
        self.row = row

    def __missing__(self, column: str) -> Any:
        value = self.row.values.get(column, "") if column in self.row.values else self.row.get(column)
        return "" if value is None else value  # an optional column of the template, say a context, may be empty


def _answer(prompt: str, words: str) -> str:
    # A causal tokenizer joins a word with the space before it: " World" is what follows "Label:" in running text.
    return words if not prompt or prompt[-1].isspace() else f" {words}"


def _label(row: Row, column: str, data: DataConfig) -> str:
    value, names = row.get(column), data.labels
    if isinstance(value, str) and value.strip() in names:
        return value.strip()
    if names and isinstance(value, str) and value.strip().lstrip("-").isdigit():  # csv holds nothing but text
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if not names:
            row.fail(f"{column} = {value}: an integer without a name. Name the classes in order: data.labels = [...].")
        if not 0 <= value < len(names):
            row.fail(f"{column} = {value}: must be 0 to {len(names) - 1}, for data.labels = {_short(list(names))}.")
        return names[value]
    label = row.text(column)
    if names:
        row.fail(f"{column} = {label!r}: not in data.labels. Choose one of: {', '.join(names)}.")
    return label


def _message(row: Row, column: str, turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
        row.fail(f"{column} holds {_short(turn)}: each message must have a text 'role' and a text 'content'.")
    roles = ("system", "user", "assistant", "tool")
    if turn["role"] not in roles:
        row.fail(f"{column} holds role {turn['role']!r}: unknown. Choose one of: {', '.join(roles)}.")
    return turn["role"], turn["content"]


def _choice(row: Row, column: str, choices: Sequence[str]) -> int:
    answer = row.get(column)
    if isinstance(answer, str):
        if answer.strip() in (stripped := [choice.strip() for choice in choices]):
            return stripped.index(answer.strip())
        if answer.strip().isdigit():  # some data sets write the index as text
            answer = int(answer)
        elif len(answer.strip()) == 1 and answer.strip().isalpha():
            answer = ord(answer.strip().upper()) - ord("A")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
        row.fail(
            f"{column} = {row.get(column)!r}: must be an index from 0 to {len(choices) - 1}, "
            f"a letter from A to {letters[-1]}, or one of the choices {_short(list(choices))}."
        )
    return answer


def _with_owner(example: Example, row: Row, data: DataConfig) -> Example:
    """Add file, client and, to partition by, label: the last two where the row has such a column."""
    client, label = row.values.get(data.columns.client), row.values.get(data.columns.label)
    return replace(
        example,
        label=example.label or ("" if label is None else str(label)),
        client="" if client is None else str(client),
        file=row.file,
    )


def _with_classes(examples: list[Example], rows: list[Row], data: DataConfig, split: Split) -> list[Example]:
    """Let every example choose among the training data's classes; a test label outside them is an error."""
    names = data.labels
    if not names and split == "train":
        names = tuple(sorted({example.label for example in examples}))
    elif not names:
        train = read_rows(data.train, data, "train")
        names = tuple(sorted({_label(row, data.columns.label, data) for row in train}))
    known = set(names)
    for example, row in zip(examples, rows, strict=True):
        if example.label not in known:
            row.fail(
                f"{data.columns.label} = {example.label!r}: a label that the training data never has. "
                f"It has: {_short(list(names))}. Leave the row out or name all classes in data.labels."
            )
    # Answers of one prompt form differ by the label alone, so the choices are made once.
    spaced = {space: tuple(space + name for name in names) for space in ("", " ")}
    return [replace(example, choices=spaced[" " if example.answer.startswith(" ") else ""]) for example in examples]


def _check_named_columns(row: Row, data: DataConfig) -> None:
    """Client and label are read where they are, but if the user gave them another name, that column must be there."""
    for role in ("client", "label"):
        column = getattr(data.columns, role)
        if column != role and column not in row.values:
            row.get(column)


def _short(value: object, limit: int = 120) -> str:
    shown = repr(value)
    return shown if len(shown) <= limit else shown[:limit] + "..."


# --------------------------------------------------------------------------------------------------------- sources


def read_rows(source: str, data: DataConfig, split: Split) -> Iterator[Row]:
    """The raw rows of one split."""
    path = Path(source).expanduser()
    if source == "docstrings":
        yield from (Row(asdict(r), source, i) for i, r in enumerate(docstrings.load(split), 1))
    elif path.is_dir():
        for file in split_files(path, data, split, source):
            yield from read_file(file)
    elif path.is_file():
        if split == "train" or source == data.test:
            yield from read_file(path)
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"data.{split} = {source!r}: no such file or folder.")
    else:
        yield from read_hub(source, data, split)


def split_files(folder: Path, data: DataConfig, split: Split, source: str) -> list[Path]:
    """The files of one split of a folder, in the order of their names."""
    names = {"train": data.train_split, "test": data.test_split}
    for candidates in (_data_files(folder / names[split]), _files_named(folder, names[split])):
        if candidates:
            return candidates
    files = _data_files(folder)
    if split == "test" and source != data.test:
        return []
    if split == "train":  # what is named after the test split is not training data
        held = set(_files_named(folder, names["test"]))
        files = [file for file in files if file not in held]
    if not files:
        raise UserError(
            f"data.{split} = {source!r}: the folder holds no data file. Choose one of: {', '.join(SUFFIXES)}."
        )
    return files


def _data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file()) if folder.is_dir() else []


def _files_named(folder: Path, split: str) -> list[Path]:
    """`train.csv`, and shards such as `train-00000-of-00002.parquet`."""
    return [p for p in _data_files(folder) if p.stem == split or p.stem.startswith(f"{split}-")]


def read_file(path: Path) -> Iterator[Row]:
    """Rows of one file; one that cannot be read, or has none, is an error."""
    if path.suffix not in READERS:
        raise UserError(f"{path}: files of type {path.suffix!r} are not read. Choose one of: {', '.join(SUFFIXES)}.")
    number = 0
    try:
        for number, values in enumerate(READERS[path.suffix](path), 1):
            if not isinstance(values, Mapping):
                raise UserError(f"{path}, row {number}: {_short(values)}: must be an object with named columns.")
            yield Row(values, str(path), number, path.stem)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}, after row {number}: not readable as {path.suffix[1:]}: {error}") from None
    if not number:
        raise UserError(f"{path}: the file holds no rows. Give a file with at least one.")


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _read_json(path: Path) -> Iterator[Any]:
    content = json.loads(path.read_text(encoding="utf-8") or "[]")
    if not isinstance(content, list):
        raise ValueError("the file must hold one list of objects; for one object a line, call it .jsonl")
    yield from content


def _read_csv(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for values in reader:
            if None in values:  # more cells than the header names
                raise ValueError(f"line {reader.line_num} has more cells than the header")
            yield {name: value or None for name, value in values.items()}


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet  # noqa: PLC0415 - heavy, and only for this kind of file

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def read_hub(source: str, data: DataConfig, split: Split) -> Iterator[Row]:
    """Rows of a data set on the Hugging Face hub; classes stored as numbers get their names."""
    import datasets  # noqa: PLC0415 - heavy, and only for the hub
    import huggingface_hub  # noqa: PLC0415

    name = data.train_split if split == "train" else data.test_split
    try:
        if not huggingface_hub.is_offline_mode():  # one short question, where load_dataset asks for half a minute
            huggingface_hub.HfApi().dataset_info(source, timeout=10)
        unnamed_test = split == "test" and source != data.test
        if unnamed_test and name not in datasets.get_dataset_split_names(source, data.subset):
            return  # as with files: a source without a test split has an empty one
        table = datasets.load_dataset(source, data.subset, split=name)
    except Exception as error:  # the library raises dozens of kinds for what a user can mend
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"data.{split} = {source!r}: neither a file, a folder nor a data set that the hub gives "
            f"(split {name!r}, subset {data.subset!r}): {reason} Check the spelling and the network; without "
            "network, HF_HUB_OFFLINE=1 reads what was loaded before."
        ) from None
    classes = {
        column: feature.names
        for column, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel) and not (column == data.columns.label and data.labels)
    }
    for number, values in enumerate(table, 1):
        for column, names in classes.items():  # -1 stands for a label that is kept secret
            code = values[column]
            values[column] = names[code] if code is not None and code >= 0 else None
        yield Row(values, f"{source} ({name})", number)
