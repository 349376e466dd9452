"""Whatever a linter or mypy is told to overlook says why, on its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OVERLOOKED = re.compile(r"# (?:noqa|type: ?ignore)\b.*")
EXPLAINED = re.compile(r"# (?:noqa: [A-Z0-9, ]+|type: ignore\[[a-z-]+\]) +[-#] ?\w.*")


def unexplained(text: str) -> list[str]:
    return [
        line.strip()
        for line in text.splitlines()
        if (found := OVERLOOKED.search(line)) and not EXPLAINED.match(found[0])
    ]


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks"])
def test_what_is_overlooked_says_why(folder: str) -> None:
    files = [file for file in (ROOT / folder).rglob("*.py") if file != Path(__file__)]
    assert files
    assert {str(file): lines for file in files if (lines := unexplained(file.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("x = 1  # type: ignore[misc] # mypy infers none", True),
        ("x = 1  # noqa: B018  # reading it is the point", True),
        ("import x  # noqa: F401, PLC0415 - heavy", True),
        ("x = 1  # type: ignore[misc]", False),
        ("x = 1  # type: ignore # all of it", False),
        ("x = 1  # noqa", False),
        ("import x  # noqa: F401 ", False),
    ],
)
def test_a_reason_is_told_from_none(line: str, told: bool) -> None:
    assert (unexplained(line) == []) == told
