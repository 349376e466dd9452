"""The embedded data set, on a tiny library that can be read at a glance and on a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedalign.data import docstrings
from fedalign.data.docstrings import MIN_CLIENT, build, first_paragraphs, library_folder, names_own_library, split_of
from fedalign.errors import UserError

SOURCE = '''
"""Tools for   moving
boxes around.

A second paragraph.
"""

def lift(box):
    "Lift the box gently."
    if box:
        def inner():
            """Hold a :meth:`~boxes.Box.lid` with ``both`` hands."""
    return """This is no docstring at all."""

class Box:
    """Too short."""
    async def open(self):
        """Open the box and look inside."""

try:
    pass
except ImportError:
    def lift(box):
        """Lift the box with a crane."""
'''
TEXTS = [
    "Tools for moving boxes around.",
    "Lift the box gently.",
    "Hold a boxes.Box.lid with both hands.",
    "Open the box and look inside.",
    "Lift the box with a crane.",
]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "boxes"
    for name, source in {
        "lifting/crane.py": SOURCE,
        "lifting/__init__.py": '"""Lift the box gently."""',  # a text that is there already
        "tests/test_crane.py": '"""Nobody reads what tests say."""',
        "broken.py": '"""A file of another Python version.""" print "old"',
        "plain.py": "x = 1\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source, encoding="utf-8")
    return folder


def test_first_paragraphs_of_all_docstrings_and_of_nothing_else() -> None:
    assert first_paragraphs(SOURCE.encode()) == TEXTS


def test_a_library(library: Path) -> None:
    rows = build({"Boxes": library})
    assert {row.text for row in rows} == set(TEXTS)
    assert len(rows) == len(TEXTS)
    assert {(row.label, row.client) for row in rows} == {("Boxes", "boxes.other")}  # too few for a client of their own
    assert build({"Boxes": library}, processes=1) == build({"Boxes": library}, processes=3) == rows


def test_large_submodules_are_clients(library: Path) -> None:
    functions = (f'def f{i}():\n    """Lift box number {i} today."""\n' for i in range(MIN_CLIENT))
    (library / "many.py").write_text("".join(functions), encoding="utf-8")
    clients = [row.client for row in build({"Boxes": library})]
    assert (clients.count("boxes.many"), clients.count("boxes.other")) == (MIN_CLIENT, len(TEXTS))


def test_the_first_library_to_say_something_keeps_it(library: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copies"
    copy.mkdir()
    (copy / "a.py").write_text(
        '"""Lift the box gently."""\ndef f():\n    """Copy what others said."""', encoding="utf-8"
    )
    labels = {row.text: row.label for row in build({"Boxes": library, "Copies": copy})}
    assert labels["Lift the box gently."] == "Boxes"
    assert labels["Copy what others said."] == "Copies"


def test_a_tenth_is_test() -> None:
    splits = [split_of(str(i)) for i in range(2000)]
    assert 0.08 < splits.count("test") / 2000 < 0.12  # 26/256 = .102, four standard deviations either side
    assert set(splits) == {"train", "test"}


def test_a_real_library() -> None:
    rows = build({"Hub": library_folder("huggingface_hub")})
    assert len(rows) > 500
    assert len({row.text for row in rows}) == len(rows)
    assert all(4 <= len(row.text.split()) <= 60 for row in rows)
    assert all(row.client.startswith("huggingface_hub.") for row in rows)
    named = sum(names_own_library(row) for row in rows) / len(rows)
    assert 0.02 < named < 0.4


@pytest.fixture
def embedded(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(docstrings, "LIBRARIES", {"Boxes": "boxes"})
    monkeypatch.setattr(docstrings, "library_folder", lambda _: library)
    monkeypatch.setattr(docstrings, "fingerprint", lambda: "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedalign"


def test_the_cache_is_read_again(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = docstrings.load("train") + docstrings.load("test")
    assert [path.name for path in embedded.iterdir()] == ["docstrings-1"]
    monkeypatch.delattr(docstrings, "build")
    assert docstrings.load("train") + docstrings.load("test") == first
    assert {row.text for row in first} == set(TEXTS)


def test_a_cache_that_cannot_be_written(embedded: Path) -> None:
    embedded.parent.write_text("a file where the folder should be", encoding="utf-8")
    assert len(docstrings.load("train") + docstrings.load("test")) == len(TEXTS)


def test_the_cache_is_built_anew_for_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = docstrings.fingerprint()
    assert before == docstrings.fingerprint()
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.0")
    assert docstrings.fingerprint() != before


def test_a_library_that_is_not_installed() -> None:
    with pytest.raises(UserError, match="needs 'no_such_library'"):
        library_folder("no_such_library")
