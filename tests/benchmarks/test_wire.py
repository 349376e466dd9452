"""The table of wire types: a folder of runs is gone on with by the same settings alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import wire


def made(kind: tuple[str, str, str], seed: int, args: Any) -> dict[str, Any]:
    """A run that nobody made."""
    scores = {"final_accuracy": 0.5, "final_loss": 1.0, "bytes_up": 1000, "bytes_down": 2000}
    return {"wire": ", ".join(kind), "seed": seed, "settings": wire.settings(args)} | scores


def test_a_folder_is_gone_on_with_by_the_same_settings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wire, "run", made)
    asked = ["--out", str(tmp_path), "--rounds", "2"]
    wire.main([*asked, "--seeds", "1"])
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == len(wire.WIRES)
    wire.main([*asked, "--seeds", "2"])  # what is there is not made again
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(wire.WIRES)
    assert f"| {wire.BASE} | 2 | 50.0" in capsys.readouterr().out
    for other in (["--rounds", "3"], ["--tests", "10"], ["--train", "80"], ["--algorithm", "by_use"]):
        with pytest.raises(SystemExit) as ended:
            wire.main([*asked, *other])
        assert ended.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"--out {str(tmp_path)!r}: holds runs of {{'run.rounds': 2, " in said
        assert said.endswith("Choose another folder.")
    old = [
        json.dumps({name: value for name, value in json.loads(line).items() if name != "settings"}) for line in lines
    ]
    (tmp_path / "runs.jsonl").write_text("".join(f"{line}\n" for line in old))
    with pytest.raises(SystemExit):
        wire.main(asked)
    assert "holds runs of settings that it does not say, not of" in capsys.readouterr().err
