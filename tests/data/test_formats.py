"""Rows of users' files -> examples, and what is said about rows that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedalign.config.run import Columns, DataConfig
from fedalign.data.formats import FORMATS, Example, load_examples
from fedalign.errors import UserError

Rows = list[dict[str, Any]]
NEWS: Rows = [
    {"text": "Oil rises again", "label": 1, "client": "a"},
    {"text": "United win the cup", "label": 0, "client": "b"},
    {"text": "Shares fall", "label": 1, "client": "a"},
]
QUESTIONS: Rows = [
    {"question": "Two and two?", "choices": ["three", "four"], "answer": 1},
    {"question": "Colour of grass?", "choices": ["red", "blue", "green"], "answer": "C"},
    {"question": "Largest?", "choices": ["cat", "whale"], "answer": "whale"},
]


def write(path: Path, rows: Rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(source: str, split: Any = "train", seed: int = 0, **data: Any) -> list[Example]:
    return load_examples(source, DataConfig(**{"train": source, **data}), split, seed)


def refused(rows: Rows, path: Path, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(write(path / "rows.jsonl", rows), **data)
    message = str(caught.value)
    assert "\n" not in message
    return message


# One three-row fixture for each kind.


def test_classification(tmp_path: Path) -> None:
    examples = load(write(tmp_path / "news.jsonl", NEWS), labels=("Sports", "Business"))
    assert examples[0] == Example(
        "Oil rises again\nLabel:", " Business", (" Sports", " Business"), "Business", client="a", file="news"
    )
    assert [example.answer for example in examples] == [" Business", " Sports", " Business"]


def test_instruction(tmp_path: Path) -> None:
    rows: Rows = [{"prompt": f"Say {word}.", "response": word} for word in ("yes", "no", "maybe")]
    examples = load(write(tmp_path / "a.jsonl", rows), kind="instruction")
    assert examples[1] == Example("Instruction: Say no.\nResponse:", " no", file="a")
    assert len(examples) == 3


def test_chat(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows: Rows = [
        {"messages": turns},
        {"messages": turns * 2},
        {"messages": [{"role": "system", "content": ""}, *turns]},
    ]
    examples = load(write(tmp_path / "a.jsonl", rows), kind="chat")
    assert examples[0].messages == (("user", "Hi"), ("assistant", "Hello"))
    assert [len(example.messages) for example in examples] == [2, 4, 3]
    assert examples[0].answer == "Hello"


def test_multiple_choice_takes_an_index_a_letter_or_the_text(tmp_path: Path) -> None:
    examples = load(write(tmp_path / "a.jsonl", QUESTIONS), kind="multiple_choice")
    assert examples[0] == Example("Question: Two and two?\nAnswer:", " four", (" three", " four"), file="a")
    assert [example.answer for example in examples] == [" four", " green", " whale"]
    assert [example.label for example in examples] == ["", "", ""]


def test_text(tmp_path: Path) -> None:
    examples = load(write(tmp_path / "a.jsonl", NEWS), kind="text")
    assert [(example.prompt, example.answer) for example in examples][2] == ("", "Shares fall")


def test_every_kind_has_a_fixture_above() -> None:
    assert sorted(FORMATS) == ["chat", "classification", "instruction", "multiple_choice", "text"]


# Sources.


def _as_csv(path: Path) -> str:
    path.write_text("text,label,client\nOil rises again,1,a\nUnited win the cup,0,b\nShares fall,1,a\n", "utf-8")
    return str(path)


def _as_json(path: Path) -> str:
    path.write_text(json.dumps(NEWS), encoding="utf-8")
    return str(path)


def _as_parquet(path: Path) -> str:
    pq.write_table(pa.Table.from_pylist(NEWS), path)
    return str(path)


@pytest.mark.parametrize(("suffix", "make"), [("csv", _as_csv), ("json", _as_json), ("parquet", _as_parquet)])
def test_the_same_rows_from_each_type_of_file(tmp_path: Path, suffix: str, make: Callable[[Path], str]) -> None:
    labels = ("Sports", "Business")
    expected = load(write(tmp_path / "news.jsonl", NEWS), labels=labels)
    assert load(make(tmp_path / f"news.{suffix}"), labels=labels) == expected


def test_a_folder_is_one_client_a_file(tmp_path: Path) -> None:
    write(tmp_path / "north.jsonl", NEWS[:2])
    write(tmp_path / "south.jsonl", NEWS[2:])
    write(tmp_path / "test.jsonl", NEWS[1:2])
    examples = load(str(tmp_path), kind="text")
    assert [example.file for example in examples] == ["north", "north", "south"]
    assert [example.answer for example in load(str(tmp_path), "test", kind="text")] == ["United win the cup"]


def test_a_folder_with_subfolders_for_splits(tmp_path: Path) -> None:
    write(tmp_path / "train" / "north.jsonl", NEWS)
    write(tmp_path / "check" / "north.jsonl", NEWS[:1])
    assert len(load(str(tmp_path), kind="text", test_split="check")) == 3
    assert len(load(str(tmp_path), "test", kind="text", test_split="check")) == 1


def test_a_single_file_has_no_test_split_unless_it_is_named_as_one(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", NEWS)
    assert load(source, "test", kind="text") == []
    assert len(load(source, "test", kind="text", test=source)) == 3


def test_test_examples_choose_among_the_classes_of_the_training_data(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"text": w, "label": w} for w in ("one", "two", "three")])
    test = write(tmp_path / "b.jsonl", [{"text": "two", "label": "two"}])
    assert load(test, "test", train=train, test=test)[0].choices == (" one", " three", " two")


def test_a_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(100)])
    draws = [[e.answer for e in load(source, seed=seed, kind="text", max_train=10)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 10
    assert draws[0] == sorted(draws[0], key=int)


def test_templates_may_use_any_column(tmp_path: Path) -> None:
    rows: Rows = [{"instruction": "Add.", "context": None, "response": "3"}]
    source = write(tmp_path / "a.jsonl", rows)
    examples = load(source, kind="instruction", template="{instruction} {{x}}{context}\n> ")
    assert (examples[0].prompt, examples[0].answer) == ("Add. {x}\n> ", "3")  # a space is there already


def test_a_column_named_as_label_labels_any_kind(tmp_path: Path) -> None:
    rows: Rows = [{**row, "subject": "maths"} for row in QUESTIONS]
    source = write(tmp_path / "a.jsonl", rows)
    assert load(source, kind="multiple_choice", columns=Columns(label="subject"))[0].label == "maths"


# Mistakes: each tells the row, the value, the rule and the choices.


def test_a_missing_column_lists_those_that_are_there(tmp_path: Path) -> None:
    message = refused(NEWS, tmp_path, columns=Columns(text="title"))
    assert "row 1" in message
    assert "'title'" in message
    assert "text, label, client" in message


def test_a_named_client_column_must_be_there(tmp_path: Path) -> None:
    assert "no column 'user'" in refused(NEWS, tmp_path, kind="text", columns=Columns(client="user"))


def test_integers_need_names(tmp_path: Path) -> None:
    assert "data.labels" in refused(NEWS, tmp_path)


def test_an_integer_outside_the_labels(tmp_path: Path) -> None:
    message = refused([*NEWS[1:2], {"text": "x", "label": -1}], tmp_path, labels=("Sports", "Business"))
    assert "row 2: label = -1: must be 0 to 1" in message


def test_a_text_outside_the_labels(tmp_path: Path) -> None:
    message = refused([{"text": "x", "label": "Sport"}], tmp_path, labels=("Sports", "Business"))
    assert "'Sport'" in message
    assert "Sports, Business" in message


def test_a_label_that_training_never_has(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"text": "x", "label": "one"}])
    test = write(tmp_path / "b.jsonl", [{"text": "x", "label": "one"}, {"text": "y", "label": "two"}])
    with pytest.raises(UserError, match=r"b\.jsonl, row 2: label = 'two'.*one"):
        load(test, "test", train=train, test=test)


def test_an_empty_file(tmp_path: Path) -> None:
    assert "no rows" in refused([], tmp_path)


def test_an_empty_text(tmp_path: Path) -> None:
    assert "row 2: column 'text' is empty" in refused([NEWS[0], {"text": " "}], tmp_path, kind="text")


def test_a_text_of_another_type(tmp_path: Path) -> None:
    assert "text = 7: must be text, not int" in refused([{"text": 7}], tmp_path, kind="text")


def test_choices_that_are_no_list(tmp_path: Path) -> None:
    rows: Rows = [{"question": "?", "choices": "three, four", "answer": 0}]
    assert "'three, four': must be a list" in refused(rows, tmp_path, kind="multiple_choice")


@pytest.mark.parametrize("answer", [2, -1, "C", "five", True, 1.5])
def test_an_answer_that_is_no_choice(tmp_path: Path, answer: object) -> None:
    rows: Rows = [{"question": "?", "choices": ["three", "four"], "answer": answer}]
    message = refused(rows, tmp_path, kind="multiple_choice")
    assert f"answer = {answer!r}: must be an index from 0 to 1, a letter from A to B" in message


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("Hi", "must be a list"),
        ([{"role": "user", "content": "Hi"}], "no message of role 'assistant'"),
        ([{"role": "human", "content": "Hi"}], "'human': unknown. Choose one of: system, user, assistant, tool"),
        ([{"role": "user"}], "must have a text 'role' and a text 'content'"),
    ],
)
def test_messages_that_are_no_chat(tmp_path: Path, messages: object, said: str) -> None:
    assert said in refused([{"messages": messages}], tmp_path, kind="chat")


def test_a_template_with_an_unknown_column(tmp_path: Path) -> None:
    assert "no column 'title'" in refused(NEWS, tmp_path, kind="text", template="{title}")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x"}\nnot json\n', "after row 1: not readable as jsonl"),
        ("a.jsonl", "[1]\n", "row 1: [1]: must be an object"),
        ("a.json", '{"text": "x"}', "must hold one list"),
        ("a.csv", "text\nx,y\n", "more cells than the header"),
        ("a.parquet", "no parquet", "not readable as parquet"),
        ("a.txt", "x", "files of type '.txt' are not read. Choose one of: .jsonl, .json, .csv, .parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load(str(tmp_path / name), kind="text")
    assert said in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load(str(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="holds no data file"):
        load(str(tmp_path))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)


@pytest.mark.usefixtures("offline")
def test_a_data_set_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'nobody/nothing': neither a file, a folder nor a data set"):
        load("nobody/nothing")


@pytest.mark.usefixtures("offline")
def test_classes_of_a_hub_data_set_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    asked: list[tuple[object, ...]] = []

    def load_dataset(*args: object, split: str) -> datasets.Dataset:
        asked.append((*args, split))
        return table

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert [e.answer for e in load("owner/name", subset="main", train_split="all")] == [" yes", " no"]
    assert [e.answer for e in load("owner/name", labels=("nein", "ja"))] == [" ja", " nein"]
    assert asked == [("owner/name", "main", "all"), ("owner/name", None, "train")]


@pytest.mark.usefixtures("offline")
def test_a_hub_data_set_without_a_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *_: ["train"])
    assert load_examples("owner/name", DataConfig(train="owner/name"), "test", 0) == []
    with pytest.raises(UserError, match="owner/name"):  # asked for by name it must be there
        load_examples("owner/name", DataConfig(test="owner/name"), "test", 0)
