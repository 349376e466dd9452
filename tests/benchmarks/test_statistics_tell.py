"""What statistics tell: sites are summed as they would report, the attacker finds what is there, and nothing else."""

from __future__ import annotations

import doctest
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedalign.client.workbench import Workbench
from fedalign.config.toml import load_config
from fedalign.data.batches import batches
from fedalign.data.formats import load_examples
from fedalign.data.tokens import TokenCounts
from fedalign.maths.sketch import Sketch
from fedalign.moe.probe import RoutingProbe, RoutingStatistics

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import statistics_tell as tell

SMALL = ["--sizes", "8", "--sites", "16", "--trained-sites", "4", "--trained-sizes", "8", "--each", "40"]


def test_examples_in_docstrings() -> None:
    found = doctest.testmod(tell)
    assert found.attempted > 0
    assert found.failed == 0


def test_sums_of_rows_are_what_a_site_of_these_rows_measures(settings: list[str]) -> None:
    config = load_config(None, settings)
    bench = Workbench.load(config)
    examples = load_examples(config.data.train, config.data, "train", 0)[:20]
    drawn = torch.tensor([[0, 3, 3, 5, 7, 9, 9, 9], [1, 2, 4, 6, 8, 10, 11, 12]])
    sites = tell.Sites(drawn, torch.zeros(2, 1), torch.zeros(2, 1))
    thresholds = 30, 4
    features = tell.forward_features(tell.sums(bench, examples), sites, *thresholds)

    layout, hidden = bench.moe.layout, bench.moe.layers[0].hidden
    sketch = Sketch(config.statistics.centroid_width, config.run.seed)
    withheld = 0
    for site, rows in enumerate(drawn.tolist()):
        routing = RoutingStatistics(layout.layers, layout.experts, hidden)
        tokens = TokenCounts(layout.token_rows)
        bench.moe.model.eval()
        with RoutingProbe(bench.moe) as probe, torch.no_grad():
            for batch in batches(bench.encoder.encode([examples[i] for i in rows]), 4096, 4):
                with probe.capture(*batch.masks()) as captured:
                    bench.moe.model(**batch.inputs())
                routing.update(captured)
                tokens.update(batch)
        found = routing.finish(*thresholds)
        withheld += int((found.load_L_E == 0).sum())
        always = torch.cat([found.prob_L_E.flatten(), found.load_L_E.flatten() / found.tokens])
        torch.testing.assert_close(features["always"][site], always, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features["margins"][site], found.margin_L_E.flatten(), rtol=1e-4, atol=1e-5)
        centroids = torch.cat([sketch.project(row) for row in found.centroid_L_E_H.flatten(0, 1)])
        torch.testing.assert_close(features["centroids"][site], centroids, rtol=1e-3, atol=1e-3)
        counts = (tokens.finish(thresholds[1]).flatten() / found.tokens).sqrt()
        torch.testing.assert_close(features["tokens"][site], counts, rtol=1e-4, atol=1e-5)
    assert 0 < withheld < 2 * layout.layers * layout.experts  # else thresholds were not tried


@pytest.mark.parametrize("presence", [False, True])
def test_the_attacker_finds_what_is_there_and_nothing_in_noise(presence: bool) -> None:
    torch.manual_seed(0)
    secret = torch.rand(2, 200, 3) if not presence else (torch.rand(2, 200, 1) > 0.5).float()
    sites = tell.Sites(torch.zeros(200, 1).long(), secret[0], secret[0])
    both = sites, replace(sites, target_S_K=secret[1])
    telling = [{"own": torch.cat([one, torch.randn(200, 20)], dim=1)} for one in secret]
    noise = [{"own": torch.randn(200, 500)} for _ in secret]
    found = tell.told((telling[0], telling[1]), both, ["own"], presence)
    nothing = tell.told((noise[0], noise[1]), both, ["own"], presence)
    chance = 0.5 if presence else 0.0
    assert found["low"] > 0.9
    assert nothing["low"] < chance + 0.01
    assert abs(nothing["score"] - chance) < 0.1
    assert all(one["low"] <= one["score"] <= one["high"] for one in (found, nothing))


def test_no_row_is_of_a_site_that_teaches_and_of_one_that_is_told() -> None:
    rows = tell.Corpus([], torch.arange(80) % 2, ["a", "b"])
    teach, told = tell.sites_of_halves("labels", rows, 10, 50, seed=0)
    assert not set(teach.row_S_N.flatten().tolist()) & set(told.row_S_N.flatten().tolist())
    first, second = teach.row_S_N[:5], teach.row_S_N[5:]
    assert not set(first.flatten().tolist()) & set(second.flatten().tolist())


def test_half_of_the_sites_have_a_subgroup_of_a_twentieth() -> None:
    rows = tell.Corpus([], torch.arange(90) % 3, ["a", "b", "c"])
    sites = tell.draw("subgroup", rows, torch.arange(90), 40, 1000, seed=0)
    has = sites.target_S_K[:, 0] > 0
    assert int(has.sum()) == 20
    assert float(sites.label_S_K[has, -1].mean()) == pytest.approx(tell.SUBGROUP, abs=0.01)
    assert float(sites.label_S_K[~has, -1].max()) == 0


def test_a_run_on_other_data_goes_on_where_it_stopped(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = next(one.removeprefix("data.train=") for one in settings if one.startswith("data.train="))
    model = next(one for one in settings if one.startswith("model.path="))
    columns = ["data.kind=classification", "data.test=" + data]
    asked = [*SMALL, "--out", str(tmp_path / "out"), "--data", data, "--set", model, *columns]
    tell.main([*asked, "--secrets", "labels"])
    file = tmp_path / "out" / "lines.jsonl"
    first = file.read_text()
    lines = [json.loads(one) for one in first.splitlines()]
    assert {one["how"] for one in lines} == {"labels", "forward", "noise", "trained"}
    assert {one["view"] for one in lines if one["how"] == "trained"} == {"+".join(asks) for asks in tell.asked()}
    tell.main([*asked, "--secrets", "labels", "subgroup", "topics"])
    assert file.read_text().startswith(first)
    assert {json.loads(one)["secret"] for one in file.read_text().splitlines()} == {"labels", "subgroup"}
    assert "not measured: topics: 0 classes" in capsys.readouterr().out

    page = tmp_path / "page.md"
    page.write_text(f"before\n{tell.BEGIN}\nold\n{tell.END}\nafter\n")
    monkeypatch.setattr(tell, "PAGE", page)
    tell.main(["--out", str(tmp_path / "out"), "--table"])
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    assert "**Mix of languages**: not run." in text
    assert all(f"`{name}`" in text for names in tell.asked().values() for name in names)

    with pytest.raises(SystemExit) as stopped:
        tell.main([*asked, "--seed", "1"])
    assert stopped.value.code == 2
    assert "Choose another folder" in capsys.readouterr().err
