"""MoE health: what a round's statistics and plan say of routers and experts, kept for people to look at.

One safetensors file a round: prob_C_L_E, load_C_L_E; the plan's gate_weight_C_L_E, expert_weight_C_L_E,
shared_weight_C; the norms of the updates, gate_norm_C_L_E, expert_norm_C_L_E, shared_norm_C; and, for federations small
enough to look at pair by pair, similarity_L_E_C_C (cosines of centred centroids) and consensus_L_E_C_C (of the experts'
updates, by their sketches), NaN where one of the two does not hold the expert. The clients' names are in its metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedalign.maths.experts import centred_directions, cosines, direction_consensus
from fedalign.protocol import Layout, Plan, Statistics

PAIRWISE = 32  # clients up to which similarities are kept


@dataclass(frozen=True)
class Health:
    """One round, read back."""

    clients: tuple[str, ...]
    tensors: dict[str, Tensor]


def write_health(folder: Path, round: int, reports: Sequence[Statistics], plan: Plan, layout: Layout) -> None:
    """Keep a round's file; one of the same round is replaced."""
    shared_C, gate_C_L_E, expert_C_L_E = layout.split(plan.weight_C_G)
    shared_norm_C, gate_norm_C_L_E, expert_norm_C_L_E = layout.split(torch.stack([r.norm_G for r in reports]))
    tensors = {
        "prob_C_L_E": torch.stack([report.prob_L_E for report in reports]).half(),
        "load_C_L_E": torch.stack([report.load_L_E for report in reports]),
        "gate_weight_C_L_E": gate_C_L_E.half().contiguous(),
        "expert_weight_C_L_E": expert_C_L_E.half().contiguous(),
        "shared_weight_C": shared_C.contiguous(),
        "gate_norm_C_L_E": gate_norm_C_L_E.contiguous(),
        "expert_norm_C_L_E": expert_norm_C_L_E.contiguous(),
        "shared_norm_C": shared_norm_C.contiguous(),
    }
    if len(reports) <= PAIRWISE:
        tensors["similarity_L_E_C_C"] = similarity(reports).half()
        tensors["consensus_L_E_C_C"] = consensus(reports).half()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"round-{round:05d}.safetensors"
    new = file.with_name(f".{file.name}.new")
    save_file(tensors, new, metadata={"clients": json.dumps(plan.clients)})
    os.replace(new, file)


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
