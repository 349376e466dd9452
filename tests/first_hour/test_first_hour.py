"""Files as people have them, from file to answer: init, data, run, generate, evaluate, chat. Nothing else is said."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Command
from tests.rendering.templates import QWEN3

PLACES = ("in town", "at home", "by the river", "on monday", "in the north", "every day")
WEATHER = [f"{what} {place}" for what in ("rain falls", "wind blows") for place in PLACES]
TWICE = [*WEATHER, *WEATHER]  # 24 rows: two clients of ten and more
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def cells(rows: list[dict[str, Any]], delimiter: str) -> str:
    table = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in table]
    return "".join(delimiter.join(row) + "\r\n" for row in quoted)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return bytes(sink.getvalue())


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def said(*turns: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in (turn.split(": ") for turn in turns)]


def alpaca() -> bytes:
    rows = [
        {"instruction": "Which?", "input": text if i % 2 else "", "output": "weather"} for i, text in enumerate(TWICE)
    ]
    return json.dumps(rows).encode()


def sharegpt() -> bytes:
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "weather"}] for text in TWICE]
    return gzip.compress(lines([{"conversations": turn} for turn in turns]))


def tools() -> bytes:
    """As OpenAI has it: the assistant calls a tool, and goes on with what it says."""
    chats = [
        [
            *said("system: Be brief.", f"user: {text}?"),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "a", "content": "grey"},
            *said("assistant: yes"),
        ]
        for text in TWICE
    ]
    return lines([{"messages": chat, "tools": TOOLS} for chat in chats])


def completions() -> bytes:
    rows = [{"prompt": f"Wo? {text}\nWie: größer?", "completion": "süß; sehr"} for text in TWICE]
    return cells(rows, ";").encode("cp1252")


def choices() -> bytes:
    rows = [{"question": f"Is it so, {text}?", "A": "yes", "B": "no", "C": "maybe", "answer": "B"} for text in TWICE]
    return cells(rows, "\t").encode("utf-16")


def pairs() -> bytes:
    rows = [{"prompt": text, "chosen": "weather", "rejected": "food"} for text in TWICE]
    return zstd(lines(rows))


def classes() -> bytes:
    return parquet([{"text": text, "label": ("rain", "wind")["wind" in text]} for text in TWICE])


def texts() -> bytes:
    return b"\xef\xbb\xbf" + lines([{"text": text} for text in TWICE])


FILES: dict[str, tuple[Callable[[], bytes], str, str]] = {  # what it holds, its kind, and what is said of it
    "alpaca.json": (alpaca, "instruction", "Alpaca: instruction, input, output"),
    "sharegpt.jsonl.gz": (sharegpt, "chat", "ShareGPT: conversations; the model has no chat template"),
    "tools.jsonl": (tools, "chat", "chats"),
    "completions.csv": (completions, "instruction", "completion; cells parted by ';'; encoded in cp1252"),
    "choices.csv": (choices, "multiple_choice", "a column for each choice; cells parted by '\\t'; encoded in utf-16"),
    "pairs.jsonl.zst": (pairs, "instruction", "pairs of answers, the chosen one is trained"),
    "classes.parquet": (classes, "classification", "texts with a class"),
    "texts.jsonl": (texts, "text", "plain text"),
}
SHORT = [
    "--set",
    "run.rounds=1",
    "--set",
    "run.check=false",
    "--set",
    "statistics.min_tokens=4",
]  # no minutes for a test


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> Path:
    return model_folder("olmoe", max_position_embeddings=512)


def asked_for(fedalign: Command, *arguments: object) -> tuple[str, str]:
    code, out, errors = fedalign(*arguments)
    assert code == 0, f"fedalign {' '.join(map(str, arguments))}\n{out}{errors}"
    return out, errors


@pytest.mark.parametrize("name", FILES)
def test_from_file_to_answer(name: str, here: Path, fedalign: Command, model: Path) -> None:
    made, kind, told = FILES[name]
    Path(name).write_bytes(made())
    out, _ = asked_for(fedalign, "init", name, "--model", model, "--to", "my.toml")
    assert told in out
    more = list[str]()
    if name == "tools.jsonl":  # ChatML has no place for tools: a file has
        Path("mine.jinja").write_text(QWEN3)
        more = ["--set", "data.chat_template=mine.jinja"]
    out, _ = asked_for(fedalign, "data", "my.toml", *more)
    assert f"{kind}: {len(TWICE)} examples" in out
    asked_for(fedalign, "run", "my.toml", "--out", "run", *SHORT, *more)
    out, _ = asked_for(fedalign, "generate", "run", "--prompts", name, "--max-new-tokens", 2)
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == len(TWICE)
    assert all("generated" in answer for answer in answers)
    out, _ = asked_for(fedalign, "evaluate", "run", "--data", name, "--alone", "--json")
    assert json.loads(out)["tuned"]["examples"] == len(TWICE)


def test_a_folder_whose_files_differ(
    here: Path, fedalign: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "sites").mkdir()
    for name in ("alpaca.json", "sharegpt.jsonl.gz", "completions.csv"):
        (here / "sites" / name).write_bytes(FILES[name][0]())
    out, _ = asked_for(fedalign, "init", "sites", "--model", model)
    assert "a file each: 3 clients" in out
    assert '[data.files."completions.csv"]' in Path("sites.toml").read_text()
    asked_for(fedalign, "run", "sites.toml", "--out", "run", *SHORT)
    monkeypatch.setattr("sys.stdin", io.StringIO("Which?\n/new\nAnd now?\n"))
    out, errors = asked_for(fedalign, "chat", "run", "--max-new-tokens", 2)
    assert "Type instruction; /new begins anew" in out
    assert errors == ""


PACKAGE = """
from fedalign.data.formats import Example

