"""The attacks' script: liars lie as they say, cells are kept apart, and the table tells what was not run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedalign.config.toml import load_config
from fedalign.federation.in_process import prepare
from fedalign.maths.heap import Heap
from fedalign.maths.rounding import broadcast_dtype, pack
from fedalign.protocol import SHARED, Broadcast, Failure, ParameterGroup, Request, Statistics, Update

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import attacks


class Collected:
    def __init__(self) -> None:
        self.updates: dict[str, Update] = {}

    def add(self, update: Update) -> Failure | None:
        self.updates[update.client] = update
        return None


def test_liars_lie_and_what_they_send_is_as_long_as_they_say(settings: list[str], tmp_path: Path) -> None:
    config = load_config(None, [*settings, "training.epochs=1"])
    prepared = prepare(config, tmp_path)
    trainer, weights = prepared.bench.trainer(), prepared.initial_weights(Heap())
    start = {group: pack(value, broadcast_dtype("float32"), seed=0) for group, value in weights.items()}
    names = list(prepared.clients)
    told: dict[str, tuple[Any, dict[str, Statistics], Collected, list[Failure]]] = {}
    for name, attack in attacks.ATTACKS.items():
        federation = attacks.Attacked(trainer, prepared.clients, names[:1], attack, trigger=7)
        reports = [r for r in federation.train(Broadcast(1, start), names) if isinstance(r, Statistics)]
        collected, groups = Collected(), (SHARED, ParameterGroup("expert"))
        failures = federation.collect([Request(client, 1, groups) for client in names], collected)
        told[name] = attack, {report.client: report for report in reports}, collected, failures
    _, honest, sent, _ = told["none"]
    for name, (attack, reports_of, collected, failures) in told.items():
        liar = reports_of[names[0]]
        assert all(torch.equal(reports_of[c].norm_G, honest[c].norm_G) for c in names[1:])
        assert [failure.client for failure in failures] == ([names[0]] if attack.silent else [])
        assert (liar.examples == 10**9) == (name in ("examples", "silent", "both"))
        if not attack.silent:
            claimed = float(liar.norm_G[0])
            assert float(collected.updates[names[0]].groups[SHARED].values.norm()) == pytest.approx(claimed, rel=1e-4)
        if attack.begins > 1:
            assert torch.equal(liar.norm_G, honest[names[0]].norm_G)
        elif attack.medians:
            others = sorted(float(honest[c].norm_G.norm()) for c in names[1:])
            expected = abs(attack.medians) * sum(others) / 2
            assert float(liar.norm_G.norm()) == pytest.approx(expected, rel=1e-4)
    turned = told["turned"][2].updates[names[0]].groups[SHARED].values
    cosine = torch.nn.functional.cosine_similarity(turned, sent.updates[names[0]].groups[SHARED].values, dim=0)
    assert float(cosine) == pytest.approx(-1, abs=1e-4)


def test_what_was_trained_before_is_the_same_and_another_is_trained_anew(settings: list[str], tmp_path: Path) -> None:
    config = load_config(None, [*settings, "training.epochs=1"])
    trained = attacks.Trained(tmp_path / "trained", most=12)

    def rounds(number: int, *of: int) -> tuple[list[list[Statistics]], Collected]:
        prepared = prepare(config, tmp_path / str(number))
        weights, names = prepared.initial_weights(Heap()), list(prepared.clients)
        nobody = attacks.ATTACKS["none"]
        federation = attacks.Attacked(prepared.bench.trainer(), prepared.clients, [], nobody, 7, trained)
        told = []
        for round, factor in enumerate(of, start=1):
            start = {g: pack(value * factor, broadcast_dtype("float32"), seed=0) for g, value in weights.items()}
            said = federation.train(Broadcast(round, start), names)
            told.append([report for report in said if isinstance(report, Statistics)])
        collected = Collected()
        assert not federation.collect([Request(client, len(of), (SHARED,)) for client in names], collected)
        return told, collected

    (first, second), got = rounds(1, 1, 2)
    clients = len(first)
    assert len(trained.known) == 2 * clients
    (again, other), _ = rounds(2, 1, 3)
    (last_first, last_second), last = rounds(3, 1, 2)
    assert all(two is one and three is one for one, two, three in zip(first, again, last_first, strict=True))
    assert all(two is one for one, two in zip(second, last_second, strict=True))
    assert not any(torch.equal(two.norm_G, one.norm_G) for one, two in zip(second, other, strict=True))
    for name, update in got.updates.items():
        assert torch.equal(update.groups[SHARED].values, last.updates[name].groups[SHARED].values)
    # the same broadcast after another past is trained anew: what a client keeps of it may matter
    (_, elsewhere), _ = rounds(4, 4, 2)
    assert not any(two is one for one, two in zip(second, elsewhere, strict=True))
    # of so many those used last stay
    assert clients == 3
    assert len(trained.known) == len(list(trained.folder.iterdir())) == 12
    (latest, gone), _ = rounds(5, 1, 3)
    assert all(two is one for one, two in zip(first, latest, strict=True))
    assert not any(two is one for one, two in zip(other, gone, strict=True))
    assert all(torch.equal(two.norm_G, one.norm_G) for one, two in zip(other, gone, strict=True))


def test_cells_are_each_there_once_and_a_stored_one_must_be_of_the_same_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = list(attacks.cells())
    assert len(set(every)) == len(every)
    assert {cell.column for cell in every} == set(attacks.COLUMNS)
    cell = every[0]
    line = cell.key | {"accuracy": 0.5}
    assert attacks.found([line], cell) is line
    column = attacks.COLUMNS[cell.column]
    monkeypatch.setitem(attacks.COLUMNS, cell.column, replace(column, revision=column.revision + 1))
    assert attacks.found([line], cell) is None
    assert attacks.outdated([line], cell) is line


def test_cells_of_the_goal_come_first() -> None:
    first = list(attacks.cells())[: 3 * len(attacks.ATTACKS)]
    assert {(cell.alpha, cell.column) for cell in first} == {(1.0, "default, clip")}
    assert [cell.seed for cell in first] == sorted(cell.seed for cell in first)
    assert {cell.liars for cell in first} == {0, 1}


def test_the_table_gives_means_and_says_what_was_not_run() -> None:
    lines = [
        attacks.Cell(1.0, seed, attack, int(attack != "none"), "default").key
        | {"accuracy": accuracy, "success": 0.25, "machine": "a machine"}
        for seed in range(2)
        for attack, accuracy in (("none", 0.5 + seed / 10), ("trigger", 0.4))
    ]
    table = attacks.tables(lines)
    assert "| nobody lies | 55.0 (2) | not run |" in table
    assert "row ten times | 40.0, works 25 % (2) | not run |" in table
    assert "**Dirichlet 0.1, 3 of 10 sites lie**: not run yet." in table
    assert "Run on: a machine." in table
    older = [line | {"revision": line["revision"] - 1} for line in lines]
    assert r"| nobody lies | 55.0\* (2) | not run |" in attacks.tables(older)
    assert attacks.tables([*older, *lines]) == table
    assert "nan" not in table
    assert "Run with this code: 4 of 264 cells" in table
    many = attacks.Cell(1.0, 0, "trigger", 3, "default, clip").key | {"accuracy": 0.4, "success": 0.25}
    assert "Run with this code: 1 of 99 cells" in attacks.tables(
        [*lines, many]
    )  # "none" is of a column not shown there
