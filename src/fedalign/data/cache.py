"""Where derived files live between runs, and how one gets there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


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
