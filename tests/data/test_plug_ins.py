"""Formats of other packages: a function of a row, under a name that data.kind takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from fedalign.config.toml import load_config
from fedalign.data.formats import FORMATS, OURS, every_kind, load_examples, of_package
from fedalign.errors import UserError
from tests.conftest import Command

NOTES = '''
    """Ward notes."""

    from fedalign.data.formats import Example
    from fedalign.data.sources import Row


    def ward(row: Row) -> Example:
        """Notes of a ward, and what follows from them. More."""
        return Example(f"{row.text('note')}\\n", row.values["outcome"].upper())


    def number(row):
        return 7


    flat = "no function"
'''
Package = Callable[[str], None]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """`package(points)`: an installed package, as pip would leave it."""

    def install(points: str) -> None:
        info = tmp_path / "lib" / "ward_notes-1.0.dist-info"
        info.mkdir(parents=True)
        (tmp_path / "lib" / "ward_notes.py").write_text(dedent(NOTES))
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ward-notes\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[fedalign.formats]\n{points}\n")
        monkeypatch.syspath_prepend(tmp_path / "lib")

    yield install
    sys.modules.pop("ward_notes", None)
    of_package.cache_clear()


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    file = tmp_path / "notes.jsonl"
    rows = [{"note": "Fever.", "outcome": "rest"}, {"note": "Well.", "outcome": "home"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_format_of_another_package(
    package: Package, notes: Path, fedalign: Command, caplog: pytest.LogCaptureFixture
) -> None:
    package("ward = ward_notes:ward\nchat = ward_notes:ward")
    data = load_config(None, [f"data.train={notes}", "data.kind=ward"]).data
    one, two = load_examples(str(notes), data, "train", 0)
    assert (one.prompt, one.answer, one.file) == ("Fever.\n", "REST", "notes")
    assert two.where == f"{notes}, line 2"
    assert caplog.text == ""  # nobody knows which columns it reads
    assert every_kind() == [*OURS, "ward"]
    assert FORMATS["chat"] is OURS["chat"]  # ours cannot be replaced
    assert {*FORMATS} == {*OURS}
    code, out, errors = fedalign("formats")
    assert code == 0, errors
    assert "Notes of a ward" in " ".join(out.split())
    code, out, errors = fedalign("data", notes, "--set", "data.kind=ward", "--set", "clients.partition=iid")
    assert code == 0, errors
    assert "ward: 2 examples" in out


def test_a_row_that_it_cannot_read_is_a_bad_row(package: Package, notes: Path, fedalign: Command) -> None:
    package("ward = ward_notes:ward")
    with notes.open("a") as file:
        file.write('{"note": "Cough."}\n{"outcome": "x"}\n')
    overrides = [f"data.train={notes}", "data.kind=ward"]
    with pytest.raises(UserError, match=r"line 3: data.kind = 'ward' cannot read it \(KeyError: \"'outcome'\"\)"):
        load_examples(str(notes), load_config(None, overrides).data, "train", 0)
    skipping = load_config(None, [*overrides, "data.on_bad_row=skip"]).data
    assert len(load_examples(str(notes), skipping, "train", 0)) == 2


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ("bad = ward_notes:missing", "ward_notes:missing of package ward-notes does not load (AttributeError"),
        ("bad = not_there:x", "does not load (ModuleNotFoundError"),
        ("bad = ward_notes:flat", "is no function of a row"),
        ("bad = ward_notes:number", "data.kind = 'bad' gave 7: must be a fedalign.data.formats.Example"),
        ("other = ward_notes:ward", "data.kind = 'bad': unknown. Choose one of: alpaca, chat, classification,"),
    ],
)
def test_a_broken_package_is_one_line(package: Package, notes: Path, points: str, told: str, fedalign: Command) -> None:
    package(points)
    with pytest.raises(UserError) as caught:
        load_examples(str(notes), load_config(None, [f"data.train={notes}", "data.kind=bad"]).data, "train", 0)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    code, out, _ = fedalign("formats")  # the others are still listed
    assert code == 0
    assert all(kind in out for kind in OURS)


def test_sites_let_no_package_read_their_rows(package: Package) -> None:
    package("ward = ward_notes:ward")
    with pytest.raises(UserError, match="a format of a package may read any column, which sites do not let it"):
        load_config(None, ["data.kind=ward", "federation.engine=flower"])
