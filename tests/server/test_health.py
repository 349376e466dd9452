"""Health files: what a round said is read back as it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from fedalign.algorithms.fedavg import FedAvg
from fedalign.protocol import Statistics
from fedalign.server import health
from fedalign.server.health import consensus, read_health, similarity, write_health
from tests.algorithms.conftest import planned
from tests.algorithms.test_hooks import LAYOUT, report


def reports() -> list[Statistics]:
    """Three clients; the third does not hold expert 1. Centroids: a and b opposed after centring."""
    every = [report(name, 1, [[1, 0], [0, 1]]) for name in ("a", "b <&> é", "c")]
    centroids = [[[2, 0], [0, 0]], [[0, 0], [0, 2]], [[1, 0], [9, 9]]]
    loads = [[[10.0, 10.0]], [[10.0, 10.0]], [[10.0, 0.0]]]
    return [
        replace(one, centroid_L_E_D=tensor([centroid]).half(), load_L_E=tensor(load))
        for one, centroid, load in zip(every, centroids, loads, strict=True)
    ]


def test_a_round_is_read_back(tmp_path: Path) -> None:
    plan = planned(FedAvg(), reports(), LAYOUT)
    for _ in range(2):  # a round that was cut off is written again
        write_health(tmp_path / "health", 3, reports(), plan, LAYOUT)
    (file,) = (tmp_path / "health").iterdir()
    assert file.name == "round-00003.safetensors"
    kept = read_health(file)
    assert kept.clients == ("a", "b <&> é", "c")
    assert_close(kept.tensors["shared_weight_C"], torch.full((3,), 1 / 3))
    assert kept.tensors["expert_weight_C_L_E"].shape == (3, 1, 2)
    assert_close(kept.tensors["load_C_L_E"][2], tensor([[10.0, 0.0]]))
    assert kept.tensors["similarity_L_E_C_C"].shape == kept.tensors["consensus_L_E_C_C"].shape == (1, 2, 3, 3)
    assert_close(kept.tensors["expert_norm_C_L_E"], torch.ones(3, 1, 2))
    assert_close(kept.tensors["gate_norm_C_L_E"], torch.ones(3, 1, 2))
    assert_close(kept.tensors["shared_norm_C"], torch.full((3,), 3**0.5))  # with embeddings and head


def test_similarities_are_cosines_of_centred_centroids_among_holders() -> None:
    found = similarity(reports())[0]
    mean = (10 * (tensor([2.0, 0]) + tensor([0.0, 0]) + tensor([1.0, 0])) + 10 * tensor([0.0, 2])) / 50
    first, second = tensor([2.0, 0]) - mean, tensor([0.0, 0]) - mean
    assert_close(found[0, 0, 1], torch.nn.functional.cosine_similarity(first, second, dim=0), atol=1e-3, rtol=1e-3)
    assert bool(found[1, 2].isnan().all())
    assert bool(found[1, :, 2].isnan().all())
    assert not bool(found[1, :2, :2].isnan().any())


def test_consensus_is_the_cosine_of_updates_among_holders() -> None:
    first, second, third = (
        replace(one, update_L_E_S=tensor([[a, [1, 0]]]).half())
        for one, a in zip(reports(), ([1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]), strict=True)
    )
    found = consensus([first, second, third])[0]
    assert_close(found[0], tensor([[1.0, 0.6, -1.0], [0.6, 1.0, -0.6], [-1.0, -0.6, 1.0]]), atol=1e-3, rtol=1e-3)
    assert bool(found[1, 2].isnan().all())
    assert_close(found[1, :2, :2], torch.ones(2, 2), atol=1e-3, rtol=1e-3)


def test_many_clients_are_not_compared_pair_by_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PAIRWISE", 2)
    plan = planned(FedAvg(), reports(), LAYOUT)
    write_health(tmp_path, 1, reports(), plan, LAYOUT)
    assert not {"similarity_L_E_C_C", "consensus_L_E_C_C"} & {
        *read_health(tmp_path / "round-00001.safetensors").tensors
    }