def triage(row):
    return Example(f"{row.text('note')}\\n", str(row.values.get("outcome", "")))
"""


def test_a_format_of_a_package(here: Path, fedalign: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "triage_notes-1.0.dist-info").mkdir()
    (here / "triage_notes.py").write_text(PACKAGE)
    (here / "triage_notes-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: triage\nVersion: 1.0\n")
    (here / "triage_notes-1.0.dist-info" / "entry_points.txt").write_text(
        "[fedalign.formats]\ntriage = triage_notes:triage\n"
    )
    monkeypatch.syspath_prepend(here)
    Path("notes.jsonl").write_bytes(lines([{"note": text, "outcome": "rest"} for text in TWICE]))
    data = 'train = "notes.jsonl"\nkind = "triage"'
    Path("my.toml").write_text(f'[model]\npath = "{model}"\n[data]\n{data}\n[clients]\npartition = "iid"\ncount = 2\n')
    asked_for(fedalign, "run", "my.toml", "--out", "run", *SHORT)
    Path("prompts.jsonl").write_bytes(lines([{"note": "rain falls"}]))
    out, _ = asked_for(fedalign, "generate", "run", "--prompts", "prompts.jsonl", "--max-new-tokens", 2)
    assert json.loads(out)["note"] == "rain falls"


WRONG = [  # what is typed, what is answered
    (["run", "my.toml", "--set", "data.kind=alpacca"], "Did you mean 'alpaca'?"),
    (["run", "my.toml", "--set", "data.encoding=utf-99"], "no such encoding. Choose one of: auto, utf-8"),
    (["run", "my.toml", "--set", "data.delimiter=;;"], 'must be "auto", or one character'),
    (["run", "my.toml", "--set", 'data.files."a.csv".kidn=text'], "data.files.a.csv.kind"),
    (["run", "my.toml", "--set", "data.chat_template=gone.jinja"], "no file that can be read. Choose one of: model"),
    (["run", "gone.toml"], "no such file. Give the path of a TOML file"),
    (["compare", "my.toml", "--algorithms", "fedavk"], "Did you mean 'fedavg'?"),
    (["doctor", "gone.toml"], "no such file. Give the path of a TOML file"),
    (["doctor", "--site", "gone"], "site.toml"),
    (["doctor"], "nothing to look at"),
    (["data", "my.toml", "--set", "data.colums.text=a"], "data.columns"),
    (["data", "gone.csv"], "no such file or folder"),
    (["init", "gone.csv"], "no such file or folder"),
    (["init", "my.csv", "--to", "my.toml"], "is there already, and nothing is overwritten"),
]
SCRIPT = """
import contextlib, io, json, sys
from fedalign.cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv, said, code = ["fedalign", *words], io.StringIO(), 0
    with contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue(), sorted({"torch", "transformers"} & {*sys.modules})]))
"""


def test_a_wrong_word_is_answered_before_torch_is_loaded(here: Path) -> None:
    Path("my.toml").write_text("[run]\nrounds = 1\n")
    typed = json.dumps([words for words, _ in WRONG])
    done = subprocess.run([sys.executable, "-c", SCRIPT, typed], capture_output=True, text=True, check=True)
    for (words, told), line in zip(WRONG, done.stdout.splitlines(), strict=True):
        code, errors, loaded = json.loads(line)
        assert (code, loaded) == (2, []), f"{words}: {errors}"
        assert told in " ".join(errors.split())
        assert "Traceback" not in errors
