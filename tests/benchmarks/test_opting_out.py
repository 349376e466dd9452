"""The numbers of docs/opting-out.md: what was found becomes a table, and nothing is written without it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import opting_out


def frozen(own: float) -> dict[str, Any]:
    reached = {"a": {"a": [0.5], "b": [0.2], opting_out.WRITES: [0.1]}, "b": {"a": [0.3], opting_out.WRITES: [0.1]}}
    scores: dict[str, float | None] = {"a": own, "b": None}
    return {"rows": {"a": 4, "b": 0}, "whole": scores, "without": {"a": scores, "b": scores}, "reached": reached}


def test_the_table_gives_means_and_ranges_over_seeds_and_no_number_where_there_is_none() -> None:
    lines = [
        {"algorithm": name, "seed": seed, "global": 0.5, "own": 0.25 * seed, "bytes_up": 1e6}
        | ({"frozen": frozen(0.25 * seed)} if name == opting_out.FROZEN else {})
        for name in opting_out.ALGORITHMS
        for seed in (1, 2)
    ]
    told = opting_out.table(lines, {"settings": {"seeds": [1, 2]}, "machine": "a machine"})
    assert "| `by_use` | 50.0 % (50.0 to 50.0) | 37.5 % (25.0 to 50.0) | 1.0 MB |" in told
    assert "| nobody | 37.5 % (25.0 to 50.0) | - |" in told
    assert "| b | 30 | - | 10 |" in told
    assert "The frozen model as a whole answers own rows at 37.5 %" in told
    assert "Mean and range of 2 seeds. Run on: a machine." in told


def test_without_a_finished_run_the_page_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = opting_out.PAGE.read_text()
    with pytest.raises(SystemExit, match="2"):
        opting_out.main(["--out", str(tmp_path), "--table"])
    assert "no found.json there" in capsys.readouterr().err
    assert opting_out.PAGE.read_text() == before
    assert before.count(opting_out.BEGIN) == before.count(opting_out.END) == 1
