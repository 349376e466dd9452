"""Semantic expert aggregation: average an expert over the clients on which it does the same job.

FedAlign-MoE (arXiv 2603.21276). Marks: [P] the paper says so, [O] our choice where it is silent. For expert e, over
the clients that hold it:

    S_ij = cos(μ_i - μ̄, μ_j - μ̄)                 semantic similarity of what is routed to it    [P; centring is O]
    D_ij = cos(Δ_i, Δ_j)                          direction consensus of its updates            [P]
    τ    = mean - β · std of S_ij over pairs i<j  adaptive threshold                            [P]
    γ_ij = 1[S_ij >= τ] · (1 + D_ij) / 2          gated weight, i ≠ j                           [P idea, O form]
    a_c  = Σ_{j≠c} n_j γ_cj / Σ_{j≠c} n_j         agreement                                     [O]
    b_c  ∝ n_c · a_c                              the client's weight                           [O]

Everything is expert by expert, so callers with many clients pass slices of the expert axis: memory is E · C² of what
is passed. Half precision is computed in float32, float64 stays float64. Axes: see `protocol`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from fedalign.maths import torch
from fedalign.maths.routing import full

if TYPE_CHECKING:
    from torch import Tensor

Consensus = Literal["half", "relu"]

ROUNDING = 1e-6  # float32 noise of a cosine, or of a difference relative to its terms


def directions(vector_C_E_H: Tensor) -> Tensor:
    """Each vector scaled to unit norm; zero vectors stay zero."""
    vector_C_E_H = full(vector_C_E_H)
    # dividing by the largest entry first keeps squares of very small or large vectors within float32
    peak_C_E_1 = _peak(vector_C_E_H)
    vector_C_E_H = vector_C_E_H / peak_C_E_1.where(peak_C_E_1 > 0, torch.ones_like(peak_C_E_1))
    norm_C_E_1: Tensor = torch.linalg.vector_norm(vector_C_E_H, dim=-1, keepdim=True)
    return vector_C_E_H / norm_C_E_1.clamp_min(0.5)  # at least 1 now, unless the vector is zero


def _peak(vector_C_E_H: Tensor) -> Tensor:
    """The largest absolute value of each vector, [..., 1], without a temporary as large as the vectors."""
    peak_C_E_1: Tensor = torch.linalg.vector_norm(vector_C_E_H, ord=torch.inf, dim=-1, keepdim=True)
    return peak_C_E_1


def centred_directions(centroid_C_E_H: Tensor, load_C_E: Tensor) -> Tensor:
    """Unit vectors of the centroids after subtracting their load-weighted mean over all clients and experts [O].

    Hidden states share a large common component that drives raw cosines to 1. Zero where the load is 0, or where what
    is left is rounding noise.
    """
    held_C_E_1 = (load_C_E > 0).unsqueeze(-1)
    centroid_C_E_H = full(centroid_C_E_H).masked_fill(~held_C_E_1, 0)
    load_C_E = load_C_E.double().clamp_min(0)
    share_C_E = load_C_E / load_C_E.sum().clamp_min(torch.finfo(torch.float64).tiny)
    mean_H = torch.einsum("ceh,ce->h", centroid_C_E_H.double(), share_C_E).to(centroid_C_E_H.dtype)
    centred_C_E_H = centroid_C_E_H - mean_H
    noise_C_E_1 = _peak(centred_C_E_H) <= ROUNDING * torch.maximum(_peak(centroid_C_E_H), _peak(mean_H))
    return directions(centred_C_E_H.masked_fill(noise_C_E_1 | ~held_C_E_1, 0))


def cosines(unit_C_E_H: Tensor) -> Tensor:
    """Cosines between the clients' unit (or zero) vectors, [E, C, C]; the diagonal is always 1."""
    unit_E_C_H = unit_C_E_H.transpose(0, 1)
    cosine_E_C_C = torch.matmul(unit_E_C_H, unit_E_C_H.transpose(1, 2)).clamp_(-1, 1)
    cosine_E_C_C.diagonal(dim1=1, dim2=2).fill_(1)
    return cosine_E_C_C


