"""One-run auditing (Steinke et al. 2023, arXiv 2305.08924): who sees the update guesses which canaries were trained on.

Each canary is a text of one token that no other has, so the row of that token is its own: the easiest thing to find. Of
those about which the attacker is surest, a guess may be right no more often than e^ε / (1 + e^ε).
"""

import math
import random
from pathlib import Path

import pytest
import torch
from scipy.stats import binom

from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.noisy import PrivateFit
from fedalign.client.spent import Privacy, PrivacyLedger
from fedalign.client.trainer import Trainer
from fedalign.config.toml import load_config
from fedalign.data.encode import Encoded
from fedalign.maths.rounding import unpack
from fedalign.moe.model import MoEModel
from fedalign.protocol import EMBEDDINGS, Request
from tests.client.test_trainer import broadcast
from tests.moe.tiny import build

CANARIES, FIRST, DELTA = 240, 10, 1e-5
CONFIDENCE = 0.95
SETTINGS = [
    "algorithm.name=fedavg",
    "evaluation.clients=false",
    "training.optimizer=sgd",
    "training.batch_examples=1000",  # all of them in each step: the most that an attacker can wish for
    "training.epochs=2",
    "privacy.seed=0",
]


def canary(number: int) -> Encoded:
    return Encoded([FIRST + number] * 4, [-100, -100, 1, 2], number)


def least_epsilon(right: int, guesses: int) -> float:
    """The largest epsilon that so many right guesses refute."""
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        chance = float(binom.sf(right - 1, guesses, 1 / (1 + math.exp(-middle))))
        low, high = (middle, high) if chance + 2 * CANARIES * DELTA <= 1 - CONFIDENCE else (low, middle)
    return low


def audited(folder: Path, epsilon: float) -> tuple[float, float]:
    """The epsilon that is claimed, and the one that the attack refutes anything below of."""
    config = load_config(None, [*SETTINGS, f"privacy.epsilon={epsilon}", "run.rounds=1"])
    torch.manual_seed(0)
    model = build("olmoe", vocab_size=FIRST + CANARIES)
    trainer = Trainer(MoEModel.wrap(model), None, config.algorithm.build(), config)
    trained = {number for number in range(CANARIES) if random.Random(number).random() < 0.5}
    privacy = Privacy(config, PrivacyLedger(folder), "here", folder, "c")
    every = [canary(number) for number in sorted(trained)]
    client = ClientData("c", every, None, ClientMemory(folder), privacy=privacy)
    table, own = model.get_input_embeddings().weight, []
    model.eval()
    for number in range(CANARIES):
        logits = model(input_ids=torch.tensor([canary(number).input_ids])).logits[0, 1:3]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2]))
        own.append(torch.autograd.grad(loss, table)[0][FIRST + number])
    report = trainer.train(client, broadcast(trainer.moe))
    update = client.memory.hand_over("c", Request("c", 1, (EMBEDDINGS,))).groups[EMBEDDINGS]
    moved_V_H = unpack(update).view(-1, table.shape[1])
    score = [-float(moved_V_H[FIRST + number] @ own[number] / own[number].norm()) for number in range(CANARIES)]
    order = sorted(range(CANARIES), key=score.__getitem__)
    best = 0.0
    for guesses in (20, 40, 80):  # of each kind
        right = sum(number in trained for number in order[-guesses:])
        right += sum(number not in trained for number in order[:guesses])
        best = max(best, least_epsilon(right, 2 * guesses))
    return report.metrics["privacy_epsilon"], best


@pytest.mark.parametrize("epsilon", [1.0, 2.0])
def test_canaries_tell_no_more_than_is_claimed(epsilon: float, tmp_path: Path) -> None:
    claimed, found = audited(tmp_path, epsilon)
    assert claimed <= epsilon
    assert found <= claimed


def test_without_noise_the_same_attack_refutes_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivateFit, "_add_noise", lambda *_: None)
    claimed, found = audited(tmp_path, 2.0)
    assert found > claimed


def test_with_a_tenth_of_the_noise_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_noise = PrivateFit._add_noise

    def less(self: PrivateFit, sums: list[torch.Tensor], step: int) -> None:
        noisy = [total.clone() for total in sums]
        add_noise(self, noisy, step)
        for total, noised in zip(sums, noisy, strict=True):
            total.lerp_(noised, 0.1)

    monkeypatch.setattr(PrivateFit, "_add_noise", less)
    claimed, found = audited(tmp_path, 2.0)
    assert found > claimed
