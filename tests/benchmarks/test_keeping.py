"""What a benchmark found is kept where that was asked for, with options, machine and versions."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import keeping


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--row", action="store_true")
    keeping.keepable(parser)
    return parser.parse_args(words)


def test_a_line_has_options_and_what_was_found(tmp_path: Path) -> None:
    args = options("--keep", str(tmp_path / "kept"), "--row")
    for clients in (10, 100):
        keeping.keep(args, "benchmarks/speed.py", {"clients": clients, "seconds": [1.5]}, "torch")
    lines = [json.loads(line) for line in (tmp_path / "kept" / "speed.jsonl").read_text().splitlines()]
    assert [line["clients"] for line in lines] == [10, 100]
    assert lines[0]["seconds"] == [1.5]
    assert lines[0]["seed"] == 3
    assert "torch 2." in lines[0]["machine"]
    assert lines[0].keys() == {"seed", "clients", "seconds", "load", "when", "machine"}


def test_nothing_is_kept_unless_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "RESULTS", tmp_path)
    keeping.keep(options(), "benchmarks/speed.py", {"seconds": 1.5}, "torch")
    assert not any(tmp_path.iterdir())
    keeping.keep(options("--keep"), "benchmarks/speed.py", {"seconds": 1.5}, "torch")
    assert [file.name for file in tmp_path.iterdir()] == ["speed.jsonl"]
