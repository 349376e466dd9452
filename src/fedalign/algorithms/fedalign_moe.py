"""FedAlign-MoE (after arXiv 2603.21276): experts averaged by who uses them, token rows by who met the token.

    experts       θ_e    ← θ_e + Σ_c b_c(e) · Δ_c(e)                b ∝ n_c(e), the client's share of its load     [O]
    token rows    row_v  ← row_v + Σ_c k_c(v) · Δrow_c(v)          k: n_c · the token's share of what c read        [O]
    the rest      FedAvg, routers too

These are the defaults: what won in measurements. The paper's method is here as options, which `fedalign_paper` sets:

    router rows   row_e  ← row_e + Σ_c ω_c(e) · Δrow_c(e)          ω from `maths.routing`: consistency of routing  [P]
    target        p_g(e) ← Σ_c ω_c(e) · p̄_c(e), normalised          pulls the clients' routers in the next round   [P]
    experts       θ_e    ← θ_e + Σ_c b_c(e) · Δ_c(e)                b from `maths.experts`: same role, same aim     [P]
    the rest      FedAvg

Marks: [P] the paper says so, [O] our choice where it is silent. Every [O] is an option. Which of them won or lost what,
and on which models: docs/evidence.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedalign.algorithms.fedavg import FedAvg, column_shares, data_share
from fedalign.maths.experts import Consensus, bimodality, centred_directions, cosines, directions, expert_weights
from fedalign.maths.routing import (
    Form,
    Granularity,
    Overlap,
    alignment_strength,
    cap_weights,
    consistency,
    consistency_weights,
    global_routing,
    router_log_prob,
    routing_penalty,
)
from fedalign.protocol import LayerRouting, Layout, ParameterGroup, Plan, State, Statistics, Step

TARGET = "target_L_E"
TWO_ROLES = 5 / 9  # bimodality of a uniform distribution
PAIRS = 1 << 20  # entries of one [E, C, C] table at a time: 4 MB stay in cache


@dataclass(frozen=True)
class FedAlignMoE(FedAvg):
    """Options with their defaults."""

    reg_strength: float = 0.0  # λ, 0.1 [P]; 0 leaves the clients' loss alone
    overlap: Overlap = "product"  # [P] in ω and α; "relative" [O]: in ω the product cancels the target
    granularity: Granularity = "token"  # [P]; "batch" [O] keeps the decisions of single tokens sharp
    form: Form = "kl"  # [P]; "bregman" [O] is never negative
    gate: Literal["rows", "average", "local"] = "average"  # FedAvg; "rows" [O] by ω; "local": clients keep their own
    gate_weights: Literal["consistency", "uniform"] = "consistency"  # [P]
    max_weight: float = 0.5  # [O] the largest weight of a client in a router row
    size_weighted: bool = False  # [P] data size does not enter ω; True [O] multiplies by n_c
    target_momentum: float = 0.0  # [O] share of the old target that stays
    adaptive_strength: bool = True  # [P] α; False pulls on all experts alike
    experts: Literal["semantic", "load", "average"] = "load"  # n_c(e) alone [O]; "semantic" [P]; "average": FedAvg
    beta: float = 0.5  # [O] standard deviations below the mean similarity that still pass
    consensus: Consensus = "half"  # [O] (1 + D) / 2, or max(0, D)
    min_agreement: float = 0.5  # [O] share of the largest agreement below which a client is left out
    vocabulary: Literal["average", "tokens"] = "tokens"  # [O] rows of trained embeddings by who met them; or FedAvg
    min_holders: int = 2  # [O] with fewer, an expert's update is clipped to its layer's median norm

    def __post_init__(self) -> None:
        for name, low, high in [
            ("reg_strength", 0, 1e6),
            ("max_weight", 1e-6, 1),
            ("target_momentum", 0, 1),
            ("beta", -100, 100),
            ("min_agreement", 0, 1),
            ("min_holders", 1, 1e9),
        ]:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} = {getattr(self, name)}: must lie between {low:g} and {high:g}")

    @property
    def centre_gates(self) -> bool:
        """A vector added to all rows changes no softmax routing, but weighted row by row it would become noise [O]."""
        return self.gate != "average"

    @property
    def counts_tokens(self) -> bool:
        """With vocabulary = "tokens"."""
        return self.vocabulary == "tokens"

    def private(self, group: ParameterGroup) -> bool:
        """With gate = "local", gates: each client goes on from its own, which are still summed for the global model."""
        return self.gate == "local" and group.kind == "gate"

    def plan(self, reports: Sequence[Statistics], layout: Layout, state: State) -> tuple[Plan, State]:
        """Weights of router rows and experts from the statistics; the new routing target becomes the state."""
        share_C = data_share(reports)
        prob_C_L_E = torch.stack([report.prob_L_E.float() for report in reports])
        held_C_L_E = torch.stack([report.held_L_E for report in reports])
        average_C_L_E = share_C[:, None, None].expand_as(prob_C_L_E)

        old_L_E = state.get(TARGET)
        target_L_E = global_routing(prob_C_L_E, average_C_L_E) if old_L_E is None else old_L_E.to(prob_C_L_E.device)
        gate_C_L_E = self._gate_weights(reports, prob_C_L_E, held_C_L_E, target_L_E)
        new_L_E = global_routing(prob_C_L_E, gate_C_L_E)
        if old_L_E is not None:
            new_L_E = torch.lerp(new_L_E, target_L_E, self.target_momentum)

        expert_C_L_E, two_roles = average_C_L_E, 0
        if self.experts == "semantic":
            expert_C_L_E, two_roles = self._expert_weights(reports, held_C_L_E)
        elif self.experts == "load":
            expert_C_L_E = column_shares(expert_sizes(reports))
        weight_C_G = layout.table(share_C, average_C_L_E if self.gate == "average" else gate_C_L_E, expert_C_L_E)
        factor_C_G = self._clip(reports, layout, held_C_L_E) if self.experts != "average" else None
        token_C_M_V = token_weights(reports) if self.counts_tokens and layout.token_rows else None
        clients = tuple(report.client for report in reports)
        metrics = {"experts_in_two_roles": two_roles} if self.experts == "semantic" else {}
        plan = Plan(clients, weight_C_G, factor_C_G, metrics, token_weight_C_M_V=token_C_M_V)
        return plan, {**state, TARGET: new_L_E}

    def penalty(self, step: Step) -> Tensor | None:
        """λ · L_reg, the mean over layers; None in round 1, when there is no target yet."""
        target_L_E = step.state.get(TARGET)
        if not self.reg_strength or target_L_E is None:
            return None
        alike: defaultdict[tuple[torch.Size, torch.Size, str], list[int]] = defaultdict(list)
        for layer, routing in enumerate(step.routing):
            alike[routing.logits_T_E.shape, routing.topk_T_K.shape, routing.scoring].append(layer)
        per_stack = [
            len(layers)
            * self._stack_penalty([step.routing[i] for i in layers], target_L_E[layers], step.prob_L_E, layers)
            for layers in alike.values()
        ]
        return self.reg_strength * torch.stack(per_stack).sum() / len(step.routing)

    def _gate_weights(
        self, reports: Sequence[Statistics], prob_C_L_E: Tensor, held_C_L_E: Tensor, target_L_E: Tensor
    ) -> Tensor:
        """ω, [C, L, E]; columns sum to one."""
        if self.gate_weights == "uniform":
            score_C_L_E = torch.ones_like(prob_C_L_E)
        else:
            margin_C_L_E = torch.stack([report.margin_L_E for report in reports])
            score_C_L_E = consistency(prob_C_L_E, margin_C_L_E, target_L_E, held_C_L_E, self.overlap)
        if self.size_weighted:
            score_C_L_E = score_C_L_E * data_share(reports)[:, None, None]
        return cap_weights(consistency_weights(score_C_L_E, held_C_L_E), self.max_weight, held_C_L_E)

    def _expert_weights(self, reports: Sequence[Statistics], held_C_L_E: Tensor) -> tuple[Tensor, int]:
        """b, [C, L, E], a layer and a few experts at a time: memory does not grow with their number.

        Beside it, of how many experts the similarity is bimodal: same-index averaging leaves a minority out there.
        """
        load_C_L_E = torch.stack([report.load_L_E.float() for report in reports])
        size_C_L_E = expert_sizes(reports)
        weight_C_L_E = torch.empty_like(load_C_L_E)
        clients, layers, experts = load_C_L_E.shape
        some = max(1, PAIRS // clients**2)
        two_roles = 0
        for layer in range(layers):
            centroid_C_E_D = torch.stack([r.centroid_L_E_D[layer].float() * r.centroid_scale_L[layer] for r in reports])
            centroid_C_E_D = centred_directions(centroid_C_E_D, load_C_L_E[:, layer])
            update_C_E_S = directions(torch.stack([report.update_L_E_S[layer] for report in reports]))
            for first in range(0, experts, some):
                part = slice(first, first + some)
                similarity_E_C_C = cosines(centroid_C_E_D[:, part])
                two_roles += int((bimodality(similarity_E_C_C, held_C_L_E[:, layer, part]) > TWO_ROLES).sum())
                weight_C_L_E[:, layer, part] = expert_weights(
                    similarity_E_C_C,
                    cosines(update_C_E_S[:, part]),
                    size_C_L_E[:, layer, part],
                    held_C_L_E[:, layer, part],
                    self.beta,
                    self.consensus,
                    self.min_agreement,
                )
        return weight_C_L_E, two_roles

    def _clip(self, reports: Sequence[Statistics], layout: Layout, held_C_L_E: Tensor) -> Tensor | None:
        """Factors that hold an expert of few holders to the median update norm of its layer's held experts."""
        rare_L_E = held_C_L_E.any(dim=0) & (held_C_L_E.sum(dim=0) < self.min_holders)
        if not rare_L_E.any():
            return None
        _, _, norm_C_L_E = layout.split(torch.stack([report.norm_G.float() for report in reports]))
        known_L_CE = norm_C_L_E.masked_fill(~held_C_L_E, torch.nan).transpose(0, 1).flatten(1)
        lower_L_1 = known_L_CE.nanmedian(dim=1, keepdim=True).values
        upper_L_1 = -(-known_L_CE).nanmedian(dim=1, keepdim=True).values
        median_L_1 = (lower_L_1 + upper_L_1) / 2
        factor_C_L_E = (median_L_1 / norm_C_L_E).where(
            (norm_C_L_E > median_L_1) & rare_L_E, torch.ones_like(norm_C_L_E)
        )
        ones_C_L_E = torch.ones_like(factor_C_L_E)
        return layout.table(ones_C_L_E[:, 0, 0], ones_C_L_E, factor_C_L_E)

    def _stack_penalty(
        self, routing: Sequence[LayerRouting], target_L_E: Tensor, prob_L_E: Tensor | None, layers: list[int]
    ) -> Tensor:
        """L_reg, the mean over layers that see equally many tokens and so can be stacked."""
        logits_L_T_E = torch.stack([layer.logits_T_E for layer in routing])
        topk_L_T_K = torch.stack([layer.topk_T_K for layer in routing])
        scoring = routing[0].scoring
        target_L_E = target_L_E.to(logits_L_T_E.device)
        if not self.adaptive_strength:
            strength_L_E = torch.ones_like(target_L_E)
        elif prob_L_E is not None:
            strength_L_E = alignment_strength(prob_L_E[layers].to(target_L_E.device), target_L_E, self.overlap)
        else:  # this client's first round: the batch speaks for it
            prob_L_T_E = router_log_prob(logits_L_T_E.detach(), scoring).exp()
            strength_L_E = alignment_strength(prob_L_T_E.mean(dim=-2), target_L_E, self.overlap)
        return routing_penalty(logits_L_T_E, topk_L_T_K, target_L_E, strength_L_E, self.granularity, self.form, scoring)


