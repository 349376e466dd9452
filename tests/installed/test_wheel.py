"""The wheel alone, in an empty environment away from the repository: all files are in it, and the demo runs there."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.installed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a release is, without a download."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, at=ROOT)
    (built,) = folder.glob("fedalign_moe-*-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fedalign` of a new environment that holds the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder, at=folder)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    # a folder that a .pth names has none of its own .pth read: not the one of an editable install
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(here) + "\n")
    python = folder / "bin" / "python"
    call(
        sys.executable,
        "-m",
        "pip",
        f"--python={python}",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        wheel,
        at=folder,
    )
    place = call(python, "-c", "import fedalign; print(fedalign.__file__)", at=folder)
    assert Path(place.strip()) == packages / "fedalign" / "__init__.py"
    return folder / "bin" / "fedalign"


def call(*words: object, at: Path) -> str:
    """Its output; it finds nothing of this repository by itself."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    surroundings = {name: value for name, value in os.environ.items() if name not in hidden}
    surroundings["XDG_CACHE_HOME"] = str(at / "cache")  # the demo's model is unpacked from the wheel
    done = subprocess.run(list(map(str, words)), cwd=at, env=surroundings, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    source = ROOT / "src"
    files = {path.relative_to(source).as_posix() for path in (source / "fedalign").rglob("*") if path.is_file()}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert inside == {name for name in files if "__pycache__" not in name}
    assert {"fedalign/py.typed", "fedalign/demo/demo.toml", "fedalign/report/page.html"} <= inside


def test_the_demo_runs_and_its_results_are_shown_and_exported(program: Path, tmp_path: Path) -> None:
    small = ["run.rounds=1", "data.max_train=300", "data.max_test=60", "clients.count=3"]
    words = [word for setting in small for word in ("--set", setting)]
    call(program, "run", "demo", "--out", "runs/demo", *words, at=tmp_path)
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text(encoding="utf-8"))
    assert (summary["rounds"], summary["algorithm"]) == (1, "fedalign_moe")
    call(program, "report", "runs/demo", "--out", "page.html", at=tmp_path)
    assert "<svg" in (tmp_path / "page.html").read_text(encoding="utf-8")
    call(program, "export", "runs/demo", "--to", "model", at=tmp_path)
    assert "FedAlign-MoE" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "OlmoeForCausalLM" in (tmp_path / "model" / "config.json").read_text(encoding="utf-8")


def test_readme_names_the_wheel_as_it_is_called(wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    for page in ("README.md", "docs/start.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert f"pip install {wheel.name.replace(version, 'VERSION')}" in text
