"""Files as people have them are recognised, and what is written for them reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.data.formats import Example, load_examples
from fedalign.data.sources import read_rows
from fedalign.doctor.recognise import Recognised, recognise
from tests.conftest import Command

ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        "chat",
        "Hello.",
    ),
    "pairs": ({"prompt": "Ill?", "chosen": "Rest.", "rejected": "No."}, "instruction", "Rest."),
    "chats": ({"chosen": [ASKED, SAID], "rejected": [ASKED]}, "chat", "Hello."),
    "prompted": ({"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID]}, "chat", "Hello."),
    "arc": (
        {"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"},
        "multiple_choice",
        "4",
    ),
    "columns": ({"question": "2 + 2?", "A": "3", "B": "4", "answer": "B"}, "multiple_choice", "4"),
    "options": ({"question": "2 + 2?", "option1": "3", "option2": "4", "answer": 2}, "multiple_choice", "4"),
    "alpaca": ({"instruction": "Sum up.", "input": "Fever.", "output": "ill"}, "instruction", "ill"),
}


def known(source: Path) -> Recognised:
    return recognise(str(source), list(read_rows(str(source), Config().data, "train")))


def examples(source: Path) -> list[Example]:
    data = load_config({"data": known(source).tables}).data
    return load_examples(str(source), data, "train", 0)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_spellings(name: str, tmp_path: Path) -> None:
    row, kind, answer = ROWS[name]
    file = write(tmp_path / "a.jsonl", row, row)
    assert load_config({"data": known(file).tables}).data.kind == kind
    assert [one.answer.strip() for one in examples(file)] == [answer] * 2


def test_how_a_file_is_written_is_found_and_said(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes("text;label\nKäse;süß\n".encode("cp1252"))
    found = known(file)
    assert found.tables == {
        "train": str(file),
        "kind": "classification",
        "delimiter": ";",
        "encoding": "cp1252",
    }
    assert found.told == "texts with a class; cells parted by ';'; encoded in cp1252"


def test_files_that_differ_are_mapped_each(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *[{"instruction": "Sum up.", "input": "Fever.", "output": "ill"}] * 3)
    write(tmp_path / "b.jsonl", {"prompt": "Well?", "response": "yes"})
    write(tmp_path / "c.jsonl", {"messages": [ASKED, SAID]})
    (tmp_path / "d.csv").write_bytes("text;label\nKäse;süß\n".encode("cp1252"))
    found = known(tmp_path)
    assert found.tables == {
        "train": str(tmp_path),
        "kind": "alpaca",
        "files": {
            "b.jsonl": {
                "template": "Instruction: {prompt}\nResponse:",
                "columns": {"prompt": "prompt", "response": "response"},
            },
            "c.jsonl": {"kind": "chat"},
            "d.csv": {"kind": "classification", "delimiter": ";", "encoding": "cp1252"},
        },
    }
    assert "3 files differ from the rest: [data.files]" in found.told
    read = examples(tmp_path)
    assert [one.answer.strip() for one in read] == ["ill", "ill", "ill", "yes", "Hello.", "süß"]
    assert read[3].prompt == "Instruction: Well?\nResponse:"
    assert (read[5].prompt, read[5].choices) == ("Käse\nLabel:", (" süß",))


def test_a_file_of_pairs_of_chats_beside_others(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *[{"prompt": "Well?", "response": "yes"}] * 2)
    write(tmp_path / "b.jsonl", {"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID]})
    pair = examples(tmp_path)[-1]
    assert pair.chat is not None
    assert pair.chat.messages == (ASKED, SAID)  # the prompt stands before


def test_files_of_one_kind_with_other_delimiters(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,one\n")
    (tmp_path / "b.csv").write_text("text;label\ny;two\n")
    assert known(tmp_path).tables["files"] == {"b.csv": {"delimiter": ";"}}
    (tmp_path / "a.csv").write_text("text;label\nx;one\n")
    assert known(tmp_path).tables == {"train": str(tmp_path), "kind": "classification", "delimiter": ";"}


def test_the_command_shows_a_file_as_it_is_recognised(fedalign: Command, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *[{"instruction": "Sum up.", "input": "Fever.", "output": "ill"}] * 20)
    argv = ("data", file, "--set", "clients.partition=iid", "--set", "clients.count=2")
    code, out, errors = fedalign(*argv)
    assert code == 0, errors
    assert "recognised by its columns: Alpaca: instruction, input, output" in out
    assert "instruction: 20 examples" in out
    assert "nothing uses" not in out
    code, out, errors = fedalign(*argv, "--set", r"data.template=Do: {instruction}\nSay:")
    assert "nothing uses input" in out
