"""The files by which people join: they parse, agree on the version, and invent no address."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from fedalign import __version__

ROOT = Path(__file__).parents[2]
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
WRITTEN = [ROOT / "CONTRIBUTING.md", ROOT / "CODE_OF_CONDUCT.md", ROOT / "CITATION.cff", *ROOT.glob(".github/**/*.yml")]


def test_one_version_everywhere() -> None:
    packages = [ROOT / "pyproject.toml", ROOT / "src/fedalign/federation/flower/app/pyproject.toml"]
    assert [tomllib.loads(path.read_text())["project"]["version"] for path in packages] == [__version__] * 2
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] in (__version__, "Unreleased")


def test_the_citation_has_what_its_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert "# blank:" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_no_address_is_invented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"https?://\S+|\S+@\S+\.\w+|orcid\S*", text, re.IGNORECASE) == []


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_has_what_a_form_needs(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in asked}) == len(asked)
    assert all(field["attributes"]["label"] for field in asked)


def test_the_workflow_runs_what_a_person_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


def test_every_target_that_contributors_are_told_of_is_there() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    told = re.findall(r"\bmake ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert told
    assert set(told) <= set(targets)
