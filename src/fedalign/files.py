"""Files that are whole or not there, and folders of which only what we wrote is ever removed.

A kill at any moment leaves the old content or the new one, never half. A folder that a command may one day replace
holds a mark, the file `.fedalign`: its first line says what the folder is, the others what was written there, as
patterns of paths. In them `*` is any text and `#` a number, both within one part of a path; one that ends with / is a
folder with a mark of its own. A folder that is written at once holds SHA256SUMS, so that a bit that flips later is
noticed; `sha256sum -c` reads it, too. Who works in a folder holds a lock in it, which the kernel frees at once when the
process ends, however it ends.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import IO
from urllib.parse import quote

import xxhash

from fedalign.errors import UserError

logger = logging.getLogger(__name__)
TALLY = "sent.json"  # beside the folders of clients: what was sent to them
KEPT_ROUNDS, KEPT_BY_CLIENTS = 2, 3  # a client may be a round ahead of the server's last whole checkpoint but one
LOCK, WATCH, MARK = ".lock", ".watch", ".fedalign"  # who writes here, who started that and looks on; whose folder it is
SUMS = "SHA256SUMS"
PATIENCE = 1.0  # seconds that a lock may be held by somebody who only looks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # of a file system that keeps none
Written = Mapping[str, Iterable[str]]  # by what a folder is: patterns of what is written to it
BY_MARK: Written = {}  # of each folder its mark says it
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR)


@contextmanager
def replacing(folder: Path, kind: str = "") -> Iterator[Path]:
    """A fresh folder to fill; on a clean exit it takes the place of `folder`, after an error it is gone.

    It gets digests of all files that it was filled with. With a `kind` it is marked as one, with these files; what else
    was put into the folder that it replaces is kept beside it, and told. Between two renames of the exchange a kill
    leaves `folder` under another name: `put_back`, called here and by `tidy`, gives it its own again.

    Raises:
        OSError: It cannot be written; libraries that say so in words of their own are translated.
    """
    new, old = _beside(folder), _behind(folder)
    put_back(folder, kind)
    _discard(old, folder, marked=bool(kind))
    if kind and not is_bare(new) and not _marks(new, kind):
        raise UserError(f"{str(new)!r}: is in the way, and we did not write it. Move it away.")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        if kind:
            _mark(new, kind, ["*"])
        yield new
        files = [file for file in new.rglob("*") if file.is_file() and file != new / MARK]
        _write_sums(new, files)
        if kind:
            _mark(new, kind, [SUMS, *(_literal(file.relative_to(new).as_posix()) for file in files)])
        for path in (*files, new / SUMS, new):
            _flush(path)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        _raise_of_disk(error, folder)
        raise
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        put_back(folder, kind)
        raise
    _flush(folder.parent)
    _discard(old, folder, marked=bool(kind))


def put_back(folder: Path, kind: str = "") -> None:
    """Undo half of an exchange that a kill came between; with a `kind`, only of what is marked as one."""
    old = _behind(folder)
    if old.is_dir() and not folder.exists() and (not kind or _marks(old, kind)):
        old.rename(folder)


def _discard(old: Path, folder: Path, *, marked: bool) -> None:
    """Remove what was replaced, or is no longer needed; if it holds anything else, it is kept under a free name."""
    strangers = sorted(_strangers(old, BY_MARK) if marked and old.is_dir() else _added(old))
    if not strangers:
        _erase(old)
        return
    names = (folder.with_name(f"{folder.name}.kept-{number}") for number in range(1, 10_000))
    kept = old.rename(next(name for name in names if not name.exists()))
    _erase(kept, strangers)
    logger.warning("%s: held %s, which we did not write: kept as %s", folder, strangers[0], kept)


def _erase(folder: Path, but: Iterable[str] = ()) -> None:
    """Remove a folder, but for some of its files: paths below it.

    Lists of what was written there go last, so that a kill leaves nothing that they do not list.
    """
    stay = {folder / name for name in but}
    for path in sorted(folder.rglob("*"), key=lambda path: (path.name in (SUMS, MARK), -len(path.parts))):
        if path not in stay and (path.is_symlink() or not path.is_dir()):
            with suppress(OSError):
                path.unlink()
    for path in sorted((folder, *folder.rglob("*")), key=lambda path: -len(path.parts)):
        with suppress(OSError):
            path.rmdir()  # those that are empty


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A neighbour to write; on a clean exit it takes the place of `path` at once, after an error it is gone.

    Raises:
        OSError: It cannot be written; libraries that say so in words of their own are translated.
    """
    new = _beside(path)
    new.unlink(missing_ok=True)
    try:
        yield new
        _flush(new)
        new.replace(path)
    except Exception as error:
        _raise_of_disk(error, path)
        raise
    finally:
        new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's whole content at once."""
    with replacing_file(path) as new:
        new.write_text(text, encoding="utf-8")


