"""Gating alignment: who is listened to about an expert's routing, and the pull towards what was agreed.

FedAlign-MoE (arXiv 2603.21276). Marks: [P] the paper says so, [O] our choice where it is silent.

    ω_c(e) = s_c(e) / Σ_j s_j(e),   s_c(e) = o_c(e) · m_c(e)                     consistency weights     [P]
    p_g(e) ∝ Σ_c ω_c(e) · p̄_c(e)                                                 global routing          [P]
    L_reg  = mean over layers, tokens of Σ_{e in top(t)} α_c(e) · d(p_c(t,e), p_g(e))                    [P]

o is the overlap of local and global routing, m the decision margin, α the alignment strength. Half precision is
computed in float32, float64 stays float64. Axes: see `protocol`; all functions but the margin's name only the axes
they need, further ones may lead (a client stacks its layers: ``logits_L_T_E``) or, with clients first, lie between
(``prob_C_L_E``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fedalign.maths import functional, torch
from fedalign.protocol import Scoring

if TYPE_CHECKING:
    from torch import Tensor

Overlap = Literal["product", "relative"]
Granularity = Literal["token", "batch"]
Form = Literal["kl", "bregman"]

TARGET_FLOOR = 1e-8  # an expert the target gave up keeps a finite logarithm


def full(values: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 if they are float64."""
    return values if values.dtype == torch.float64 else values.float()


def router_log_prob(logits_T_E: Tensor, scoring: Scoring = "softmax") -> Tensor:
    """Log of the router's probabilities over all E experts, before top-k [P].

    Args:
        logits_T_E: router logits, selection-only biases excluded.
        scoring: "softmax", or "sigmoid" or "sqrtsoftplus" for scores that are normalised to sum to one.

    Returns:
        log p, [..., T, E], in nats.

    Raises:
        ValueError: The scoring is "unknown".
    """
    if scoring == "unknown":
        raise ValueError("a router of unknown scoring has no probabilities")
    logits_T_E = full(logits_T_E)
    if scoring == "sigmoid":  # σ(x) / Σ σ = softmax(log σ(x)): no underflow where all scores are tiny
        logits_T_E = functional.logsigmoid(logits_T_E)
    elif scoring == "sqrtsoftplus":
        tiny = torch.finfo(logits_T_E.dtype).tiny
        logits_T_E = functional.softplus(logits_T_E).clamp_min(tiny).log() / 2
    return logits_T_E.log_softmax(dim=-1)


def consistency(
    prob_C_E: Tensor,
    margin_C_E: Tensor,
    target_E: Tensor,
    held_C_E: Tensor | None = None,
    overlap: Overlap = "product",
) -> Tensor:
    """Consistency score s = overlap · margin; zero where not held.

    Args:
        prob_C_E: mean router probability of each client, p̄.
        margin_C_E: mean decision margin of each client, m >= 0.
        target_E: global routing distribution, p_g.
        held_C_E: boolean, the client reported the expert; None: all hold.
        overlap: "product" [P]: p̄ · p_g; "relative" [O]: min(p̄, p_g) / max(p̄, p_g), 0 where both are 0.
    """
    score_C_E = _overlap(prob_C_E, target_E, overlap) * full(margin_C_E)
    return score_C_E if held_C_E is None else score_C_E.masked_fill(~held_C_E.bool(), 0)


def _overlap(prob_C_E: Tensor, target_E: Tensor, kind: Overlap) -> Tensor:
    """o, how far a client and the target use the same expert."""
    prob_C_E, target_E = full(prob_C_E), full(target_E)
    if kind == "product":
        return prob_C_E * target_E
    larger_C_E = torch.maximum(prob_C_E, target_E)
    return torch.minimum(prob_C_E, target_E) / larger_C_E.where(larger_C_E > 0, torch.ones_like(larger_C_E))


