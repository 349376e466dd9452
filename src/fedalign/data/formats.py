"""Rows of the user's data -> examples: a prompt, an answer, what may be chosen and who owns it.

A format is one function and one line of `FORMATS`. The function is given all rows, so that what a column means is
settled by the whole of it. Whatever is wrong with a row is told with its file, its number (counted from 1, a csv
header not counted), the value, the rule and the choices.
"""

from __future__ import annotations

import functools
import json
import math
import random
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedalign.algorithms import from_package, offered
from fedalign.config.run import FORMAT_GROUP, choice_columns
from fedalign.data.sources import (
    WHOLE,
    BadRowError,
    Row,
    Split,
    check_names,
    is_missing,
    names_in,
    read_rows,
    say,
    shortened,
)
from fedalign.errors import UserError

if TYPE_CHECKING:
    from fedalign.config.run import DataConfig

LETTER = re.compile("[A-Za-z]")
ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {  # of ShareGPT
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
Training = Callable[[], Sequence[Row]] | None  # training rows of the same kind; None: the rows themselves are
SHOWN, SKIPPED = 5, 10  # rows that a notice names; that cannot be read


@dataclass(frozen=True)
class Chat:
    """Messages as the model's chat template takes them, and which of them are trained."""

    messages: tuple[Mapping[str, Any], ...]
    answers: tuple[int, ...]  # indices of assistant's turns with something in them and no weight of 0
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Example:
    """The text that the model reads, and the one it should say. The loss is on the answer alone."""

    prompt: str
    answer: str  # "": there is nothing to learn from it
    choices: tuple[str, ...] = ()  # all possible answers, in a fixed order, where there are such
    label: str = ""  # class name, for partitions by label; "" if there is none
    client: str = ""  # value of the client column, "" without one
    file: str = ""  # stem of the file it was read from
    chat: Chat | None = None  # in place of prompt and answer
    where: str = field(default="an example", compare=False)  # file and row, for the user


@dataclass(frozen=True)
class Format:
    """One kind of data."""

    read: Callable[[Sequence[Row], DataConfig, Training], Iterator[Example]]
    told: str  # what a model card says of it
    prompt: str | None = ""  # the default template over roles of [data.columns]; None: the tokenizer's chat template
    roles: tuple[str, ...] = ()  # of [data.columns] that it reads beside those of the prompt
    classes: bool = False  # whether all examples choose among one set of answers
    reads_all: bool = False  # any column

    def columns(self, data: DataConfig, template: str | None = None) -> set[str]:
        """The columns that it reads; `template` in place of its default prompt."""
        of_prompt = [getattr(data.columns, role) for role, _ in _fields(self.prompt or "") if role]
        named = of_prompt if template is None else [column for column, _ in _fields(template)]
        of_roles = [getattr(data.columns, role) for role in (*self.roles, "label", "client")]
        several = choice_columns(data.columns.choices) if "choices" in self.roles else []
        return {*named, *of_roles, *several} - {""}


def load_examples(
    source: str, data: DataConfig, split: Split, seed: int, *, may_be_none: bool = False
) -> list[Example]:
    """All examples of one split of `source`, or `max_train` / `max_test` of them drawn at random.

    Args:
        source: "docstrings"; a .jsonl, .json, .csv or .parquet file, maybe compressed; a folder of them; or a hub id.
            A folder's split is its subfolder of the split's name (`data.train_split`, `data.test_split`), or its file
            of that name or numbered parts of it, or, for training, all other files. A folder or file without a test
            split has an empty one, unless it is named by `data.test`: then all of it is the test split.
        data: kind, columns, labels, template and limits.
        split: "train" or "test".
        seed: of the draw; the same seed draws the same examples.
        may_be_none: whether it is no error where no row can be read, or none has an answer.

    Raises:
        UserError: whatever is wrong with the source or a row of it.
    """
    if split == "train":
        check_names(data)
    rows = list(read_rows(source, data, split))
    if not rows:
        return []
    told = f"data.{split} = {source!r}"
    if not may_be_none:
        _check_named_columns(rows[0], data, split)
    if data.on_bad_row == "skip":
        rows, broken = sift(rows, data, split)
        if broken:
            first = "; ".join(broken[:SKIPPED])
            say(f"{told}: {len(broken):,} rows that cannot be read are left out: {first}")
        if not rows and may_be_none:
            return []
        if not rows:
            raise UserError(f"{told}: no row can be read. Look at them with: fedalign data")
    examples = examples_of(rows, data, split)
    if "rejected" in rows[0].values and "chosen" in columns_read(rows[:1], data):
        say(f"{told}: pairs of answers: what stands in 'chosen' is trained, 'rejected' is not used")
    if unread := unread_columns(rows, data):
        say(
            f"{told}: filled columns that data.kind = {data.kind!r} does not read: {', '.join(unread)}. To use one, "
            "write it into data.template as {column}, or name it under [data.columns]"
        )
    if empty := [example.where for example in examples if not example.answer]:
        say(f"{told}: {name_some(empty)} with nothing to learn from, left out")
        examples = [example for example in examples if example.answer]
    if not examples and not may_be_none:
        raise UserError(f"{told}: no row has an answer to learn from.")
    return drawn(examples, data, split, seed)


def drawn(examples: Sequence[Example], data: DataConfig, split: Split, seed: int) -> list[Example]:
    """All of them, or as many as the configuration asks for, in their order."""
    limit = data.max_train if split == "train" else data.max_test
    if not limit or limit >= len(examples):
        return list(examples)
    chosen = random.Random(f"{seed} {split}").sample(range(len(examples)), limit)
    return [examples[i] for i in sorted(chosen)]


def examples_of(
    rows: Sequence[Row], data: DataConfig, split: Split, training: Callable[[str], Sequence[Row]] | None = None
) -> list[Example]:
    """An example of each row, those with nothing to learn from too; what rows mean is settled by all of them.

    Of a test split the training rows settle it; `training` gives those of a kind, where they need not be read again.

    Raises:
        UserError: A row, or all together, cannot be read.
    """
    by_kind: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_kind.setdefault(row.kind or data.kind, []).append(i)
    training = training or functools.partial(_training_rows, data)
    found: dict[int, Example] = {}
    for kind, indices in by_kind.items():
        own = data.model_copy(update={"kind": kind, "template": data.template if kind == data.kind else None})
        settled_by = None if split == "train" else functools.partial(training, kind)
        read = FORMATS[kind].read([rows[i] for i in indices], own, settled_by)
        found |= dict(zip(indices, read, strict=True))
    return list(_with_owners([found[i] for i in range(len(rows))], rows, data))


def sift(rows: Sequence[Row], data: DataConfig, split: Split) -> tuple[list[Row], list[str]]:
    """The rows that can be read, and of each other one why not. Each is tried alone, then all that are left together.

    Raises:
        UserError: Something is wrong with all of them together, or with the training rows that settle a test split.
    """
    training = functools.cache(functools.partial(_training_rows, data))

    def flaw(those: Sequence[Row], as_split: Split) -> BadRowError | None:
        try:
            examples_of(those, data, as_split, training)
        except BadRowError as error:
            return error
        return None

    if flaw(rows, split) is None:
        return list(rows), []
    alone = [flaw([row], "train") for row in rows]  # where labels mean what the row itself says
    kept = [row for row, problem in zip(rows, alone, strict=True) if problem is None]
    broken = [str(problem) for problem in alone if problem is not None]
    while kept and (problem := flaw(kept, split)) is not None:
        left = [row for row in kept if row is not problem.row]
        if len(left) == len(kept):
            raise problem
        broken.append(str(problem))
        kept = left
    return kept, broken


def name_some(where: Sequence[str]) -> str:
    """How many examples, and the first of them by name."""
    return f"{len(where):,} ({'; '.join(where[:SHOWN])}{'; ...' if len(where) > SHOWN else ''})"


# ---------------------------------------------------------------------------------------------------------- kinds


def classification(rows: Sequence[Row], data: DataConfig, training: Training) -> Iterator[Example]:
    """Text and label: the answer is the label's name, and every example chooses among all names."""
    prompts = [prompt_of(row, data) for row in rows]
    names, labels = _labels(rows, data, training)
    choices = {space: tuple(space + name for name in names) for space in ("", " ")}
    for prompt, label in zip(prompts, labels, strict=True):
        answer = _answer(prompt, label)
        yield Example(prompt, answer, choices[" " if answer.startswith(" ") else ""], label)


def instruction(rows: Sequence[Row], data: DataConfig, training: Training) -> Iterator[Example]:
    """Prompt and response."""
    for row in rows:
        prompt, response = prompt_of(row, data), row.text(data.columns.response, may_be_empty=True)
        yield Example(prompt, _answer(prompt, response) if response else "")


def chat(rows: Sequence[Row], data: DataConfig, training: Training) -> Iterator[Example]:
    """Messages with a role and content each, or from and value; every assistant's turn is an answer."""
    for row in rows:
        read = _conversation(row, data)
        answers = tuple(i for i, (_, is_trained) in enumerate(read) if is_trained)
        messages = tuple(message for message, _ in read)
        last = str(messages[answers[-1]].get("content") or messages[answers[-1]]) if answers else ""
        yield Example("", last, chat=Chat(messages, answers, _tools(row, data.columns.tools)))


def multiple_choice(rows: Sequence[Row], data: DataConfig, training: Training) -> Iterator[Example]:
    """Question, choices and the right one: its number, its letter (from A) or its text."""
    offered = [_offered(row, data.columns.choices) for row in rows]
    for row, texts, index in zip(rows, offered, _indices(rows, offered, data, training), strict=True):
        prompt = prompt_of(row, data)
        answers = tuple(_answer(prompt, words) for words in texts)
        yield Example(prompt, answers[index], answers)


def text(rows: Sequence[Row], data: DataConfig, training: Training) -> Iterator[Example]:
    """Plain text to model: all of it is answer."""
    for row in rows:
        template = data.template if row.template is None else row.template
        whole = row.text(data.columns.text, may_be_empty=True) if template is None else prompt_of(row, data)
        yield Example("", whole if whole.strip() else "")


OURS = {
    "chat": Format(chat, "conversations", prompt=None, roles=("messages", "system", "history", "tools")),
    "multiple_choice": Format(
        multiple_choice,
        "questions with choices, one of them right",
        prompt="Question: {question}\nAnswer:",
        roles=("choices", "answer"),
    ),
    "instruction": Format(
        instruction,
        "instructions with a response each",
        prompt="Instruction: {prompt}\nResponse:",
        roles=("response",),
    ),
    "classification": Format(
        classification, "texts with a class each", prompt="{text}\nLabel:", roles=("label",), classes=True
    ),
    "text": Format(text, "plain text", roles=("text",)),
}


class _Formats(dict[str, Format]):
    """Ours; another name is loaded from the package that offers it."""

    def __missing__(self, kind: str) -> Format:
        return of_package(kind)


FORMATS = _Formats(OURS)


def every_kind() -> list[str]:
    """Names that `data.kind` takes: ours, then those that installed packages offer."""
    return [*OURS, *(name for name in offered(FORMAT_GROUP) if name not in OURS)]


@functools.cache
def of_package(kind: str) -> Format:
    """The format that another package's function of a row makes.

    Raises:
        UserError: No package offers it, or the package is broken.
    """
    function: Callable[[Row], Example] = from_package(
        FORMAT_GROUP, "data.kind", kind, OURS, lambda found: None if callable(found) else "is no function of a row"
    )

    def read(rows: Sequence[Row], data: DataConfig, training: Training) -> Iterator[Example]:
        for row in rows:
            try:
                example = function(row)
            except UserError:
                raise
            except Exception as error:  # whatever another package's function does with a row
                row.fail(f"data.kind = {kind!r} cannot read it ({type(error).__name__}: {shortened(str(error))}).")
            if not isinstance(example, Example):
                row.fail(f"data.kind = {kind!r} gave {shortened(example)}: must be a fedalign.data.formats.Example.")
            yield example

    told = " ".join((function.__doc__ or kind).split())
    return Format(read, told.partition(". ")[0].rstrip("."), reads_all=True)


# --------------------------------------------------------------------------------------------------------- prompts


def prompt_of(row: Row, data: DataConfig) -> str:
    """The kind's default template over its own roles, or the user's over the columns of the row."""
    template = data.template if row.template is None else row.template
    if template is None:
        parts = _fields(FORMATS[data.kind].prompt or "")
        return "".join(before + (role and row.text(getattr(data.columns, role))) for role, before in parts)
    return "".join(before + _cell(row, column, data.columns.input) for column, before in _fields(template))


def first_field(template: str) -> str:
    """The first column that a template names."""
    return next(column for column, _ in _fields(template) if column)


def _cell(row: Row, column: str, optional: str) -> str:
    if column and column not in row.values and column != optional:
        row.fail(f"no column {column!r}, which data.template names. There are: {', '.join(row.values) or 'none'}.")
    value = row.values.get(column)
    return "" if is_missing(value) else str(value)  # an optional column of the template, say a context, may be empty


@functools.cache
def _fields(template: str) -> list[tuple[str, str]]:
    """Columns of a template with the text before each; "" where text follows without a column."""
    return [(column or "", before) for before, column, _, _ in string.Formatter().parse(template)]


def _answer(prompt: str, words: str) -> str:
    # A causal tokenizer joins a word with the space before it: " World" is what follows "Label:" in running text.
    return words if not prompt or prompt[-1].isspace() else f" {words}"


# ---------------------------------------------------------------------------------------------------------- labels


def _labels(rows: Sequence[Row], data: DataConfig, training: Training) -> tuple[tuple[str, ...], list[str]]:
    """The names of all classes, and each row's."""
    column = data.columns.label
    words = names_in(rows, column)
    for row in rows:
        value = row.get(column)
        if not isinstance(value, (str, bool, int)) and not (isinstance(value, float) and value.is_integer()):
            row.text(column)  # says what it must be
    if data.labels:
        names = names_in([Row({column: name}, "data.labels", 0) for name in data.labels], column)
        if len(set(names)) < len(names) or "" in names:
            raise UserError(f"data.labels = {shortened(list(data.labels))}: each class needs a name of its own.")
        return tuple(names), [_named(row, word, names, column) for row, word in zip(rows, words, strict=True)]
    known = words if training is None else names_in(training(), column)
    names = sorted({word for word in known if word})
    for row, word in zip(rows, words, strict=True):
        if WHOLE.fullmatch(word):
            row.fail(
                f"{column} = {word}: an integer without a name. Name the classes in order: data.labels = [...]. If the "
                f"numbers are their names: data.labels = {json.dumps(sorted(names, key=_as_number))}."
            )
        if word not in names:
            row.fail(
                f"{column} = {word or row.text(column)!r}: a label that the training data never has. "
                f"It has: {shortened(names)}. Leave the row out or name all classes in data.labels."
            )
    return tuple(names), words


def _training_rows(data: DataConfig, kind: str) -> Sequence[Row]:
    """The training rows of one kind: those that can be read, where the others are left out."""
    rows = [row for row in read_rows(data.train, data, "train") if (row.kind or data.kind) == kind]
    return sift(rows, data, "train")[0] if data.on_bad_row == "skip" else rows


def _as_number(name: str) -> tuple[float, str]:
    return (float(name) if WHOLE.fullmatch(name) else math.inf, name)


def _named(row: Row, word: str, names: Sequence[str], column: str) -> str:
    """The class that a cell names. Where no class is called by a number, a number counts the names from 0."""
    named = {name.lower(): name for name in names}.get(word.lower()) if word in ("True", "False") else word
    if named in names:
        return str(named)
    number = WHOLE.fullmatch(word)
    if number is None or any(map(WHOLE.fullmatch, names)):
        row.fail(f"{column} = {word or row.text(column)!r}: not in data.labels. Choose one of: {', '.join(names)}.")
    if not 0 <= int(number[1]) < len(names):
        row.fail(f"{column} = {word}: must be 0 to {len(names) - 1}, for data.labels = {shortened(list(names))}.")
    return names[int(number[1])]


# ------------------------------------------------------------------------------------------------- multiple choice


class _Choices(list[str]):
    """Texts to choose among; `names`: what a row calls each, where it does."""

    names: tuple[str, ...] = ()


def _offered(row: Row, column: str) -> _Choices:
    """The choices of a row: a list, an object of names and texts, lists of both, or a column for each."""
    several = [] if column in row.values else choice_columns(column)
    given: Any = _side_by_side(row, several) if several else row.get(column)
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        given = _parsed(row, column, given)
    names: tuple[str, ...] = ()
    if isinstance(given, dict) and given.keys() == {"label", "text"}:
        names, given = tuple(map(str, given["label"])), given["text"]
    elif isinstance(given, dict):
        given = {name: text for name, text in given.items() if not is_missing(text)}
        names, given = tuple(map(str, given)), list(given.values())
    if several and isinstance(given, list):
        given = [str(text) for text in given]  # a table may hold numbers
    if not isinstance(given, list) or len(given) < 2 or not all(isinstance(c, str) and c.strip() for c in given):
        row.fail(f"{column} = {shortened(given)}: must be a list of two or more texts.")
    found = _Choices(text.strip() for text in given)
    if names and len(names) != len(found):
        row.fail(f"{column} = {shortened(row.get(column))}: must have a label for each text.")
    found.names = names
    return found


def _side_by_side(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    """A choice of each column; the last ones may be empty."""
    values = {name: row.values[name] if name in row.values else row.get(name) for name in columns}
    filled = {name: value for name, value in values.items() if not is_missing(value)}
    for name in columns[: len(filled)]:
        row.get(name)  # says that it is empty, though those after it are not
    return filled


def _by_name(row: Row, answer: Any, offered: _Choices) -> Any:
    """The text of the choice that an answer calls by its name; else the answer."""
    name = str(answer)
    if name not in offered.names:
        return answer
    text = offered[offered.names.index(name)]
    if name in offered and text != name:
        row.fail(f"the answer {name!r} may be the name of the choice {text!r}, or the text of another. Rename one.")
    return text


@dataclass(frozen=True)
class _Right:
    """The right answers of rows as they are written, and as numbers where they are such."""

    rows: Sequence[Row]
    offered: Sequence[_Choices]
    answers: Sequence[Any]
    numbers: Sequence[int | None]
    spells: bool  # whether letters count choices

    @classmethod
    def read(cls, rows: Sequence[Row], offered: Sequence[_Choices], column: str) -> _Right:
        """Read the column of answers.

        A text that is one of its row's choices is that choice, unless another row has a text of its kind (a number, a
        letter) that is none: then all of that kind count choices.
        """
        answers = [_by_name(row, _plain(row.get(column)), texts) for row, texts in zip(rows, offered, strict=True)]
        unlike = [a for a, texts in zip(answers, offered, strict=True) if isinstance(a, str) and a not in texts]
        counts, spells = (any(kind.fullmatch(a) for a in unlike) for kind in (WHOLE, LETTER))
        return cls(rows, offered, answers, [_number(answer, counts) for answer in answers], spells)

    def base(self, column: str) -> int | None:
        """Whether numbers count choices from 0 or from 1: a 0 tells, and so does the number of a row's choices."""
        every = list(zip(self.rows, self.numbers, self.offered, strict=True))
        first = next((row for row, number, _ in every if number == 0), None)
        last = next((row for row, number, texts in every if number == len(texts)), None)
        if first is not None and last is not None:
            last.fail(
                f"{column} = {last.get(column)!r}: counts from 1, but row {first.number} of {first.source} from 0."
            )
        return None if first is last else int(last is not None)


def _indices(rows: Sequence[Row], offered: Sequence[_Choices], data: DataConfig, training: Training) -> Iterator[int]:
    """Which choice is right in each row; what letters and numbers stand for is settled by all rows."""
    column = data.columns.answer
    right = _Right.read(rows, offered, column)
    base = right.base(column)
    if base is None and training is not None and data.train != "docstrings":  # a coordinator of sites has no other
        train = training()
        base = _Right.read(train, [_offered(row, data.columns.choices) for row in train], column).base(column)
    if base != 0 and any(number is not None for number in right.numbers):
        why = "one is the number of its choices" if base else "none is 0 and none is the number of its choices"
        say(f"{rows[0].source}: numbers in {column!r} are taken to count choices from {base or 0}: {why}")
    for row, answer, number, texts in zip(rows, right.answers, right.numbers, offered, strict=True):
        index = -1 if number is None else number - (base or 0)
        if number is None and isinstance(answer, str):
            is_letter = right.spells and LETTER.fullmatch(answer)
            index = ord(answer.upper()) - ord("A") if is_letter else texts.index(answer) if answer in texts else -1
        if not 0 <= index < len(texts):
            row.fail(
                f"{column} = {row.get(column)!r}: must be an index from {base or 0} to {len(texts) - 1 + (base or 0)}, "
                f"a letter from A to {chr(ord('A') + len(texts) - 1)}, or one of the choices {shortened(texts)}."
            )
        yield index


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value


def _number(answer: Any, counts: bool) -> int | None:
    if isinstance(answer, str):
        number = WHOLE.fullmatch(answer) if counts else None
        return int(number[1]) if number else None
    return answer if isinstance(answer, int) and not isinstance(answer, bool) else None


# ----------------------------------------------------------------------------------------------------------- chats


def asked(row: Row, data: DataConfig) -> Chat:
    """A chat up to its last question, however a row spells it."""
    read = [message for message, _ in _conversation(row, data, is_answered=False)]
    while read and read[-1]["role"] == "assistant":
        read.pop()
    if not read:
        row.fail(f"{data.columns.messages} asks for nothing.")
    return Chat(tuple(read), (), _tools(row, data.columns.tools))


def _conversation(row: Row, data: DataConfig, is_answered: bool = True) -> list[tuple[dict[str, Any], bool]]:
    """The messages of a row, what stands before them too, each with whether it is trained."""
    read = _turns(row, data.columns.messages)
    if is_answered and not any(message["role"] == "assistant" for message, _ in read):
        row.fail(f"{data.columns.messages} has no message of role 'assistant'; there is nothing to learn from it.")
    if (before := row.values.get(data.columns.history)) not in ("", []) and not is_missing(before):
        read = [(message, False) for message, _ in _turns(row, data.columns.history)] + read
    if (system := row.values.get(data.columns.system)) and not is_missing(system):
        read = [({"role": "system", "content": row.text(data.columns.system)}, False), *read]
    return read


def _turns(row: Row, column: str) -> list[tuple[dict[str, Any], bool]]:
    """The messages of a column, each with whether it is an answer with something to learn."""
    turns = row.get(column)
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # as tables without lists hold one
        turns = _parsed(row, column, turns)
    if not isinstance(turns, list) or not turns:
        row.fail(f"{column} = {shortened(turns)}: must be a list of messages, each with 'role' and 'content'.")
    return [_message(row, f"{column}[{i}]", turn) for i, turn in enumerate(turns)]


def _respelt(row: Row, where: str, turn: dict[str, Any]) -> dict[str, Any]:
    """A ShareGPT turn, which is `from` somebody and has a `value`, as a message."""
    speaker, value = str(turn["from"]), turn.get("value")
    rest = {key: one for key, one in turn.items() if key not in ("from", "value")}
    if speaker == "function_call":
        calls = _parsed(row, f"{where}, value", value) if isinstance(value, str) else value
        return rest | {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    if speaker not in SPEAKERS:
        row.fail(f"{where} is from {speaker!r}: unknown. Choose one of: {', '.join((*SPEAKERS, 'function_call'))}.")
    return rest | {"role": SPEAKERS[speaker], "content": value}


def _message(row: Row, where: str, turn: Any) -> tuple[dict[str, Any], bool]:
    """A message as templates take it, and whether it is an answer with something to learn."""
    if isinstance(turn, dict) and "from" in turn and is_missing(turn.get("role")):
        turn = _respelt(row, where, turn)
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        row.fail(f"{where} = {shortened(turn)}: each message must have a text 'role' and a text 'content'.")
    if turn["role"] not in ROLES:
        row.fail(f"{where} holds role {turn['role']!r}: unknown. Choose one of: {', '.join(ROLES)}.")
    message = {key: value for key, value in turn.items() if not is_missing(value)}
    weight = message.pop("weight", 1)
    if weight not in (0, 1):
        row.fail(f"{where}, weight = {weight!r}: must be 0 (not trained) or 1.")
    if "tool_calls" in message:
        message["tool_calls"] = _calls(row, f"{where}, tool_calls", message["tool_calls"])
    if not isinstance(content := message.get("content", ""), str):
        message["content"] = _joined(row, where, content)
    elif "content" not in message and not message.get("tool_calls"):
        row.fail(f"{where} = {shortened(turn)}: each message must have a text 'role' and a text 'content'.")
    filled = any(value not in ("", [], {}) for key, value in message.items() if key not in ("role", "name"))
    return message, message["role"] == "assistant" and filled and weight == 1


def _joined(row: Row, where: str, parts: Any) -> str:
    """Parts of text as one text, as templates write them."""
    if not isinstance(parts, list):
        row.fail(f"{where}, content = {shortened(parts)}: must be text, or a list of parts of text.")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            row.fail(f"{where}, content has the part {shortened(part)}: only parts of type 'text' are read.")
    return "".join(part["text"] for part in parts)


def _calls(row: Row, where: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, however they were written."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        row.fail(f"{where} = {shortened(calls)}: must be a list of calls, each with a 'function'.")
    read = []
    for call in calls:
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            row.fail(f"{where} holds {shortened(call)}: its 'function' must have a 'name' and 'arguments'.")
        if isinstance(inner.get("arguments"), str):
            inner = inner | {"arguments": _parsed(row, f"{where}, arguments", inner["arguments"] or "{}")}
        read.append(call | {"function": inner} if "function" in call else inner)
    return read


def _tools(row: Row, column: str) -> tuple[Mapping[str, Any], ...]:
    tools = row.values.get(column)
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(row, column, tools)
    if is_missing(tools) or tools in ("", []):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        row.fail(f"{column} = {shortened(tools)}: must be a list of tools, each a JSON object.")
    return tuple(tools)


def _parsed(row: Row, where: str, words: str) -> Any:
    try:
        return json.loads(words)
    except ValueError as error:
        row.fail(f"{where} = {shortened(words)}: not readable as JSON: {error}")


# ---------------------------------------------------------------------------------------------------------- owners


def _with_owners(examples: Sequence[Example], rows: Sequence[Row], data: DataConfig) -> Iterator[Example]:
    """Add where each stands, its client and, to partition by, its label: these two where rows have such a column."""
    for row in rows:
        value = row.values.get(data.columns.client)
        if isinstance(value, (list, dict)):
            row.fail(f"{data.columns.client} = {shortened(value)}: must be the name or number of one client.")
    labels, clients = names_in(rows, data.columns.label), names_in(rows, data.columns.client)
    for example, row, label, client in zip(examples, rows, labels, clients, strict=True):
        yield replace(example, label=example.label or label, client=client, file=row.file, where=row.where)


def _check_named_columns(row: Row, data: DataConfig, split: Split) -> None:
    """Client and label are read where they are, but under a name that the user gave they must be there.

    Whose a row is, only those to train on have to say: all clients are tested on the same.
    """
    for role in ("client", "label") if split == "train" else ("label",):
        column = getattr(data.columns, role)
        if column != role and column not in row.values:
            row.get(column)


def columns_read(rows: Sequence[Row], data: DataConfig) -> set[str]:
    """The columns that are read in some of them."""
    return {column for _, read in _read_alike(rows, data) for column in read}


def unread_columns(rows: Sequence[Row], data: DataConfig) -> list[str]:
    """Columns that hold something and are not read; an answer that was rejected is left out on purpose."""
    return list(
        dict.fromkeys(
            str(column)
            for alike, read in _read_alike(rows, data)
            for row in alike
            for column, value in row.values.items()
            if column not in read | ({"rejected"} if "chosen" in read else set())
            and not is_missing(value)
            and value not in ("", [], {})
        )
    )


def _read_alike(rows: Sequence[Row], data: DataConfig) -> Iterator[tuple[list[Row], set[str]]]:
    """Rows that are read in one way, and the columns that are read of them."""
    ways: dict[tuple[str, str | None], list[Row]] = {}
    for row in rows:
        ways.setdefault((row.kind or data.kind, row.template), []).append(row)
    for (kind, own), alike in ways.items():
        template = data.template if own is None and kind == data.kind else own
        form = FORMATS[kind]
        yield alike, {str(c) for row in alike for c in row.values} if form.reads_all else form.columns(data, template)
