"""How files are written: delimiters, encodings, compression. A guess is told, a wrong one is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedalign.config.run import DataConfig
from fedalign.config.toml import load_config
from fedalign.data.formats import Example, load_examples
from fedalign.data.sources import Written, written_as
from fedalign.errors import UserError
from tests.conftest import make_site

CELLS = [["text", "label"], ["Käse; 2, größer", "süß"], ['er sagt "ja"\nund geht', "groß"]]


def csv_of(delimiter: str) -> str:
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in CELLS]
    return "".join(delimiter.join(row) + "\r\n" for row in quoted)


def load(path: Path, **data: Any) -> list[Example]:
    return load_examples(str(path), DataConfig(**{"train": str(path), **data}), "train", 0)


def read(path: Path, **data: Any) -> list[list[str]]:
    return [[one.prompt.removesuffix("\nLabel:"), one.label] for one in load(path, **data)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_csv_is_parted_by_what_its_header_is_parted_by(
    tmp_path: Path, delimiter: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(csv_of(delimiter).encode())
    assert read(file) == CELLS[1:]
    assert (f"{file}: cells are parted by {delimiter!r}" in caplog.text) == (delimiter != ",")
    assert written_as(file) == Written(file, "utf-8", delimiter)


def test_a_header_without_quotes_and_a_tsv(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.csv").write_text("\nid;text;label, short\n1;a, b;x\n")
    assert [one.answer for one in load(tmp_path / "a.csv", kind="text")] == ["a, b"]
    (tmp_path / "c.csv").write_text('5" pipe;text\n1;a\n2;b "quoted"\n')
    assert [one.answer for one in load(tmp_path / "c.csv", kind="text")] == ["a", 'b "quoted"']
    (tmp_path / "b.tsv").write_text("text,note\tlabel\na, b\tx\n")
    assert [one.label for one in load(tmp_path / "b.tsv", kind="text", columns={"text": "text,note"})] == ["x"]
    assert "b.tsv: cells" not in caplog.text


def test_a_delimiter_that_is_named_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;b,c\nx;1,2\n")
    assert [one.answer for one in load(tmp_path / "a.csv", kind="text", delimiter=";")] == ["x"]
    with pytest.raises(UserError, match=r"no column 'text'. There are: text;b, c"):
        load(tmp_path / "a.csv", kind="text", delimiter=",")
    (tmp_path / "b.csv").write_text("text;label\na;b;c\n")
    with pytest.raises(UserError, match="line 2 has more cells than the header, parted by ';'"):
        load(tmp_path / "b.csv")


@pytest.mark.parametrize(
    ("written", "guessed"),
    [
        ("utf-8", "utf-8"),
        ("utf-8-sig", "utf-8-sig"),
        ("utf-16", "utf-16"),
        ("utf-32", "utf-32"),
        ("cp1252", "cp1252"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_an_encoding_is_found(
    tmp_path: Path, written: str, guessed: str, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / f"a.{suffix}"
    rows = [dict(zip(CELLS[0], row, strict=True)) for row in CELLS[1:]]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = {"csv": csv_of(","), "jsonl": "\n".join(lines), "json": f"[{','.join(lines)}]"}[suffix]
    file.write_bytes(text.encode(written))
    assert read(file) == CELLS[1:]
    assert written_as(file).encoding == guessed
    assert ("is read as Windows-1252" in caplog.text) == (written == "cp1252")
    assert read(file, encoding=guessed) == CELLS[1:]


def test_utf_8_that_is_named_needs_no_mark_and_may_have_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(csv_of(","), encoding="utf-8-sig")
    assert read(tmp_path / "a.csv", encoding="UTF-8") == CELLS[1:]


@pytest.mark.parametrize("named", ["utf-8", "utf-16", "utf-16-be", "cp1252", "shift_jis", "utf-7"])
@pytest.mark.parametrize("written", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding_and_a_name_that_says_otherwise_is_told(
    tmp_path: Path, written: str, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(csv_of(",").encode(written))
    assert read(file, encoding=named) == CELLS[1:]
    agree = written.removesuffix("-sig") == named
    told = f"{file}: its byte order mark says {written.removesuffix('-sig')}, and so it is read: not as {named!r}"
    assert [line for line in caplog.messages if "mark" in line] == ([] if agree else [told])


@pytest.mark.parametrize("named", ["cp1252", "latin-1", "cp1250"])
def test_letters_of_utf_8_that_are_read_as_others_are_told(
    tmp_path: Path, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.csv"
    for content, is_told in (("text\nü\n".encode(), True), (b"text\nu\n", False), ("text\nü\n".encode(named), False)):
        caplog.clear()
        file.write_bytes(content)
        load(file, kind="text", encoding=named)
        lines = [line for line in caplog.messages if "valid UTF-8" in line]
        assert len(lines) == is_told
        assert all(f"{file}: is read as {named!r}" in line and 'encoding = "utf-8"' in line for line in lines)


@pytest.mark.parametrize("content", ["text\nä\n".encode("utf-16-le"), b"text\n\x81\xff\n"])
def test_what_fits_nothing_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(
        UserError, match=r"a\.csv: neither UTF-8 nor Windows-1252, or with zero bytes in it.* Name its enc"
    ):
        load(tmp_path / "a.csv", kind="text")


def test_a_wrong_encoding_that_is_named_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text\nä\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"a\.csv, after row 0: not readable as csv: 'utf-8' codec can't decode"):
        load(tmp_path / "a.csv", kind="text", encoding="utf-8")
    assert load(tmp_path / "a.csv", kind="text", encoding="cp1252")[0].answer == "ä"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.encoding=hex", 'data.encoding = "hex": no such encoding. Choose one of: auto, utf-8,'),
        ("data.encoding=latin-99", "no such encoding"),
        ("data.delimiter=::", 'must be "auto", or one character'),
        ('data.delimiter="\\n"', 'must be "auto", or one character'),
        ("data.delimiter=", 'must be "auto", or one character'),
    ],
)
def test_keys_that_name_nothing(override: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert told in str(caught.value)


# Compression.


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return bytes(sink.getvalue())


def test_zst(tmp_path: Path) -> None:
    packed = zstd(csv_of(";").encode("utf-16"))
    (tmp_path / "a.csv.zst").write_bytes(packed)
    assert read(tmp_path / "a.csv.zst") == CELLS[1:]
    (tmp_path / "b.csv.zst").write_bytes(packed[:-3])
    with pytest.raises(UserError, match=r"b\.csv\.zst, after row 0: not readable as csv\.zst: Truncated"):
        read(tmp_path / "b.csv.zst")
    pq.write_table(pa.table({"text": ["hi"], "label": ["x"]}), tmp_path / "c.parquet")
    (tmp_path / "c.parquet.zst").write_bytes(zstd((tmp_path / "c.parquet").read_bytes()))
    assert read(tmp_path / "c.parquet.zst") == [["hi", "x"]]


# Files that differ.


@pytest.fixture
def apart(tmp_path: Path) -> Path:
    """Three files: as [data] says; with other columns, delimiter and encoding; and of another kind."""
    folder = tmp_path / "sites"
    folder.mkdir()
    (folder / "east.jsonl").write_text('{"text": "rain falls", "label": "weather"}\n')
    (folder / "north.csv").write_bytes("label;text;note\n7;food;Käse schmeckt\n".encode("cp1252"))
    (folder / "south.jsonl").write_text('{"frage": "2 + 2?", "antwort": "4"}\n')
    return folder


def keys(folder: Path, **more: str) -> list[str]:
    north = {"delimiter": ";", "encoding": "cp1252", "columns.text": "note", "columns.label": "text"}
    south = {"kind": "instruction", "columns.prompt": "frage", "columns.response": "antwort"}
    named = {"north.csv": north, "south.jsonl": south}
    return [
        f"data.train={folder}",
        *(f'data.files."{file}".{name}={value}' for file, values in named.items() for name, value in values.items()),
        *(f"data.{name}={value}" for name, value in more.items()),
    ]


def test_files_of_a_folder_have_their_own_columns_and_kinds(apart: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load_config(None, keys(apart)).data
    east, north, south = load_examples(str(apart), data, "train", 0)
    assert (east.prompt, east.answer, east.file) == ("rain falls\nLabel:", " weather", "east")
    assert (north.prompt, north.answer, north.file) == ("Käse schmeckt\nLabel:", " food", "north")
    assert north.choices == east.choices == (" food", " weather")  # classes are those of all files
    assert (south.prompt, south.answer, south.choices) == ("Instruction: 2 + 2?\nResponse:", " 4", ())
    # what bears the name of another column is not taken for it, nor lost without a word
    assert "does not read: label (other)" in caplog.text


def test_a_template_of_a_file_is_over_its_own_columns(apart: Path) -> None:
    own = ['data.files."north.csv".template={text} {{}} {note} {label}:', r"data.template=<{text}>\n"]
    data = load_config(None, [*keys(apart), *own]).data
    east, north, south = load_examples(str(apart), data, "train", 0)
    assert east.prompt == "<rain falls>\n"
    assert north.prompt == "food {} Käse schmeckt 7:"
    assert south.prompt == "Instruction: 2 + 2?\nResponse:"  # of another kind: that template is not for it


def test_an_unknown_file_is_one_line(apart: Path) -> None:
    data = load_config(None, [f"data.train={apart}", 'data.files."nord.csv".kind=text']).data
    with pytest.raises(UserError) as caught:
        load_examples(str(apart), data, "train", 0)
    assert str(caught.value) == (
        "data.files = 'nord.csv': unknown. Choose one of: east.jsonl, north.csv, south.jsonl. Did you mean 'north.csv'?"
    )


def test_files_of_the_test_set_may_be_named(apart: Path) -> None:
    test = apart.parent / "proof.csv"
    test.write_text("a|b\nsnow|weather\n")
    more = [f"data.test={test}", 'data.files."proof.csv".columns.text=a', 'data.files."proof.csv".columns.label=b']
    data = load_config(None, [*keys(apart), *more]).data
    [proof] = load_examples(str(test), data, "test", 0)
    assert (proof.prompt, proof.choices) == ("snow\nLabel:", (" food", " weather"))


def test_of_a_test_file_of_another_kind_the_training_rows_of_that_kind_settle_what_it_means(tmp_path: Path) -> None:
    """Rows of [data] stand beside them, and hold neither choices nor labels."""
    for split, answer in (("train", 2), ("test", 1)):
        folder = tmp_path / split
        folder.mkdir()
        (folder / "a.jsonl").write_text('{"prompt": "Hi", "response": "Hello."}\n')
        row = {"question": "Grass?", "choices": ["red", "green"], "answer": answer}
        (folder / f"{split}-mc.jsonl").write_text(json.dumps(row))
        (folder / f"{split}-class.jsonl").write_text('{"text": "rain", "label": "weather"}\n')
    kinds = {"mc": "multiple_choice", "class": "classification"}
    files = [f'data.files."{split}-{k}.jsonl".kind={kind}' for split in ("train", "test") for k, kind in kinds.items()]
    data = load_config(None, [f"data.train={tmp_path}", "data.kind=instruction", *files]).data
    train, test = load_examples(str(tmp_path), data, "train", 0), load_examples(str(tmp_path), data, "test", 0)
    for examples, right in ((train, " green"), (test, " red")):
        found = {one.answer: one.choices for one in examples}
        assert found == {" Hello.": (), right: (" red", " green"), " weather": (" weather",)}


def test_the_columns_of_a_spelling_are_its_own_whatever_they_are_called_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "Why?", "context": "Fever.", "response": "Ill."}\n')
    rows = [{"instruction": "Sum up.", "output": "ill"}, {"instruction": "Sum up.", "input": "Rain.", "output": "wet"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = ["data.columns.input=context", "data.template={prompt} {context}", 'data.files."b.jsonl".kind=alpaca']
    data = load_config(None, [f"data.train={tmp_path}", "data.kind=instruction", *named]).data
    prompts = [one.prompt for one in load_examples(str(tmp_path), data, "train", 0)]
    assert prompts == ["Why? Fever.", "Sum up.\n\nResponse:", "Sum up.\nRain.\nResponse:"]


def test_a_site_reads_its_own_files_as_its_site_file_says(tmp_path: Path) -> None:
    (tmp_path / "north.csv").write_bytes("secret;note;label\nx;Käse;food\n".encode("utf-16-le"))
    own = 'delimiter = ";"\nencoding = "utf-16-le"\ncolumns = {text = "note"}\n'
    site = make_site(tmp_path, f'name = "ward"\n[data]\ntrain = "north.csv"\n[data.files."north.csv"]\n{own}')
    theirs = ['data.labels=["food"]', "data.encoding=cp1252", 'data.files."north.csv".columns.text=secret']
    data = site.localise(load_config(None, theirs)).data
    [one] = load_examples(data.train, data, "train", 0)
    assert (one.prompt, one.answer) == ("Käse\nLabel:", " food")


def test_files_of_chats_are_several_sequences_an_example() -> None:
    assert not load_config(None, ["data.kind=instruction", 'data.files."a.csv".kind=text']).data.has_chats
    assert load_config(None, ["data.kind=instruction", 'data.files."a.csv".kind=sharegpt']).data.has_chats


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ('data.files."a.csv".kind=poem', "data.files.a.csv.kind = 'poem': unknown. Choose one of: alpaca, chat,"),
        ('data.files."a.csv".columns.tekst=a', "'tekst' is nothing that a column is read as. Choose of: text, label"),
        ('data.files."a.csv".columns={text="a", label="a"}', "a column of its own, and 'a' is named 2 times"),
        ('data.files."a.csv".columns.text=', "a column of its own, and '' is named 1 times"),
        ('data.files."a.csv".colums=a', "data.files.a.csv.colums': unknown. Choose one of: data.files.a.csv.columns"),
        ('data.files."a.csv.kind=text', "write section.key=value"),
    ],
)
def test_mistakes_about_a_file(override: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
