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

from fedalign.config.run import KINDS, SPELLINGS, Columns, DataConfig
from fedalign.data import formats
from fedalign.data.formats import OURS, Chat, Example, load_examples
from fedalign.data.sources import Row
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
    chats = [example.chat for example in examples if example.chat]
    assert chats[0] == Chat(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}), (1,))
    assert [(len(chat.messages), chat.answers) for chat in chats] == [(2, (1,)), (4, (1, 3)), (3, (2,))]
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
    assert sorted(OURS) == ["chat", "classification", "instruction", "multiple_choice", "text"]


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
    assert "line 1" in message
    assert "'title'" in message
    assert "text, label, client" in message


def test_a_named_client_column_must_be_there(tmp_path: Path) -> None:
    assert "no column 'user'" in refused(NEWS, tmp_path, kind="text", columns=Columns(client="user"))


def test_rows_to_test_on_need_not_say_whose_they_are(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", NEWS)
    test = load_examples(source, DataConfig(test=source, kind="text", columns=Columns(client="user")), "test", 0)
    assert [one.client for one in test] == [""] * len(NEWS)


def test_integers_need_names(tmp_path: Path) -> None:
    assert "data.labels" in refused(NEWS, tmp_path)


def test_an_integer_outside_the_labels(tmp_path: Path) -> None:
    message = refused([*NEWS[1:2], {"text": "x", "label": -1}], tmp_path, labels=("Sports", "Business"))
    assert "line 2: label = -1: must be 0 to 1" in message


def test_a_text_outside_the_labels(tmp_path: Path) -> None:
    message = refused([{"text": "x", "label": "Sport"}], tmp_path, labels=("Sports", "Business"))
    assert "'Sport'" in message
    assert "Sports, Business" in message


def test_a_label_that_training_never_has(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"text": "x", "label": "one"}])
    test = write(tmp_path / "b.jsonl", [{"text": "x", "label": "one"}, {"text": "y", "label": "two"}])
    with pytest.raises(UserError, match=r"b\.jsonl, line 2: label = 'two'.*one"):
        load(test, "test", train=train, test=test)


def test_an_empty_file(tmp_path: Path) -> None:
    assert "no rows" in refused([], tmp_path)


def test_an_empty_text(tmp_path: Path) -> None:
    rows = [NEWS[0], {"text": " ", "label": 0}]
    assert "line 2: column 'text' is empty" in refused(rows, tmp_path, labels=("Sports", "Business"))


def test_a_text_of_another_type(tmp_path: Path) -> None:
    assert "text = 7: must be text, not int" in refused([{"text": 7}], tmp_path, kind="text")


def test_choices_that_are_no_list(tmp_path: Path) -> None:
    rows: Rows = [{"question": "?", "choices": "three, four", "answer": 0}]
    assert "'three, four': must be a list" in refused(rows, tmp_path, kind="multiple_choice")


@pytest.mark.parametrize("answer", [3, -1, "C", "five", True, 1.5])
def test_an_answer_that_is_no_choice(tmp_path: Path, answer: object) -> None:
    rows: Rows = [{"question": "?", "choices": ["three", "four"], "answer": answer}]
    message = refused(rows, tmp_path, kind="multiple_choice")
    assert f"answer = {answer!r}: must be an index from 0 to 1, a letter from A to B" in message


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("Hi", "must be a list"),
        ([{"role": "user", "content": "Hi"}], "no message of role 'assistant'"),
        (
            [{"role": "human", "content": "Hi"}],
            "'human': unknown. Choose one of: system, developer, user, assistant, tool",
        ),
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
        ("a.jsonl", '{"text": "x"}\nnot json\n', "line 2: not readable as JSON: Expecting value (column 1)."),
        ("a.jsonl", "[1]\n", "line 1: [1]: must be an object"),
        ("a.json", '{"text": "x"}', "must hold one list"),
        ("a.csv", "text\nx,y\n", "more cells than the header"),
        ("a.parquet", "no parquet", "not readable as parquet"),
        ("a.txt", "x", "files of type '.txt' are not read. Choose one of: .jsonl, .json, .csv, .tsv, .parquet"),
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


def test_a_data_set_that_the_hub_does_not_give() -> None:
    with pytest.raises(UserError, match=r"'nobody/nothing': neither a file, a folder nor a data set"):
        load("nobody/nothing")


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


def test_a_hub_data_set_without_a_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *_: ["train"])
    assert load_examples("owner/name", DataConfig(train="owner/name"), "test", 0) == []
    with pytest.raises(UserError, match="owner/name"):  # asked for by name it must be there
        load_examples("owner/name", DataConfig(test="owner/name"), "test", 0)


