"""What is printed is what was said: no markup, no emoji, in any console of the command line."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table

import fedalign
from fedalign.cli.live import LiveTable
from fedalign.cli.terminal import console, err, out, say

HARD = "9E:AB:CD:3C [ward 3] :smile: [/] 12:ID:00"


def told_by(shown: Console, what: RenderableType) -> str:
    shown.file = io.StringIO()
    shown.width = 200
    shown.print(what)
    return shown.file.getvalue()


def table(text: str) -> Table:
    made = Table("", title=text, caption=text)
    made.add_row(text)
    return made


@pytest.mark.parametrize("made", [lambda: out, lambda: err, console], ids=["out", "err", "a new one"])
@pytest.mark.parametrize("dressed", [str, Panel, table])
def test_text_is_shown_as_it_is(
    made: Callable[[], Console], dressed: Callable[[str], RenderableType], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = made()
    monkeypatch.setattr(shown, "_file", None)
    monkeypatch.setattr(shown, "_width", 200)
    assert HARD in told_by(shown, dressed(HARD))


def test_lines_to_copy_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    say(HARD)
    assert capsys.readouterr().out == HARD + "\n"


def test_the_bar_shows_a_stage_as_it_is() -> None:
    live = LiveTable(console(), rounds=3)
    live.progress(1, HARD, 1, 2)
    assert HARD in told_by(console(), live)


def test_there_is_one_way_to_make_a_console() -> None:
    package = Path(fedalign.__file__).parent
    makers = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if re.search(r"\bConsole\(", path.read_text())
    }
    assert makers == {"cli/terminal.py"}
