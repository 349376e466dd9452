"""What each site loses when another leaves: changes that can be worked out by hand, on the page of such runs alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedalign.config.toml import load_config
from fedalign.report import write_report
from fedalign.report.leaving import losses
from fedalign.report.material import read_material
from tests.report.made import Shape, make_run

TITLE = "What each site loses when another leaves"
TOLD: dict[str, Any] = {
    "round": 2,
    "rows": {"a": 1200, "<b>": 4},
    "whole": {"a": {"accuracy": 0.5, "loss_nats": 1.0}, "<b>": {"accuracy": 0.25, "loss_nats": 2.0}},
    "without": {
        "<b>": {"a": {"accuracy": 0.52, "loss_nats": 0.9}, "<b>": {"accuracy": 0.0, "loss_nats": 2.5}},
        "a": {"a": {"accuracy": 0.1, "loss_nats": 3.0}, "<b>": {"accuracy": 0.25, "loss_nats": 2.0}},
    },
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", load_config(None, ["run.rounds=2"]), Shape(rounds=2))


def page_of(run: Path) -> str:
    write_report([run], run / "report.html")
    return (run / "report.html").read_text()


def test_changes_are_those_of_each_sites_rows(run: Path) -> None:
    (run / "leaving.json").write_text(json.dumps(TOLD))
    (found,) = losses(read_material([run])).shown
    assert (found.round, found.sites) == (2, [("a", 1200), ("<b>", 4)])
    assert found.whole == [("50.0 %", "1.000"), ("25.0 %", "2.000")]
    assert found.left == [
        ("<b>", [("+2.0", "-0.100"), ("-25.0", "+0.500")]),
        ("a", [("-40.0", "+2.000"), ("+0.0", "+0.000")]),
    ]


def test_the_page_shows_them_with_their_rows_and_escapes_names(run: Path) -> None:
    (run / "leaving.json").write_text(json.dumps(TOLD))
    page = page_of(run)
    assert TITLE in page
    (table,) = re.findall(r"<caption>Change of accuracy[^<]*round 2</caption>.*?</table>", page, re.DOTALL)
    assert "rows of <bdi>a</bdi>, n = 1,200" in table
    assert "rows of <bdi>&lt;b&gt;</bdi>, n = 4" in table
    assert "<b>" not in table
    found = re.findall(r"<td>(.*?)</td>", table)
    assert found == ["50.0 %, 1.000", "25.0 %, 2.000", "+2.0, -0.100", "-25.0, +0.500", "-40.0, +2.000", "+0.0, +0.000"]


def test_of_rows_without_a_right_answer_the_loss_alone_is_told(run: Path) -> None:
    told = json.loads(json.dumps(TOLD).replace("0.52", "null").replace("0.5,", "null,"))
    (run / "leaving.json").write_text(json.dumps(told))
    (found,) = losses(read_material([run])).shown
    assert found.whole[0] == ("-", "1.000")
    assert found.left[0][1][0] == ("-", "-0.100")


def test_where_sites_own_experts_and_nothing_is_told_the_page_says_how_to_get_it(run: Path) -> None:
    assert TITLE not in page_of(run)
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text(json.dumps({"num_experts": 8, "site_experts": {"a": [7]}}))
    page = page_of(run)
    assert TITLE in page
    assert "fedalign evaluate MODEL --data FILE --leaving each" in page


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps(TOLD | {"whole": {}}), json.dumps(TOLD | {"round": "x"})])
def test_a_damaged_file_is_told_and_the_page_is_made(run: Path, text: str) -> None:
    (run / "leaving.json").write_text(text)
    (notice,) = re.findall(r'<p class="notice">(.*?leaving.json is left out.*?)</p>', page_of(run))
    assert "damaged" in notice
