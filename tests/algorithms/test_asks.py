"""What leaves a client is what its algorithm asks for, no more and no less, and how much that is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedalign.algorithms import ALGORITHMS
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.doctor.estimate import statistics_nbytes
from fedalign.protocol import EMBEDDINGS, Layout, Statistics, TokenRows, asked_shapes
from tests.algorithms.test_hooks import broadcast
from tests.algorithms.test_rounds import federation

ALWAYS = {"prob_L_E", "load_L_E", "norm_G"}
SEMANTIC = {"margin_L_E", "centroid_L_E_D", "centroid_scale_L", "update_L_E_S"}
ASKED: dict[str, set[str]] = {name: set() for name in ALGORITHMS} | {
    "by_use": {"token_count_M_V"},
    "fc_moe": {"update_L_E_S"},
    "fedalign_moe": SEMANTIC | {"token_count_M_V"},
    "fedalign_paper": SEMANTIC,
}
VARIANTS = {
    **{name: ((f"algorithm.name={name}",), asked) for name, asked in ASKED.items()},
    "clients": (("algorithm.name=fedalign_moe", "algorithm.vocabulary=clients"), SEMANTIC | {"token_met_M_B"}),
    "pictures": (
        ("algorithm.name=fedavg", "tracking.health=full"),
        {"centroid_L_E_D", "centroid_scale_L", "update_L_E_S"},
    ),
}
VOCABULARY = 50_000
CELLS = 16 * 64
LARGE = Layout(
    16,
    64,
    {group: VOCABULARY if group == EMBEDDINGS else 1 for group in Layout(16, 64, {}).groups},
    token_rows=(TokenRows(0, VOCABULARY, 1),),
)


def configured(*overrides: str) -> Config:
    return load_config(None, ["statistics.centroid_width=64", "statistics.update_width=64", *overrides])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_report_holds_what_is_asked_for_and_nothing_else(variant: str, tmp_path: Path) -> None:
    overrides, asked = VARIANTS[variant]
    config = configured(*overrides)
    engine = federation(tmp_path, config.algorithm.name)
    engine.trainer.config = config
    start = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    (report,) = engine.train(broadcast(start, 1), list(engine.members())[:1])
    assert isinstance(report, Statistics)
    sizes = {name: value.numel() for name, value in vars(report).items() if isinstance(value, torch.Tensor)}
    assert {name for name, size in sizes.items() if size} == ALWAYS | asked
    shapes = asked_shapes(engine.trainer.moe.layout, config.asks, 64, 64)
    for name, (shape, dtype) in shapes.items():
        value = getattr(report, name)
        assert (tuple(value.shape), str(value.dtype)) == (shape, f"torch.{dtype}"), name
    assert report.nbytes == statistics_nbytes(config, engine.trainer.moe.layout)
    assert set(report.metrics) == {"train_seconds"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_report_of_a_large_model_is_small(variant: str) -> None:
    overrides, asked = VARIANTS[variant]
    nbytes = statistics_nbytes(configured(*overrides), LARGE)
    counts = 4 * VOCABULARY * ("token_count_M_V" in asked) + VOCABULARY // 8 * ("token_met_M_B" in asked)
    assert nbytes - counts <= (300_000 if "update_L_E_S" in asked else 30_000)


def test_bytes_by_hand() -> None:
    always = 72 + 4 * (2 * CELLS + 3 + 2 * CELLS)  # numbers, routing and load, lengths
    assert statistics_nbytes(configured("algorithm.name=fedavg"), LARGE) == always == 16_468
    assert statistics_nbytes(configured("algorithm.name=by_use"), LARGE) == always + 4 * VOCABULARY
    semantic = 4 * CELLS + 2 * CELLS * 64 + 4 * 16 + 2 * CELLS * 64
    assert statistics_nbytes(configured("algorithm.name=fedalign_paper"), LARGE) == always + semantic == 282_772
    met = configured("algorithm.name=fedalign_moe", "algorithm.vocabulary=clients")
    assert statistics_nbytes(met, LARGE) == always + semantic + VOCABULARY // 8
