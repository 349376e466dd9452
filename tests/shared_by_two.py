"""What each process does that torchrun starts for tests/test_parallel.py: `python -m tests.shared_by_two jobs.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedalign import parallel
from fedalign.cli.main import app
from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.trainer import Trainer
from fedalign.config.toml import load_config
from fedalign.maths.average import StreamingSum
from fedalign.maths.rounding import pack
from fedalign.moe.load import DTYPES
from fedalign.moe.model import MoEModel
from fedalign.protocol import Broadcast, Reports, State, Statistics
from fedalign.testing import planned
from tests.client.test_trainer import examples
from tests.moe.tiny import build

SETTINGS = [
    "training.batch_examples=5",
    "training.optimizer=sgd",
    "training.learning_rate=1e-1",
    "training.balance_coefficient=0.01",
    "statistics.min_tokens=2",
    "run.rounds=1",
]
USUAL = ["algorithm.name=fedalign_paper", "algorithm.vocabulary=tokens"]

EXACT: dict[str, dict[str, Any]] = {
    "switch_transformers": {"dropout_rate": 0.0, "router_jitter_noise": 0.0}
}  # what draws no random numbers in training


def one_client(family: str, folder: Path, *more: str) -> Path:
    """One client's rounds on a tiny model of a family, one of two members; what it trained and said, in a folder."""
    own = any(setting.startswith("algorithm.name=") for setting in more)
    config = load_config(None, [*SETTINGS, *([] if own else USUAL), *more])
    moe = MoEModel.wrap(build(family, **EXACT.get(family, {})).to(DTYPES[config.tuning.dtype]), config.tuning)
    if parallel.world() > 1:
        moe = moe.shard(torch.device("cpu"))
    if config.tuning.gradient_checkpointing:
        moe.checkpoint_activations()
    held = sum(parallel.held(p)[0].numel() for p in moe.model.parameters())
    # the last batch has one example, so the second process has none
    client = ClientData("c", examples(21, seq2seq=moe.is_seq2seq), None, ClientMemory(folder / "client"))
    state = {"target_L_E": torch.full((moe.layout.layers, moe.experts), 1 / moe.experts)}
    trainer = Trainer(moe, None, config.algorithm.build(), config)
    left: dict[str, torch.Tensor] = {}
    for number in range(1, config.run.rounds + 1):
        start = moe.read()
        weights = {group: pack(value, "float32", 0) for group, value in start.items()}
        report = trainer.train(client, Broadcast(number, weights, state))
        left |= {f"{name} {number}": value for name, value in vars(report).items() if isinstance(value, torch.Tensor)}
        after = moe.read()
        left |= {f"moved {group} {number}": after[group] - value for group, value in start.items()}
        if number < config.run.rounds:
            state = next_state(trainer, client, report, state)
            left |= {f"state {name} {number}": value for name, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "loss": report.loss,
        "share": held / sum(p.numel() for p in moe.model.parameters()),
        "hash": moe.weights_hash(),
    }
    (folder / f"{parallel.rank()}.json").write_text(json.dumps(about))
    moe.save(folder / "model")
    if parallel.is_first():
        save_file(left, folder / "round.safetensors")
    return folder


def next_state(trainer: Trainer, client: ClientData, report: Statistics, state: State) -> State:
    """What the server makes of the round for the algorithm."""
    layout = trainer.moe.layout
    plan = planned(trainer.algorithm, Reports([report], layout, members=2), state)
    total = StreamingSum(layout, plan, {client.name: report.norm_G}, "float32")
    for request in plan.requests(report.round, layout):
        assert total.add(client.memory.hand_over(client.name, request)) is None
    return plan.then(total.streams(), total.came()) if plan.then else plan.state


def main(jobs: dict[str, Any]) -> None:
    """Some rounds, then some commands, one after another."""
    with parallel.together("cpu"):
        for family, folder, *more in jobs["rounds"]:
            one_client(family, Path(folder), *more)
        for arguments in jobs["commands"]:
            app(arguments, standalone_mode=False)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
