"""A client's statistics for its report, from its update and its routing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedalign.maths.sketch import Sketch
from fedalign.protocol import Layout, ParameterGroup


def centroid_sketches(centroid_L_E_H: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centroids sketched, float16 [L, E, D], and the scale of each layer that they are to be multiplied with."""
    sketch = Sketch(width, seed)
    sketch_L_E_D = torch.stack([torch.stack([sketch.project(row) for row in rows]) for rows in centroid_L_E_H]).cpu()
    scale_L = sketch_L_E_D.abs().amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    return (sketch_L_E_D / scale_L[:, None, None]).half(), scale_L


def update_sketches(
    layout: Layout,
    update: Mapping[ParameterGroup, Tensor],
    start: Mapping[ParameterGroup, Tensor],
    width: int,
    seed: int,
) -> Tensor:
    """Directions of the experts' updates, [L, E, S]; of adapters those of their products, as factors are not unique."""
    sketch = Sketch(width, seed)

    def project(group: ParameterGroup) -> Tensor:
        factors = layout.factors.get(group)
        if not factors:
            return sketch.project(update[group]).cpu()
        old = start[group].to(update[group].device)
        return sketch.project_change(old + update[group], old, factors).cpu()

    sketches = torch.stack([project(group) for group in layout.groups if group.kind == "expert"])
    return torch.nn.functional.normalize(sketches.view(layout.layers, layout.experts, width), dim=-1)


def packed_bits(met_M_V: Tensor) -> Tensor:
    """Eight booleans to a byte, the lowest bit first, uint8 [M, ceil(V / 8)].

    >>> packed_bits(torch.tensor([[True, False, True]]))
    tensor([[5]], dtype=torch.uint8)
    >>> packed_bits(torch.zeros(0, 0) > 0).shape
    torch.Size([0, 0])
    """
    matrices, tokens = met_M_V.shape
    count = -(-tokens // 8)
    bit_M_B_8 = torch.nn.functional.pad(met_M_V.byte(), (0, 8 * count - tokens)).view(matrices, count, 8)
    byte_M_B: Tensor = (bit_M_B_8 << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return byte_M_B
