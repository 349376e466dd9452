"""A user's own files in folders of ours."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from fedalign.errors import UserError
from fedalign.files import check_free, take

FOREIGN = (
    "thesis.tex",
    "merged.safetensors",
    "round-notes.txt",
    "round-my/thesis.safetensors",
    "round-00001-copy/state.json",
    ".a.new",
)


def check_foreign_files_are_kept(folder: Path, kind: str, written: Mapping[str, Sequence[str]]) -> None:
    """All that is there may be replaced; a file of the user's, in whatever folder, is named and nothing removed."""
    check_free(folder, kind, overwrite=True, written=written)
    before = sorted(folder.rglob("*"))
    for place in (folder, *(path for path in before if path.is_dir() and not path.is_symlink())):
        for name in FOREIGN:
            mine = place / name
            mine.parent.mkdir(exist_ok=True)
            mine.write_text("years of work")
            said = f"holds {mine.relative_to(folder).as_posix()}, which no {kind} wrote"
            with pytest.raises(UserError) as refused:
                check_free(folder, kind, overwrite=True, written=written)
            assert said in str(refused.value)
            with pytest.raises(UserError) as refused:
                take(folder, kind, written)
            assert said in str(refused.value)
            assert mine.read_text() == "years of work"
            shutil.rmtree(mine.parent) if "/" in name else mine.unlink()
    assert sorted(folder.rglob("*")) == before