def semantic_similarity(centroid_C_E_H: Tensor, load_C_E: Tensor) -> Tensor:
    """S: cosines of the centred centroids of each expert's input [P idea, centring is O].

    Args:
        centroid_C_E_H: mean hidden state routed to each expert (or its sketch).
        load_C_E: number of tokens behind it; 0: not held.

    Returns:
        similarity_E_C_C; 0 with a client whose load or whose centred centroid is 0; the diagonal is 1.
    """
    return cosines(centred_directions(centroid_C_E_H, load_C_E))


def direction_consensus(update_C_E_S: Tensor) -> Tensor:
    """D: cosines of the clients' updates of each expert (or of their sketches) [P].

    Returns:
        consensus_E_C_C; 0 with a zero update; the diagonal is 1.

    >>> direction_consensus(torch.tensor([[[3.0, 0.0]], [[2.0, 2.0]]]))
    tensor([[[1.0000, 0.7071],
             [0.7071, 1.0000]]])
    """
    return cosines(directions(update_C_E_S))


def adaptive_threshold(similarity_E_C_C: Tensor, held_C_E: Tensor, beta: float = 0.5) -> Tensor:
    """τ: mean - β · population standard deviation of S over the pairs i<j of holders [P; β = 0.5 is O].

    Returns:
        threshold_E; -1, which lets everything pass, with fewer than two holders.
    """
    similarity_E_C_C = full(similarity_E_C_C)
    held_E_C_1 = held_C_E.bool().T.unsqueeze(2).to(similarity_E_C_C.dtype)
    holders_E = held_C_E.bool().sum(dim=0)
    pairs_E = (holders_E * (holders_E - 1)).clamp_min(1)  # each counts twice, as the tables are symmetric
    diagonal_E = (similarity_E_C_C.diagonal(dim1=1, dim2=2) * held_E_C_1.squeeze(2)).sum(dim=1)
    mean_E = (_quadratic(similarity_E_C_C, held_E_C_1) - diagonal_E) / pairs_E
    squared_E_C_C = (similarity_E_C_C - mean_E[:, None, None]).square_()
    squared_E_C_C.diagonal(dim1=1, dim2=2).zero_()
    std_E = (_quadratic(squared_E_C_C, held_E_C_1) / pairs_E).sqrt()
    return torch.where(holders_E >= 2, mean_E - beta * std_E, torch.full_like(mean_E, -1))


def _quadratic(table_E_C_C: Tensor, vector_E_C_1: Tensor) -> Tensor:
    """vᵀ A v for each expert: a sum over pairs without a mask as large as the table."""
    return (vector_E_C_1 * torch.bmm(table_E_C_C, vector_E_C_1)).sum(dim=(1, 2))


def bimodality(similarity_E_C_C: Tensor, held_C_E: Tensor) -> Tensor:
    """Sarle's bimodality coefficient of S over the pairs of holders: (skewness² + 1) / kurtosis, in [0, 1] [O].

    Above 5/9, that of a uniform distribution, the holders likely use the expert in two roles: averages serve neither.

    Returns:
        coefficient_E; 0 with fewer than four holders, or if all pairs are alike.
    """
    similarity_E_C_C = full(similarity_E_C_C)
    held_E_C = held_C_E.bool().T
    pair_E_C_C = (held_E_C.unsqueeze(2) & held_E_C.unsqueeze(1)).triu_(1)
    pairs_E = pair_E_C_C.sum(dim=(1, 2)).clamp_min(1)
    mean_E = similarity_E_C_C.masked_fill(~pair_E_C_C, 0).sum(dim=(1, 2)) / pairs_E
    deviation_E_C_C = (similarity_E_C_C - mean_E[:, None, None]).masked_fill_(~pair_E_C_C, 0)
    square_E_C_C = deviation_E_C_C.square()
    second_E = square_E_C_C.sum(dim=(1, 2)) / pairs_E
    third_E = deviation_E_C_C.mul_(square_E_C_C).sum(dim=(1, 2)) / pairs_E
    fourth_E = square_E_C_C.square_().sum(dim=(1, 2)) / pairs_E
    usable_E = (held_E_C.sum(dim=1) >= 4) & (second_E > ROUNDING**2)
    second_E = second_E.where(usable_E, torch.ones_like(second_E))
    skewness_E, kurtosis_E = third_E / second_E**1.5, fourth_E / second_E**2
    return torch.where(usable_E, (skewness_E**2 + 1) / kurtosis_E.clamp_min(1), torch.zeros_like(second_E))


