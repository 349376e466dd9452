"""An ordinary client of FedAvg on the demo's model: what a user of another framework would write, without ours.

`peers.py` lets Flower, NVFLARE and a bare loop run it. All it needs lies in the folder that PEERS names: the
model, and rows of tokens for each client and for the test. As a script it is NVFLARE's training script.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

IGNORED = -100
FOLDER = "PEERS"  # the environment variable that names the folder
Rows = Sequence[tuple[list[int], list[int]]]  # token ids and labels


class Demo(nn.Module):
    """The demo's model under a name that a framework can import."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = AutoModelForCausalLM.from_pretrained(folder() / "model")

    def forward(self, **inputs: Tensor) -> Any:
        """As the model."""
        return self.inner(**inputs)


def folder() -> Path:
    """Where everything lies."""
    return Path(os.environ[FOLDER])


def settings() -> dict[str, Any]:
    """The settings that all peers share."""
    return dict(json.loads((folder() / "settings.json").read_text()))


def rows_of(name: str) -> Rows:
    """A client's rows, or those of `test`."""
    return [(ids, labels) for ids, labels in json.loads((folder() / f"{name}.json").read_text())]


def collate(rows: Rows) -> dict[str, Tensor]:
    """One padded batch."""
    length = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in rows]),
    }


def train(model: nn.Module, name: str, round: int) -> int:
    """One local epoch in batches of equal numbers of rows; the number of rows."""
    shared, rows = settings(), list(rows_of(name))
    begun = time.time()
    random.Random(f"{round}/{name}").shuffle(rows)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=shared["learning_rate"], weight_decay=0.0)
    for start in range(0, len(rows), shared["batch_examples"]):
        optimizer.zero_grad()
        model(**collate(rows[start : start + shared["batch_examples"]])).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), shared["max_grad_norm"])
        optimizer.step()
    note(round, name, begun)
    return len(rows)


def note(round: int, name: str, begun: float) -> None:
    """Write down when a client trained, for the seconds of a round."""
    line = json.dumps({"round": round, "client": name, "begun": begun, "ended": time.time()})
    with (folder() / "times.jsonl").open("a") as file:
        file.write(line + "\n")


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    """Mean loss per answer token on the test rows, nats."""
    model.eval()
    rows, total, tokens = rows_of("test"), 0.0, 0
    for start in range(0, len(rows), 32):
        batch = collate(rows[start : start + 32])
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        total, tokens = total + float(model(**batch).loss) * count, tokens + count
    return total / tokens


def same_order(model: nn.Module, arrays: Sequence[Any]) -> Mapping[str, Tensor]:
    """A state that `load_state_dict` takes, of arrays in the order of the model's own."""
    return {name: torch.as_tensor(array) for name, array in zip(model.state_dict(), arrays, strict=True)}


def nvflare_client() -> None:
    """Train whatever the server sends until it has no more."""
    import nvflare.client as flare  # noqa: PLC0415 - only NVFLARE's own processes have it

    torch.set_num_threads(1)
    flare.init()
    number = int(flare.get_site_name().rpartition("-")[2]) - 1
    model = Demo()
    while flare.is_running():
        received = flare.receive()
        model.load_state_dict({name: torch.as_tensor(value) for name, value in received.params.items()})
        count = train(model, f"client-{number}", received.current_round)
        params = {name: value.detach().clone() for name, value in model.state_dict().items()}
        meta = {"NUM_STEPS_CURRENT_ROUND": count}
        flare.send(flare.FLModel(params=params, meta=meta))


if __name__ == "__main__":
    nvflare_client()
