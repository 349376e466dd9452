"""What one of several processes under torchrun does for tests/test_parallel.py: run by it, not by pytest."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fedalign import parallel
from fedalign.checkpoint import ClientMemory
from fedalign.client import ClientData, Trainer
from fedalign.config import load_config
from fedalign.moe.model import MoEModel
from fedalign.protocol import Broadcast
from fedalign.results import RunFolder
from fedalign.run import execute, prepare
from fedalign.wire import pack
from tests.moe.tiny import build
from tests.test_client import examples
from tests.test_run import Silent


def whole_run(out: Path, overrides: list[str]) -> None:
    """A run as `fedalign run` does it, and how much of the model this process held."""
    config = load_config(None, overrides)
    folder = RunFolder(out)
    prepared = prepare(config, folder.clients)
    folder.begin(config)
    summary = execute(prepared, folder, Silent())
    parameters = list(prepared.bench.moe.model.parameters())
    share = sum(parallel.held(p)[0].numel() for p in parameters) / sum(p.numel() for p in parameters)
    about = {"share": share, "final_loss": summary["final_loss"]}
    out.with_name(f"{out.name}-{parallel.rank()}.json").write_text(json.dumps(about))


def one_round(family: str, folder: Path) -> None:
    """One client's round on a tiny model of a family: weights and statistics afterwards, in one file."""
    config = load_config(
        None, ["training.batch_examples=5", "training.learning_rate=1e-1", "training.optimizer=sgd", "training.balance_coefficient=0.01"]
    )
    moe = MoEModel.wrap(build(family))
    if parallel.world() > 1:
        moe = moe.shard(torch.device("cpu"))
    step = Trainer(moe, None, config.algorithm.build(), config)
    data = ClientData("c", examples(22, seq2seq=moe.is_seq2seq), None, ClientMemory(folder / family))
    target = {"target_L_E": torch.full((moe.layout.layers, moe.experts), 1 / moe.experts)}
    weights = {group: pack(value.cpu(), "float32", 0) for group, value in moe.read().items()}
    report = step.train(data, Broadcast(1, weights, target))
    said = {name: value for name, value in vars(report).items() if isinstance(value, torch.Tensor)}
    after = {str(group): value for group, value in moe.read().items()}
    if parallel.is_first():
        save_file(after | said, folder / f"{family}.safetensors")


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with parallel.together("cpu"):
        for out, overrides in jobs["runs"]:
            whole_run(Path(out), overrides)
        for family in jobs["families"]:
            one_round(family, Path(sys.argv[1]).parent)


if __name__ == "__main__":
    main()
