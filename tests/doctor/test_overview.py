"""`fedalign data`: what is read and what is not, of files as people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedalign.config.toml import load_config
from fedalign.data.formats import load_examples, sift
from fedalign.data.sources import read_rows
from fedalign.doctor.overview import Lengths, overview
from fedalign.errors import UserError
from tests.conftest import SUBJECTS, Command, rows

ALPACA: list[dict[str, Any]] = [
    {"instruction": "Summarise.", "input": "Pat has fever.", "output": "Fever."},
    {"instruction": "Summarise.", "input": "Pat is well.", "output": 7},
    {"instruction": "", "input": "Pat coughs.", "output": "Cough."},
    {"instruction": "Translate.", "input": "chat", "output": "cat"},
    {"instruction": "Translate.", "input": "chien", "output": ""},
]
COLUMNS = ["data.kind=instruction", "data.columns.prompt=instruction", "data.columns.response=output"]
TWO = ["clients.partition=iid", "clients.count=2", "clients.min_examples=1"]


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    file = tmp_path / "notes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    return file


def test_every_broken_row_is_told_and_the_rest_is_shown(alpaca: Path, olmoe: Path) -> None:
    config = load_config(None, [f"data.train={alpaca}", f"model.path={olmoe}", *COLUMNS, *TWO])
    found = overview(config)
    assert found.files == {str(alpaca): 5}
    assert [line.partition("line ")[2][0] for line in found.broken] == ["2", "3"]
    assert (found.examples, found.empty) == (2, (f"{alpaca}, line 5",))
    assert found.unread == ("input",)
    assert found.columns["output"].is_read
    assert found.columns["output"].filled == 4
    assert sum(found.clients.values()) == 2
    assert found.lengths is not None
    assert len(found.lengths.tokens) == 2
    assert [[piece for piece, learnt in pieces if learnt] for pieces in found.shown] == [
        [" Fever.</s>"],
        [" cat</s>"],
    ]


def test_lengths_name_what_is_too_long(alpaca: Path, olmoe: Path) -> None:
    config = load_config(None, [f"data.train={alpaca}", f"model.path={olmoe}", *COLUMNS, *TWO, "data.max_length=25"])
    lengths = overview(config).lengths
    assert lengths is not None
    assert lengths.limit == 25
    assert lengths.too_long == tuple(
        f"{alpaca}, line {number}" for number, tokens in zip((1, 4), lengths.tokens, strict=True) if tokens > 25
    )
    assert lengths.too_long
    bars = Lengths((3, 4, 4, 9, 30), 0, ()).histogram(4)
    assert sum(count for _, _, count in bars) == 5
    assert (bars[0][0], bars[-1][1]) == (3, 30)


def test_broken_rows_are_skipped_where_that_is_asked_for(alpaca: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(None, [f"data.train={alpaca}", *COLUMNS])
    with pytest.raises(UserError, match="line 2"):
        load_examples(str(alpaca), config.data, "train", 0)
    skipping = load_config(None, [f"data.train={alpaca}", *COLUMNS, "data.on_bad_row=skip"])
    examples = load_examples(str(alpaca), skipping.data, "train", 0)
    assert [example.answer.strip() for example in examples] == ["Fever.", "cat"]
    assert "2 rows that cannot be read are left out" in caplog.text
    alpaca.write_text(json.dumps(ALPACA[1]) + "\n")
    with pytest.raises(UserError, match="no row can be read"):
        load_examples(str(alpaca), skipping.data, "train", 0)


def test_lines_that_are_no_object_are_listed_with_the_rest(alpaca: Path, fedalign: Command) -> None:
    alpaca.write_text("{no\n\n" + alpaca.read_text() + "[1]\n")
    found = overview(load_config(None, [f"data.train={alpaca}", *COLUMNS, *TWO]))
    assert [line.removeprefix(f"{alpaca}, line ")[0] for line in found.broken] == ["1", "8", "4", "5"]
    code, out, errors = fedalign("data", str(alpaca))
    assert code == 1, errors
    assert "recognised by its columns: Alpaca" in errors + out
    assert "line 8: [1]: must be an object" in (errors + out).replace("\n", " ")


def test_what_is_wrong_with_all_rows_together_is_no_broken_row(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in ("x", "y", "zz")))
    config = load_config(None, [f"data.train={file}", 'data.labels=["x","y"]'])
    kept, broken = sift(list(read_rows(str(file), config.data, "train")), config.data, "train")
    assert len(kept) == 2
    assert len(broken) == 1
    assert "line 3" in broken[0]


def test_the_command_guesses_the_kind_and_shows_what_nothing_uses(fedalign: Command, alpaca: Path, olmoe: Path) -> None:
    sets = [word for setting in [*COLUMNS, *TWO] for word in ("--set", setting)]
    code, out, errors = fedalign("data", str(alpaca), "--model", str(olmoe), *sets)
    assert code == 1, errors
    assert "nothing uses input" in out
    assert "2 rows cannot be read:" in out
    assert "Fever.</s>" in out
    plain = alpaca.with_name("plain.jsonl")
    plain.write_text("".join(json.dumps({"text": row["text"], "label": row["label"]}) + "\n" for row in rows()))
    code, out, errors = fedalign("data", str(plain), "--set", "clients.count=2", "--set", "clients.partition=iid")
    assert code == 0, errors
    assert "classification: 120 examples" in out
    assert all(f"{subject} " in out for subject in SUBJECTS)
    code, _, errors = fedalign("data", str(plain.with_name("none.jsonl")))
    assert (code, "no such file" in errors) == (2, True)


def test_a_configuration_is_looked_at_with_its_own_model(fedalign: Command, settings: list[str]) -> None:
    sets = [word for setting in settings for word in ("--set", setting)]
    code, out, errors = fedalign("data", "demo", *sets, "--set", "data.max_train=30")
    assert code == 0, errors
    assert "30 of them (data.max_train)" in out
    assert "3 clients" in out


def test_a_name_with_quotes_is_a_name(fedalign: Command, alpaca: Path) -> None:
    odd = alpaca.rename(alpaca.with_name('no"tes\\.jsonl'))
    sets = [word for setting in [*COLUMNS, *TWO] for word in ("--set", setting)]
    code, out, errors = fedalign("data", str(odd), *sets)
    assert code == 1, errors
    assert "2 rows cannot be read:" in out


def folder_of(path: Path, **files: list[dict[str, Any]]) -> Path:
    path.mkdir()
    for name, lines in files.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def words(*texts: str) -> str:
    return " ".join(" ".join(texts).split())


def test_files_of_a_folder_that_do_not_fit_are_a_line_each(fedalign: Command, tmp_path: Path) -> None:
    news = [{"text": row["text"], "label": row["label"]} for row in rows()[:30]]
    notes = [{"note": row["text"], "ward": row["label"]} for row in rows()[:30]]
    folder = folder_of(tmp_path / "sites", a=notes, b=news, c=ALPACA[3:])
    code, out, errors = fedalign("data", str(folder))
    told = words(out, errors)
    assert code == 1, errors
    assert "classification: 30 examples" in told or "read as classification" in told
    assert f"{folder / 'a.jsonl'}: none of its 30 rows can be read, line 1: no column 'text'" in told
    assert told.count("no column") == 1
    assert '[data.files."NAME"]' in told
    assert "fedalign init" in told


def test_a_file_with_labels_is_never_plain_text(fedalign: Command, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "sites", a=[{"text": "x", "label": i % 2} for i in range(30)])
    code, out, errors = fedalign("data", str(folder / "a.jsonl"))
    assert code == 1
    assert "classification: 0 examples" in words(out, errors)
    assert "none of its 30 rows can be read, line 1: label = 0: an integer without a name" in words(out, errors)


def test_without_a_configuration_nothing_is_said_of_clients_that_nobody_asked_for(
    fedalign: Command, tmp_path: Path
) -> None:
    few = folder_of(tmp_path / "few", a=[{"text": "x", "label": "y"}])
    code, out, errors = fedalign("data", str(few / "a.jsonl"))
    assert code == 0, errors
    assert "clients" not in out + errors
    _, out, errors = fedalign("data", str(few / "a.jsonl"), "--set", "clients.count=2")
    assert "clients" in out + errors


def test_chats_without_a_model_say_why_none_is_shown(fedalign: Command, tmp_path: Path, olmoe: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    file = folder_of(tmp_path / "chats", a=[{"messages": turns}]) / "a.jsonl"
    code, out, errors = fedalign("data", str(file))
    assert code == 0, errors
    assert "No example is shown" in out + errors
    assert "--model" in out + errors
    _, out, errors = fedalign("data", str(file), "--set", "data.chat_template=chatml", "--model", str(olmoe))
    assert "No example is shown" not in out + errors
    assert "Hello." in out
