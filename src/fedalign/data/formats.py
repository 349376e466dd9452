"""A row of the user's data -> an example: a prompt, an answer, what may be chosen and who owns it.

One function and one line of `FORMATS` for each kind. Whatever is wrong with a row is told with its file, its number
(counted from 1, a csv header not counted), the value, the rule and the choices.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedalign.data.sources import Row, Split, read_rows, shortened

if TYPE_CHECKING:
    from fedalign.config.run import DataConfig


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
        row.fail(f"{column} = {shortened(turns)}: must be a list of messages, each with 'role' and 'content'.")
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
        row.fail(f"{columns.choices} = {shortened(choices)}: must be a list of two or more texts.")
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
    return data.template.format_map(_Columns(row))


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
            row.fail(f"{column} = {value}: must be 0 to {len(names) - 1}, for data.labels = {shortened(list(names))}.")
        return names[value]
    label = row.text(column)
    if names:
        row.fail(f"{column} = {label!r}: not in data.labels. Choose one of: {', '.join(names)}.")
    return label


def _message(row: Row, column: str, turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
        row.fail(f"{column} holds {shortened(turn)}: each message must have a text 'role' and a text 'content'.")
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
            f"a letter from A to {letters[-1]}, or one of the choices {shortened(list(choices))}."
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
                f"It has: {shortened(list(names))}. Leave the row out or name all classes in data.labels."
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
