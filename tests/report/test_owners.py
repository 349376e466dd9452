"""Whose expert answers for whose data: shares that can be worked out by hand, on the page of such runs alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedalign.config.toml import load_config
from fedalign.report import write_report
from fedalign.report.material import read_material
from fedalign.report.owners import matrices
from tests.report.made import Shape, make_run

LOADS = [  # of three sites, two layers, four experts
    [[50, 0, 50, 0], [100, 0, 0, 0]],
    [[10, 10, 0, 80], [0, 0, 0, 100]],
    [[0, 0, 0, 0], [0, 0, 0, 0]],
]
OWNERS = {"a": [2], "<b>": [3]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two rounds whose last one has these loads, and a model without a record."""
    folder = make_run(tmp_path / "run", load_config(None, ["run.rounds=2"]), Shape(rounds=2))
    load = np.array(LOADS, dtype=np.float32)
    share = np.full_like(load, 0.25)
    tables = dict.fromkeys(("prob_C_L_E", "gate_weight_C_L_E", "expert_weight_C_L_E"), share)
    whole = {**tables, "load_C_L_E": load, "shared_weight_C": np.ones(3, dtype=np.float32)}
    (folder / "health" / "round-00001.safetensors").unlink()
    save_file(whole, folder / "health" / "round-00002.safetensors", {"clients": json.dumps(["a", "<b>", "late"])})
    return folder


def own(run: Path, record: Any, place: str = "model") -> None:
    (run / place).mkdir(exist_ok=True)
    (run / place / "config.json").write_text(json.dumps({"num_experts": 4, "site_experts": record}))


@pytest.mark.parametrize("place", ["model", "best"])
def test_tokens_are_counted_by_the_owner_of_their_experts(run: Path, place: str) -> None:
    own(run, OWNERS, place)
    found = matrices(read_material([run]))
    (matrix,) = found.shown
    assert not found.problems
    assert (matrix.round, matrix.owners) == (2, [("public", "0-1"), ("a", "2"), ("<b>", "3")])
    assert matrix.rows == [("<b>", [0.1, 0.0, 0.9]), ("a", [0.75, 0.25, 0.0]), ("late", [None, None, None])]


def test_the_page_shows_them_and_escapes_names(run: Path, tmp_path: Path) -> None:
    own(run, OWNERS)
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Whose expert answers for whose data" in page
    (table,) = re.findall(r"<caption>Tokens of each site[^<]*round 2.*?</table>", page, re.DOTALL)
    assert re.findall(r"<td>(.*?)</td>", table) == ["10.0", "0.0", "90.0", "75.0", "25.0", "0.0", "-", "-", "-"]
    assert "&lt;b&gt;" in table
    assert "<b>" not in table


@pytest.mark.parametrize("record", [None, {}])
def test_a_page_of_other_runs_says_nothing_of_it(run: Path, tmp_path: Path, record: Any) -> None:
    if record is not None:
        own(run, record)
    write_report([run], tmp_path / "page.html")
    assert "Whose expert answers" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("record", "said"), [({"a": [4]}, "no such expert"), (["a"], "must be a table"), ({"a": [0, 1, 2, 3]}, "public")]
)
def test_a_broken_record_is_told_and_the_page_is_made(run: Path, tmp_path: Path, record: Any, said: str) -> None:
    own(run, record)
    write_report([run], tmp_path / "page.html")
    (notice,) = re.findall(
        r'<p class="notice">(.*?whose expert is whose is left out.*?)</p>', (tmp_path / "page.html").read_text()
    )
    assert said in notice


def test_a_damaged_configuration_is_told(run: Path) -> None:
    own(run, OWNERS)
    (run / "model" / "config.json").write_text("{")
    (problem,) = matrices(read_material([run])).problems
    assert "whose expert is whose is left out" in problem
