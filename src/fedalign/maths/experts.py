"""Semantic expert aggregation: average an expert over the clients on which it does the same job.

FedAlign-MoE (arXiv 2603.21276). Marks: [P] the paper says so, [O] our choice where it is silent. For expert e, over
the clients that hold it:

    S_ij = cos(μ_i - μ̄, μ_j - μ̄)                 semantic similarity of what is routed to it    [P; centring is O]
    D_ij = cos(Δ_i, Δ_j)                          direction consensus of its updates            [P]
    τ    = mean - β · std of S_ij over pairs i<j  adaptive threshold                            [P]
    γ_ij = 1[S_ij >= τ] · (1 + D_ij) / 2          gated weight, i ≠ j                           [P idea, O form]
    a_c  = Σ_{j≠c} n_j γ_cj / Σ_{j≠c} n_j         agreement                                     [O]
    b_c  ∝ n_c · a_c                              the client's weight                           [O]

Everything is expert by expert, so callers pass slices of the expert axis: memory is E · C² of what is passed.

Pairs grow with the square of the clients. `sampled_weights` grows with their number [O]: τ is exact from sums, as
Σ_ij S_ij = ‖Σ x_i‖² and Σ_ij S_ij² = ‖Σ x_i x_iᵀ‖² for unit vectors x; the gate is none of these, so a_c is estimated
against some of the holders. Clients near the bar of min_agreement, and those that set it, are then held against all.

Half precision is computed in float32, float64 stays float64. Axes: see `protocol`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from fedalign.maths import torch
from fedalign.maths.routing import full

if TYPE_CHECKING:
    from torch import Tensor

Consensus = Literal["half", "relu"]

PARTNERS = 128  # holders that all others are held against where there are more
TOP, DOUBTFUL = 16, 64  # clients that are held against all: who sets the bar, and those nearest to it
POWER_STEPS = 8  # of the power iteration: it only sorts
ROUNDING = 1e-6  # float32 noise of a cosine, or of a difference relative to its terms


def directions(vector_C_E_H: Tensor) -> Tensor:
    """Each vector scaled to unit norm; zero vectors stay zero."""
    vector_C_E_H = full(vector_C_E_H)
    return _scaled(vector_C_E_H, _peak(vector_C_E_H))


def _scaled(vector_C_E_H: Tensor, peak_C_E_1: Tensor) -> Tensor:
    """As `directions`, for callers that have the peaks."""
    # dividing by the largest entry first keeps squares of very small or large vectors within float32
    vector_C_E_H = vector_C_E_H / peak_C_E_1.where(peak_C_E_1 > 0, torch.ones_like(peak_C_E_1))
    norm_C_E_1: Tensor = torch.linalg.vector_norm(vector_C_E_H, dim=-1, keepdim=True)
    return vector_C_E_H / norm_C_E_1.clamp_min(0.5)  # at least 1 now, unless the vector is zero


def _peak(vector_C_E_H: Tensor) -> Tensor:
    """The largest absolute value of each vector, [..., 1], without a temporary as large as the vectors."""
    return torch.maximum(vector_C_E_H.amax(dim=-1, keepdim=True), -vector_C_E_H.amin(dim=-1, keepdim=True))


def centred_directions(centroid_C_E_H: Tensor, load_C_E: Tensor) -> Tensor:
    """Unit vectors of the centroids after subtracting their load-weighted mean over all clients and experts [O].

    Hidden states share a large common component that drives raw cosines to 1. Zero where the load is 0, or where what
    is left is rounding noise.
    """
    centroid_C_E_H = full(centroid_C_E_H).masked_fill(~(load_C_E > 0).unsqueeze(-1), 0)
    weight_C_E = load_C_E.double().clamp_min(0)
    share_C_E = weight_C_E / weight_C_E.sum().clamp_min(torch.finfo(torch.float64).tiny)
    mean_H = torch.einsum("ceh,ce->h", centroid_C_E_H.double(), share_C_E).to(centroid_C_E_H.dtype)
    return directions_from(mean_H, centroid_C_E_H, load_C_E)


def directions_from(mean_H: Tensor, centroid_C_E_H: Tensor, load_C_E: Tensor) -> Tensor:
    """As `centred_directions`, for callers that have the mean."""
    centroid_C_E_H = full(centroid_C_E_H)
    centred_C_E_H = centroid_C_E_H - mean_H
    peak_C_E_1 = _peak(centred_C_E_H)
    noise_C_E_1 = peak_C_E_1 <= ROUNDING * torch.maximum(_peak(centroid_C_E_H), _peak(mean_H))
    return _scaled(centred_C_E_H, peak_C_E_1).masked_fill_(noise_C_E_1 | ~(load_C_E > 0).unsqueeze(-1), 0)


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
    """Sarle's bimodality coefficient [O] of S over the pairs of holders: (skewness² + 1) / kurtosis, in [0, 1].

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
    size_C_E = _relative(size_C_E, held_C_E)
    agreement_C_E = _agreement(similarity_E_C_C, direction_E_C_C, size_C_E, held_C_E, beta, consensus)
    return _backed(agreement_C_E, size_C_E, held_C_E, min_agreement)


