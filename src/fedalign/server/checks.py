"""Why a report cannot be used."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedalign.config.run import StatisticsConfig
from fedalign.protocol import Evaluation, Failure, Layout, Statistics


def check_statistics(
    report: Statistics, layout: Layout, options: StatisticsConfig, round: int, token_cells: tuple[int, int] = (0, 0)
) -> str | None:
    """Why a report cannot be used, or None."""
    if report.round != round:
        return f"its statistics are of round {report.round}, not {round}"
    if report.examples <= 0 or report.tokens < 0:
        return f"it reports {report.examples} examples and {report.tokens} tokens"
    if not math.isfinite(report.loss):
        return f"its loss is {report.loss}"
    if not all(math.isfinite(value) for value in report.metrics.values()):
        return "its metrics are not finite"
    if strange := set(report.frozen) - set(layout.groups):
        return f"it did not train {min(strange)}, which the model does not have"
    cells = (layout.layers, layout.experts)
    shapes = {
        "prob_L_E": cells,
        "load_L_E": cells,
        "margin_L_E": cells,
        "centroid_L_E_D": (*cells, options.centroid_width),
        "centroid_scale_L": (layout.layers,),
        "update_L_E_S": (*cells, options.update_width),
        "norm_G": (len(layout.groups),),
        "token_count_M_V": token_cells,
    }
    for name, shape in shapes.items():
        value: Tensor = getattr(report, name)
        expected = torch.float16 if name in ("centroid_L_E_D", "update_L_E_S") else torch.float32
        if value.shape != shape or value.dtype != expected:
            return f"{name} is {value.dtype} {list(value.shape)}, expected {expected} {list(shape)}"
        if not bool(value.isfinite().all()):
            return f"{name} is not finite"
        if name in ("prob_L_E", "load_L_E", "norm_G", "token_count_M_V") and bool((value < 0).any()):
            return f"{name} is negative"
    return None


def check_evaluation(score: Evaluation) -> str | None:
    """Why a client's score cannot be used, or None."""
    if score.examples <= 0 or not math.isfinite(score.loss):
        return f"its loss is {score.loss} on {score.examples} examples"
    if score.accuracy is not None and not 0 <= score.accuracy <= 1:
        return f"its accuracy is {score.accuracy}"
    return None


def find_outliers(reports: Sequence[Statistics], ratio: float) -> list[Failure]:
    """Clients whose whole update is longer than `ratio` median ones: broken, and enough to break the model. 0: none."""
    if not ratio or len(reports) < 2:
        return []
    norm_C = torch.stack([report.norm_G for report in reports]).double().norm(dim=1)
    median = float(norm_C.median())  # the lower one of two
    return [
        Failure(
            report.client,
            "train",
            f"its update is {norm / median:.3g} times as long as the median one, server.max_norm_ratio = {ratio:g}",
        )
        for report, norm in zip(reports, norm_C.tolist(), strict=True)
        if norm > ratio * median > 0
    ]
