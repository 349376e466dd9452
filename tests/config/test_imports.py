"""A configuration is read by people who wait: no heavy package is loaded for it."""

import json
import subprocess
import sys
from pathlib import Path

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
