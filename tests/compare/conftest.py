"""Requests and finished runs without training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedalign.compare.plan import Cell, Design, cells, make_design, parse_algorithms, parse_grid, parse_seeds
from fedalign.compare.tables import Finished
from fedalign.config.toml import load_config

Ask = Callable[..., Design]


@pytest.fixture
def ask() -> Ask:
    """`ask("fedavg,fedprox", seeds="2", sets=["clients.alpha=0.1,1.0"])`: a design on the defaults."""

    def make(algorithms: str, seeds: str = "2", sets: Sequence[str] = (), tune: bool = False) -> Design:
        single, grid = parse_grid(["run.rounds=2", *sets])
        return make_design(load_config(None, single), parse_algorithms([algorithms]), grid, parse_seeds(seeds), tune)

    return make


def finished(cell: Cell, *accuracies: float, bytes_up: int = 1_000_000, **last: Any) -> Finished:
    """A run with these accuracies by round; `last`: more numbers of the last round."""
    history = [
        {"round": i, "accuracy": accuracy, "loss_nats": 1.0, "bytes_up": bytes_up if i else 0}
        for i, accuracy in enumerate(accuracies)
    ]
    history[-1] |= last
    return Finished(cell, history)


def by_name(design: Design) -> dict[tuple[str, int], Cell]:
    """Cells of a design without a grid, by label and seed."""
    return {(cell.choice.label, cell.seed): cell for cell in cells(design)}


def tree(path: Path) -> dict[str, bytes]:
    """Every file with its bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