def whole_lines(file: Path) -> list[str]:
    """The lines of a file to which lines are added; half a line, which a kill left, is cut off."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    *lines, half = text.split("\n")
    if half:
        write_text(file, "".join(f"{line}\n" for line in lines))
    return lines


def write_private(path: Path, content: bytes) -> None:
    """Replace a file's whole content at once; only its owner could ever read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as new, open(new, "xb", opener=_privately) as file:
        file.write(content)


@contextmanager
def for_its_owner() -> Iterator[None]:
    """Meanwhile only its owner can read what this process makes: files, and folders, whoever writes them."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def append_private(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Add a line of JSON for each record, with the time (UTC, to the second); return when the disk has them.

    Only its owner could ever read the file. Half a line at its end, which a kill left, is cut off.
    """
    when = datetime.now(UTC).isoformat(timespec="seconds")
    with open(path, "a+", encoding="utf-8", opener=_privately) as file:
        file.seek(0)
        kept, newline, half = file.read().rpartition("\n")
        if half:
            file.truncate(len((kept + newline).encode()))
        file.write("".join(json.dumps({**record, "when": when}) + "\n" for record in records))
    _flush(path)
    _flush(path.parent)


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


def _behind(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _privately(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def trouble(error: BaseException) -> str | None:
    """The reason why a disk or folder cannot be written, in a few words; None: the error is of another kind."""
    found = _of_disk(error)
    if found is None:
        return None
    where = "" if found.filename is None else f"{str(found.filename)!r}: "
    return f"{where}{found.strerror}"


def _of_disk(error: BaseException) -> OSError | None:
    """The error of a disk or a folder that this is, perhaps in the words of a library in Rust."""
    if isinstance(error, OSError):
        return error if error.errno in DISK or (error.filename is not None and error.errno is not None) else None
    told = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(told[1]), os.strerror(int(told[1]))) if told and int(told[1]) in DISK else None


def _raise_of_disk(error: BaseException, path: Path) -> None:
    """Raise it again as the OSError that it is in truth, with the path; nothing if it is none."""
    found = _of_disk(error)
    if found is not None and found is not error:
        raise OSError(found.errno, found.strerror, str(path)) from error


# ------------------------------------------------------------------------------------------------------------- digests


def digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files by their paths below a folder, in hex, in the order of the paths."""
    found = {}
    for file in sorted(files):
        with file.open("rb") as opened:
            found[file.relative_to(folder).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def _write_sums(folder: Path, files: Iterable[Path]) -> None:
    lines = (f"{digest}  {name}\n" for name, digest in digests(folder, files).items())
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def fingerprint(parts: Iterable[bytes | memoryview]) -> str:
    """32 hex digits over bytes: they tell damage and equality fast, and are no proof against somebody who forges them.

    >>> fingerprint([b"ab", b"c"]) == fingerprint([b"abc"]) != fingerprint([b"abd"])
    True
    """
    found = xxhash.xxh3_128()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def damage(folder: Path, *names: str) -> str:
    """The files that are no longer as they were written, in a few words; empty: there are none.

    Args:
        folder: what `replacing` made.
        names: the files to look at; none: all.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        written = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        for name in names or written:
            if name not in written:
                return f"{SUMS} does not list {name}"
            if digests(folder, [folder / name])[name] != written[name]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    return "" if written else f"{SUMS} is empty"


def refuse_damaged(folder: Path, *names: str, what: str = "") -> None:
    """Refuse a folder whose files, or these of them, are no longer as they were written.

    Raises:
        UserError: It says which, and how a change that was meant is told; `what` stands before the folder's name.
    """
    if problem := damage(folder, *names):
        raise UserError(
            f"{what}{str(folder)!r}: damaged, or changed since it was written: {problem}. If somebody meant to change "
            f"it, remove {SUMS}."
        )


# --------------------------------------------------------------------------------------------------------------- locks


@contextmanager
def locked(file: Path, what: str, patience: float = PATIENCE) -> Iterator[int]:
    """Hold a lock file, whose text says who does; yields its descriptor, with which a child holds it, too.

    The kernel keeps the lock (flock), and frees it when the last of these processes has ended. The file itself stays.

    Args:
        file: the lock.
        what: is at work there, if somebody else holds it.
        patience: seconds to wait for whoever does.

    Raises:
        UserError: Somebody else holds it all that time.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    while (lock := _lock(file)) is None:
        refuse_held(file, what, patience)
        if time.monotonic() > deadline:  # others who only look, one after another
            raise _held(file, what, "another process")
        time.sleep(0.02)
    with lock:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield lock.fileno()


def refuse_held(file: Path, what: str, patience: float = PATIENCE) -> None:
    """Refuse a folder that somebody works in.

    Args:
        file: the lock.
        what: is at work there, if the lock is held.
        patience: seconds to wait for it to be let go.

    Raises:
        UserError: It is, and by whom.
    """
    deadline = time.monotonic() + patience
    while (holder := held_by(file)) is not None:
        if time.monotonic() > deadline:
            raise _held(file, what, holder)
        time.sleep(0.02)


def held_by(file: Path) -> str | None:
    """Who holds a lock file, or None if nobody does."""
    try:
        with file.open(encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read() or "another process"
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return None


def _held(file: Path, what: str, holder: str) -> UserError:
    where = file.parent if file.name in (LOCK, WATCH) else file.with_name(file.name[1 : -len(LOCK)])
    return UserError(
        f"{str(where)!r}: {what} is at work there ({holder}). Wait for it, end it, or give another folder."
    )


def _lock(file: Path) -> IO[str] | None:
    """Open and lock it; None: somebody else has."""
    lock = file.open("a", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), file.stat()):
            return lock  # else it was removed after it was opened
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            lock.close()
            raise
        logger.warning("%s: this file system keeps no locks: see to it that nobody else works there", file.parent)
        return lock
    lock.close()
    return None


@contextmanager
def claimed(path: Path, what: str) -> Iterator[None]:
    """Hold a place that is yet to be written, or will be replaced as a whole: its lock lies beside it meanwhile.

    Raises:
        UserError: Somebody else writes it.
    """
    file = path.with_name(f".{path.name}{LOCK}")
    with locked(file, what):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------- places that may be taken


def holds(path: Path, kind: str, option: str = "--out") -> bool:
    """Whether a folder is marked as a `kind`; if not, it is not there, or empty.

    Raises:
        UserError: Something else is there.
    """
    put_back(path, kind)
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {str(path)!r}: is a file. Give a folder that does not exist yet.")
    if is_bare(path):
        return False
    if not _marks(path, kind):
        raise UserError(
            f"{option} {str(path)!r}: is not empty and holds no {kind} (no {MARK} that says so). "
            "Give a new or empty folder."
        )
    return True


def is_bare(path: Path) -> bool:
    """Whether a folder is not there, or holds nothing but locks, a mark, and what a kill left of a file half made."""
    if not path.exists():
        return True
    return all(
        file.name in (LOCK, WATCH, MARK) or (file.is_file() and _finished(file.name) != file.name)
        for file in path.iterdir()
    )


def check_free(
    path: Path, kind: str, overwrite: bool, option: str = "--out", go_on: str = "", written: Written = BY_MARK
) -> None:
    """Refuse a place where anything would be lost but a `kind` of ours that may be replaced.

    A part of a run or of a model is no place of its own: `best/` is marked as a model, and is its run's.

    Args:
        path: where something is to be written.
        kind: what that is, in a word.
        overwrite: the user wants what is there replaced.
        option: what the user calls the place.
        go_on: what else could be done with a `kind` that is there.
        written: as of `take`.

    Raises:
        UserError: Something would be lost.
    """
    for above in path.resolve().parents:
        if _marks(above, "run") or _marks(above, "model"):
            raise UserError(f"{option} {str(path)!r}: lies in {str(above)!r}, a run or a model. Give another folder.")
    if not holds(path, kind, option):
        return
    if not overwrite:
        raise UserError(
            f"{option} {str(path)!r}: already holds a {kind}. {go_on}Replace it: --overwrite; or give another {option}."
        )
    _refuse_strangers(path, kind, option, written)


def refuse_source(place: Path, source: str, what: str, whose: str = "--out") -> None:
    """Refuse a place that would be emptied with what is made of something in it.

    Args:
        place: where something is to be written, in place of what is there.
        source: what is read for it: a path, or a name that is none, which is no matter.
        what: what the user calls that.
        whose: what the place is, which --out decides.

    Raises:
        UserError: The source is the place, or lies in it.
    """
    where = Path(source).expanduser()
    if where.exists() and where.resolve().is_relative_to(place.expanduser().resolve()):
        raise UserError(
            f"{what} {source!r}: is {whose} {str(place)!r}, or lies in it, and would be lost. Give another --out."
        )


def take(path: Path, kind: str, written: Written, option: str = "--out") -> None:
    """Make an empty folder that is marked as a `kind`; call it where `check_free` allowed it, perhaps a while ago.

    Args:
        path: the folder; of what is there a lock stays.
        kind: what it will be.
        written: patterns of what is written to it, and to kinds of folders in it. They count in place of those of a
            mark, which may be an earlier version's; of kinds that are not named here the mark's count.
        option: what the user calls the place.

    Raises:
        UserError: Something is there that was not written by who marked it.
    """
    path.mkdir(parents=True, exist_ok=True)
    _refuse_strangers(path, kind, option, written)
    for old in sorted(path.iterdir(), key=lambda old: old.name == MARK):  # the mark goes last
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old.name not in (LOCK, WATCH):
            old.unlink()
    _mark(path, kind, written[kind])


def tidy(path: Path, written: Written) -> None:
    """Put back or remove what kills left half made in a folder that is marked; call it while the folder is locked.

    Args:
        path: the folder.
        written: as of `take`.
    """
    strangers = {Path(stranger) for stranger in _strangers(path, written)}
    for root, folders, names in os.walk(path):
        below = Path(root).relative_to(path)
        for name in (*folders, *names):
            whole, there = below / _finished(name), Path(root, name)
            if name == _finished(name) or there.is_symlink():
                continue
            marked = (there / MARK).exists() and below / name / MARK not in strangers
            if not marked and any(stranger.is_relative_to(below / name) for stranger in strangers):
                continue
            if not there.is_dir():
                there.unlink()
            elif name.endswith(".new"):
                shutil.rmtree(there, ignore_errors=True)
            else:
                put_back(path / whole)
                _discard(there, path / whole, marked=marked)
        folders[:] = [name for name in folders if name == _finished(name)]


def remove(path: Path, lines: Iterable[str]) -> None:
    """Remove what was written to a folder, and it, too, if nothing else is there.

    Args:
        path: the folder.
        lines: patterns of what was written, as in a mark.
    """
    ours = [_pattern(line) for line in lines]
    for root, _, names in os.walk(path, topdown=False):
        below = Path(root).relative_to(path)
        for name in names:
            whole = "/".join(map(_finished, (below / name).parts))
            if any(pattern.fullmatch(whole) for pattern in ours):
                with suppress(OSError):
                    Path(root, name).unlink()
        with suppress(OSError):  # it holds something else
            Path(root).rmdir()


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


def _refuse_strangers(path: Path, kind: str, option: str, written: Written) -> None:
    found = sorted(_strangers(path, written))
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{option} {str(path)!r}: holds {', '.join(found[:3])}{more}, which no {kind} wrote. "
            f"Move that away, or give another {option}."
        )


def _strangers(folder: Path, written: Written) -> Iterator[str]:
    """Paths of files in a folder that were not written there by who marked it."""
    listed = next((lines for kind, lines in written.items() if _marks(folder, kind)), _marks(folder))
    ours = [_pattern(line) for line in (LOCK, WATCH, MARK, *listed)]  # a kill may have come before the mark was whole

    def is_ours(path: Path, end: str = "") -> bool:
        whole = "/".join(map(_finished, path.parts)) + end
        return any(pattern.fullmatch(whole) for pattern in ours)

    for root, folders, names in os.walk(folder):
        below = Path(root).relative_to(folder)
        for name in list(folders):
            path, is_whole = below / name, name == _finished(name)
            if (folder / path).is_symlink():
                names.append(name)
            elif is_ours(path, "/") and (not is_whole or (folder / path / MARK).exists()):
                folders.remove(name)
                if is_whole or (name.endswith(".old") and (folder / path / MARK).exists()):
                    yield from ((path / stranger).as_posix() for stranger in _strangers(folder / path, written))
        yield from ((below / name).as_posix() for name in names if not is_ours(below / name))


@cache
def _pattern(line: str) -> re.Pattern[str]:
    """Of paths, for a line of a mark.

    >>> [bool(_pattern("a/r-#/*.bin").fullmatch(path)) for path in ("a/r-10/x.bin", "a/r-x/x.bin", "a/r-1/x/y.bin")]
    [True, False, False]
    >>> bool(_pattern(_literal("x[1]#*.bin")).fullmatch("x[1]#*.bin"))
    True
    """
    wild = {"*": "[^/]*", "#": "[0-9]+"}
    return re.compile(
        "".join(wild.get(one, re.escape(one[1] if one[1:] else one)) for one in re.findall(r"\[.\]|.", line))
    )


def _literal(name: str) -> str:
    """The line of a mark that is this path and no other."""
    return re.sub(r"[*#?[]", r"[\g<0>]", name)


def _added(folder: Path) -> list[str]:
    """Paths of files in a folder that `replacing` made without a mark, and did not write; none if a kill took the list.

    A folder in it may have been made in the same way.
    """
    listed = set[str]()
    for sums in folder.rglob(SUMS):
        below = sums.parent.relative_to(folder)
        lines = sums.read_text(encoding="utf-8", errors="replace").splitlines()
        listed |= {(below / name).as_posix() for name in (SUMS, *(line.partition("  ")[2] for line in lines))}
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    whole = {path.as_posix() for path in files if all(part == _finished(part) for part in path.parts)}
    return sorted(whole - listed) if (folder / SUMS).exists() else []


def _finished(name: str) -> str:
    """The name that a file or folder would have now, had a kill not come between."""
    return name[1:-4] if name.startswith(".") and name.endswith((".new", ".old")) else name


# ------------------------------------------------------------------------------------------------- rounds and clients


def rounds_in(folder: Path) -> list[tuple[int, Path]]:
    """Complete rounds kept in `folder`, oldest first."""
    found = ((path, re.fullmatch(r"round-(\d{5,})", path.name)) for path in folder.glob("round-*") if path.is_dir())
    return sorted((int(name[1]), path) for path, name in found if name)


def forget_old(folder: Path, kept: int) -> None:
    """Remove all rounds but the last few; one to which something was added is kept under another name."""
    for _, path in rounds_in(folder)[:-kept]:
        _discard(path, path, marked=False)


def folder_name(client: str) -> str:
    """A folder for any client id: one path component, the same for no two ids.

    >>> folder_name("client-00"), folder_name("../ward 3"), folder_name(TALLY)
    ('client-00', '%2E.%2Fward%203', 'sent%2Ejson')
    """
    name = quote(client, safe="")
    if client.startswith(".") or client == TALLY:
        name = name.replace(".", "%2E", 1)
    return name if len(name) <= 100 else f"{name[:60]}-{hashlib.sha256(client.encode()).hexdigest()[:16]}"
