"""Files that are whole or not there, and folders of which only what we wrote is ever removed.

A kill at any moment leaves the old content or the new one, never half. A folder that a command may one day replace
holds a mark, the file `.fedalign`: its first line says what the folder is, the others what was written there, as
patterns of paths; one that ends with / is a folder with a mark of its own.
"""

from __future__ import annotations

import atexit
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote

from fedalign.errors import UserError

KEPT_ROUNDS = 2
LOCK, MARK = ".lock", ".fedalign"


@contextmanager
def replacing(folder: Path, kind: str = "") -> Iterator[Path]:
    """A fresh folder to fill; on a clean exit it takes the place of `folder` at once, after an error it is gone.

    With a `kind` it is marked as one, with the files that it was filled with.
    """
    new, old = _beside(folder), folder.with_name(f".{folder.name}.old")
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        files = [file for file in new.rglob("*") if file.is_file()]
        if kind:
            _mark(new, kind, [glob.escape(file.relative_to(new).as_posix()) for file in files])
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for file in files:
        _flush(file)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A neighbour to write; on a clean exit it takes the place of `path` at once, after an error it is gone."""
    new = _beside(path)
    new.unlink(missing_ok=True)
    try:
        yield new
        _flush(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's whole content at once."""
    with replacing_file(path) as new:
        new.write_text(text, encoding="utf-8")


def write_private(path: Path, content: bytes) -> None:
    """Replace a file's whole content at once; only its owner could ever read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as new, open(new, "xb", opener=_privately) as file:
        file.write(content)


def cached(name: str, fill: Callable[[Path], object]) -> Path:
    """A folder of the cache, filled on first use; of processes that fill it at the same time the first one's stays.

    Where the cache cannot be written to, it is a folder of this process alone.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix=f"fedalign-{name}-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        fill(folder)
        return folder
    try:
        fill(new)
        new.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same content
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/fedalign`, by default `~/.cache/fedalign`; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedalign"


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _privately(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------------- places that may be taken


def holds(path: Path, kind: str, option: str = "--out") -> bool:
    """Whether a folder is marked as a `kind`; if not, it is not there, or empty.

    Raises:
        UserError: Something else is there.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {str(path)!r}: is a file. Give a folder that does not exist yet.")
    if not path.exists() or all(file.name == LOCK for file in path.iterdir()):
        return False
    if not _marks(path, kind):
        raise UserError(
            f"{option} {str(path)!r}: is not empty and holds no {kind} (no {MARK} that says so). "
            "Give a new or empty folder."
        )
    return True


def check_free(path: Path, kind: str, overwrite: bool, option: str = "--out", go_on: str = "") -> None:
    """Refuse a place where anything would be lost but a `kind` of ours that may be replaced.

    Args:
        path: where something is to be written.
        kind: what that is, in a word.
        overwrite: the user wants what is there replaced.
        option: what the user calls the place.
        go_on: what else could be done with a `kind` that is there.

    Raises:
        UserError: Something would be lost.
    """
    if not holds(path, kind, option):
        return
    if not overwrite:
        raise UserError(
            f"{option} {str(path)!r}: already holds a {kind}. {go_on}Replace it: --overwrite; or give another {option}."
        )
    _refuse_strangers(path, kind, option)


def take(path: Path, kind: str, written: Iterable[str], option: str = "--out") -> None:
    """Make an empty folder that is marked as a `kind`; call it where `check_free` allowed it, perhaps a while ago.

    Args:
        path: the folder; of what is there a lock stays.
        kind: what it will be.
        written: patterns of what will be written to it.
        option: what the user calls the place.

    Raises:
        UserError: Something is there that was not written by who marked it.
    """
    path.mkdir(parents=True, exist_ok=True)
    _refuse_strangers(path, kind, option)
    for old in sorted(path.iterdir(), key=lambda old: old.name == MARK):  # the mark goes last
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old.name != LOCK:
            old.unlink()
    _mark(path, kind, written)


def check_new(what: str, files: Iterable[Path], remedy: str) -> None:
    """Refuse to write files that are there.

    Raises:
        UserError: One is.
    """
    for file in files:
        if file.exists():
            raise UserError(f"{what}: {str(file)!r} is there already. {remedy}")


def _mark(folder: Path, kind: str, written: Iterable[str]) -> None:
    head = f"{kind}: --overwrite removes what is listed here, and refuses where there is anything else"
    write_text(folder / MARK, "".join(f"{line}\n" for line in (head, *sorted(written))))


def _marks(folder: Path, kind: str = "") -> list[str]:
    """The patterns of what was written to a folder, the mark among them; empty without a mark of this kind."""
    try:
        head, *lines = (folder / MARK).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    return [MARK, *lines] if not kind or head.startswith(f"{kind}: ") else []


def _refuse_strangers(path: Path, kind: str, option: str) -> None:
    found = sorted(_strangers(path))
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{option} {str(path)!r}: holds {', '.join(found[:3])}{more}, which no {kind} wrote. "
            f"Move that away, or give another {option}."
        )


def _strangers(folder: Path) -> Iterator[str]:
    """What is in a folder and not listed by its mark: paths below it."""
    listed = [LOCK, *_marks(folder)]

    def is_listed(path: str) -> bool:
        return any(fnmatchcase(path, line) for line in listed)

    for root, folders, names in os.walk(folder):
        below = Path(root).relative_to(folder)
        for name in list(folders):
            path, inner = folder / below / name, (below / _finished(name)).as_posix()
            if path.is_symlink():
                names.append(name)
            elif is_listed(f"{inner}/") and (name != _finished(name) or (path / MARK).exists()):
                folders.remove(name)
                if name == _finished(name):
                    yield from (f"{inner}/{stranger}" for stranger in _strangers(path))
        for name in names:
            if not is_listed((below / _finished(name)).as_posix()):
                yield (below / name).as_posix()


def _finished(name: str) -> str:
    """What a file or folder would be called now, had a kill not come between."""
    return name[1:-4] if name.startswith(".") and name.endswith((".new", ".old")) else name


# ------------------------------------------------------------------------------------------------- rounds and clients


def rounds_in(folder: Path) -> list[tuple[int, Path]]:
    """Complete rounds kept in `folder`, oldest first."""
    return sorted((int(path.name.removeprefix("round-")), path) for path in folder.glob("round-*") if path.is_dir())


def forget_old(folder: Path) -> None:
    """Remove all rounds but the last `KEPT_ROUNDS`."""
    for _, path in rounds_in(folder)[:-KEPT_ROUNDS]:
        shutil.rmtree(path, ignore_errors=True)


def folder_name(client: str) -> str:
    """A folder for any client id: one path component, the same for no two ids.

    >>> folder_name("client-00"), folder_name("../ward 3")
    ('client-00', '%2E.%2Fward%203')
    """
    name = quote(client, safe="").replace(".", "%2E", 1) if client.startswith(".") else quote(client, safe="")
    return name if len(name) <= 100 else f"{name[:60]}-{hashlib.sha256(client.encode()).hexdigest()[:16]}"