def expert_sizes(reports: Sequence[Statistics]) -> Tensor:
    """n_c(e), [C, L, E]: a client's examples times the expert's share of its load; 0 if it does not hold the expert."""
    load_C_L_E = torch.stack([report.load_L_E.float() for report in reports])
    examples_C_1_1 = torch.tensor([report.examples for report in reports])[:, None, None]
    return examples_C_1_1 * load_C_L_E / load_C_L_E.sum(dim=-1, keepdim=True).clamp_min(1)


def token_weights(reports: Sequence[Statistics]) -> Tensor:
    """k, [C, M, V]: n_c times the token's share of the tokens that c met, normalised over clients [O].

    It is what RegMean (arXiv 2212.09849) makes of an embedding: the Gram matrix of its one-hot inputs is diagonal,
    and holds the counts. Rows of tokens that nobody met: n_c / Σ n.
    """
    count_C_M_V = torch.stack([report.token_count_M_V for report in reports])
    examples_C_1_1 = torch.tensor([report.examples for report in reports])[:, None, None]
    size_C_M_V = examples_C_1_1 * count_C_M_V / count_C_M_V.sum(dim=-1, keepdim=True).clamp_min(1)
    met_1_M_V = size_C_M_V.sum(0, keepdim=True) > 0
    return torch.where(met_1_M_V, column_shares(size_C_M_V), data_share(reports)[:, None, None])