# Labels mean what the file says.

STARS = ["1", "2", "3", "4", "5"]


def labels(path: Path, values: list[Any], **data: Any) -> list[str]:
    source = write(path, [{"text": f"x{i}", "label": value} for i, value in enumerate(values)])
    return [example.label for example in load(source, **data)]


def as_csv(path: Path, values: list[str], **data: Any) -> list[str]:
    path.write_text("text,label\n" + "".join(f"x{i},{value}\n" for i, value in enumerate(values)))
    return [example.label for example in load(str(path), **data)]


def test_numbers_that_are_names_are_names_in_every_type_of_file(tmp_path: Path) -> None:
    values = [1, 2, 3, 4, 1]
    expected = ["1", "2", "3", "4", "1"]
    for written in (values, [float(value) for value in values], [str(value) for value in values]):
        assert labels(tmp_path / "a.jsonl", list(written), labels=STARS) == expected
        assert as_csv(tmp_path / "a.csv", list(map(str, written)), labels=STARS) == expected
        pq.write_table(pa.table({"text": list("abcde"), "label": written}), tmp_path / "a.parquet")
        assert [e.label for e in load(str(tmp_path / "a.parquet"), labels=STARS)] == expected
    with pytest.raises(UserError, match=r"(row|line) 2: label = '0': not in data.labels. Choose one of: 1, 2, 3, 4, 5"):
        labels(tmp_path / "a.jsonl", [1, 0], labels=STARS)


def test_numbers_that_are_no_names_count_them(tmp_path: Path) -> None:
    for values in ([0, 1, 1], [0.0, 1.0, 1.0], ["0", "1", "b"]):
        assert labels(tmp_path / "a.jsonl", list(values), labels=("a", "b")) == ["a", "b", "b"]
        assert as_csv(tmp_path / "a.csv", list(map(str, values)), labels=("a", "b")) == ["a", "b", "b"]


