"""What the pages say is so: commands and options exist, code runs, keys are known, every file has its line."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from fedalign.cli.main import app
from fedalign.config.run import SPELLINGS, Config
from fedalign.config.site import SiteConfig
from fedalign.config.toml import load_config, parse_config
from fedalign.data.formats import load_examples
from fedalign.data.sources import Row

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("benchmarks/**/*.md")])
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:-m )?fedalign ((?:[a-z]\S*|-\S+)(?: .*)?)")


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language, without their indent."""
    found = FENCED.findall(page.read_text(encoding="utf-8"))
    return [
        "\n".join(line.removeprefix(indent) for line in text.splitlines())
        for indent, kind, text in found
        if kind == language
    ]


def commands() -> list[Any]:
    """All lines of all pages that call us."""
    lines = [
        (page.relative_to(ROOT), line)
        for page in PAGES
        for text in (*blocks(page, ""), *blocks(page, "sh"))
        for line in re.sub(r"\\\n\s*", " ", text).splitlines()
        if COMMAND.match(line.strip())
    ]
    return [pytest.param(line, id=f"{page}: {line[:50]}") for page, line in dict.fromkeys(lines)]


@pytest.mark.parametrize("line", commands())
def test_a_command_on_a_page_can_be_typed(line: str) -> None:
    words = shlex.split(line.split(" # ", maxsplit=1)[0], comments=True)
    words = words[words.index("fedalign") + 1 :]
    command: click.Command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    options = {name for option in command.params for name in option.opts}
    assert {word.split("=")[0] for word in words if word.startswith("-")} <= options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_toml_on_a_page_has_keys_that_there_are(page: Path) -> None:
    for text in blocks(page, "toml"):
        tables = tomllib.loads(text)
        if "superlink" in tables or "project" in tables:
            continue  # another program's file
        if "name" in tables:
            SiteConfig.model_validate(tables)
        else:
            parse_config(tables)
        assert tables.keys() <= {*Config.model_fields, *SiteConfig.model_fields}


def test_an_algorithm_in_twenty_lines_runs(capsys: pytest.CaptureFixture[str]) -> None:
    algorithm, tried = blocks(ROOT / "docs" / "algorithms.md", "python")
    assert len(algorithm.split("@dataclass")[1].splitlines()) <= 20
    names: dict[str, Any] = {"__name__": "my_package"}
    exec(algorithm, names)
    exec(tried, names)
    assert "tensor" in capsys.readouterr().out
    assert float(names["plan"].weight_C_G.sum(0).max()) == pytest.approx(1)


def test_a_format_of_your_own_reads_a_row() -> None:
    [function] = blocks(ROOT / "docs" / "data.md", "python")
    names: dict[str, Any] = {"__name__": "my_package"}
    exec(function, names)
    example = names["ward_note"](Row({"note": "Fever.", "outcome": "rest"}, "a.csv", 1))
    assert (example.prompt, example.answer) == ("Fever.\nNext:", " rest")


def test_rows_on_the_page_of_data_are_read_as_it_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*?\})`[,|. ]", page, re.MULTILINE)
    assert [kind for kind, _ in rows] == [
        *("chat", "multiple_choice", "instruction", "classification", "text"),
        *SPELLINGS,
    ]
    for kind, row in rows:
        file = tmp_path / f"{kind}.jsonl"
        file.write_text(row.replace("[...]", "[]") + "\n", encoding="utf-8")
        config = load_config({"data": {"train": str(file), "kind": kind}})
        [example] = load_examples(str(file), config.data, "train", 0)
        assert example.answer.strip() in row


def test_the_readme_stays_a_first_screen() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_file_has_its_line_in_the_tree() -> None:
    (tree,) = [text for text in blocks(ROOT / "docs" / "architecture.md", "") if text.startswith("src/fedalign/")]
    named = set(re.findall(r"[\w.*]+\.(?:py|\*)", tree)) | {f"{name}/" for name in re.findall(r"(\w+)/", tree)}
    algorithms = {path.name for path in (ROOT / "src/fedalign/algorithms").glob("*.py")}
    there = {path.name for path in (ROOT / "src" / "fedalign").rglob("*.py")} - algorithms
    there -= {"__init__.py", "__main__.py"} | {path.name for path in (ROOT / "src/fedalign/cli").glob("*.py")}
    there -= {"page.py", "card.py"} if {"page.*", "card.*"} <= named else set()
    assert sorted(there - named) == []
    kept = {path.name for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    assert sorted(name for name in named if name.endswith(".py") and name not in kept) == []
    folders = {f"{path.name}/" for path in (ROOT / "src" / "fedalign").iterdir() if path.is_dir()} - {"__pycache__/"}
    assert sorted(folders - named) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert re.match(r"[a-z]+:", target) or (page.parent / target).exists(), target
