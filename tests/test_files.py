"""Files that are whole or not there, and folders of which only what we wrote is ever removed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fedalign import files
from fedalign.errors import UserError
from fedalign.files import (
    LOCK,
    MARK,
    cached,
    check_free,
    check_new,
    replacing,
    replacing_file,
    take,
    write_private,
    write_text,
)

WRITTEN = ("config.toml", "rounds/round-*", "model/")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a run leaves it: a file, rounds, and a model that has a mark of its own."""
    folder = tmp_path / "run"
    take(folder, "run", WRITTEN)
    (folder / "config.toml").touch()
    with replacing(folder / "rounds" / "round-1") as round_1:
        (round_1 / "state.json").touch()
    with replacing(folder / "model", "model") as model:
        (model / "weights[1].bin").touch()  # a bracket is a pattern elsewhere
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_a_run_wrote_is_replaced(run: Path) -> None:
    with pytest.raises(UserError, match=r"already holds a run. Do. Replace it: --overwrite; or give another --out"):
        check_free(run, "run", overwrite=False, go_on="Do. ")
    check_free(run, "run", overwrite=True)
    take(run, "run", WRITTEN)
    assert names(run) == [MARK]


@pytest.mark.parametrize(
    "name", ["thesis.tex", "rounds/notes.txt", "model/thesis.tex", "model/deep/thesis.tex", ".thesis.old/thesis.tex"]
)
def test_what_nobody_of_us_wrote_is_named_and_kept(run: Path, name: str) -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("years of work")
    before = names(run)
    said = rf"holds {name}, which no run wrote\. Move that away, or give another --out"
    with pytest.raises(UserError, match=said):
        check_free(run, "run", overwrite=True)
    with pytest.raises(UserError, match=said):
        take(run, "run", WRITTEN)
    assert names(run) == before


def test_links_and_marked_folders_that_are_not_listed_are_kept(run: Path, tmp_path: Path) -> None:
    with replacing(run / "exported", "model") as exported:
        (exported / "config.json").touch()
    (tmp_path / "precious").mkdir()
    (run / "linked").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"holds exported/.fedalign, exported/config.json, linked, which"):
        check_free(run, "run", overwrite=True)


def test_what_a_kill_left_half_made_is_ours(run: Path) -> None:
    for name in (".config.toml.new", "rounds/.round-2.new/state.json", ".model.new/weights.bin", ".model.old/a.bin"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    take(run, "run", WRITTEN)
    assert names(run) == [MARK]


def test_a_folder_that_no_mark_speaks_for(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()  # a project's own
    with pytest.raises(UserError, match=r"is not empty and holds no run \(no .fedalign that says so\)"):
        check_free(tmp_path, "run", overwrite=True)
    with pytest.raises(UserError, match=r"--to .*config\.toml'.* is a file"):
        check_free(tmp_path / "config.toml", "model", overwrite=True, option="--to")
    with pytest.raises(UserError, match=r"holds config\.toml, which no run wrote"):
        take(tmp_path, "run", WRITTEN)


def test_a_mark_of_another_kind_does_not_count(run: Path) -> None:
    with pytest.raises(UserError, match="holds no comparison"):
        check_free(run, "comparison", overwrite=True)


@pytest.mark.parametrize("there", [(), (LOCK,)])
def test_an_empty_folder_is_free_and_a_lock_stays(tmp_path: Path, there: tuple[str, ...]) -> None:
    for name in there:
        (tmp_path / name).touch()
    check_free(tmp_path, "run", overwrite=False)
    take(tmp_path, "run", WRITTEN)
    assert names(tmp_path) == sorted([MARK, *there])
    check_free(tmp_path / "new", "run", overwrite=False)


def test_a_linked_folder_is_emptied_not_unlinked(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    take(tmp_path / "link", "run", WRITTEN)
    assert (tmp_path / "link").is_symlink()
    assert names(run) == [MARK]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")

    def write() -> None:
        with replacing_file(tmp_path / "a") as new:
            new.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_private_file_is_never_readable_by_others(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "key"
    for content in (b"first", b"second"):
        write_private(file, content)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.read_bytes() == content


def test_files_that_are_there_are_not_written(tmp_path: Path) -> None:
    check_new("key", [tmp_path / "a", tmp_path / "b"], "Choose another.")
    (tmp_path / "b").touch()
    with pytest.raises(UserError, match=r"key: '.*/b' is there already. Choose another."):
        check_new("key", [tmp_path / "a", tmp_path / "b"], "Choose another.")


def test_the_cache_is_filled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fill(folder: Path) -> None:
        (folder / "mine").touch()
        first = files.cache_folder() / "data"  # another process is faster
        first.mkdir()
        (first / "theirs").touch()

    assert names(cached("data", fill)) == ["theirs"]
    assert names(cached("data", fill)) == ["theirs"]  # or `mkdir` would fail
    assert [path.name for path in (tmp_path / "fedalign").iterdir()] == ["data"]


def test_a_cache_that_cannot_be_filled_stays_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fill(folder: Path) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        cached("data", fill)
    assert list((tmp_path / "fedalign").iterdir()) == []
