"""Making a site: what is in its folder, and what is refused before anything is made."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from fedalign.config.site import SiteColumns, SiteConfig, SiteFolder
from fedalign.doctor.link import check_key
from fedalign.doctor.report import Examination
from fedalign.errors import UserError
from fedalign.federation.flower.keys import make_certificates
from fedalign.federation.flower.new_site import Wishes, init_site, parse_columns, readable_columns


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "notes.jsonl"
    file.write_text(json.dumps({"body": "a secret", "code": "b"}) + "\n")
    return file


def test_a_new_site_is_what_was_asked_for(data: Path, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path).ca
    wishes = Wishes(data, "demo", "cpu", {"text": "body"}, "fl.example.org:8000", certificates)
    site = init_site("hospital-a", tmp_path / "a", wishes)
    assert site == SiteFolder.load(tmp_path / "a")
    config = site.config
    assert config.name == "hospital-a"
    assert config.data.train == str(data)
    assert config.data.columns == SiteColumns(text="body")
    assert config.model.path == "demo"
    assert config.limits.device == "cpu"
    assert config.coordinator.superlink == "fl.example.org:8000"
    assert config.coordinator.root_certificates == str(certificates)
    assert {path.name for path in site.path.iterdir()} == {"site.toml", "key", "key.pub"}
    assert stat.S_IMODE((site.path / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE(site.path.stat().st_mode) == 0o700


def test_what_was_not_asked_for_is_the_default(data: Path, tmp_path: Path) -> None:
    site = init_site("a", tmp_path / "a", Wishes(data))
    assert site.config.limits.seed is not None
    tables = {"name": "a", "data": {"train": str(data)}, "limits": {"seed": site.config.limits.seed}}
    assert site.config == SiteConfig.model_validate(tables)
    other = init_site("a", tmp_path / "b", Wishes(data))
    assert other.config.limits.seed != site.config.limits.seed
    found = Examination()
    check_key(found, site)
    assert [check.verdict for check in found.checks] == ["ok"]


@pytest.mark.parametrize("name", ['ward "3"', "../ward", "Zürich, Süd", "w" * 64])
def test_any_name_comes_back(data: Path, tmp_path: Path, name: str) -> None:
    assert init_site(name, tmp_path / "a", Wishes(data)).config.name == name


@pytest.mark.parametrize("present", ["site.toml", "key", "key.pub"])
def test_nothing_is_overwritten(data: Path, tmp_path: Path, present: str) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / present).write_text("mine")
    with pytest.raises(UserError, match="there already"):
        init_site("a", folder, Wishes(data))
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(present, "mine")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": Path("none.jsonl")}, "no such file"),
        ({"root_certificates": Path("none.crt")}, "no such file"),
        ({"root_certificates": Path(__file__)}, "holds no certificate in PEM form. Give the coordinator's ca.crt."),
        ({"root_certificates": Path(__file__).parent}, "holds no certificate in PEM form"),
        ({"superlink": "junk"}, 'coordinator.superlink = "junk": must be HOST:PORT'),
        ({"columns": {"text": "note"}}, r"no column 'note'. There are: body, code"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_made(
    data: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        init_site("a", tmp_path / "a", Wishes(**({"data": data} | change)))
    assert not (tmp_path / "a").exists()


def test_rows_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text('{"text": "well"}\n{"text": \n')
    with pytest.raises(UserError, match=r"line 2: not readable"):
        init_site("a", tmp_path / "a", Wishes(tmp_path / "notes.jsonl"))
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(UserError, match=r"type '.txt' are not read"):
        init_site("a", tmp_path / "a", Wishes(tmp_path / "notes.txt"))


def test_a_column_for_each_choice_is_named_as_readable(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question;A;B;answer;secret\nGrass?;red;green;B;x\n", encoding="utf-16")
    folder = init_site("a", tmp_path / "a", Wishes(tmp_path / "a.csv", columns={"choices": "A,B"}))
    assert readable_columns(folder.config) == ["question", "answer", "A", "B"]
    with pytest.raises(UserError, match="no column 'C'"):
        init_site("b", tmp_path / "b", Wishes(tmp_path / "a.csv", columns={"choices": "A,B,C"}))


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "\x1b[31mred", "right\u202eleft", "w" * 65])
def test_a_name_that_cannot_be_printed_is_refused(data: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        init_site(name, tmp_path / "a", Wishes(data))
    assert str(caught.value) == f"name = {json.dumps(name)}: must be 1 to 64 printable characters."
    assert not (tmp_path / "a").exists()


def test_columns_are_written_role_and_name() -> None:
    assert parse_columns(["text=a=b"]) == {"text": "a=b"}
    with pytest.raises(UserError, match="ROLE=NAME"):
        parse_columns(["text"])
    with pytest.raises(UserError, match="Choose one of: answer"):
        parse_columns(["body=text"])
