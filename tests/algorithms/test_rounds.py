"""Real rounds of every algorithm: three clients train a tiny model in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedalign.algorithms import ALGORITHMS
from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.trainer import Trainer
from fedalign.config.toml import load_config
from fedalign.federation.in_process import InProcess
from fedalign.maths.average import StreamingSum
from fedalign.maths.rounding import pack
from fedalign.moe.model import MoEModel
from fedalign.moe.site_experts import with_owners
from fedalign.protocol import Broadcast, Plan, Reports, State, Statistics, Weights, asked_shapes
from fedalign.server.checks import check_statistics
from fedalign.testing import planned
from tests.client.test_trainer import examples
from tests.moe.tiny import EXPERTS, build

SIZES = {"a": 24, "b": 5, "c": 15}


def federation(folder: Path, name: str) -> InProcess:
    config = load_config(
        None,
        [
            f"algorithm.name={name}",
            "training.learning_rate=1e-2",
            "training.batch_examples=4",
            "statistics.min_tokens=20",
        ],
    )
    owned = config.algorithm.build().shared is not None
    model = build("olmoe", num_experts=7 if owned else EXPERTS)
    if owned:
        with_owners(model.config, {client: [expert] for expert, client in enumerate(SIZES, EXPERTS)})
    trainer = Trainer(MoEModel.wrap(model), None, config.algorithm.build(), config)
    return InProcess(
        trainer,
        {
            client: ClientData(client, examples(size, seed=size), None, ClientMemory(folder / client))
            for client, size in SIZES.items()
        },
    )


def one_round(
    engine: InProcess, number: int, old: Weights, state: State
) -> tuple[list[Statistics], Plan, Weights, State]:
    """As the server does it."""
    layout, algorithm = engine.trainer.moe.layout, engine.trainer.algorithm
    broadcast = Broadcast(number, {group: pack(value, "float32", 0) for group, value in old.items()}, state)
    options = engine.trainer.config.statistics
    shapes = asked_shapes(layout, algorithm.asks, options.centroid_width, options.update_width)
    reports = []
    for report in engine.train(broadcast, engine.members()):
        assert isinstance(report, Statistics)
        assert check_statistics(report, layout, shapes, number) is None
        reports.append(report)
    plan = planned(algorithm, Reports(reports, layout, len(engine.members())), state)
    plan = plan.without({report.client: report.frozen for report in reports}, layout)
    total = StreamingSum(layout, plan, {report.client: report.norm_G for report in reports}, "float32")
    assert engine.collect([r for r in plan.requests(number, layout) if r.groups], total) == []
    assert total.unchanged(1.0) == []
    return reports, plan, total.result(old), plan.then(total.streams(1.0), total.came(1.0)) if plan.then else plan.state


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_two_rounds(name: str, tmp_path: Path) -> None:
    engine = federation(tmp_path, name)
    layout = engine.trainer.moe.layout
    weights = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    state: State = {}
    losses = []
    for number in (1, 2):  # penalties and states begin in the second
        reports, plan, new, state = one_round(engine, number, weights, state)
        assert plan.clients == tuple(engine.members())
        assert plan.weight_C_G.dtype == torch.float32
        assert bool((plan.weight_C_G >= 0).all())
        total_G = plan.weight_C_G.sum(0)
        assert bool((((total_G - 1).abs() < 1e-6) | (total_G == 0)).all())
        assert (total_G[0] > 0) == (name not in ("local", "site_experts"))
        for group, total in zip(layout.groups, total_G.tolist(), strict=True):
            assert bool(new[group].isfinite().all())
            assert torch.equal(new[group], weights[group]) == (total == 0 or layout.sizes[group] == 0), group
        held_C_L_E = torch.stack([report.held_L_E for report in reports])
        assert bool(held_C_L_E.any())
        assert name == "centralised" or not bool(held_C_L_E.all())  # something is withheld, and some leave it out
        losses.append(sum(report.loss * report.examples for report in reports))
        weights = new
    assert losses[1] < losses[0]
