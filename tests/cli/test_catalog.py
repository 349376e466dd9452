"""Lists of what there is to choose from: complete, plug-ins included, and without waiting for torch."""

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from fedalign.algorithms import ALGORITHMS, described, make
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.data.formats import FORMATS
from fedalign.moe.families import FAMILIES, REFUSED
from tests.conftest import Command


def test_every_key_is_printed_and_reads_back_as_the_defaults(fedalign: Command, tmp_path: Path) -> None:
    code, out, _ = fedalign("config", "--all")
    assert code == 0
    (tmp_path / "all.toml").write_text(out)
    assert load_config(tmp_path / "all.toml") == Config()
    for section, kind in Config.model_fields.items():
        assert f"[{section}]" in out
        assert kind.annotation is not None
        assert all(f"{key} = " in out or f"{section}.{key}" in out for key in kind.annotation.model_fields)


def test_a_configuration_is_printed_as_its_differences(fedalign: Command, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('[training]\nlearning_rate = 1e-4\nepochs = 3\n[algorithm]\nname = "fedprox"\nmu = 0.5\n')
    code, out, _ = fedalign("config", str(file), "--set", "run.seed=4")
    assert code == 0
    assert tomllib.loads(out) == {
        "run": {"seed": 4},
        "training": {"epochs": 3},
        "algorithm": {"name": "fedprox", "mu": 0.5},
    }
    file.write_text(out)
    assert tomllib.loads(fedalign("config", str(file))[1]) == tomllib.loads(out)
    assert "every key is at its default" in fedalign("config", "--set", "run.seed=0", "/dev/null")[1]
    code, _, errors = fedalign("config", str(file), "--set", "run.sed=4")
    assert code == 2
    assert "run.sed" in errors


def test_all_algorithms_are_listed_those_of_packages_too(fedalign: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = [EntryPoint("theirs", "fedalign.algorithms.fedprox:FedProx", "fedalign.algorithms")]
    monkeypatch.setattr("fedalign.algorithms.entry_points", lambda group: offered)
    code, out, _ = fedalign("algorithms")
    assert code == 0
    assert all(name in out for name in (*ALGORITHMS, "theirs"))


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_an_algorithm_is_listed_with_its_options(fedalign: Command, name: str) -> None:
    code, out, _ = fedalign("algorithms", name)
    assert code == 0
    assert all(option in out for option, *_ in described(make(name, {})))


def test_an_unknown_algorithm_is_one_line(fedalign: Command) -> None:
    code, _, errors = fedalign("algorithms", "fedavk")
    assert (code, "Did you mean 'fedavg'" in errors) == (2, True)


def test_formats_and_families_are_listed(fedalign: Command) -> None:
    code, out, _ = fedalign("formats")
    assert code == 0
    assert all(kind in out for kind in FORMATS)
    code, out, _ = fedalign("families")
    assert code == 0
    assert all(name in out for name in (*FAMILIES, *REFUSED))


@pytest.mark.parametrize("words", [["config", "--all"], ["algorithms"], ["algorithms", "fedprox"], ["formats"]])
def test_lists_need_no_torch(words: list[str]) -> None:
    script = (
        "import sys\nfrom fedalign.cli.main import app\n"
        f"try:\n    app({words})\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