@pytest.mark.parametrize("word", ["NA", "None", "null", "nan"])
def test_a_word_for_nothing_is_a_word_and_a_class_of_that_name_is_told(
    tmp_path: Path, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.csv").write_text(f"text,label\n{word},x\nb,{word}\nc,{word}\n")
    write(tmp_path / "b.jsonl", [{"text": word, "label": "x"}, {"text": "b", "label": word}])
    for name, count in (("a.csv", 2), ("b.jsonl", 1)):
        source = str(tmp_path / name)
        caplog.clear()
        examples = load(source)
        assert examples[0].prompt == f"{word}\nLabel:"
        assert examples[1].label == word
        [told] = [line for line in caplog.messages if "is a class of that name" in line]
        assert told.startswith(f"{source}: {word!r} ({count}) in column 'label'")
        caplog.clear()
        load(source, labels=("x", word))
        assert "is a class of that name" not in caplog.text
    (tmp_path / "c.csv").write_text("text,label\na,x\nb,\n")
    with pytest.raises(UserError, match=r"c\.csv, row 2: column 'label' is empty"):
        load(str(tmp_path / "c.csv"))


def test_truth_is_named(tmp_path: Path) -> None:
    names = ("false", "true")
    assert labels(tmp_path / "a.jsonl", [True, False], labels=names) == ["true", "false"]
    assert as_csv(tmp_path / "a.csv", ["True", "False"], labels=names) == ["true", "false"]
    assert labels(tmp_path / "a.jsonl", [True, False]) == as_csv(tmp_path / "a.csv", ["True", "False"])
    with pytest.raises(UserError, match=r"label = 'True': not in data.labels. Choose one of: ham, spam"):
        labels(tmp_path / "a.jsonl", [True, False], labels=("ham", "spam"))


def test_categories(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "label": pa.array(["x", "y"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [e.label for e in load(str(tmp_path / "a.parquet"))] == ["x", "y"]


def with_classes(path: Path, codes: list[int | None], *names: str, column: str = "label") -> str:
    """Parquet as Hugging Face datasets writes it, with the names of the classes beside the schema."""
    texts = [f"x{i}" for i in range(len(codes))]
    features = {"text": datasets.Value("string"), column: datasets.ClassLabel(names=list(names))}
    table = datasets.Dataset.from_dict({"text": texts, column: codes}, features=datasets.Features(features))
    table.to_parquet(path)
    return str(path)


def test_numbers_whose_names_stand_in_the_file_are_these_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = with_classes(tmp_path / "a.parquet", [1, 0, 1], "nay", "yea")
    assert [example.label for example in load(source)] == ["yea", "nay", "yea"]
    assert "numbers in 'label' are classes that the data names: 0 nay, 1 yea; -1 is none" in caplog.text
    assert [example.label for example in load(source, labels=("yea", "nay", "maybe"))] == ["yea", "nay", "yea"]
    assert "data.labels calls" not in caplog.text
    assert [example.label for example in load(source, labels=("nope", "yep"))] == ["yep", "nope", "yep"]
    assert "data.labels calls the classes in 'label', in this order: ['nope', 'yep']" in caplog.text
    with pytest.raises(UserError, match=r"row 1: label = 'yea': not in data.labels. Choose one of: nay, yep"):
        load(source, labels=("nay", "yep"))
    stars = with_classes(tmp_path / "b.parquet", [0, 4], *STARS)
    assert [example.label for example in load(stars, labels=STARS)] == ["1", "5"]  # codes are no names
    owned = with_classes(tmp_path / "c.parquet", [0, 1], "north", "south", column="client")
    assert [example.client for example in load(owned, kind="text")] == ["north", "south"]


def test_each_file_names_its_own_classes(tmp_path: Path) -> None:
    with_classes(tmp_path / "a.parquet", [0, 1], "no", "yes")
    with_classes(tmp_path / "b.parquet", [0, 1], "yes", "no")
    (tmp_path / "c.csv").write_text("text,label\nx,yes\n")
    assert [example.label for example in load(str(tmp_path))] == ["no", "yes", "yes", "no", "yes"]


def test_a_class_that_the_file_does_not_name(tmp_path: Path) -> None:
    for none in (-1, None):
        source = with_classes(tmp_path / "a.parquet", [0, none], "no", "yes")
        with pytest.raises(
            UserError, match=r"a\.parquet, row 2: column 'label' is empty. Fill it, or leave such rows out"
        ):
            load(source)
        assert len(load(source, kind="text")) == 2
    names = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    table = pa.table({"text": ["x"], "label": [2]}).replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"row 1: label = 2: the classes that .*b\.parquet names are 0 to 1\."):
        load(str(tmp_path / "b.parquet"))
    for metadata in ("{", "[]", '{"info": {"features": {"label": {"_type": "ClassLabel"}}}}'):
        pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "c.parquet")
        with pytest.raises(UserError, match=r"c\.parquet: its Hugging Face metadata cannot be read"):
            load(str(tmp_path / "c.parquet"))


def test_integers_without_names_are_refused_in_every_type_of_file(tmp_path: Path) -> None:
    said = r'(row|line) 1: label = 3: an integer without a name.*data.labels = \["2", "3", "11"\]'
    with pytest.raises(UserError, match=said):
        labels(tmp_path / "a.jsonl", [3, 2, 11])
    with pytest.raises(UserError, match=said):
        as_csv(tmp_path / "a.csv", ["3", "2", "11"])


def test_one_letter_written_in_two_ways_is_one_class(tmp_path: Path) -> None:
    assert labels(tmp_path / "a.jsonl", ["caf\u00e9", "cafe\u0301"]) == ["caf\u00e9"] * 2
    assert labels(tmp_path / "a.jsonl", ["caf\u00e9"], labels=("cafe\u0301", "bar")) == ["caf\u00e9"]


@pytest.mark.parametrize("value", ["²", 1.5, float("nan"), ["a"], None, ""])
def test_a_label_that_is_no_class(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UserError, match="line 1"):
        labels(tmp_path / "a.jsonl", [value, "a"], labels=("a", "b"))


@pytest.mark.parametrize("names", [("a", "a"), ("a", " "), ("\u00e9", "e\u0301")])
def test_each_class_needs_a_name_of_its_own(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises((UserError, ValueError), match="labels"):  # by the configuration, if it looks
        labels(tmp_path / "a.jsonl", ["a"], labels=names)


# Choices: what numbers and letters stand for is settled by the whole file.


def chosen(path: Path, answers: list[Any], choices: list[list[str]] | None = None, split: Any = "train") -> list[str]:
    offered = choices or [["red", "green", "blue"]] * len(answers)
    rows = [{"question": "?", "choices": c, "answer": a} for a, c in zip(answers, offered, strict=True)]
    source = write(path / "a.jsonl", rows)
    return [example.answer.strip() for example in load(source, split, kind="multiple_choice", test=source)]


def test_numbers_count_from_one_where_one_is_the_number_of_choices(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert chosen(tmp_path, [1, 3, 2]) == ["red", "blue", "green"]
    assert "a.jsonl: numbers in 'answer' are taken to count choices from 1: one is the number of" in caplog.text
    assert chosen(tmp_path, ["A", "3", 1.0]) == ["red", "blue", "red"]  # numbers beside letters, as text too


def test_numbers_count_from_zero_where_one_is_zero(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert chosen(tmp_path, [0, "2", "c"]) == ["red", "blue", "blue"]
    assert caplog.text == ""
    with pytest.raises(UserError, match=r"line 2: answer = 3: counts from 1, but row 1 of .* from 0"):
        chosen(tmp_path, [0, 3])


def test_numbers_that_tell_nothing_count_from_zero_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert chosen(tmp_path, [1, 2]) == ["green", "blue"]
    assert "taken to count choices from 0: none is 0 and none is the number of its choices" in caplog.text


def test_a_test_set_counts_as_the_training_data_where_it_tells_nothing(tmp_path: Path) -> None:
    choices = [["red", "green", "blue"]]
    train = write(tmp_path / "a.jsonl", [{"question": "?", "choices": choices[0], "answer": n} for n in (1, 3)])
    test = write(tmp_path / "b.jsonl", [{"question": "?", "choices": choices[0], "answer": 2}])
    assert load(test, "test", kind="multiple_choice", train=train, test=test)[0].answer == " green"


def test_an_answer_that_is_a_choice_is_that_choice(tmp_path: Path) -> None:
    numbers = [["3", "1", "2"], ["10", "2", "0"]]
    assert chosen(tmp_path, ["1", "2"], numbers) == ["1", "2"]  # both stand there: they are texts
    assert chosen(tmp_path, ["1", "0"], [numbers[0], ["x", "y", "z"]]) == ["1", "x"]  # "0" does not: all count
    assert chosen(tmp_path, [1, 0], numbers) == ["1", "10"]
    assert chosen(tmp_path, ["B", "A"], [["B", "A"], ["A", "C"]]) == ["B", "A"]


@pytest.mark.parametrize("answer", ["²", "ß", "Ж", 4, "4", "D", float("nan"), None])
def test_an_answer_that_is_nothing_of_the_kind(tmp_path: Path, answer: Any) -> None:
    with pytest.raises(UserError, match="line 2"):
        chosen(tmp_path, ["A", answer])


# What trains nothing is left out and named.


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_an_empty_answer(tmp_path: Path, empty: str | None, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "x", "response": said} for said in ("y", empty, "z")])
    assert [example.answer for example in load(source, kind="instruction")] == [" y", " z"]
    assert "1 (" in caplog.text
    assert "a.jsonl, line 2) with nothing to learn from, left out" in caplog.text
    source = write(tmp_path / "b.jsonl", [{"text": "x"}, {"text": empty}])
    assert len(load(source, kind="text")) == 1
    source = write(tmp_path / "c.jsonl", [{"text": empty}])
    with pytest.raises(UserError, match=r"c\.jsonl': no row has an answer to learn from"):
        load(source, kind="text")


# Chats.


def talk(path: Path, *turns: dict[str, Any], **row: Any) -> Chat:
    [example] = load(write(path / "a.jsonl", [{"messages": turns, **row}]), kind="chat")
    assert example.chat is not None
    return example.chat


USER: dict[str, Any] = {"role": "user", "content": "Hi"}
ASSISTANT: dict[str, Any] = {"role": "assistant", "content": "Hello"}


def test_turns_of_no_weight_and_empty_ones_are_no_answers(tmp_path: Path) -> None:
    turns = (USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "content": ""}, USER, {**ASSISTANT, "weight": 1})
    found = talk(tmp_path, *turns)
    assert found.answers == (5,)
    assert found.messages[1] == ASSISTANT  # templates know no weights


def test_tool_calls_and_tools_however_they_are_written(tmp_path: Path) -> None:
    arguments = {"city": "Oslo"}
    for written in (arguments, json.dumps(arguments)):
        call = {"type": "function", "function": {"name": "weather", "arguments": written}}
        for tools in ([{"name": "weather"}], json.dumps([{"name": "weather"}])):
            found = talk(tmp_path, USER, {"role": "assistant", "content": None, "tool_calls": [call]}, tools=tools)
            assert found.tools == ({"name": "weather"},)
            assert found.answers == (1,)
            expected = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
            assert found.messages[1] == {"role": "assistant", "tool_calls": [expected]}


def test_parts_of_text_are_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    assert (
        talk(tmp_path, {"role": "developer", "content": "x"}, USER, {**ASSISTANT, "content": parts}).messages[2]
        == ASSISTANT
    )


@pytest.mark.parametrize(
    ("turn", "row", "said"),
    [
        ({"content": [{"type": "image", "url": "x"}]}, {}, "messages[1], content has the part {'type': 'image'"),
        ({"content": 7}, {}, "messages[1], content = 7: must be text, or a list of parts of text"),
        ({"weight": 0.5}, {}, "messages[1], weight = 0.5: must be 0 (not trained) or 1"),
        ({"tool_calls": "f()"}, {}, "messages[1], tool_calls = 'f()': must be a list of calls"),
        ({"tool_calls": [{"function": {}}]}, {}, "its 'function' must have a 'name' and 'arguments'"),
        ({"tool_calls": [{"name": "f", "arguments": "{"}]}, {}, "tool_calls, arguments = '{': not readable as JSON"),
        ({"content": None}, {}, "must have a text 'role' and a text 'content'"),
        ({}, {"tools": "f"}, "tools = 'f': not readable as JSON"),
        ({}, {"tools": {"name": "f"}}, "must be a list of tools"),
    ],
)
def test_messages_that_no_template_takes(tmp_path: Path, turn: dict[str, Any], row: dict[str, Any], said: str) -> None:
    message = refused([{"messages": [USER, {**ASSISTANT, **turn}], **row}], tmp_path, kind="chat")
    assert said in message
    assert "rows.jsonl, line 1: " in message


# Rows that are left out.


def test_a_training_row_that_is_left_out_settles_nothing_of_the_test_split(tmp_path: Path) -> None:
    bad = {"question": "Broken?", "choices": ["one"], "answer": 0}
    train = [bad, {"question": "Grass?", "choices": ["red", "green"], "answer": 2}, bad]
    test = [{"question": "Sky?", "choices": ["red", "blue", "green"], "answer": 2}, bad]
    source, other = write(tmp_path / "train.jsonl", train), write(tmp_path / "test.jsonl", test)
    given: Any = {"train": source, "test": other, "kind": "multiple_choice", "on_bad_row": "skip"}
    [one] = load_examples(other, DataConfig(**given), "test", 0)
    assert one.answer == " blue"  # numbers count from 1, as those of the row that is trained


def test_classes_of_rows_that_are_left_out_are_no_choices(tmp_path: Path) -> None:
    train: Rows = [{"text": "rain", "label": "weather"}, {"text": "bread", "label": "food"}, {"label": "lost"}]
    test: Rows = [{"text": "snow", "label": "weather"}, {"text": "gone", "label": "lost"}]
    source, other = write(tmp_path / "train.jsonl", train), write(tmp_path / "test.jsonl", test)
    given: Any = {"train": source, "test": other, "on_bad_row": "skip"}
    trained = load_examples(source, DataConfig(**given), "train", 0)
    [scored] = load_examples(other, DataConfig(**given), "test", 0)
    assert {one.choices for one in (*trained, scored)} == {(" food", " weather")}


def test_a_training_row_that_settles_the_test_split_and_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not left out of the test rows for ever, which it is none of."""
    row = {"question": "Grass?", "choices": ["red", "green"], "answer": 1}
    broken = Row({"question": "Broken?", "choices": ["one"], "answer": 0}, "train.jsonl", 7)
    monkeypatch.setattr(formats, "_training_rows", lambda *_: [broken])
    rows = [Row(row, "test.jsonl", 1)]
    with pytest.raises(UserError, match=r"train.jsonl, \w+ 7: choices"):
        formats.sift(rows, DataConfig(kind="multiple_choice", train="train.jsonl", on_bad_row="skip"), "test")


# Formats.


def test_a_kind_of_data_is_one_line() -> None:
    assert set(OURS) == set(KINDS)
    roles = {role for form in OURS.values() for role in form.roles}
    assert roles <= set(Columns.model_fields)
    for spelling in SPELLINGS.values():
        assert spelling["kind"] in KINDS
        assert set(spelling["columns"]) <= set(Columns.model_fields)


@pytest.mark.parametrize(
    "template", ["", "Say:", "{{}}", "{}", "{text", "{text.real.x}", "{text:9999999999}", "{text!r}", "{0.x[}"]
)
def test_a_template_that_cannot_be_filled(tmp_path: Path, template: str) -> None:
    with pytest.raises((UserError, ValueError), match="template"):  # by the configuration, if it looks
        load(write(tmp_path / "a.jsonl", NEWS), kind="text", template=template)