def consistency_weights(score_C_E: Tensor, held_C_E: Tensor | None = None) -> Tensor:
    """ω: scores normalised over clients [P].

    A column without any score is uniform over its holders, over all clients if nobody holds it [O].

    >>> consistency_weights(torch.tensor([[0.3, 0.0], [0.1, 0.0]]))
    tensor([[0.7500, 0.5000],
            [0.2500, 0.5000]])
    """
    eligible_C_E = _holders(score_C_E, held_C_E)
    score_C_E = full(score_C_E).masked_fill(~eligible_C_E, 0)
    peak_E = score_C_E.amax(dim=0)  # dividing by it first keeps tiny products of probabilities apart from zero
    score_C_E = torch.where(peak_E > 0, score_C_E / peak_E, eligible_C_E.to(score_C_E.dtype))
    return score_C_E / score_C_E.sum(dim=0)


def cap_weights(weight_C_E: Tensor, max_weight: float | Tensor, held_C_E: Tensor | None = None) -> Tensor:
    """Weights of which none exceeds `max_weight` (of each column, or of all): no client may own what it reports on [O].

    The excess goes to the other holders in proportion to their weights (equally if those are all zero), until none
    is above the cap. Where the cap cannot be kept (max_weight · holders < 1) the column is uniform over its holders,
    over all clients if nobody holds it. Columns sum to 1.

    >>> cap_weights(torch.tensor([[0.8], [0.15], [0.05]]), max_weight=0.5).flatten()
    tensor([0.5000, 0.3750, 0.1250])
    """
    dtype, eligible_C_E = full(weight_C_E).dtype, _holders(weight_C_E, held_C_E)
    uniform_C_E = eligible_C_E / eligible_C_E.sum(dim=0)
    holders_E = (eligible_C_E if held_C_E is None else held_C_E.bool()).sum(dim=0)
    feasible_E = max_weight * holders_E.double() > 1 + 1e-9
    weight_C_E = weight_C_E.double().masked_fill(~eligible_C_E, 0)
    capped_C_E = torch.zeros_like(eligible_C_E)
    while True:
        spread_C_E = _spread(weight_C_E, eligible_C_E & ~capped_C_E, 1 - max_weight * capped_C_E.sum(dim=0))
        above_C_E = (spread_C_E > max_weight * (1 + 1e-9)) & feasible_E & ~capped_C_E
        if not above_C_E.any():  # at most 1 / max_weight turns: each caps one more client of a column
            break
        capped_C_E |= above_C_E
    result_C_E = torch.where(capped_C_E, max_weight, spread_C_E).where(feasible_E, uniform_C_E)
    return result_C_E.to(dtype)


def global_routing(prob_C_E: Tensor, weight_C_E: Tensor) -> Tensor:
    """p_g: the clients' routing distributions, weighted expert by expert and normalised over experts [P].

    Uniform if no weighted probability is left.
    """
    target_E = (full(prob_C_E) * full(weight_C_E)).sum(dim=0)
    total = target_E.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, target_E / total, torch.full_like(target_E, 1 / target_E.shape[-1]))


def alignment_strength(prob_E: Tensor, target_E: Tensor, overlap: Overlap = "product") -> Tensor:
    """α, the overlap over its maximum: strong on experts both agree on, weak on the client's own [P idea, O formula].

    With "product" it is weak on experts that both hardly use, too: tokens can flee there from the pull. With
    "relative" it is weak only where the two differ. Zero everywhere if they share no expert.
    """
    overlap_E = _overlap(prob_E, target_E, overlap)
    peak = overlap_E.amax(dim=-1, keepdim=True)
    return torch.where(peak > 0, overlap_E / peak, torch.zeros_like(overlap_E))


