"""`fedalign new algorithm`: what it writes installs, passes its own test and runs; names that cannot be are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedalign.algorithms import make
from fedalign.server.results import RunFolder, read_history
from tests.conftest import Command

PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")


def python(*words: str, folder: Path, path: Path) -> str:
    """Run this interpreter in `folder`, with `path` before what it imports from now."""
    paths = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    surroundings = os.environ | {"PYTHONPATH": paths}
    told = subprocess.run(
        [sys.executable, *words], cwd=folder, env=surroundings, check=False, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout


@pytest.mark.installed
def test_a_new_algorithm_installs_passes_its_test_and_runs(
    fedalign: Command, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, errors = fedalign("new", "algorithm", "by_need")
    assert code == 0, errors
    assert "pip install --editable ./by_need" in out  # a bare word would be looked for in a registry
    assert sorted(path.name for path in Path("by_need").iterdir()) == [
        "by_need.py",
        "pyproject.toml",
        "test_by_need.py",
    ]
    python("-m", "ruff", "check", "--isolated", "by_need", folder=tmp_path, path=tmp_path)

    installed = tmp_path / "installed"
    python(*PIP, "--no-build-isolation", f"--target={installed}", "./by_need", folder=tmp_path, path=tmp_path)
    assert (installed / "by_need.py").is_file()
    (tmp_path / "by_need" / "by_need.py").unlink()  # its test reads what is installed
    assert "5 passed" in python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", folder=tmp_path / "by_need", path=installed
    )

    monkeypatch.syspath_prepend(installed)
    assert "by_need" in fedalign("algorithms")[1]
    assert "of the load" in fedalign("algorithms", "by_need")[1]
    chosen = [*settings, "run.rounds=1", "algorithm.name=by_need", "algorithm.power=0.5"]
    words = [word for setting in chosen for word in ("--set", setting)]
    code, _, errors = fedalign("run", os.devnull, "--out", "run", *words)
    assert code == 0, errors
    assert [line["round"] for line in read_history(RunFolder(tmp_path / "run"))] == [0, 1]
    assert type(make("by_need", {})).__module__ == "by_need"
    sys.modules.pop("by_need")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("By_need", "must be a Python name of a-z, 0-9 and single _ between them"),
        ("by-need", "must be a Python name"),
        ("by__need", "must be a Python name"),
        ("need_", "must be a Python name"),
        ("2need", "must be a Python name"),
        ("nöd", "must be a Python name"),
        ("../need", "must be a Python name"),
        ("class", "must be a Python name"),
        ("fedavg", "there is one already"),
        ("json", "a Python module is called so"),
        ("fed_avg", "its class would be called FedAvg"),
    ],
)
def test_a_name_that_cannot_be_is_refused(
    fedalign: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, errors = fedalign("new", "algorithm", name)
    assert code == 2
    assert errors.startswith(f"Error: algorithm NAME = {name!r}: {told}")
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_nothing_is_overwritten(fedalign: Command, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "mine"
    if kind == "folder":
        place.mkdir()
    elif kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "nowhere")
    code, _, errors = fedalign("new", "algorithm", "by_need", "--dir", place)
    assert (code, "nothing is overwritten" in errors) == (2, True)
    assert list(tmp_path.iterdir()) == [place]
    assert kind != "folder" or list(place.iterdir()) == []
