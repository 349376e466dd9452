"""Files that are whole or not there: a kill at any moment leaves the old content or the new one, never half."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from fedalign.errors import UserError


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/fedalign`, by default `~/.cache/fedalign`; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedalign"


def write_atomically(path: Path, write: Callable[[Path], None]) -> bool:
    """Let `write` fill a temporary neighbour, then rename it to `path`; False where the disk says no.

    A reader sees the old file or the new one, never half of one; of two writers the last wins.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError:
        return False
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.replace(path)
    except OSError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


KEPT_ROUNDS = 2


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder to fill; on a clean exit it takes the place of `folder` at once, after an error it is gone."""
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for file in new.rglob("*"):
        if file.is_file():
            _flush(file)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's whole content at once."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    _flush(new)
    new.replace(path)


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner could ever read."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    except OSError as error:
        raise UserError(
            f"key {str(path)!r}: cannot be written ({error.strerror}). Choose a path in a folder of yours."
        ) from None
