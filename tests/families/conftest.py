"""Reports of the matrix name their case, for who counts outcomes in another process."""

from __future__ import annotations

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add family, kind and test."""
    report = yield
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "test_matrix.py" in item.nodeid and parameters.keys() >= {"family", "kind"}:
        case = (str(parameters["family"]), str(parameters["kind"]), item.originalname)
        report.user_properties.append(("case of the matrix", case))
    return report
