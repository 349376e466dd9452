"""A headless Chromium that notes every design and every line of its console, and pages of five kinds of run."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

import fedalign
from fedalign.compare.folder import ComparisonFolder
from fedalign.compare.plan import cells, make_design, parse_algorithms
from fedalign.config.toml import load_config
from fedalign.report import write_report
from tests.conftest import rows
from tests.rendering.templates import CHATML
from tests.report.made import Shape, make_comparison
from tests.server.test_run import Silent, start

EVIL = '<img src="http://127.0.0.1:9/x" onerror="alert(1)">'
CLIENTS = ("St. Mary's hospital, ward 4", EVIL, *(f"client-{i:02d}" for i in range(8)))


@dataclass(frozen=True)
class Browser:
    """One page open."""

    driver: webdriver.Chrome

    def open(self, page: Path, width: int = 1200, *, dark: bool = False) -> None:
        """Load it anew and wait until its figures are drawn."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(page.as_uri())
        self.wait_for("figure svg")

    def wait_for(self, selector: str) -> None:
        """Until something is there."""
        WebDriverWait(self.driver, 20).until(lambda driver: driver.find_elements("css selector", selector))

    def all(self, selector: str) -> list[WebElement]:
        """Every element of a selector."""
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> WebElement:
        """The only element of a selector."""
        (found,) = self.all(selector)
        return found

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {expression}")

    def settle(self) -> None:
        """Until what was asked for is drawn."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def console(self) -> list[str]:
        """What it has said since this was last asked."""
        return [line["message"] for line in self._log("browser")]

    def requests(self) -> list[str]:
        """Addresses asked for since this was last asked."""
        messages = [json.loads(line["message"])["message"] for line in self._log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def _log(self, name: str) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = self.driver.get_log(name)
        return lines

    def screenshot(self, path: Path) -> None:
        """The whole page."""
        width, height = self.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)
        path.write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.fail("These tests need Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Browser(opened)
    finally:
        opened.quit()


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison at two settings; two of its clients have awkward names."""
    folder = tmp_path_factory.mktemp("report")
    shape = Shape(clients=CLIENTS, rounds=12, layers=4)
    grid = {"clients.alpha": ["0.1", "1.0"]}
    write_report([make_comparison(folder / "runs", shape=shape, grid=grid)], folder / "report.html")
    return folder / "report.html"


KINDS = ("classification", "chat", "compare", "extended", "interrupted")


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory, settings: list[str], olmoe: Path) -> dict[str, Path]:
    """Pages of real runs of a tiny model."""
    folder = tmp_path_factory.mktemp("kinds")
    three, two = (load_config(None, [*settings, f"run.rounds={rounds}"]) for rounds in (3, 2))
    fedalign.run(three, out=folder / "classification", progress=False)
    shutil.copytree(folder / "classification", folder / "extended")
    fedalign.run(resume=folder / "extended", overrides={"run.rounds": 5}, progress=False)
    with pytest.raises(KeyboardInterrupt):
        start(folder / "interrupted", [*settings, "run.rounds=6"], watch=Silent(lambda *at: at == (3, "summing", 1)))
    _chat(folder, olmoe)
    design = make_design(two, parse_algorithms(["fedavg,fedalign_moe"]), {}, [0, 1], tune=False)
    comparison = ComparisonFolder(folder / "compare")
    (folder / "compare").mkdir()
    comparison.design.write_text(design.to_toml())
    for cell in cells(design):
        fedalign.run(cell.config, out=comparison.run(cell, "runs").path, progress=False)
    for kind in KINDS:
        write_report([folder / kind], folder / f"{kind}.html")
    return {kind: folder / f"{kind}.html" for kind in KINDS}


def _chat(folder: Path, olmoe: Path) -> None:
    """A run on conversations, which has no accuracy."""
    shutil.copytree(olmoe, folder / "chatty")
    (folder / "chatty" / "chat_template.jinja").write_text(CHATML)
    for part, chosen in (("train", rows()[1::2]), ("test", rows()[::8])):
        turns = [[("user", f"What is this about: {row['text']}?"), ("assistant", row["label"])] for row in chosen]
        lines = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [f"model.path={folder / 'chatty'}", f"data.train={folder / 'train.jsonl'}"]
    asked += [f"data.test={folder / 'test.jsonl'}", "data.kind=chat", "clients.partition=iid", "clients.count=3"]
    asked += ["run.rounds=2", "statistics.min_tokens=4", "evaluation.max_new_tokens=12"]
    fedalign.run(load_config(None, asked), out=folder / "chat", progress=False)
