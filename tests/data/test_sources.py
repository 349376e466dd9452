"""Files and folders as rows: nothing is lost by its name, and what cannot be read says why."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedalign.config.run import ClientsConfig, Columns, DataConfig
from fedalign.data.formats import Example, load_examples
from fedalign.data.partition import partition
from fedalign.errors import UserError

ROW = json.dumps({"text": "hi"}) + "\n"


def load(source: Path, split: Any = "train", **data: Any) -> list[Example]:
    return load_examples(str(source), DataConfig(**{"train": str(source), "kind": "text", **data}), split, 0)


def sites(folder: Path, *names: str, **data: Any) -> list[str]:
    """The clients of a folder with a row in each file."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(ROW.encode()) if name.endswith(".gz") else ROW.encode())
    return [example.file for example in load(folder, **data)]


# Names.


def test_a_site_is_a_site_whatever_it_is_called(tmp_path: Path) -> None:
    names = ("train-station.jsonl", "test-lab.jsonl", "testing.jsonl", "berlin.jsonl")
    assert sites(tmp_path, *names) == ["berlin", "test-lab", "testing", "train-station"]
    assert load(tmp_path, "test") == []


def test_suffixes_in_any_case_and_packed_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("berlin.jsonl", "oslo.JSONL", "paris.JsonL.gz", "rome.2024.jsonl.gz")
    assert sites(tmp_path, *names) == ["berlin", "oslo", "paris", "rome.2024"]
    assert caplog.text == ""


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_packed_files(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / f"a.csv.{suffix}").write_bytes(pack(b"text\nhi\nno\n"))
    assert [example.answer for example in load(tmp_path / f"a.csv.{suffix}")] == ["hi", "no"]
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(pack(ROW.encode())[:-12])
    with pytest.raises(UserError, match=rf"b\.jsonl\.{suffix}, after line \d: not readable as jsonl\.{suffix}: "):
        load(tmp_path / f"b.jsonl.{suffix}")


def test_numbered_parts_are_a_split(tmp_path: Path) -> None:
    names = ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl")
    assert sites(tmp_path, *names) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert [example.file for example in load(tmp_path, "test")] == ["test-00000-of-00001"]


def test_what_is_left_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("berlin.jsonl", "._berlin.jsonl", ".hidden.csv", "notes.txt", "more/oslo.jsonl", "test.jsonl")
    assert sites(tmp_path, *names) == ["berlin"]
    assert f"data.train = '{tmp_path}': left out: ._berlin.jsonl, .hidden.csv, more/, notes.txt" in caplog.text
    assert load(tmp_path, test=str(tmp_path / "test.jsonl")) == load(tmp_path)
    assert "more/, notes.txt, test.jsonl" in caplog.text  # that of this folder is not read then


def test_files_beside_a_named_split_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert sites(tmp_path, "train.jsonl", "validation.jsonl", "test.jsonl") == ["train"]
    assert "left out: validation.jsonl" in caplog.text
    assert sites(tmp_path / "b", "train/oslo.jsonl", "train/readme.md", "berlin.jsonl") == ["oslo"]
    assert "left out: berlin.jsonl, train/readme.md" in caplog.text


