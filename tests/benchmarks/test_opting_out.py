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
