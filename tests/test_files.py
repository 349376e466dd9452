"""Files that are whole or not there, and folders of which only what we wrote is ever removed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedalign import files
from fedalign.errors import UserError
from fedalign.files import (
    LOCK,
    MARK,
    PATIENCE,
    SUMS,
    WATCH,
    append_private,
    cached,
    check_free,
    check_new,
    claimed,
    damage,
    forget_old,
    held_by,
    locked,
    put_back,
    refuse_held,
    remove,
    replacing,
    replacing_file,
    take,
    tidy,
    trouble,
    write_private,
    write_text,
)

WRITTEN = {"run": ("config.toml", "rounds/round-#/SHA256SUMS", "rounds/round-#/state.json", "model/")}


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
    check_free(run, "run", overwrite=True, written=WRITTEN)
    take(run, "run", WRITTEN)
    assert names(run) == [MARK]
    check_free(run, "run", overwrite=False)  # a mark alone is nothing that could be lost


@pytest.mark.parametrize(
    "name",
    [
        *("thesis.tex", "rounds/notes.txt", "model/thesis.tex", "model/deep/thesis.tex", ".thesis.old/thesis.tex"),
        *("rounds/round-1/thesis.tex", "rounds/round-1/deep/state.json", "rounds/round-notes.txt"),
        *("rounds/round-my/state.json", "rounds/round-1-copy/state.json", "rounds/.round-2.new/thesis.tex"),
        *("model/thesis[1].tex", "deep/config.toml"),
    ],
)
def test_what_nobody_of_us_wrote_is_named_and_kept(run: Path, name: str) -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("years of work")
    before = names(run)
    said = rf"holds {re.escape(name)}, which no run wrote\. Move that away, or give another --out"
    with pytest.raises(UserError, match=said):
        check_free(run, "run", overwrite=True, written=WRITTEN)
    with pytest.raises(UserError, match=said):
        take(run, "run", WRITTEN)
    assert names(run) == before


def test_links_and_marked_folders_that_are_not_listed_are_kept(run: Path, tmp_path: Path) -> None:
    with replacing(run / "exported", "model") as exported:
        (exported / "config.json").touch()
    (tmp_path / "precious").mkdir()
    (run / "linked").symlink_to(tmp_path / "precious")
    with pytest.raises(
        UserError, match=r"holds exported/.fedalign, exported/SHA256SUMS, exported/config.json and 1 more"
    ):
        check_free(run, "run", overwrite=True, written=WRITTEN)


@pytest.mark.parametrize("part", ["model", "rounds", "new", "new/model", "model/clients/a"])
@pytest.mark.parametrize("kind", ["run", "model", "comparison"])
def test_a_part_of_a_run_or_a_model_is_no_place_of_its_own(run: Path, part: str, kind: str) -> None:
    said = rf"--to '{run}/{part}': lies in '{run}(/model)?', a run or a model\. Give another folder"
    with pytest.raises(UserError, match=said):
        check_free(run / part, kind, overwrite=True, option="--to")


def test_lines_are_added_behind_whole_lines_alone(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    append_private(file, [{"name": "Zoë"}, {"name": "b"}])
    with file.open("a", encoding="utf-8") as half:
        half.write('{"name": "Zo')
    append_private(file, [{"name": "c"}])
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["name"] for line in lines] == ["Zoë", "b", "c"]
    assert all(line["when"].endswith("+00:00") for line in lines)
    assert file.stat().st_mode & 0o777 == 0o600


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


@pytest.mark.parametrize("there", [(), (LOCK,), (LOCK, WATCH)])
def test_an_empty_folder_is_free_and_a_lock_stays(tmp_path: Path, there: tuple[str, ...]) -> None:
    for name in there:
        (tmp_path / name).touch()
    check_free(tmp_path, "run", overwrite=False)
    take(tmp_path, "run", WRITTEN)
    assert names(tmp_path) == sorted([MARK, *there])
    check_free(tmp_path.with_name("new"), "run", overwrite=False)


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


# ------------------------------------------------------------------------------------------------- exchanging folders


def fill(folder: Path, text: str, kind: str = "model") -> None:
    with replacing(folder, kind) as new:
        (new / "weights.bin").write_text(text)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    fill(tmp_path / "model", "old")
    return tmp_path / "model"


def test_what_a_user_put_into_a_folder_is_kept_when_it_is_replaced(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(("thesis.tex", "deep/thesis.tex"), start=1):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("years of work")
        fill(model, "new")
        assert names(model) == [MARK, SUMS, "weights.bin"]
        assert names(kept := model.with_name(f"model.kept-{number}")) == [name]
        assert (kept / name).read_text() == "years of work"
        told = caplog.records[-1].getMessage()
        assert f"held {name}, which we did not write" in told
        assert told.endswith(f"model.kept-{number}")
    fill(model, "newer")
    assert len(caplog.records) == 2
    assert len(list(model.parent.iterdir())) == 3


@pytest.mark.parametrize("which", ["first", "second"])
def test_an_exchange_that_fails_or_is_cut_off_loses_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    (model / "thesis.tex").write_text("years of work")
    rename, calls = Path.rename, iter(("first", "second"))

    def fails(self: Path, target: Path) -> Path:
        if next(calls, "") == which:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space"):
        fill(model, "new")
    assert names(model) == [MARK, SUMS, "thesis.tex", "weights.bin"]
    monkeypatch.undo()
    model.rename(model.with_name(".model.old"))  # as a kill leaves it between the two renames
    check_free(model.with_name("other"), "model", overwrite=False)
    with pytest.raises(UserError, match="already holds a model"):
        check_free(model, "model", overwrite=False)
    assert (model / "weights.bin").read_text() == "old"
    model.rename(model.with_name(".model.old"))
    fill(model, "new")
    assert (model / "weights.bin").read_text() == "new"
    assert (model.with_name("model.kept-1") / "thesis.tex").exists()


def test_neighbours_that_only_look_like_ours_are_left_alone(tmp_path: Path) -> None:
    for name in (".model.old", ".model.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    put_back(tmp_path / "model", "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(UserError, match=r"\.model\.new': is in the way, and we did not write it"):
        fill(tmp_path / "model", "new")
    assert len(list(tmp_path.rglob("thesis.tex"))) == 2


def test_a_folder_that_was_cut_off_before_its_mark_is_ours(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".{MARK}.new").touch()
    check_free(tmp_path / "run", "run", overwrite=False)
    take(tmp_path / "run", "run", WRITTEN)
    assert names(tmp_path / "run") == [MARK]
    (tmp_path / "run" / MARK).unlink()
    (tmp_path / ".model.new").mkdir()
    (tmp_path / ".model.new" / f".{MARK}.new").touch()
    fill(tmp_path / "model", "new")
    assert names(tmp_path) == [f"model/{MARK}", f"model/{SUMS}", "model/weights.bin"]


def test_a_folder_is_tidied_of_what_kills_left(run: Path) -> None:
    whole = names(run)
    (run / "model").rename(run / ".model.old")
    (run / "rounds" / "round-1").rename(run / "rounds" / ".round-1.old")
    for name in (".config.toml.new", "rounds/.round-2.new/state.json", ".model.new/weights.bin"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    (run / ".thesis.old").mkdir()
    (run / ".thesis.old" / "thesis.tex").touch()
    (run / "rounds" / ".round-3.new").mkdir()
    (run / "rounds" / ".round-3.new" / "thesis.tex").touch()
    tidy(run, WRITTEN)
    assert names(run) == sorted([*whole, ".thesis.old/thesis.tex", "rounds/.round-3.new/thesis.tex"])


def test_what_is_put_back_keeps_what_a_user_put_into_it(run: Path) -> None:
    (run / "model" / "thesis.tex").touch()
    whole = names(run)
    (run / "model").rename(run / ".model.old")
    said = r"holds \.model\.old/thesis\.tex, which no run wrote"
    with pytest.raises(UserError, match=said):
        take(run, "run", WRITTEN)
    tidy(run, WRITTEN)
    assert names(run) == whole


def test_a_round_is_forgotten_but_for_what_a_user_put_into_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2, 3, 4):
        with replacing(tmp_path / f"round-{number:05d}") as folder:
            (folder / "state.json").touch()
        with replacing(tmp_path / f"round-{number:05d}" / "scored") as folder:
            (folder / "line.json").touch()
    (tmp_path / "round-00002" / "scored" / "thesis.tex").write_text("years of work")
    (tmp_path / "round-00003" / SUMS).unlink()  # a kill came before all of it was gone
    forget_old(tmp_path, kept=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00002.kept-1", "round-00004"]
    assert names(tmp_path / "round-00002.kept-1") == ["scored/thesis.tex"]
    assert (tmp_path / "round-00002.kept-1" / "scored" / "thesis.tex").read_text() == "years of work"
    (told,) = caplog.records
    assert "held scored/thesis.tex, which we did not write: kept as" in told.getMessage()
    (tmp_path / "round-00004" / "thesis.tex").touch()
    with replacing(tmp_path / "round-00004") as folder:
        (folder / "state.json").touch()
    assert names(tmp_path / "round-00004") == [SUMS, "state.json"]
    assert (tmp_path / "round-00004.kept-1" / "thesis.tex").exists()


def test_a_kill_while_a_round_is_forgotten_leaves_nothing_that_looks_like_a_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink
    for after in range(4):
        for number in (1, 2):
            with replacing(tmp_path / f"round-{number:05d}") as folder:
                (folder / "state.json").touch()
        with replacing(tmp_path / "round-00001" / "scored") as folder:
            (folder / "line.json").touch()
        left = iter(range(after))

        def killed(self: Path, missing_ok: bool = False, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            unlink(self, missing_ok)

        monkeypatch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            forget_old(tmp_path, kept=1)
        monkeypatch.undo()
        forget_old(tmp_path, kept=1)
        assert [path.name for path in tmp_path.iterdir()] == ["round-00002"]


def test_what_was_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("moved.jsonl", "round-1/a.safetensors", "round-2/.a.safetensors.new", "round-2/thesis.tex", "b/c.tex"):
        (tmp_path / "transfers" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "transfers" / name).touch()
    lines = ("moved.jsonl", "round-#/*.safetensors")
    remove(tmp_path / "transfers", lines)
    assert names(tmp_path) == ["transfers/b/c.tex", "transfers/round-2/thesis.tex"]
    assert not (tmp_path / "transfers" / "round-1").exists()
    for name in ("b/c.tex", "round-2/thesis.tex"):
        (tmp_path / "transfers" / name).unlink()
    remove(tmp_path / "transfers", lines)
    remove(tmp_path / "transfers", lines)
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_version_marked_is_known_by_what_is_written_now(run: Path) -> None:
    lines = (run / MARK).read_text().splitlines()
    (run / MARK).write_text(f"{lines[0]}\nconfig.toml\nmodel/\nrounds/*\n")
    (run / "rounds" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds rounds/thesis\.tex, which no run wrote"):
        check_free(run, "run", overwrite=True, written=WRITTEN)
    (run / "rounds" / "thesis.tex").unlink()
    check_free(run, "run", overwrite=True, written=WRITTEN)


RUST = Exception("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [RUST, OSError(errno.ENOSPC, "No space left on device", "a")])
@pytest.mark.parametrize("write", [replacing, replacing_file])
def test_a_full_disk_is_an_os_error_in_whosever_words(
    tmp_path: Path, write: Callable[[Path], Iterator[Path]], error: Exception
) -> None:
    def fails() -> None:
        with write(tmp_path / "a"):  # type: ignore[attr-defined] # both are context managers
            raise error

    with pytest.raises(OSError, match="No space left on device") as caught:
        fails()
    assert caught.value.errno == errno.ENOSPC
    assert str(trouble(caught.value)).endswith("a': No space left on device")
    assert names(tmp_path) == []


def test_only_disks_and_folders_are_trouble() -> None:
    assert trouble(PermissionError(errno.EACCES, "Permission denied", "/a")) == "'/a': Permission denied"
    assert trouble(RUST) == "No space left on device"
    for other in (ValueError("os error"), ConnectionRefusedError(errno.ECONNREFUSED, "refused"), OSError("bare")):
        assert trouble(other) is None


# ------------------------------------------------------------------------------------------------------------- digests


def test_what_is_no_longer_as_it_was_written_is_named(model: Path) -> None:
    assert damage(model) == damage(model, "weights.bin") == ""
    (model / "thesis.tex").touch()  # nothing of ours
    assert damage(model) == ""
    assert damage(model, "thesis.tex") == f"{SUMS} does not list thesis.tex"
    (model / "weights.bin").write_text("olt")
    assert damage(model) == "weights.bin is not what was written"
    (model / "weights.bin").unlink()
    assert damage(model) == "weights.bin is missing"
    (model / SUMS).write_text("")
    assert damage(model) == f"{SUMS} is empty"
    (model / SUMS).unlink()
    assert damage(model) == f"{SUMS} is missing"


def test_digests_are_those_that_others_read(model: Path) -> None:
    told = subprocess.run(["sha256sum", "--check", SUMS], cwd=model, capture_output=True, text=True, check=True).stdout
    assert told == "weights.bin: OK\n"


# --------------------------------------------------------------------------------------------------------------- locks


HOLDER = """
import sys, time
from pathlib import Path
from fedalign.files import locked
with locked(Path(sys.argv[1]), "a run"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `tmp_path`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_holds_a_folder_and_gets_it_when_that_is_killed(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    by = f"process {other.pid} on {socket.gethostname()}"
    said = rf"{tmp_path}': a run is at work there \({by}\)\. Wait for it, end it, or give another folder\.$"
    assert held_by(tmp_path / LOCK) == by
    with pytest.raises(UserError, match=said), locked(tmp_path / LOCK, "a run"):
        pass
    with pytest.raises(UserError, match=said):
        refuse_held(tmp_path / LOCK, "a run")
    assert held_by(tmp_path / LOCK) == by  # a vain attempt leaves its name
    other.send_signal(signal.SIGKILL)
    other.wait()
    refuse_held(tmp_path / LOCK, "a run")
    with locked(tmp_path / LOCK, "a run"):
        assert held_by(tmp_path / LOCK) == f"process {os.getpid()} on {socket.gethostname()}"


def test_who_is_patient_gets_it_from_a_process_that_ends_meanwhile(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    threading.Timer(PATIENCE + 1, other.kill).start()
    with locked(tmp_path / LOCK, "an answer", patience=60):
        assert held_by(tmp_path / LOCK) == f"process {os.getpid()} on {socket.gethostname()}"


def test_whoever_looks_at_that_moment_keeps_nobody_out(tmp_path: Path) -> None:
    with locked(tmp_path / LOCK, "a run"):
        pass
    looking = (tmp_path / LOCK).open()
    fcntl.flock(looking, fcntl.LOCK_SH)  # as `held_by` does for as long as it looks
    threading.Timer(0.2, looking.close).start()
    with locked(tmp_path / LOCK, "a run"):
        assert held_by(tmp_path / LOCK)


def test_a_lock_that_was_removed_before_it_was_got_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, flock = tmp_path / LOCK, fcntl.flock
    removed = iter((True,))

    def slowly(*arguments: int) -> None:
        flock(*arguments)
        if next(removed, False):
            file.unlink()  # as who held it does, and somebody else makes it anew

    monkeypatch.setattr(fcntl, "flock", slowly)
    with locked(file, "a run"):
        assert held_by(file)


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def has_none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", has_none)
    with locked(tmp_path / LOCK, "a run"):
        assert held_by(tmp_path / LOCK) is None
    assert "keeps no locks: see to it that nobody else works there" in caplog.text


def test_a_place_is_claimed_by_one_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with claimed(place, "an export"):
        with pytest.raises(UserError, match=rf"{place}': an export is at work there"), claimed(place, "an export"):
            pass
        fill(place, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
