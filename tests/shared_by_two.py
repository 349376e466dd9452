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
from fedalign.maths.rounding import pack
from fedalign.moe.load import DTYPES
from fedalign.moe.model import MoEModel
from fedalign.protocol import Broadcast
from tests.client.test_trainer import examples
from tests.moe.tiny import build

SETTINGS = [
    "training.batch_examples=5",
    "training.optimizer=sgd",
    "training.learning_rate=1e-1",
    "training.balance_coefficient=0.01",
    "statistics.min_tokens=2",
    "algorithm.name=fedalign_paper",
    "algorithm.vocabulary=tokens",
]


EXACT: dict[str, dict[str, Any]] = {
    "switch_transformers": {"dropout_rate": 0.0, "router_jitter_noise": 0.0}
}  # what draws no random numbers in training


def one_round(family: str, folder: Path, *more: str) -> Path:
    """One client's round on a tiny model of a family; what it trained and said, in a folder."""
    config = load_config(None, [*SETTINGS, *more])
    moe = MoEModel.wrap(build(family, **EXACT.get(family, {})).to(DTYPES[config.tuning.dtype]), config.tuning)
    if parallel.world() > 1:
        moe = moe.shard(torch.device("cpu"))
    if config.tuning.gradient_checkpointing:
        moe.checkpoint_activations()
    held = sum(parallel.held(p)[0].numel() for p in moe.model.parameters())
    # the last batch has one example, so the second process has none
    client = ClientData("c", examples(21, seq2seq=moe.is_seq2seq), None, ClientMemory(folder / "client"))
    target = {"target_L_E": torch.full((moe.layout.layers, moe.experts), 1 / moe.experts)}
    start = moe.read()
    weights = {group: pack(value, "float32", 0) for group, value in start.items()}
    report = Trainer(moe, None, config.algorithm.build(), config).train(client, Broadcast(1, weights, target))
    said = {name: value for name, value in vars(report).items() if isinstance(value, torch.Tensor)}
    after = moe.read()
    moved = {f"moved {group}": after[group] - value for group, value in start.items()}
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "loss": report.loss,
        "share": held / sum(p.numel() for p in moe.model.parameters()),
        "hash": moe.weights_hash(),
    }
    (folder / f"{parallel.rank()}.json").write_text(json.dumps(about))
    moe.save(folder / "model")
    if parallel.is_first():
        save_file(moved | said, folder / "round.safetensors")
    return folder


def main(jobs: dict[str, Any]) -> None:
    """Some rounds, then some commands, one after another."""
    with parallel.together("cpu"):
        for family, folder, *more in jobs["rounds"]:
            one_round(family, Path(folder), *more)
        for arguments in jobs["commands"]:
            app(arguments, standalone_mode=False)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
