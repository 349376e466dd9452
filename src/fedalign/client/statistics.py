"""What a client works out of its update and routing for its report: centred rows, sketches."""

from __future__ import annotations

import torch
from torch import Tensor

from fedalign.maths.sketch import Sketch
from fedalign.moe.model import MoEModel
from fedalign.protocol import Layout, ParameterGroup, Weights


def centre_rows(update: Weights, moe: MoEModel) -> None:
    """Take the mean over its experts off each softmax router's rows, in place."""
    for layer, info in enumerate(moe.layers):
        if info.scoring == "softmax":
            rows = [ParameterGroup("gate", layer, expert) for expert in range(moe.experts)]
            mean = torch.stack([update[row] for row in rows]).mean(0)
            for row in rows:
                update[row] -= mean


def centroid_sketches(centroid_L_E_H: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centroids sketched, float16 [L, E, D], and the scale of each layer that they are to be multiplied with."""
    sketch = Sketch(width, seed)
    sketch_L_E_D = torch.stack([torch.stack([sketch.project(row) for row in rows]) for rows in centroid_L_E_H]).cpu()
    scale_L = sketch_L_E_D.abs().amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    return (sketch_L_E_D / scale_L[:, None, None]).half(), scale_L


def update_sketches(layout: Layout, update: Weights, start: Weights, width: int, seed: int) -> Tensor:
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