def sampled_weights(
    centroid_C_E_D: Tensor,
    update_C_E_S: Tensor,
    size_C_E: Tensor,
    held_C_E: Tensor,
    beta: float = 0.5,
    consensus: Consensus = "half",
    min_agreement: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `expert_weights` and `bimodality`, in time and memory that grow with the clients, not with their pairs.

    Nothing is drawn, so the order of the clients does not matter. With at most `PARTNERS` holders it is exact.

    Args:
        centroid_C_E_D: unit vectors, see `centred_directions`.
        update_C_E_S: unit vectors, see `directions`.
        size_C_E: as of `expert_weights`.
        held_C_E: as of `expert_weights`.
        beta: as of `expert_weights`.
        consensus: as of `expert_weights`.
        min_agreement: as of `expert_weights`.

    Returns:
        weight_C_E, and the bimodality of each expert: of as many holders, spread evenly.
    """
    held_C_E = held_C_E.bool()
    size_C_E = _relative(full(size_C_E), held_C_E)
    pairs = _Pairs(centroid_C_E_D, update_C_E_S, held_C_E, beta, consensus)
    agreement_C_E = pairs.agreement(size_C_E.T.double(), min_agreement).T.to(size_C_E.dtype)
    return _backed(agreement_C_E, size_C_E, held_C_E, min_agreement), pairs.bimodality()


class _Pairs:
    """Pairs of the holders of each expert, as many as are looked at; other clients' vectors are zero, their sizes 0."""

    def __init__(
        self, centroid_C_E_D: Tensor, update_C_E_S: Tensor, held_C_E: Tensor, beta: float, consensus: Consensus
    ) -> None:
        self._held_E_C, self._consensus = held_C_E.T, consensus
        other_E_C_1 = ~held_C_E.T.unsqueeze(2)
        self._centroid_E_C_D = centroid_C_E_D.transpose(0, 1).masked_fill(other_E_C_1, 0)
        self._update_E_C_S = update_C_E_S.transpose(0, 1).masked_fill(other_E_C_1, 0)
        self._holders_E = self._held_E_C.sum(dim=1)
        self._place_P = torch.arange(min(PARTNERS, len(held_C_E)))
        gram_E_D_D = torch.bmm(self._centroid_E_C_D.transpose(1, 2), self._centroid_E_C_D).double()
        sum_E_D = self._centroid_E_C_D.sum(dim=1, dtype=torch.float64)
        square_E_C = self._centroid_E_C_D.square().sum(dim=2, dtype=torch.float64)
        bar_E = self._threshold(gram_E_D_D, sum_E_D, square_E_C, beta) - ROUNDING
        self._bar_E_1_1 = bar_E.to(centroid_C_E_D.dtype)[:, None, None]
        along_E_D = _principal(gram_E_D_D, sum_E_D, self._holders_E).to(centroid_C_E_D.dtype)
        along_E_C = (self._centroid_E_C_D * along_E_D.unsqueeze(1)).sum(dim=2)
        self._sorted_E_C = self._last(along_E_C).argsort(dim=1, stable=True)  # holders, then the others

    def _threshold(self, gram_E_D_D: Tensor, sum_E_D: Tensor, square_E_C: Tensor, beta: float) -> Tensor:
        """τ, as `adaptive_threshold`."""
        pairs_E = (self._holders_E * (self._holders_E - 1)).clamp_min(1)  # each counts twice
        mean_E = (sum_E_D.square().sum(dim=1) - square_E_C.sum(dim=1)) / pairs_E
        squared_E = (gram_E_D_D.square().sum(dim=(1, 2)) - square_E_C.square().sum(dim=1)) / pairs_E
        return mean_E - beta * (squared_E - mean_E.square()).clamp_min(0).sqrt()

    def agreement(self, size_E_C: Tensor, min_agreement: float) -> Tensor:
        """a_c, float64 [E, C]: against a sample, but for those of whom the bar makes most; 0 of others than holders."""
        agreement_E_C = self._sampled(size_E_C) * self._held_E_C
        agreement_E_C = self._corrected(agreement_E_C, -agreement_E_C, TOP, size_E_C)
        bar_E_1 = min_agreement * agreement_E_C.amax(dim=1, keepdim=True)
        return self._corrected(agreement_E_C, (agreement_E_C - bar_E_1).abs(), DOUBTFUL, size_E_C)

    def _corrected(self, agreement_E_C: Tensor, away_E_C: Tensor, some: int, size_E_C: Tensor) -> Tensor:
        """The same, but of the holders that are least `away` against all holders."""
        rows_E_R = self._last(away_E_C).topk(min(some, away_E_C.shape[1]), largest=False).indices
        return agreement_E_C.scatter(1, rows_E_R, self._exact(rows_E_R, size_E_C)) * self._held_E_C

    def _sampled(self, size_E_C: Tensor) -> Tensor:
        """a_c of all, against some holders."""
        partners_E_P, stands_for_E_P = self._partners(size_E_C)
        gated_E_C_P = self._gated(None, partners_E_P).scatter_(1, partners_E_P.unsqueeze(1), 0)  # none backs itself
        own_E_C = torch.zeros_like(size_E_C).scatter_add_(1, partners_E_P, stands_for_E_P)
        return _share(gated_E_C_P, stands_for_E_P, own_E_C)

    def _exact(self, rows_E_R: Tensor, size_E_C: Tensor) -> Tensor:
        """a_c of some, against all holders."""
        gated_E_R_C = self._gated(rows_E_R, None).scatter_(2, rows_E_R.unsqueeze(2), 0)
        return _share(gated_E_R_C, size_E_C, size_E_C.gather(1, rows_E_R))

    def _partners(self, size_E_C: Tensor) -> tuple[Tensor, Tensor]:
        """Some holders, and how much data each stands for: large ones for their own, others for as much of their like.

        The others are a systematic sample along the sorted holders, in proportion to size.
        """
        place_P, count = self._place_P, len(self._place_P)
        falling_E_C, largest_E_C = size_E_C.sort(dim=1, descending=True, stable=True)
        from_E_P = falling_E_C.flip(1).cumsum(dim=1).flip(1)[:, :count]
        falling_E_P, largest_E_P = falling_E_C[:, :count], largest_E_C[:, :count]
        sure_E_1 = (falling_E_P * (count - place_P) <= from_E_P).byte().argmax(dim=1, keepdim=True)
        one_E_1 = from_E_P.gather(1, sure_E_1) / (count - sure_E_1)
        sure_E_P = place_P < sure_E_1
        rest_E_C = size_E_C.scatter(1, largest_E_P, falling_E_P.masked_fill(sure_E_P, 0))
        mass_E_C = rest_E_C.gather(1, self._sorted_E_C).cumsum(dim=1)
        at_E_P = torch.searchsorted(mass_E_C, (place_P - sure_E_1 + 0.5) * one_E_1).clamp_max(len(mass_E_C[0]) - 1)
        sampled_E_P = self._sorted_E_C.gather(1, at_E_P)
        return torch.where(sure_E_P, largest_E_P, sampled_E_P), torch.where(sure_E_P, falling_E_P, one_E_1)

    def _gated(self, rows_E_R: Tensor | None, partners_E_P: Tensor | None) -> Tensor:
        """γ between some and some; None: all."""
        similar_E_R_P, gated_E_R_P = (
            torch.bmm(_some(unit_E_C_X, rows_E_R), _some(unit_E_C_X, partners_E_P).transpose(1, 2))
            for unit_E_C_X in (self._centroid_E_C_D, self._update_E_C_S)
        )
        gated_E_R_P.clamp_(-1, 1)
        gated_E_R_P = gated_E_R_P.add_(1).div_(2) if self._consensus == "half" else gated_E_R_P.clamp_(min=0)
        return gated_E_R_P.mul_(similar_E_R_P.ge_(self._bar_E_1_1))  # by 1 or 0: booleans take ten times as long

    def _last(self, value_E_C: Tensor) -> Tensor:
        """The same, so that in rising order holders come first."""
        return value_E_C.masked_fill(~self._held_E_C, torch.inf)

    def bimodality(self) -> Tensor:
        """As `bimodality`, over holders evenly along their order."""
        count = len(self._place_P)
        step_E_1 = (self._holders_E.double() / count).clamp_min(1).unsqueeze(1)
        some_E_P = self._sorted_E_C.gather(1, ((self._place_P + 0.5) * step_E_1).long())
        similarity_E_P_P = cosines(_some(self._centroid_E_C_D, some_E_P).transpose(0, 1))
        return bimodality(similarity_E_P_P, (self._place_P < self._holders_E.unsqueeze(1)).T)


def _some(unit_E_C_X: Tensor, which_E_R: Tensor | None) -> Tensor:
    """The vectors of some clients of each expert, [E, R, X]; None: of all."""
    return unit_E_C_X if which_E_R is None else unit_E_C_X[torch.arange(len(which_E_R)).unsqueeze(1), which_E_R]


def _share(gated_E_R_P: Tensor, size_E_P: Tensor, own_E_R: Tensor) -> Tensor:
    """The share, by data, of its partners other than itself that each row agrees with, [E, R]; 0 without any."""
    others_E_R = size_E_P.sum(dim=1, keepdim=True) - own_E_R
    agreeing_E_R = gated_E_R_P.mul_(size_E_P.to(gated_E_R_P.dtype).unsqueeze(1)).sum(dim=2).double()
    return (agreeing_E_R / others_E_R.where(others_E_R > 0, 1.0)).clamp_(0, 1)


def _principal(gram_E_D_D: Tensor, sum_E_D: Tensor, count_E: Tensor) -> Tensor:
    """About the first principal direction of vectors, [E, D], from their Gram matrices and sums."""
    mean_E_D = sum_E_D / count_E.clamp_min(1).unsqueeze(1)
    scatter_E_D_D = gram_E_D_D - sum_E_D.unsqueeze(2) * mean_E_D.unsqueeze(1)
    widest_E_1_1 = scatter_E_D_D.diagonal(dim1=1, dim2=2).argmax(dim=1)[:, None, None]
    vector_E_D_1 = torch.take_along_dim(scatter_E_D_D, widest_E_1_1, dim=2)
    for _ in range(POWER_STEPS):
        vector_E_D_1 = torch.nn.functional.normalize(torch.bmm(scatter_E_D_D, vector_E_D_1), dim=1)
    return vector_E_D_1.squeeze(2)


def _relative(size_C_E: Tensor, held_C_E: Tensor) -> Tensor:
    """Sizes of holders in shares of each expert's largest, so that no scale of them underflows; 0 of others."""
    size_C_E = size_C_E.masked_fill(~held_C_E, 0)
    return size_C_E / size_C_E.amax(dim=0).clamp_min(torch.finfo(size_C_E.dtype).tiny)


def _backed(agreement_C_E: Tensor, size_C_E: Tensor, held_C_E: Tensor, min_agreement: float) -> Tensor:
    """The weights of agreements: in proportion to data and agreement, without clients below the bar."""
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
