"""For authors of algorithms: made-up reports, and a plan tried on them as a server would.

>>> from fedalign.algorithms import make
>>> algorithm = make("fedalign_moe", {})
>>> seen = reports(clients=3, experts=4, asks=algorithm.asks)
>>> plan = planned(algorithm, seen)
>>> plan.weight_C_G.shape, sorted(plan.state)
(torch.Size([3, 17]), ['target_L_E'])
>>> later = planned(algorithm, reports(clients=3, experts=4, asks=algorithm.asks, seed=1), plan.state)
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, get_args

import torch
from torch.nn.functional import one_hot

from fedalign.client.statistics import packed_bits
from fedalign.maths.routing import decision_margin
from fedalign.protocol import (
    SHARED,
    Algorithm,
    Ask,
    Layout,
    Plan,
    Reports,
    State,
    Statistics,
    TokenRows,
    asked_shapes,
)
from fedalign.server.checks import check_plan

EVERYTHING: frozenset[Ask] = frozenset(get_args(Ask)) - {"data"}
TOP_K = 2
NOISE = 1.0  # of a client's own router, inputs and updates, beside what all clients have in common
SIZE: dict[str, int] = {"shared": 40, "gate": 4, "expert": 6}  # values of a group, beside token rows


def reports(
    clients: int = 3,
    layers: int = 2,
    experts: int = 4,
    *,
    asks: Set[Ask] = EVERYTHING,
    seed: int = 0,
    tokens: int = 128,
    min_tokens: int = 16,
    vocabulary: int = 50,
    width: int = 16,
) -> Reports:
    """What clients would say of random tokens: the same seed, the same reports. All of them trained all groups.

    Routers and updates differ from client to client about something common. Experts that fewer than `min_tokens` of
    a client's `tokens` reached are withheld; `vocabulary` tokens have a row each, 0 for none; `width` is of sketches.
    """
    groups = Layout(layers, experts, {}).groups
    rows = (TokenRows(SIZE["shared"], vocabulary, 1),) if vocabulary else ()
    sizes = {group: SIZE[group.kind] + (vocabulary if group == SHARED else 0) for group in groups}
    layout = Layout(layers, experts, sizes, token_rows=rows, softmax_L=(True,) * layers)
    made = tuple(_report(client, layout, asks, seed, tokens, min_tokens, width) for client in range(clients))
    return Reports(made, layout, clients)


def planned(algorithm: Algorithm, seen: Reports, state: State | None = None) -> Plan:
    """The algorithm's plan; a ValueError says why a server would not go on with it."""
    plan = algorithm.plan(seen, state or {})
    if flaw := check_plan(plan, seen.of, seen.layout):
        raise ValueError(f"the plan {flaw}")
    return plan


def _report(
    client: int, layout: Layout, asks: Set[Ask], seed: int, tokens: int, min_tokens: int, width: int
) -> Statistics:
    common, own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed * 1_000_003 + client + 1)
    cells = (layout.layers, layout.experts)

    def alike(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=common) + NOISE * torch.randn(shape, generator=own)

    router_L_1_E = alike(layout.layers, 1, layout.experts)
    prob_L_T_E = (router_L_1_E + torch.randn(layout.layers, tokens, layout.experts, generator=own)).softmax(-1)
    topk_L_T_K = prob_L_T_E.topk(min(TOP_K, layout.experts)).indices
    load_L_E = one_hot(topk_L_T_K, layout.experts).sum((1, 2)).float()
    load_L_E = load_L_E.where(load_L_E >= min_tokens, 0)
    held_L_E_1 = (load_L_E > 0).unsqueeze(-1)
    size_G = torch.tensor([layout.sizes[group] for group in layout.groups])
    count_M_V = torch.poisson(alike(*layout.token_cells).exp(), generator=own)
    count_M_V *= tokens / count_M_V.sum(-1, keepdim=True).clamp_min(1)
    every = {
        "prob_L_E": prob_L_T_E.mean(1),
        "load_L_E": load_L_E,
        "norm_G": size_G.sqrt() * (0.5 + torch.rand(len(size_G), generator=own)) / 100,
        "margin_L_E": decision_margin(prob_L_T_E, topk_L_T_K).where(load_L_E > 0, 0),
        "centroid_L_E_D": alike(*cells, width) / (4 * width**0.5) * held_L_E_1,
        "centroid_scale_L": torch.ones(layout.layers),
        "update_L_E_S": torch.nn.functional.normalize(alike(*cells, width), dim=-1) * held_L_E_1,
        "token_count_M_V": count_M_V,
        "token_met_M_B": packed_bits(count_M_V > 0),
    }
    shapes = asked_shapes(layout, asks, width, width)
    fields: dict[str, Any] = {
        name: every[name].to(getattr(torch, dtype))
        if every[name].shape == shape
        else torch.zeros(shape, dtype=getattr(torch, dtype))
        for name, (shape, dtype) in shapes.items()
    }
    examples = int(torch.randint(20, 600, (), generator=own))
    return Statistics(f"client-{client}", 1, examples, tokens, steps=10, learning_rate=1e-3, loss=1.0, **fields)
