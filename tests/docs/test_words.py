"""Docstrings name the thing: none begins with "What"."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "fedalign"
EVERY = sorted(PACKAGE.rglob("*.py"))
DESCRIBED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_docstrings_name_the_thing(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    every = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, DESCRIBED)]
    assert [text for text in every if text.startswith("What")] == []
