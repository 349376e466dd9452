"""MoE health: what a round's statistics and plan say of routers and experts, kept for people to look at.

One safetensors file a round: prob_C_L_E, load_C_L_E; the plan's gate_weight_C_L_E, expert_weight_C_L_E,
shared_weight_C; the norms of the updates, gate_norm_C_L_E, expert_norm_C_L_E, shared_norm_C (embeddings and head
included); and, for federations small enough to look at pair by pair, similarity_L_E_C_C (cosines of centred centroids)
and consensus_L_E_C_C (of the experts' updates, by their sketches), NaN where one of the two does not hold the expert.
The clients' names are in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedalign.files import replacing_file
from fedalign.maths.experts import centred_directions, cosines, direction_consensus
from fedalign.protocol import WHOLE, Layout, Plan, Statistics

PAIRWISE = 32  # clients up to which similarities are kept


@dataclass(frozen=True)
class Health:
    """One round, read back."""

    clients: tuple[str, ...]
    tensors: dict[str, Tensor]


def write_health(folder: Path, round: int, reports: Sequence[Statistics], plan: Plan, layout: Layout) -> None:
    """Keep a round's file; one of the same round is replaced."""
    shared_C, gate_C_L_E, expert_C_L_E = layout.split(plan.weight_C_G)
    norm_C_G = torch.stack([report.norm_G for report in reports])
    _, gate_norm_C_L_E, expert_norm_C_L_E = layout.split(norm_C_G)
    tensors = {
        "prob_C_L_E": torch.stack([report.prob_L_E for report in reports]).half(),
        "load_C_L_E": torch.stack([report.load_L_E for report in reports]),
        "gate_weight_C_L_E": gate_C_L_E.half().contiguous(),
        "expert_weight_C_L_E": expert_C_L_E.half().contiguous(),
        "shared_weight_C": shared_C.contiguous(),
        "gate_norm_C_L_E": gate_norm_C_L_E.contiguous(),
        "expert_norm_C_L_E": expert_norm_C_L_E.contiguous(),
        "shared_norm_C": norm_C_G[:, : len(WHOLE)].norm(dim=1),
    }
    if len(reports) <= PAIRWISE and reports[0].centroid_L_E_D.numel():
        tensors["similarity_L_E_C_C"] = similarity(reports).half()
    if len(reports) <= PAIRWISE and reports[0].update_L_E_S.numel():
        tensors["consensus_L_E_C_C"] = consensus(reports).half()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(folder / f"round-{round:05d}.safetensors") as file:
        # not `save_file`, which writes beside the file, where a kill would leave it
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        file.write_bytes(save(whole, metadata={"clients": json.dumps(plan.clients)}))


def similarity(reports: Sequence[Statistics]) -> Tensor:
    """Cosines of centred centroids, [L, E, C, C]; NaN where an expert is not held."""
    load_C_L_E = torch.stack([report.load_L_E for report in reports])
    layers = []
    for layer in range(load_C_L_E.shape[1]):
        centroid_C_E_D = torch.stack([r.centroid_L_E_D[layer].float() * r.centroid_scale_L[layer] for r in reports])
        similarity_E_C_C = cosines(centred_directions(centroid_C_E_D, load_C_L_E[:, layer]))
        layers.append(_among_holders(similarity_E_C_C, load_C_L_E[:, layer]))
    return torch.stack(layers)


def consensus(reports: Sequence[Statistics]) -> Tensor:
    """Cosines of the experts' updates as their sketches tell them, [L, E, C, C]; NaN where an expert is not held."""
    load_C_L_E = torch.stack([report.load_L_E for report in reports])
    update_C_L_E_S = torch.stack([report.update_L_E_S.float() for report in reports])
    return torch.stack(
        [
            _among_holders(direction_consensus(update_C_L_E_S[:, layer]), load_C_L_E[:, layer])
            for layer in range(load_C_L_E.shape[1])
        ]
    )


def _among_holders(table_E_C_C: Tensor, load_C_E: Tensor) -> Tensor:
    held_E_C = (load_C_E > 0).T
    return table_E_C_C.masked_fill(~(held_E_C.unsqueeze(1) & held_E_C.unsqueeze(2)), torch.nan)


def read_health(file: Path) -> Health:
    """The inverse of `write_health`."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    return Health(tuple(json.loads(metadata["clients"])), tensors)


Floats = NDArray[np.float32]
DEAD, OVERLOADED = 0.05, 2.0  # times an even share of the layer's tokens
SHAPES = {"prob_C_L_E": 3, "load_C_L_E": 3, "gate_weight_C_L_E": 3, "expert_weight_C_L_E": 3, "shared_weight_C": 1}


class DamagedError(Exception):
    """A file that cannot be read."""


@dataclass(frozen=True)
class Round:
    """One round's file."""

    number: int
    clients: tuple[str, ...]
    tables: Mapping[str, Floats]

    @property
    def relative_load_L_E(self) -> Floats:
        """Tokens of each expert over all clients, 1: an even share of its layer; a layer without tokens has none."""
        load_L_E: Floats = self.tables["load_C_L_E"].sum(axis=0)
        total_L_1 = load_L_E.sum(axis=1, keepdims=True)
        relative_L_E: Floats = load_L_E * load_L_E.shape[1] / np.where(total_L_1 > 0, total_L_1, 1)
        return relative_L_E

    @property
    def dead(self) -> int:
        """Experts that hardly anyone uses, over all layers."""
        return int((self.relative_load_L_E < DEAD).sum())

    @property
    def overloaded(self) -> int:
        """Experts with far more than their share, over all layers."""
        return int((self.relative_load_L_E > OVERLOADED).sum())


def read_round(path: Path) -> Round:
    """Read and check one file.

    Raises:
        DamagedError: It is not what it should be.
    """
    try:
        number = int(path.stem.removeprefix("round-"))
        kept = read_health(path)
        clients, tables = kept.clients, {name: table.float().numpy() for name, table in kept.tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedError(" ".join(str(error).split())) from None
    if not all(isinstance(name, str) for name in clients) or len(set(clients)) < len(clients) or not clients:
        raise DamagedError("its clients are not a list of different names")
    cells = tables["prob_C_L_E"].shape[1:] if "prob_C_L_E" in tables else ()
    for name, axes in SHAPES.items():
        if name not in tables or tables[name].shape != (len(clients), *cells)[:axes]:
            raise DamagedError(f"{name} is missing or has a wrong shape")
        if not np.isfinite(tables[name]).all() or (tables[name] < 0).any():
            raise DamagedError(f"{name} is not finite or negative")
    similarity = tables.get("similarity_L_E_C_C")
    if similarity is not None and similarity.shape != (*cells, len(clients), len(clients)):
        raise DamagedError("similarity_L_E_C_C has a wrong shape")
    return Round(number, clients, tables)
