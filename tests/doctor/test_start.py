"""`fedalign init`: files as people have them become configurations that run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedalign.config.toml import load_config, parse_config
from fedalign.data.formats import load_examples
from fedalign.doctor import start as starting
from fedalign.doctor.model import skeleton_bench
from fedalign.doctor.start import start
from fedalign.errors import UserError
from tests.conftest import Command, rows

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
FILES: dict[str, tuple[dict[str, Any], str, str]] = {
    "alpaca": ({"instruction": "Sum up.", "input": "Fever.", "output": "ill"}, "instruction", "ill"),
    "instructions": ({"instruction": "Sum up.", "output": "ill"}, "instruction", "ill"),
    "response": ({"prompt": "Sum up.", "response": "ill"}, "instruction", "ill"),
    "completion": ({"prompt": "Sum up.", "completion": "ill"}, "instruction", "ill"),
    "answer": ({"question": "Ill?", "answer": "yes"}, "instruction", "yes"),
    "choices": ({"question": "Ill?", "choices": ["yes", "no"], "answer": "A"}, "multiple_choice", "yes"),
    "chat": ({"messages": CHAT}, "chat", "Hello."),
    "classes": ({"text": "Fever.", "label": "ill"}, "classification", "ill"),
    "text": ({"text": "Any text."}, "text", "Any text."),
}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_recognised_and_its_configuration_reads_it(name: str, tmp_path: Path) -> None:
    row, kind, answer = FILES[name]
    file = write(tmp_path / f"{name}.jsonl", [row] * 40)
    made = start(str(file), None)
    (tmp_path / "made.toml").write_text(made.to_toml())
    config = load_config(tmp_path / "made.toml")
    assert config.data.kind == kind
    examples = load_examples(str(file), config.data, "train", 0)
    assert {example.answer.strip() for example in examples} == {answer}
    assert name != "alpaca" or "Fever." in examples[0].prompt  # nothing of a row is lost
    assert set(made.reasons) == set(made.tables)


def test_rows_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    lines = [{"prompt": "Sum up.", "response": "ill"}] * 40 + [{"prompt": "Sum up.", "response": 7}] * 3
    made = start(str(write(tmp_path / "a.jsonl", lines)), None)
    assert made.reasons["data"].endswith("; 3 of 43 rows cannot be read and are left out: fedalign data lists them")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{broken\n[1, 2]\n")
    made = start(str(tmp_path / "a.jsonl"), None)
    assert made.reasons["data"].endswith("; 5 of 45 rows cannot be read and are left out: fedalign data lists them")
    assert len(load_examples(made.tables["data"]["train"], parse_config(made.tables).data, "train", 0)) == 40


def test_prompts_that_the_model_cannot_read_whole_are_cut(tmp_path: Path) -> None:
    """Else the command that it recommends would refuse them."""
    lines = [{"prompt": "Sum up. " * (200 if i == 7 else 1), "response": "ill"} for i in range(40)]
    made = start(str(write(tmp_path / "a.jsonl", lines)), None)
    assert made.tables["data"]["too_long"] == "truncate"
    assert made.reasons["data"].endswith("tokens that the model reads: their prompts are cut")
    bench = skeleton_bench(parse_config(made.tables))
    assert bench.encoder.encode(load_examples(str(tmp_path / "a.jsonl"), bench.config.data, "train", 0))
    short = start(str(write(tmp_path / "b.jsonl", lines[:7])), None)
    assert "too_long" not in short.tables["data"]


def test_a_column_that_may_name_owners_is_told(tmp_path: Path) -> None:
    lines = [{"text": f"a text {i}", "label": "xy"[i % 2], "ward": ("north", "south")[i % 2]} for i in range(60)]
    why = start(str(write(tmp_path / "a.jsonl", lines)), None).reasons["clients"]
    assert "no column is called `client`, and it is one file" in why
    assert "if `ward` says whose a row is: [data.columns] client = 'ward'" in why
    named = [{**line, "ward": str(i)} for i, line in enumerate(lines)]
    assert "ward" not in start(str(write(tmp_path / "b.jsonl", named)), None).reasons["clients"]


def test_owners_are_found_by_column_or_file(tmp_path: Path) -> None:
    mine = [row | {"client": row["owner"]} for row in rows()]
    assert start(str(write(tmp_path / "all.jsonl", mine)), None).tables["clients"] == {"partition": "natural"}
    folder = tmp_path / "sites"
    folder.mkdir()
    for name in ("north", "south"):
        plain = [{"text": row["text"], "label": row["label"]} for row in rows()]
        write(folder / f"{name}.jsonl", plain)
    assert start(str(folder), None).tables["clients"] == {"partition": "files"}


def test_tuning_is_the_largest_that_memory_allows(tmp_path: Path, olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, chosen = write(tmp_path / "a.jsonl", list(rows())), []
    for free in (10**12, 10**6, 5 * 10**5, 1000):
        monkeypatch.setattr(starting, "free_memory", lambda free=free: free)
        try:
            chosen.append(start(str(file), str(olmoe)).tables["tuning"])
        except UserError as error:
            chosen.append({"refused": str(error)})
    assert chosen[0] == {"kind": "full"}
    assert chosen[-1].keys() == {"refused"}
    assert "full would take" in chosen[-1]["refused"]
    assert "lora bfloat16 would take" in chosen[-1]["refused"]


def test_the_command_writes_what_runs_and_overwrites_nothing(
    fedalign: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, olmoe: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "notes.jsonl", list(rows()))
    code, out, errors = fedalign("init", "notes.jsonl", "--model", olmoe)
    assert code == 0, errors
    assert "recognised by its columns: texts with a class" in out
    made = (tmp_path / "notes.toml").read_text()
    code, _, errors = fedalign("init", "notes.jsonl", "--model", olmoe)
    assert (code, "is there already" in errors) == (2, True)
    assert (tmp_path / "notes.toml").read_text() == made
    code, out, errors = fedalign("run", "notes.toml", "--dry-run")
    assert code == 0, errors
    assert "nothing was trained" in out


def test_columns_that_nobody_knows_are_one_line(fedalign: Command, tmp_path: Path) -> None:
    file = write(tmp_path / "odd.jsonl", [{"colour": "red"}])
    code, _, errors = fedalign("init", file, "--to", tmp_path / "odd.toml")
    assert code == 2
    assert "has columns colour, of which no kind of data is made" in errors
    assert not (tmp_path / "odd.toml").exists()
