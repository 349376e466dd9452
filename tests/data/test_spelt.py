"""Kinds of data as other projects spell them: what is read, what is trained, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedalign.config.run import Columns, DataConfig
from fedalign.config.toml import load_config, read_config
from fedalign.data.formats import Example, load_examples, unread_columns
from fedalign.data.sources import read_rows
from fedalign.errors import UserError

ASKED = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Hello."}


def load(folder: Path, *rows: dict[str, Any], **data: Any) -> list[Example]:
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(str(file), DataConfig(**{"train": str(file), **data}), "train", 0)


def messages(example: Example) -> list[dict[str, Any]]:
    assert example.chat is not None
    return [dict(message) for message in example.chat.messages]


# Names.


def test_the_name_of_a_spelling_stands_for_a_kind_with_its_columns() -> None:
    config = load_config(None, ["data.kind=alpaca", "data.columns.response=reply"])
    assert (config.data.kind, config.data.columns.prompt) == ("instruction", "instruction")
    assert config.data.columns.response == "reply"  # what is given goes first
    assert read_config(config.to_toml()) == config
    assert DataConfig(kind="sharegpt", columns=Columns(system="setting")).columns == Columns(
        messages="conversations", system="setting"
    )


def test_alpaca(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"instruction": "Sum up.", "input": "Fever.", "output": "ill"}
    less = {"instruction": "Sum up.", "output": "ill"}
    one, two, three = load(tmp_path, row, row | {"input": ""}, less, kind="alpaca")
    assert (one.prompt, one.answer) == ("Sum up.\nFever.\nResponse:", " ill")
    assert two.prompt == three.prompt == "Sum up.\n\nResponse:"
    assert caplog.text == ""


# ShareGPT.


def test_sharegpt(tmp_path: Path) -> None:
    call = {"name": "look", "arguments": {"at": "sky"}}
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
        {"from": "user", "value": "Rain?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "blue"},
        {"from": "assistant", "value": "No.", "weight": 0},
    ]
    [one] = load(tmp_path, {"conversations": turns}, kind="sharegpt")
    assert [message["role"] for message in messages(one)] == [
        *("system", "user", "assistant", "user", "assistant", "tool", "assistant")
    ]
    assert messages(one)[4] == {"role": "assistant", "tool_calls": [call]}
    assert messages(one)[2] == SAID
    assert one.chat is not None
    assert one.chat.answers == (2, 4)


def test_a_system_column_stands_before_the_messages(tmp_path: Path) -> None:
    rows = [{"messages": [ASKED, SAID], "system": system} for system in ("Be brief.", "", None)]
    one, two, three = load(tmp_path, *rows, kind="chat")
    assert messages(one) == [{"role": "system", "content": "Be brief."}, ASKED, SAID]
    assert messages(two) == messages(three) == [ASKED, SAID]
    with pytest.raises(UserError, match="system = 7: must be text"):
        load(tmp_path, {"messages": [ASKED, SAID], "system": 7}, kind="chat")


def test_a_csv_holds_messages_as_json(tmp_path: Path) -> None:
    text = json.dumps([ASKED, SAID]).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages\n"{text}"\n')
    data = DataConfig(train=str(tmp_path / "a.csv"), kind="chat")
    [one] = load_examples(data.train, data, "train", 0)
    assert messages(one) == [ASKED, SAID]


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        ({"from": "alien", "value": "x"}, "conversations[0] is from 'alien': unknown. Choose one of: system, human"),
        ({"from": "human"}, "'role' and a text 'content'"),
        ({"from": "function_call", "value": "look"}, "conversations[0], value = 'look': not readable as JSON"),
        ({"from": "function_call", "value": "7"}, "must be a list of calls"),
        ({"from": ["human"], "value": "x"}, "unknown. Choose one of"),
    ],
)
def test_turns_that_nobody_says(tmp_path: Path, turn: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, {"conversations": [turn, {"from": "gpt", "value": "Hello."}]}, kind="sharegpt")
    assert told in str(caught.value)
    assert "line 1" in str(caught.value)


# Preference pairs.


def test_the_chosen_of_two_answers_is_trained_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": "Ill?", "chosen": "Rest.", "rejected": "No."}
    [one] = load(tmp_path, row, kind="preference")
    assert (one.prompt, one.answer) == ("Instruction: Ill?\nResponse:", " Rest.")
    assert "'chosen' is trained, 'rejected' is not used" in caplog.text
    assert "does not read" not in caplog.text


def test_the_chosen_of_two_chats_is_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    no = {"role": "assistant", "content": "No."}
    [one] = load(tmp_path, {"chosen": [ASKED, SAID], "rejected": [ASKED, no]}, kind="preference_chat")
    assert messages(one) == [ASKED, SAID]
    assert "'chosen' is trained, 'rejected' is not used" in caplog.text
    before = [ASKED, no, ASKED]
    row = {"prompt": before, "chosen": [SAID], "rejected": [no]}
    [two] = load(tmp_path, row, kind="preference_chat", columns={"history": "prompt"})
    assert messages(two) == [*before, SAID]
    assert two.chat is not None
    assert two.chat.answers == (3,)  # what stood before is not trained
    empty: list[Any] = [None, [], ""]
    for nothing in empty:
        [three] = load(tmp_path, {"messages": [ASKED, SAID], "history": nothing}, kind="chat")
        assert messages(three) == [ASKED, SAID]


# Choices.


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (["red", "green"], "B"),
        (["red", "green"], "green"),
        (["red", "green"], 1),
        (["red", "green"], 2),
        (["red", "green"], "2"),
        ({"A": "red", "B": "green"}, "B"),
        ({"1": "red", "2": "green"}, 2),
        ({"1": "red", "2": "green", "3": None}, "2"),
        ({"text": ["red", "green"], "label": ["A", "B"]}, "B"),
        ({"text": ["red", "green"], "label": ["1", "2"]}, "2"),
        ('["red", "green"]', "green"),
    ],
)
def test_choices_with_letters_numbers_or_names(tmp_path: Path, choices: Any, answer: Any) -> None:
    row = {"question": "Grass?", "choices": choices, "answer": answer}
    [one] = load(tmp_path, row, kind="multiple_choice")
    assert (one.answer, one.choices) == (" green", (" red", " green"))


def test_a_column_for_each_choice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question;A;B;C;answer\nGrass?;red;green;;B\n2 + 2?;3;4;5;B\n")
    data = DataConfig(train=str(tmp_path / "a.csv"), kind="multiple_choice", columns=Columns(choices="A, B,C"))
    one, two = load_examples(data.train, data, "train", 0)
    assert (one.answer, one.choices) == (" green", (" red", " green"))
    assert (two.answer, two.choices) == (" 4", (" 3", " 4", " 5"))
    assert unread_columns(list(read_rows(data.train, data, "train")), data) == []
    for content, told in (
        ("question;A;B;answer\nGrass?;red;green;B\n", "no column 'C'"),
        ("question;A;B;C;answer\nGrass?;red;;green;C\n", "column 'B' is empty"),
    ):
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(UserError, match=told):
            load_examples(data.train, data, "train", 0)


@pytest.mark.parametrize(
    ("choices", "answer", "told"),
    [
        ({"1": "2", "2": "4"}, "2", "'2' may be the name of the choice '4', or the text of another"),
        ({"A": "red", "B": "green"}, "C", "must be an index from 0 to 1, a letter from A to B, or one of"),
        ({"text": ["red", "green"], "label": ["A"]}, "A", "must have a label for each text"),
        ({"text": "red", "label": "A"}, "A", "must be a list of two or more texts"),
        ({"A": "red"}, "A", "must be a list of two or more texts"),
        ("red, green", "red", "must be a list of two or more texts"),
    ],
)
def test_choices_that_cannot_be_told_apart(tmp_path: Path, choices: Any, answer: Any, told: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, {"question": "?", "choices": choices, "answer": answer}, kind="multiple_choice")
    assert told in str(caught.value)
    assert "line 1" in str(caught.value)
