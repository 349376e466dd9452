"""Run the matrix over all families, and write docs/models.md (--write) or check that it says what came out."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CASE = "case of the matrix"  # conftest.py's


class Outcomes:
    """Which tests of the matrix failed, by family and kind; workers tell it by their reports (conftest.py)."""

    def __init__(self) -> None:
        self.failed: dict[tuple[str, str], list[str]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told: dict[str, Any] = dict(report.user_properties)
        if CASE in told:
            family, kind, name = told[CASE]
            names = self.failed[family, kind]
            if not report.passed:
                names.append(name)


def main(write: bool) -> int:
    outcomes = Outcomes()
    stale = [f"--ignore={HERE / 'test_table.py'}"] if write else []
    asked = ["-m", "families or not families", "--numprocesses", "2", "--dist", "worksteal"]
    status = pytest.main([*asked, *stale, str(HERE.parent / "moe"), str(HERE)], [outcomes])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(status)
    logging.disable(logging.WARNING)  # handlers made meanwhile write to what pytest had put in the place of stderr
    from tests.families.table import DOCUMENT, render  # noqa: PLC0415  # pytest is first to import what it may rewrite

    page = render({case: sorted(set(names)) for case, names in outcomes.failed.items()})
    if write:
        DOCUMENT.write_text(page, encoding="utf-8")
    elif DOCUMENT.read_text(encoding="utf-8") != page:
        print(f"{DOCUMENT.name} does not say what came out. Write it anew: make models", file=sys.stderr)
        return 1
    return int(status)


if __name__ == "__main__":
    sys.exit(main(write="--write" in sys.argv[1:]))
