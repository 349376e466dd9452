"""Rounds of real training: plan-then-sum against the textbook, sketches of real updates against the updates."""

from pathlib import Path

import pytest
import torch

from fedalign.algorithms.fedavg import FedAvg
from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.trainer import Trainer
from fedalign.config.toml import load_config
from fedalign.federation.in_process import InProcess, pooled
from fedalign.maths.average import StreamingSum
from fedalign.maths.experts import direction_consensus
from fedalign.maths.rounding import pack
from fedalign.moe.model import MoEModel
from fedalign.protocol import Broadcast, ParameterGroup, Reports, Statistics, Weights
from fedalign.testing import planned
from tests.client.test_trainer import examples
from tests.moe.tiny import build

SIZES = {"a": 24, "b": 9, "c": 15}


def federation(folder: Path, width: int = 256) -> InProcess:
    config = load_config(
        None,
        [
            "training.learning_rate=1e-2",
            "training.batch_examples=4",
            "training.epochs=2",
            "algorithm.name=fedavg",
            "statistics.min_tokens=1",
            "statistics.min_examples=1",
            f"statistics.update_width={width}",
            "tracking.health=full",  # FedAvg does not ask for sketches
        ],
    )
    trainer = Trainer(MoEModel.wrap(build("olmoe")), None, FedAvg(), config)
    clients = {
        name: ClientData(name, examples(size, seed=size), None, ClientMemory(folder / name))
        for name, size in SIZES.items()
    }
    return InProcess(trainer, clients)


def one_round(engine: InProcess) -> tuple[Weights, list[Statistics], list[Weights], Weights]:
    """Old weights, statistics, each client's trained weights, and the new weights."""
    moe = engine.trainer.moe
    old = {group: value.clone() for group, value in moe.read().items()}
    broadcast = Broadcast(1, {group: pack(value, "float32", 0) for group, value in old.items()})
    reports, trained = [], []
    for name in engine.members():  # as the server does, but looking at the model in between
        (report,) = engine.train(broadcast, [name])
        assert isinstance(report, Statistics)
        reports.append(report)
        trained.append({group: value.clone() for group, value in moe.read().items()})
    plan = planned(FedAvg(), Reports(reports, moe.layout, len(reports)))
    total = StreamingSum(moe.layout, plan, {r.client: r.norm_G for r in reports}, "float32")
    assert engine.collect(plan.requests(1, moe.layout), total) == []
    return old, reports, trained, total.result(old)


def test_fedavg_is_the_textbook_weighted_mean(tmp_path: Path) -> None:
    _, _, trained, new = one_round(federation(tmp_path))
    shares = [size / sum(SIZES.values()) for size in SIZES.values()]
    for group, value in new.items():
        textbook = sum(share * weights[group].double() for share, weights in zip(shares, trained, strict=True))
        assert torch.allclose(value.double(), textbook, rtol=0, atol=1e-6)  # type: ignore[arg-type] # sum begins with the number 0


def test_whoever_holds_all_data_has_all_examples(tmp_path: Path) -> None:
    clients = {
        name: ClientData(name, examples(size, seed=size), None, ClientMemory(tmp_path / name))
        for name, size in SIZES.items()
    }
    (pool,) = pooled(clients).values()
    assert pool.examples == sum(client.examples for client in clients.values()) == sum(SIZES.values())
    assert [one.input_ids for one in pool.train] == [one.input_ids for c in clients.values() for one in c.train]


@pytest.mark.parametrize("width", [64, 1024])
def test_cosines_of_sketches_are_those_of_the_updates(tmp_path: Path, width: int) -> None:
    engine = federation(tmp_path, width)
    old, reports, trained, _ = one_round(engine)
    layout = engine.trainer.moe.layout
    exact, estimated = [], []
    for layer in range(layout.layers):
        cells = [ParameterGroup("expert", layer, expert) for expert in range(layout.experts)]
        update_C_E_N = torch.stack([torch.stack([w[cell] - old[cell] for cell in cells]) for w in trained])
        exact.append(direction_consensus(update_C_E_N))
        estimated.append(direction_consensus(torch.stack([report.update_L_E_S[layer] for report in reports])))
    error = (torch.stack(exact) - torch.stack(estimated))[..., ~torch.eye(len(SIZES), dtype=torch.bool)]
    assert float(torch.stack(exact).abs().max()) > 0.2  # real updates do agree
    assert float(error.square().mean().sqrt()) < 1.5 / width**0.5
    assert float(error.abs().max()) < 5 / width**0.5
