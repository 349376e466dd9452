"""The page as text: whole, offline, and safe whatever a client calls itself."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedalign.cli.main import app
from fedalign.config.toml import load_config
from fedalign.files import LOCK, locked
from fedalign.report import write_report
from fedalign.report.page import _bands
from tests.report.made import Shape, make_comparison, make_run

EVIL = '</script><img src="http://127.0.0.1:9/x" onerror="alert(1)">'


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    made = make_comparison(folder / f"c{EVIL.replace('/', '')}", shape=Shape(clients=("a", EVIL)))
    write_report([made], folder / "report.html")
    return (folder / "report.html").read_text()


def test_names_are_data(page: str) -> None:
    tags = Tags(page).tags
    assert not [tag for tag, _ in tags if tag == "img"]
    assert EVIL not in page
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    assert EVIL in data["clients"][0]["names"]
    assert EVIL in data["health"][0]["clients"]


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    for tag, attributes in Tags(page).tags:
        assert "src" not in attributes, tag
        assert str(attributes.get("href", "#")).startswith(("#", "data:")), tag
    assert "default-src 'none'" in page


def test_headings_are_in_order_and_figures_are_described(page: str) -> None:
    tags = Tags(page).tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
    figures = sum(tag == "figure" for tag, _ in tags)
    assert figures == sum(tag == "figcaption" for tag, _ in tags) == 10
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_tables_are_those_of_the_comparison(page: str) -> None:
    assert re.search(r'<th scope="row">fedavg</th>', page)
    assert re.search(r"\d \(\d+\.\d, \d+\.\d, \d+\.\d\)", page)  # three seeds, one by one
    assert "3 seeds are too few for an interval" in page


def test_a_page_of_losses_speaks_of_lower(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", load_config(None, ["run.rounds=2"]))
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if "accurac" not in key} for line in lines]
    (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    write_report([made], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text().split("<script")[0]
    assert "Loss against bytes uploaded" in text
    assert "how early a curve gets low" in text
    assert re.search(r"loss \d\.\d+.nats at the start, \d\.\d+.nats after round 4, one seed, n.=.400.rows", text)
    assert "higher" not in text.partition("<section")[2].partition("Experts</h2>")[0]


def test_the_command_writes_beside_the_run(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", load_config(None, ["run.rounds=4"]), rounds=2)
    result = CliRunner().invoke(app, ["report", str(made)])
    assert result.exit_code == 0, result.output
    assert "Broken off" in result.output
    with locked(made / LOCK, "a run"):
        assert "Still at work" in CliRunner().invoke(app, ["report", str(made)]).output
    assert (made / "report.html").exists()


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([], "Each line is a single run"),
        ([2, 3], "lowest to the highest run"),
        ([4, 9], "95 % Student-t intervals; bands that overlap"),
        ([2, 5], "Bands of 4 seeds and more are 95 % Student-t intervals; the others reach from the lowest"),
    ],
)
def test_what_bands_are_is_said_of_those_that_there_are(counts: list[int], said: str) -> None:
    assert said in _bands(counts)


def test_one_run_is_not_spoken_of_as_several(tmp_path: Path) -> None:
    write_report([make_run(tmp_path / "run", load_config(None, ["run.rounds=4"]))], tmp_path / "one.html")
    text = (tmp_path / "one.html").read_text().split("<script")[0]
    for word in ("means over seeds", "Student-t", "Bold", "Runs of one seed", "fedalign_moe&#39;s end", "seeds 0"):
        assert word not in text, word
    for word in ("start, before training", "After 4 rounds, seed 0.", "Mean client: each client counts alike"):
        assert word in text, word
