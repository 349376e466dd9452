"""The report in a real browser. Screenshots are kept in the folder that REPORT_SCREENSHOTS names, if it is set."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from fedalign.config.toml import load_config
from fedalign.report import write_report
from tests.browser.conftest import CLIENTS, EVIL, KINDS, Browser
from tests.report.made import Shape, make_comparison, make_run

pytestmark = pytest.mark.browser
FIGURES = (
    "convergence",
    "bytes",
    "clients",
    "confusion",
    "routing",
    "divergence",
    "similarity",
    "weights",
    "balance",
    "load",
)


def keep(browser: Browser, name: str) -> None:
    folder = os.environ.get("REPORT_SCREENSHOTS")
    if folder:
        browser.screenshot(Path(folder) / f"{name}.png")


def drawing(browser: Browser, figure: str) -> str:
    browser.settle()
    return str(browser.evaluate(f"document.querySelector('#figure-{figure} .drawing').innerHTML"))


def choose(browser: Browser, id: str, value: str) -> None:
    Select(browser.one(f"#{id}")).select_by_value(value)


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_quietly_and_fits(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.console(), browser.requests()
    browser.open(page, width, dark=dark)
    assert browser.console() == []
    asked = browser.requests()
    assert page.as_uri() in asked
    assert [address for address in asked if not address.startswith(("file:", "data:"))] == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.all(".empty") == []
    for name in FIGURES:
        assert browser.all(f"#figure-{name} svg[role=img]"), name
    keep(browser, f"{'dark' if dark else 'light'}-{width}")


@pytest.mark.parametrize("figure", FIGURES)
def test_figures_are_downloaded_as_they_look(browser: Browser, page: Path, tmp_path: Path, figure: str) -> None:
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.open(page)
    browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    for button in browser.all(f"#figure-{figure} .downloads button"):
        browser.driver.execute_script("arguments[0].click()", button)
    wanted = {kind: tmp_path / f"{figure}.{kind}" for kind in ("svg", "png", "csv")}
    WebDriverWait(browser.driver, 20).until(lambda _: all(path.exists() for path in wanted.values()))
    drawn = ElementTree.fromstring(wanted["svg"].read_text())
    assert len(drawn.findall("{http://www.w3.org/2000/svg}svg")) == len(browser.all(f"#figure-{figure} .drawing svg"))
    assert "var(" not in wanted["svg"].read_text()
    assert len({tuple(pixel) for row in matplotlib.image.imread(wanted["png"]) for pixel in row}) > 5
    with wanted["csv"].open(newline="") as file:
        head, *rows = csv.reader(file)
    assert rows
    assert {len(row) for row in rows} == {len(head)}
    assert browser.console() == []


def test_dark_mode_changes_page_and_lines(browser: Browser, page: Path) -> None:
    looks = {}
    for dark in (False, True):
        browser.open(page, dark=dark)
        looks[dark] = browser.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('#figure-divergence [aria-label=line] path')).stroke]"
        )
    assert looks[False][0] == "rgb(255, 255, 255)"
    assert looks[True][0] == "rgb(21, 23, 26)"
    assert looks[False][1] != looks[True][1]


@pytest.mark.parametrize(
    ("id", "value", "changed", "same"),
    [
        ("layer", "2", ["routing", "similarity", "weights"], ["convergence"]),
        ("expert", "3", ["similarity"], ["routing"]),
        ("run", "2", [], ["convergence"]),
        ("weights", "gate_weight", ["weights"], ["routing"]),
        ("metric", "1", ["convergence"], ["bytes"]),
        ("seed", "1", ["clients"], ["routing"]),
        ("bytes-panel", "2", ["bytes"], ["convergence"]),
        ("bytes-axis", "log", ["bytes"], ["convergence"]),
    ],
)
def test_selectors_change_their_figures(
    browser: Browser, page: Path, id: str, value: str, changed: list[str], same: list[str]
) -> None:
    browser.open(page)
    before = {name: drawing(browser, name) for name in [*changed, *same]}
    caption = browser.one("#figure-routing figcaption").text
    choose(browser, id, value)
    assert {name: drawing(browser, name) != before[name] for name in before} == dict.fromkeys(
        changed, True
    ) | dict.fromkeys(same, False)
    if id == "run":
        assert browser.one("#figure-routing figcaption").text == caption.replace("fedavg", "fedalign_moe")
    assert browser.console() == []


def test_the_round_is_chosen_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    slider = browser.one("#round")
    assert browser.one("#round-shown").text == "12 of 12"
    before = drawing(browser, "similarity"), drawing(browser, "load")
    slider.send_keys(Keys.HOME)
    assert browser.one("#round-shown").text == "1 of 12"
    assert slider.get_attribute("aria-valuetext") == "round 1 of 12"
    assert drawing(browser, "load") != before[1]
    slider.send_keys(Keys.ARROW_RIGHT * 4)
    browser.settle()
    titles = [title.text for title in browser.all("#figure-routing .panel-title")]
    assert titles == ["Round 1 (first)", "Round 5 (chosen)", "Round 12 (latest)"]
    slider.send_keys(Keys.END)
    assert drawing(browser, "similarity") == before[0]


def test_the_legend_hides_an_algorithm_everywhere(browser: Browser, page: Path) -> None:
    browser.open(page)
    lines = "#figure-divergence [aria-label=line]"
    assert len(browser.all(lines)) == 3
    browser.all("#legend input")[0].send_keys(Keys.SPACE)
    browser.settle()
    assert len(browser.all(lines)) == 2
    assert "fedavg" not in str(browser.one("#figure-bytes svg").get_attribute("aria-label"))


def test_the_setting_changes_all_figures(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert "clients.alpha = 0.1" in browser.one("#figure-convergence figcaption").text
    choose(browser, "point", "1")
    browser.settle()
    captions = [caption.text for caption in browser.all("figcaption")]
    assert len(captions) == len(FIGURES)
    assert all("clients.alpha = 1.0" in caption for caption in captions)


def test_every_figure_has_its_numbers_and_a_description(browser: Browser, page: Path) -> None:
    browser.open(page)
    for name in FIGURES:
        browser.one(f"#figure-{name} summary").send_keys(Keys.ENTER)
        browser.wait_for(f"#figure-{name} details td")
        for drawn in browser.all(f"#figure-{name} svg[role=img]"):
            assert len(str(drawn.get_attribute("aria-label"))) > 40
    assert browser.one("#figure-similarity details thead").text.count("client-") == 8
    assert browser.console() == []


def test_names_of_clients_are_only_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.all("img") == []
    browser.one("#figure-routing summary").send_keys(Keys.ENTER)
    browser.wait_for("#figure-routing details td")
    names = [cell.text for cell in browser.all("#figure-routing details tbody th")]
    assert sorted(names) == sorted(CLIENTS)
    assert EVIL in names


def test_the_skip_link_is_reached_first(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.one("body").send_keys(Keys.TAB)
    assert browser.evaluate("document.activeElement.className") == "skip"


def test_one_run_and_an_ablation_open_quietly(browser: Browser, tmp_path: Path) -> None:
    made = {
        "run": make_run(tmp_path / "run", load_config(None, ["run.rounds=4"]), rounds=1),
        "ablation": make_comparison(tmp_path / "ablation", None, seeds=[0, 1]),
        "many": make_run(
            tmp_path / "many",
            load_config(None, ["run.rounds=1"]),
            Shape(tuple(f"site-{i}" for i in range(90)), rounds=1),
        ),
    }
    for name, folder in made.items():
        write_report([folder], tmp_path / f"{name}.html")
        browser.open(tmp_path / f"{name}.html", 390)
        assert browser.console() == [], name
        assert browser.evaluate("document.documentElement.scrollWidth") == 390, name
        keep(browser, name)
    assert "60 of 90 clients" in browser.one("#figure-clients figcaption").text


def test_without_what_is_optional_it_says_so(browser: Browser, tmp_path: Path) -> None:
    bare = make_run(tmp_path / "run", load_config(None, ["run.rounds=4"]))
    for path in [*(bare / "health").iterdir(), bare / "clients.json"]:
        path.unlink()
    write_report([bare], tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    assert browser.console() == []
    assert "What clients hold was not recorded" in browser.one("#figure-clients figcaption").text
    assert "was not recorded in these runs" in browser.one("#experts").text


# ------------------------------------------------------------------------------------------------- five kinds of run

FAINT = """
const number = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const behind = (one) => {
  for (let at = one; at; at = at.parentElement) {
    const color = number(getComputedStyle(at).backgroundColor);
    if (color.length < 4 || color[3] > 0) return color;
  }
  return [255, 255, 255];
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode.data.trim(), one = walker.currentNode.parentElement;
  const box = one.getBoundingClientRect(), style = getComputedStyle(one);
  if (!text || !box.width || style.clipPath !== "none" || one.closest("script, style, noscript, option")) continue;
  const drawn = one.closest("svg") !== null;
  if (drawn && style.stroke !== "none") continue; // numbers in cells have a rim
  const [front, back] = [number(drawn ? style.fill : style.color), behind(one)].map(light);
  const contrast = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
  if (contrast < 4.5) found.push(`${text}: ${contrast.toFixed(2)}`);
}
return found;
"""
EMPTY = """
const all = (selector) => [...document.querySelectorAll(selector)];
const seen = (one) => one.getBoundingClientRect().width > 0;
const marks = "[aria-label=dot] > *, [aria-label=line] > *, [aria-label=cell] > *, [aria-label=bar] > *";
const texts = all("figure .empty, p, li, dd, caption, summary, td.text");
const found = [
  ...all("figure").filter((one) => !one.querySelector(".drawing svg, .empty")),
  ...all("figure .panel > svg").filter((one) => !one.querySelector(marks)),
  ...texts.filter((one) => seen(one) && !one.querySelector("button, select") && !one.textContent.trim()),
  ...all("select").filter((one) => seen(one) && one.options.length === 0),
  ...all("#run, #confusion, #seed, #point").filter((one) => seen(one) && one.options.length < 2),
];
return found.map((one) => one.outerHTML.slice(0, 200));
"""
CLIPPED = """
return [...document.querySelectorAll("#results .scroll, #answers .scroll")]
  .filter((one) => one.closest("details:not([open])") === null && !one.closest("figure"))
  .filter((one) => one.scrollWidth > one.clientWidth + 1 || one.scrollHeight > one.clientHeight + 1)
  .map((one) => one.getAttribute("aria-label") || one.getAttribute("aria-labelledby"));
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1400, 800])
@pytest.mark.parametrize("dark", [False, True])
def test_real_runs_are_shown_whole(browser: Browser, kinds: dict[str, Path], kind: str, width: int, dark: bool) -> None:
    browser.console()
    browser.open(kinds[kind], width, dark=dark)
    browser.settle()
    keep(browser, f"{kind}-{width}-{'dark' if dark else 'light'}")
    assert browser.console() == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.driver.execute_script(EMPTY) == []
    assert browser.driver.execute_script(CLIPPED) == []
    assert browser.driver.execute_script(FAINT) == []


