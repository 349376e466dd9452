"""`fedalign report`: one self-contained page for run folders, or for a comparison; it opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedalign.errors import UserError
from fedalign.files import write_text
from fedalign.report.material import read_material
from fedalign.report.page import GENERATOR, render


def write_report(folders: Sequence[Path], out: Path) -> list[str]:
    """Make the page; returns what is not in it, and why.

    Raises:
        UserError: There is nothing to report, or `out` is something else than a report.
    """
    _check_replaceable(out)
    material = read_material(folders)
    page = render(material)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return list(material.missing)


def default_out(folders: Sequence[Path]) -> Path:
    """Inside the one folder, or here for several."""
    return folders[0] / "report.html" if len(folders) == 1 else Path("report.html")


def _check_replaceable(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"--out {str(out)!r}: is a folder. Give the name of the page, such as report.html.")
    if not out.exists():
        return
    with out.open("rb") as file:
        if f'<meta name="generator" content="{GENERATOR} '.encode() not in file.read(4096):
            raise UserError(f"--out {str(out)!r}: is a file that is no report. Give another name.")
