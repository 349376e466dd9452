"""The notebooks run from the first cell to the last, in a kernel, and are kept without output."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))
SMALL = {
    "demo": '{"run.rounds": 1, "clients.count": 2, "data.max_train": 200, "data.max_test": 40}',
    "own_data": '{"run.rounds": 1}',
}
LONGEST = 25  # words of a sentence

each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def test_every_notebook_has_a_small_form() -> None:
    assert {file.stem for file in NOTEBOOKS} == {*SMALL}


@each
def test_outputs_are_not_kept(file: Path) -> None:
    for cell in nbformat.read(file, 4).cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


@each
def test_sentences_are_short(file: Path) -> None:
    for cell in nbformat.read(file, 4).cells:
        if cell.cell_type == "markdown":
            sentences = re.split(r"(?<=[.:?])\s+|\n\n", cell.source)
            assert [one for one in sentences if len(one.split()) > LONGEST] == []


@pytest.mark.installed
@pytest.mark.filterwarnings("default")  # of Jupyter's own
@each
def test_a_notebook_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    notebook = nbformat.read(file, 4)
    settings, answer = (tagged(notebook, tag) for tag in ("parameters", "answer"))
    assert settings.source.startswith("overrides = {}")
    settings.source = f"overrides = {SMALL[file.stem]}"
    work = tmp_path / "work"
    work.mkdir()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(work)}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert "0." in answer.outputs[-1]["data"]["text/plain"]  # a probability


def tagged(notebook: Any, tag: str) -> Any:
    """The one cell with this tag."""
    (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    return cell