def test_what_is_faint_or_empty_or_cut_is_found(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.settle()
    assert [browser.driver.execute_script(script) for script in (FAINT, EMPTY, CLIPPED)] == [[], [], []]
    faint = '<p style="color: #999">faint</p><p></p><figure></figure><select></select>'
    cut = (
        '<div id="results"><div class="scroll" aria-label="cut" style="width: 9px"><pre>far too long</pre></div></div>'
    )
    browser.driver.execute_script(f"document.querySelector('main').innerHTML = {json.dumps(faint + cut)}")
    assert browser.driver.execute_script(FAINT) == ["faint: 2.85"]
    assert len(browser.driver.execute_script(EMPTY)) == 3
    assert browser.driver.execute_script(CLIPPED) == ["cut"]


@pytest.mark.parametrize("kind", KINDS)
def test_real_runs_say_of_how_many_rows_and_seeds(browser: Browser, kinds: dict[str, Path], kind: str) -> None:
    browser.open(kinds[kind])
    rows = 15 if kind == "chat" else 30
    verdict = browser.all(".verdict")[0].text.replace("\N{NO-BREAK SPACE}", " ")
    assert f"n = {rows} rows" in verdict
    assert ("2 seeds" if kind == "compare" else "one seed") in verdict
    for figure in ("convergence", "bytes"):
        assert f"{rows} rows of the global test set" in browser.one(f"#figure-{figure} figcaption").text
    tested = [text.text for text in browser.all("#figure-clients svg text") if "n = " in text.text]
    assert len(tested) == 3
    summaries = [one.text for one in browser.all("#answers > details > summary")]
    assert len(summaries) == (2 if kind == "compare" else 1)
    assert all(f"10 of n = {rows} test rows" in text for text in summaries)
    assert len(browser.all("#answers > details[open] table.answers tbody tr")) == 10
    body = browser.one("main").text
    assert ("Bands" in body) == (kind == "compare")
    assert ("Bold" in body) == (kind == "compare")
    assert ("lowest loss" in body or "higher" not in body.partition("Experts")[0]) or kind != "chat"


def test_each_kind_is_told_as_what_it_is(browser: Browser, kinds: dict[str, Path]) -> None:
    said = {}
    for kind in KINDS:
        browser.open(kinds[kind])
        said[kind] = browser.one("body").text.replace("\N{NO-BREAK SPACE}", " ")
    assert "Final scores" in said["classification"]
    assert "Broken off: fedalign_moe, seed 0: round 2 of 6" in said["interrupted"]
    assert "Scores so far" in said["interrupted"]
    assert "Final scores" not in said["interrupted"]
    assert "given after round 2" in said["interrupted"]
    assert "given after round 5" in said["extended"]
    assert "After 5 rounds, seed 0." in said["extended"]
    assert "Loss against bytes uploaded" in said["chat"]
    assert "accuracy" not in said["chat"].partition("Experts\n")[0].partition("Results")[2].lower()
    assert "2 seeds are too few for an interval" in said["compare"]
