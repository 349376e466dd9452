"""Run the matrix over all families, and write docs/models.md (--write) or check that it says what came out."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


class Outcomes:
    """Which tests of the matrix failed, by family and kind."""

    def __init__(self) -> None:
        self.failed: dict[tuple[str, str], list[str]] = defaultdict(list)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "test_matrix.py" in item.nodeid and parameters.keys() >= {"family", "kind"}:
            names = self.failed[str(parameters["family"]), str(parameters["kind"])]
            if not report.passed:
                names.append(item.originalname)
        return report


def main(write: bool) -> int:
    outcomes = Outcomes()
    stale = [f"--ignore={HERE / 'test_table.py'}"] if write else []
    status = pytest.main(["-m", "families or not families", *stale, str(HERE.parent / "moe"), str(HERE)], [outcomes])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(status)
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
