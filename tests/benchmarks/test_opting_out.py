"""What experts of sites' own cost: a small run gives all numbers of the page, is gone on with, and is no other one."""

from __future__ import annotations

import doctest
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedalign.compare import comparison as comparing
from tests.server.test_run import in_this_process

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import opting_out


def test_examples_in_docstrings() -> None:
    found = doctest.testmod(opting_out)
    assert found.attempted > 0
    assert found.failed == 0


def test_a_run_gives_the_numbers_of_the_page(
    settings: list[str],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, page = tmp_path / "out", tmp_path / "page.md"
    data = [one for one in settings if one.startswith(("data.", "clients.alpha", "clients.min"))]
    model = model_folder("olmoe", initializer_range=0.2)
    monkeypatch.setattr(comparing, "run_all", in_this_process)
    sizes = ["--clients", "2", "--rounds", "1", "--rows", "80"]
    asked = [*sizes, "--model", str(model), "--out", str(out), "--set", *data, "training.batch_examples=32"]
    with pytest.raises(SystemExit):
        opting_out.main(["--out", str(out), "--table"])
    assert "no found.json there. Run it without --table first" in capsys.readouterr().err
    opting_out.main(asked)
    lines = json.loads((out / "found.json").read_text())
    assert [line["algorithm"] for line in lines] == [*opting_out.ALGORITHMS, opting_out.LOW_RANK]
    (found,) = [line["frozen"] for line in lines if "frozen" in line]
    names = ["client-00", "client-01"]
    assert list(found["rows"]) == list(found["whole"]) == list(found["without"]) == list(found["reached"]) == names
    assert all(sum(found["rows"].values()) > 0 and list(found["without"][gone]) == names for gone in names)
    for owner in names:
        assert list(found["reached"][owner]) == [*names, opting_out.WRITES]
        assert all(0 <= share <= 1 for shares in found["reached"][owner].values() for share in shares)
    whole = opting_out.weighted(found["whole"], found["rows"])
    sent = {line["algorithm"]: line["bytes_up"] for line in lines}
    assert sent["site_experts, low rank"] < sent["site_experts"] < sent["site_experts:shared=average"] < sent["fedavg"]

    monkeypatch.setattr(opting_out, "Clients", None)  # what was measured is not measured again
    before = {file: file.stat().st_mtime_ns for file in out.rglob("metrics.jsonl")}
    opting_out.main(asked)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("metrics.jsonl")} == before
    assert json.loads((out / "found.json").read_text()) == lines

    parts = "".join(f"{opting_out.BEGIN.format(part)}\nold {part}\n{opting_out.END}\n" for part in ("demo", "many"))
    page.write_text(f"before\n{parts}after\n")
    monkeypatch.setattr(opting_out, "PAGE", page)
    opting_out.main(["--out", str(out), "--table"])
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "\nold demo\n" not in text
    assert "\nold many\n" in text
    for word in (
        "| `by_use` |",
        "| nobody |",
        "| client-01 |",
        f"own rows at {opting_out.percent([whole])}",
        "Python 3.",
    ):
        assert word in text
    monkeypatch.setattr(opting_out, "MATRIX", 1)  # two are many
    opting_out.main(["--out", str(out), "--table", "many"])
    assert "| rows of all others |" in page.read_text()
    assert "\nold many\n" not in page.read_text()
    with pytest.raises(SystemExit):
        opting_out.main(["--out", str(out), "--table", "few"])
    assert "page.md has no such part" in capsys.readouterr().err

    with pytest.raises(SystemExit) as stopped:
        opting_out.main([*asked, "--seeds", "1"])
    assert stopped.value.code == 2
    assert "Choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lines", "fedavgg"], "--lines = 'fedavgg': unknown"),
        (["--rounds", "3", "--after", "4"], "--after 4: no such round. Choose 0 to 3"),
        (["a", "b"], "--out: one folder, or several with --table"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        opting_out.main(["--out", str(tmp_path / "out"), *words])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_seeds_of_several_folders_are_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of lines that some seeds have alone these are told; scores stand after the rounds that they are of."""
    page, folders = tmp_path / "page.md", [str(tmp_path / name) for name in ("a", "b")]
    page.write_text(f"{opting_out.BEGIN.format('demo')}\n{opting_out.END}\n")
    monkeypatch.setattr(opting_out, "PAGE", page)
    line = {"own": 0.5, "after": [{"global": 0.25, "own": 0.125}], "bytes_up": 1000.0, "model_bytes": 1000}
    made = {"clients": 2, "rounds": 3, "after": [1]}
    for folder, seed, names in zip(folders, (7, 8), (["fedavg", "by_use"], ["fedavg"]), strict=True):
        lines = [line | {"algorithm": name, "seed": seed, "global": seed / 10} for name in names]
        about = {"settings": made | {"seeds": [seed]}, "machine": "a machine"}
        Path(folder).mkdir()
        Path(folder, opting_out.FOUND).write_text(json.dumps(lines))
        Path(folder, opting_out.ABOUT).write_text(json.dumps(about))
    opting_out.main(["--out", *folders, "--table"])
    text = page.read_text()
    assert "| global test set after 1 rounds | own rows after 1 rounds | global test set after 3 |" in text
    assert "| `fedavg` | 25.0 % (25.0 to 25.0) | 12.5 % (12.5 to 12.5) | 75.0 % (70.0 to 80.0) |" in text
    assert "| `by_use` (seed 7) | 25.0 % | 12.5 % | 70.0 % |" in text
    assert "Mean and range of 2 seeds." in text
    Path(folders[1], opting_out.ABOUT).write_text(json.dumps({"settings": made | {"seeds": [8], "rounds": 4}}))
    with pytest.raises(SystemExit):
        opting_out.main(["--out", *folders, "--table"])
    assert "holds runs of" in capsys.readouterr().err