def expert_weights(
    similarity_E_C_C: Tensor,
    direction_E_C_C: Tensor,
    size_C_E: Tensor,
    held_C_E: Tensor,
    beta: float = 0.5,
    consensus: Consensus = "half",
    min_agreement: float = 0.0,
) -> Tensor:
    """b: each client's weight in each expert, from threshold, gate and agreement (see the module's docstring).

    Args:
        similarity_E_C_C: semantic similarity S.
        direction_E_C_C: direction consensus D.
        size_C_E: n_c(e), the data behind a client's expert; any scale.
        held_C_E: boolean, the client reported the expert.
        beta: how many standard deviations below the mean S still passes.
        consensus: weight of a passing pair, "half" [O]: (1 + D) / 2; "relu" [O]: max(0, D).
        min_agreement: a client whose agreement is below this share of the largest one gets weight 0 [O].

    Returns:
        weight_C_E. Columns sum to 1, or to 0 if nobody holds e. Where no pair agrees, or with one holder, in
        proportion to size alone (uniform over holders if that is 0 too).
    """
    held_C_E = held_C_E.bool()
    similarity_E_C_C, direction_E_C_C, size_C_E = _alike(similarity_E_C_C, direction_E_C_C, size_C_E)
    size_C_E = size_C_E.masked_fill(~held_C_E, 0)
    size_C_E = size_C_E / size_C_E.amax(dim=0).clamp_min(torch.finfo(size_C_E.dtype).tiny)
    agreement_C_E = _agreement(similarity_E_C_C, direction_E_C_C, size_C_E, held_C_E, beta, consensus)
    bar_E = agreement_C_E.amax(dim=0) * (min_agreement - ROUNDING)
    backed_C_E = (size_C_E * agreement_C_E).masked_fill(agreement_C_E < bar_E, 0)
    return _first_positive(backed_C_E, size_C_E, held_C_E.to(size_C_E.dtype))


def _agreement(
    similarity_E_C_C: Tensor, direction_E_C_C: Tensor, size_C_E: Tensor, held_C_E: Tensor, beta: float, consensus: str
) -> Tensor:
    """a_c in [0, 1]: the share, by data, of the other holders that the client agrees with; 0 without others."""
    bar_E_1_1 = adaptive_threshold(similarity_E_C_C, held_C_E, beta)[:, None, None] - ROUNDING
    weight_E_C_C = (1 + direction_E_C_C).div_(2) if consensus == "half" else direction_E_C_C.clamp(min=0)
    gated_E_C_C = weight_E_C_C.masked_fill_(similarity_E_C_C < bar_E_1_1, 0)
    gated_E_C_C.diagonal(dim1=1, dim2=2).zero_()
    size_E_C = size_C_E.T.contiguous()
    agreeing_C_E = torch.bmm(gated_E_C_C, size_E_C.unsqueeze(2)).squeeze(2).T
    # in double: beside a client that holds nearly all data, float32 would lose the others to rounding
    others_C_E = (size_C_E.double().sum(dim=0) - size_C_E.double()).to(size_C_E.dtype)
    share_C_E = agreeing_C_E / others_C_E.where(others_C_E > 0, torch.ones_like(others_C_E))
    return share_C_E.masked_fill(~held_C_E, 0)


def _alike(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors in the most precise of their types, float32 at least."""
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return (tensor.to(wide) for tensor in tensors)


def _first_positive(*candidates_C_E: Tensor) -> Tensor:
    """Column by column, the first candidate that is not all zero, normalised over clients; else zeros."""
    weight_C_E = candidates_C_E[-1]
    for candidate_C_E in reversed(candidates_C_E[:-1]):
        weight_C_E = torch.where(candidate_C_E.amax(dim=0) > 0, candidate_C_E, weight_C_E)
    total_E = weight_C_E.sum(dim=0)
    return weight_C_E / total_E.where(total_E > 0, torch.ones_like(total_E))
