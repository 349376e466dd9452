"""Docstrings name the thing: none begins with "What", but for those whose turn is still to come."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "fedalign"
LATER = (  # rooms and files whose docstrings are still to be rewritten: take a line out once it is done
    *("data/", "export/", "federation/", "inference/", "report/"),
    *("client/answers.py", "compare/tables.py", "doctor/data.py", "doctor/recognise.py"),
    *("server/results.py", "server/trackers.py"),
)
NAMED = [path for path in sorted(PACKAGE.rglob("*.py")) if not path.relative_to(PACKAGE).as_posix().startswith(LATER)]
DESCRIBED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("path", NAMED, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_docstrings_name_the_thing(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    every = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, DESCRIBED)]
    assert [text for text in every if text.startswith("What")] == []
