"""For authors of algorithms: made-up reports, and a plan tried on them as a server would.

>>> from fedalign.algorithms import make
>>> algorithm = make("fedalign_moe", {})
>>> plan = planned(algorithm, reports(clients=3, experts=4, asks=algorithm.asks))
>>> plan.weight_C_G.shape, sorted(plan.state)
(torch.Size([3, 19]), ['target_L_E'])
>>> later = planned(algorithm, reports(clients=3, experts=4, asks=algorithm.asks, seed=1), plan.state)
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from fedalign.client.statistics import packed_bits
from fedalign.maths.routing import decision_margin
from fedalign.protocol import (
    EMBEDDINGS,
    HEAD,
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
TOKENS, TOP_K, WIDTH, VOCABULARY = 128, 2, 16, 50


def layout(layers: int = 2, experts: int = 4, token_rows: bool = True) -> Layout:
    """A model whose groups are small; its head is its embedding, which has one value to a token."""
    sizes = dict.fromkeys(Layout(layers, experts, {}).groups, 5) | {SHARED: 10, EMBEDDINGS: VOCABULARY, HEAD: 0}
    top_k_L = (min(TOP_K, experts),) * layers
    return Layout(layers, experts, sizes, {}, (TokenRows(0, VOCABULARY, 1),) * token_rows, (True,) * layers, top_k_L)


def reports(
    clients: int = 3,
    layers: int = 2,
    experts: int = 4,
    *,
    asks: Set[Ask] = EVERYTHING,
    seed: int = 0,
    min_tokens: int = 16,
    token_rows: bool = True,
    model: Layout | None = None,
) -> Reports:
    """Reports as clients would make them of random tokens; the same seed gives the same reports.

    Each client trained all groups. Routers and updates differ from client to client about something common. All reports
    pass the server's checks.

    Args:
        clients: C, called client-0, client-1 and so on, with 20, 30, 40 ... examples.
        layers: L, each with a router.
        experts: E of each layer; a token is sent to 2 of them.
        asks: what `Algorithm.asks` says; fields that nobody asks for are empty.
        seed: of the random numbers.
        min_tokens: experts that fewer of a client's 128 tokens reached are withheld: their load is 0.
        token_rows: whether embeddings of 50 tokens are trained.
        model: in place of a small one of these layers, experts and rows.

    >>> seen = reports(clients=3, layers=2, experts=4)
    >>> seen.stack("load_L_E").shape, seen.share_C
    (torch.Size([3, 2, 4]), tensor([0.2222, 0.3333, 0.4444]))
    """
    model = model or layout(layers, experts, token_rows)
    return Reports([_report(c, model, asks, seed, min_tokens) for c in range(clients)], model, clients)


def planned(algorithm: Algorithm, seen: Reports, state: State | None = None) -> Plan:
    """The algorithm's plan; a ValueError says why a server would not go on with it."""
    plan = algorithm.plan(seen, state or {})
    if flaw := check_plan(plan, seen.of, seen.layout):
        raise ValueError(f"the plan {flaw}")
    return plan


def _report(client: int, model: Layout, asks: Set[Ask], seed: int, min_tokens: int) -> Statistics:
    common, own = (torch.Generator().manual_seed(1000 * seed + number) for number in (0, client + 1))
    layers, experts = cells = model.layers, model.experts

    def alike(*shape: int) -> Tensor:
        return torch.randn(shape, generator=common) + torch.randn(shape, generator=own)

    prob_L_T_E = (alike(layers, 1, experts) / 2 + torch.randn(layers, TOKENS, experts, generator=own)).softmax(-1)
    topk_L_T_K = prob_L_T_E.topk(min(TOP_K, experts)).indices
    load_L_E = one_hot(topk_L_T_K, experts).sum((1, 2)).float()
    load_L_E *= load_L_E >= min_tokens
    held_L_E_1 = (load_L_E > 0).unsqueeze(-1)
    vocabulary = model.token_cells[1] or VOCABULARY
    drawn_T = alike(vocabulary).exp().multinomial(TOKENS, True, generator=own)
    count_M_V = drawn_T.bincount(minlength=vocabulary).expand(len(model.token_rows), -1)
    every = {
        "prob_L_E": prob_L_T_E.mean(1),
        "load_L_E": load_L_E,
        "norm_G": 0.01 + 0.01 * torch.rand(len(model.groups), generator=own),
        "margin_L_E": decision_margin(prob_L_T_E, topk_L_T_K) * (load_L_E > 0),
        "centroid_L_E_D": alike(*cells, WIDTH).tanh() * held_L_E_1,
        "centroid_scale_L": torch.ones(layers),
        "update_L_E_S": normalize(alike(*cells, WIDTH), dim=-1) * held_L_E_1,
        "token_count_M_V": count_M_V,
        "token_met_M_B": packed_bits(count_M_V > 0),
    }
    asked = asked_shapes(model, asks, WIDTH, WIDTH).items()
    given = {name: every[name] if all(shape) else torch.zeros(shape) for name, (shape, _) in asked}
    fields: dict[str, Any] = {name: given[name].to(getattr(torch, dtype)) for name, (_, dtype) in asked}
    return Statistics(f"client-{client}", 1, 20 + 10 * client, TOKENS, steps=10, learning_rate=1e-3, loss=1.0, **fields)
