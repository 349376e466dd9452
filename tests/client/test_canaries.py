"""The one-run audit of benchmarks/private.py on a tiny model: the claim holds, and does not where noise is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fedalign.client.noisy import PrivateFit
from fedalign.client.trainer import Trainer
from fedalign.config.toml import load_config
from fedalign.moe.model import MoEModel
from tests.moe.tiny import build

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import private
from private import CANARIES

FIRST = 10


QUARTER = 30  # examples a step, of about 120


def audited(folder: Path, epsilon: float, batch: int = private.WHOLE) -> tuple[float, float]:
    """The epsilon that is claimed, and the one that the attack refutes anything below of."""
    config = load_config(None, [*private.AUDITED, f"training.batch_examples={batch}", f"privacy.epsilon={epsilon}"])
    torch.manual_seed(0)
    model = MoEModel.wrap(build("olmoe", vocab_size=FIRST + CANARIES))
    trainer = Trainer(model, None, config.algorithm.build(), config)
    canaries = private.Canaries(range(FIRST, FIRST + CANARIES), [1, 2])
    return private.audited(trainer, canaries, [], folder)


@pytest.mark.parametrize(("epsilon", "batch"), [(1.0, private.WHOLE), (2.0, private.WHOLE), (2.0, QUARTER)])
def test_canaries_tell_no_more_than_is_claimed(epsilon: float, batch: int, tmp_path: Path) -> None:
    claimed, found = audited(tmp_path, epsilon, batch)
    assert claimed <= epsilon
    assert found <= claimed


@pytest.mark.parametrize("batch", [private.WHOLE, QUARTER])
def test_without_noise_the_same_attack_refutes_the_claim(batch: int, tmp_path: Path) -> None:
    with private.noise_on(False):
        claimed, found = audited(tmp_path, 2.0, batch)
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
