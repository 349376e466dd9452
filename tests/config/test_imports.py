"""A configuration is read by people who wait: no heavy package is loaded for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedalign.algorithms import ALGORITHMS, options

HEAVY = ("torch", "transformers", "numpy")
READ = f"""
import json, sys
from pathlib import Path
from fedalign.config.toml import load_config
for path in map(Path, json.loads(sys.argv[1])):
    load_config(path).algorithm.build()
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""


def test_reading_a_configuration_of_any_algorithm_imports_nothing_heavy(tmp_path: Path) -> None:
    files = []
    for name, kind in ALGORITHMS.items():
        chosen = {"name": name} | options(kind())
        files.append(str(tmp_path / f"{name}.toml"))
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in chosen.items()]  # TOML writes such values alike
        Path(files[-1]).write_text("[algorithm]\n" + "".join(lines))
    command = [sys.executable, "-c", READ, json.dumps(files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


WRONG = f"""
import json, sys
from fedalign.cli.main import main
sys.argv = ["fedalign", *json.loads(sys.argv[1])]
try:
    main()
except SystemExit as end:
    print(json.dumps([end.code, *(name for name in {HEAVY} if name in sys.modules)]))
"""


@pytest.mark.parametrize(
    "command",
    [
        ["run", "demo", "--set", "run.sede=1"],
        ["run", "none.toml"],
        ["compare", "demo", "--algorithms", "fedalgin"],
        ["compare", "demo", "--algorithms", "fedavg", "--set", "clients.alhpa=0.1,1.0"],
        ["compare", "demo", "--algorithms", "fedprox:mu=x"],
        ["compare", "demo", "--algorithms", "fedavg", "--seeds", "many"],
        ["compare", "none.toml", "--ablation"],
        ["compare"],
    ],
)
def test_a_wrong_word_is_told_before_anything_heavy_is_imported(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRONG, json.dumps(command)], capture_output=True, text=True, check=False
    )
    assert json.loads(done.stdout) == [2], done.stderr