def routing_penalty(
    logits_T_E: Tensor,
    topk_T_K: Tensor,
    target_E: Tensor,
    strength_E: Tensor,
    granularity: Granularity = "token",
    form: Form = "kl",
    scoring: Scoring = "softmax",
) -> Tensor:
    """L_reg: how far the routing lies from the global one; differentiable through the logits alone.

    Args:
        logits_T_E: router logits; leading axes ([L, T, E]) are averaged over, all arguments then have them.
        topk_T_K: the experts each token was sent to.
        target_E: global routing distribution p_g; clamped at 1e-8 and renormalised.
        strength_E: alignment strength α.
        granularity: "token" [P]: mean over tokens of the sum over the token's top-k; "batch" [O]: with p the mean over
            tokens, the sum over all experts: single tokens may stay sharp.
        form: "kl" [P]: p · log(p / p_g); "bregman" [O]: p · log(p / p_g) - p + p_g, never negative and zero only at p_g
            (the first is not: over part of the experts its minimum lies at p_g / e).
        scoring: how the router turns logits into probabilities, as in `router_log_prob`.

    Returns:
        A scalar in nats; 0 without tokens.
    """
    log_p_T_E = router_log_prob(logits_T_E, scoring)
    target_E = full(target_E.detach()).clamp_min(TARGET_FLOOR)
    target_T_E = (target_E / target_E.sum(dim=-1, keepdim=True)).unsqueeze(-2).to(log_p_T_E.dtype)
    strength_T_E = full(strength_E.detach()).unsqueeze(-2).to(log_p_T_E.dtype)
    tokens = log_p_T_E.shape[-2]
    if tokens == 0:
        return log_p_T_E.sum()
    if granularity == "token":
        topk_T_K = topk_T_K.long()
        whole = log_p_T_E.shape
        divergence = _divergence(log_p_T_E.gather(-1, topk_T_K), target_T_E.expand(whole).gather(-1, topk_T_K), form)
        per_layer = (strength_T_E.expand(whole).gather(-1, topk_T_K) * divergence).sum(dim=(-2, -1)) / tokens
    else:
        p_1_E = log_p_T_E.exp().sum(dim=-2, keepdim=True) / tokens
        divergence = _divergence(p_1_E.clamp_min(torch.finfo(p_1_E.dtype).tiny).log(), target_T_E, form)
        per_layer = (strength_T_E * divergence).sum(dim=(-2, -1))
    return per_layer.mean()


def decision_margin(prob_T_E: Tensor, topk_T_K: Tensor) -> Tensor:
    """m: how clearly tokens chose expert e, the mean of max(0, p(e) - best p not chosen) [P idea, O formula].

    Args:
        prob_T_E: router probabilities over all experts.
        topk_T_K: the experts each token was sent to.

    Returns:
        margin_E in [0, 1]; 0 for an expert nobody chose, and everywhere if K = E.

    >>> decision_margin(torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]]), torch.tensor([[0], [0]]))
    tensor([0.2000, 0.0000, 0.0000])
    """
    prob_T_E = full(prob_T_E)
    experts = prob_T_E.shape[-1]
    if topk_T_K.shape[-1] >= experts:
        return prob_T_E.new_zeros((*prob_T_E.shape[:-2], experts))
    chosen_T_E = torch.zeros_like(prob_T_E, dtype=torch.bool).scatter_(-1, topk_T_K.long(), True)
    best_left_T_1 = prob_T_E.masked_fill(chosen_T_E, -torch.inf).amax(dim=-1, keepdim=True)
    gap_T_E = (prob_T_E - best_left_T_1).clamp_min(0).masked_fill(~chosen_T_E, 0)
    return gap_T_E.sum(dim=-2) / chosen_T_E.sum(dim=-2).clamp_min(1)


def _divergence(log_p: Tensor, target: Tensor, form: Form) -> Tensor:
    """d(p, target), elementwise."""
    p = log_p.exp()
    # p = 0 has log p = -inf; the floor turns 0 · inf into the limit, 0
    pointwise = p * (log_p.clamp_min(-torch.finfo(p.dtype).max) - target.log())
    return pointwise if form == "kl" else pointwise - p + target


def _holders(values_C_E: Tensor, held_C_E: Tensor | None) -> Tensor:
    """Who may have a weight: the holders of a column, or everyone if it has none (or `held_C_E` is None)."""
    if held_C_E is None:
        return torch.ones_like(values_C_E, dtype=torch.bool)
    held_C_E = held_C_E.bool()
    return held_C_E | ~held_C_E.any(dim=0)


def _spread(weight_C_E: Tensor, free_C_E: Tensor, mass_E: Tensor) -> Tensor:
    """Share `mass_E` among the free entries in proportion to their weights, equally if those are all zero."""
    part_C_E = weight_C_E.masked_fill(~free_C_E, 0)
    part_C_E = torch.where(part_C_E.sum(dim=0) > 0, part_C_E, free_C_E.to(part_C_E.dtype))
    return part_C_E * (mass_E / part_C_E.sum(dim=0).clamp_min(torch.finfo(part_C_E.dtype).tiny))