def test_two_files_of_one_name_are_two_clients(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nhi\n")
    assert sites(tmp_path, "a.jsonl", "b.jsonl") == ["a.csv", "a.jsonl", "b"]


# Contents.


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", ROW), ("a.json", f"[{ROW}]"), ("a.csv", "text\nhi\n")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert [example.answer for example in load(tmp_path / name)] == ["hi"]


def test_a_long_cell(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert [len(example.answer) for example in load(tmp_path / "a.csv")] == [200_000]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x", "text": "y"}', "an object has the key 'text' twice"),
        ("a.json", '[{"text": "x", "more": {"a": 1, "a": 2}}]', "an object has the key 'a' twice"),
        ("a.csv", "text,label,text\nx,y,z\n", "the header has 'text' twice"),
        ("a.csv", 'text,label\n"x,y\nz,w\n', "unexpected end of data"),
        ("a.jsonl", '{"text": "\\ud83d"}', "'\\ud83d' is half of a character"),
        ("a.jsonl", "[" * 10_000, "maximum recursion depth"),
    ],
)
def test_files_that_would_lose_something(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        load(tmp_path / name)
    where = "line 1: not readable as JSON: " if name == "a.jsonl" else f"after row 0: not readable as {name[2:]}: "
    assert f"{name}, {where}" in str(caught.value)
    assert said in str(caught.value)


def _spoilt(path: Path) -> None:
    """Blank lines, two that are no JSON, one that is no object, one without text: lines 3, 6, 7 and 8."""
    good = json.dumps({"text": "hi"})
    path.write_text("\n".join(["", good, "{no", "", good, "[1]", "null", '{"note": 1}', good, ""]))


def test_a_bad_line_of_a_jsonl_has_the_number_that_an_editor_shows(tmp_path: Path) -> None:
    _spoilt(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: not readable as JSON: .* \(column 2\)"):
        load(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text(f"\n\n{ROW}\n{{}}\n")
    with pytest.raises(UserError, match=r"b\.jsonl, line 5: no column 'text'"):
        load(tmp_path / "b.jsonl")


def test_lines_that_are_no_object_are_left_out_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _spoilt(tmp_path / "a.jsonl")
    assert [example.where[-6:] for example in load(tmp_path, on_bad_row="skip")] == ["line 2", "line 5", "line 9"]
    lines, rows = (line for line in caplog.messages if "left out" in line)
    assert lines.startswith(f"{tmp_path / 'a.jsonl'}: 3 lines that cannot be read are left out: ")
    assert [number in lines for number in ("line 3:", "line 6: [1]:", "line 7: None:")] == [True] * 3
    assert "1 rows that cannot be read" in rows
    assert "line 8:" in rows
    (tmp_path / "b.jsonl").write_text("no\n")
    with pytest.raises(UserError, match=r"b\.jsonl: no line can be read: .*b\.jsonl, line 1: not readable as JSON"):
        load(tmp_path / "b.jsonl", on_bad_row="skip")
    (tmp_path / "c.json").write_text("[1, ")
    with pytest.raises(UserError, match=r"c\.json, after row 0: not readable as json"):
        load(tmp_path / "c.json", on_bad_row="skip")


CELLS = {"a cell more": b"x,y,z\n", "a byte": b"x\xff,y\n", "behind a quote": b'"x"y,z\n'}


@pytest.mark.parametrize("bad", CELLS.values(), ids=CELLS)
def test_a_bad_row_of_a_csv_is_left_out_where_that_is_asked_for(
    bad: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, good = tmp_path / "a.csv", b"x,y\n" * 3
    path.write_bytes(b"text,label\n" + good + bad + good)
    given = {"kind": "classification", "encoding": "utf-8", "delimiter": ","}
    assert [one.where[-5:] for one in load(path, on_bad_row="skip", **given)] == [
        f"row {n}" for n in (1, 2, 3, 5, 6, 7)
    ]
    assert "1 rows that cannot be read are left out" in caplog.text
    with pytest.raises(UserError, match="not readable as csv"):
        load(path, **given)


def test_a_quote_that_nobody_closes_takes_what_follows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\nx,y\n" + b'"x,y\n' + b"x,y\n")
    assert len(load(path, kind="classification", on_bad_row="skip", delimiter=",")) == 1
    assert "lines 3 to 4 are not readable as csv" in caplog.text


def test_a_byte_that_is_no_letter_costs_its_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, row = tmp_path / "a.jsonl", ROW.encode()
    path.write_bytes(b"\n".join([row, row.replace(b'": "', b'": "\xff', 1), row]))
    assert len(load(path, on_bad_row="skip", encoding="utf-8")) == 2
    assert "line 3: byte 0xff is not utf-8." in caplog.text
    with pytest.raises(UserError, match="can't decode byte 0xff"):
        load(path, encoding="utf-8")


def test_a_whole_character_may_be_written_in_halves(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert load(tmp_path / "a.jsonl")[0].answer == "\N{GRINNING FACE}"


def test_a_parquet_column_that_stands_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="the file has a column 'text' twice"):
        load(tmp_path / "a.parquet")


# Columns.


def test_filled_columns_that_nothing_reads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"instruction": "Translate to French", "input": word, "output": "x", "note": ""} for word in ("dog", "")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = Columns(prompt="instruction", response="output")
    [first, _] = load(tmp_path / "a.jsonl", kind="instruction", columns=columns)
    assert first.prompt == "Instruction: Translate to French\nResponse:"
    assert (
        "filled columns that data.kind = 'instruction' does not read: input. To use one, write it into" in caplog.text
    )
    caplog.clear()
    template = "{instruction}\n{input}\n"
    [first, _] = load(tmp_path / "a.jsonl", kind="instruction", columns=columns, template=template)
    assert first.prompt == "Translate to French\ndog\n"
    assert caplog.text == ""


# Owners.


def _owned(path: Path, owners: list[Any]) -> Path:
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(len(owners))], "client": owners}), path)
    return path


def test_an_owner_that_is_missing_is_an_error_whatever_the_table_writes_for_it(tmp_path: Path) -> None:
    clients = ClientsConfig(partition="natural", min_examples=1)
    for owners in ([1.0, float("nan"), 2.0], [1.0, None, 2.0], ["a", "", "b"]):
        with pytest.raises(UserError, match=r"clients.partition = 'natural': 1 of 3 examples name no client"):
            partition(load(_owned(tmp_path / "a.parquet", owners)), clients, 0)


@pytest.mark.parametrize("owner", [["a"], {"name": "a"}, []])
def test_an_owner_is_one_name(tmp_path: Path, owner: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "client": owner}))
    with pytest.raises(UserError, match=r"line 1: client = .*: must be the name or number of one client"):
        load(tmp_path / "a.jsonl")


def test_an_owner_is_the_same_in_every_file(tmp_path: Path) -> None:
    _owned(tmp_path / "a.parquet", [1.0, 2.0])
    (tmp_path / "b.csv").write_text("text,client\nx,1\ny,3\n")
    (tmp_path / "c.jsonl").write_text('{"text": "z", "client": 1}\n')
    clients = ClientsConfig(partition="natural", min_examples=1)
    assert partition(load(tmp_path), clients, 0) == {"1": [0, 2, 4], "2": [1], "3": [3]}
