"""Weighted sums of low-rank products: averaged as products, brought back to their rank, never written out in full.

A layer that is tuned by LoRA uses the product B·A. The mean of products is not the product of means, so this sums the
products themselves [O], where summing the values sums factors [FedIT, arXiv 2305.05644]:

    (B·A)_new = B·A + Σ_c k_c (B_c·A_c − B·A) = (1 − Σ_c k_c) B·A + Σ_c k_c B_c·A_c      k_c: the plan's signed weight

Side by side, the factors of all terms make up one tall and one wide matrix whose product this sum is. Their QR
decompositions leave a small core between orthonormal bases, whose SVD is the SVD of the sum. Its r largest singular
values give the best approximation of rank r (Eckart and Young 1936); √S goes to each factor, the largest first. So a
site of a smaller rank, which trains the first components only, trains the strongest.

Work is in float64: it costs about as much time as float32 here and holds one pair's factors at a time; terms that
nearly cancel then leave no noise that could pass for a component.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedalign.maths.rounding import unpack_part
from fedalign.protocol import Factors, Packed

SINGLE, DOUBLE = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
SMALL = 1e-3  # of the largest: singular values below are none, and what divides by them would be enormous
ROUNDING = 1e-6  # a sum of float32 weights that is closer to 1 is 1

Pair = tuple[Tensor, Tensor]  # B [outputs, rank] and A [rank, inputs]


def pair_in(flat: Tensor, place: Factors) -> Pair:
    """B and A of one pair: views of the group's flat values [N]."""
    B = flat[place.start_B : place.start_B + place.outputs * place.rank].view(place.outputs, place.rank)
    A = flat[place.start_A : place.start_A + place.rank * place.inputs].view(place.rank, place.inputs)
    return B, A


def plain_ranges(factors: Sequence[Factors], size: int) -> list[tuple[int, int]]:
    """Start and end of each run of values, of `size`, that belong to no pair.

    >>> plain_ranges([Factors(start_A=2, start_B=8, rank=1, inputs=4, outputs=2)], 11)
    [(0, 2), (6, 8), (10, 11)]
    """
    taken = [(place.start_A, place.start_A + place.rank * place.inputs) for place in factors]
    taken += [(place.start_B, place.start_B + place.outputs * place.rank) for place in factors]
    taken.sort()
    ends, starts = [0, *(end for _, end in taken)], [*(start for start, _ in taken), size]
    if any(end > start for end, start in zip(ends, starts, strict=True)):
        raise ValueError(f"factors at {taken}: must lie apart, within 0 and {size}")
    return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]


def best_factors(terms: Sequence[tuple[float, Pair]], spare_A: Tensor) -> Pair:
    """Factors of rank r whose product is nearest to Σ coefficient · B·A in the Frobenius norm.

    The work is done on the stacked factors, some of which may have a rank of their own. Only where they are together
    wider than B is long and A is wide, the core is as large as the product, but never larger than the stack.

    Where the sum has fewer than r components, columns of B are zero. Their rows of A must not be: the gradient of each
    is proportional to the other, so both would stay zero for good. They are what of `spare_A` lies outside the rows in
    use, its main directions first: never zero as long as the rows of `spare_A` are linearly independent.

    Args:
        terms: coefficients of either sign, with B [outputs, any rank] and A [the same, inputs].
        spare_A: [r, inputs]; its length is the rank wanted.

    Returns:
        B [outputs, r] and A [r, inputs], float32, the largest singular value first. The sign of a component, free in an
        SVD, is such that the largest entry of its column of B is positive.
    """
    left = Basis(torch.cat([coefficient * B.double() for coefficient, (B, _) in terms], dim=1))
    right = Basis(torch.cat([A.double() for _, (_, A) in terms]).T)
    U, S, V = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    # below this a component is float32 rounding of the result, or float64 rounding of terms that cancel
    noise = max(SINGLE * float(S[0]), DOUBLE * left.R.shape[1] * float(left.R.norm() * right.R.norm()))
    kept = int((S[: len(spare_A)] > noise).sum())
    B, rows = left.times(U[:, :kept]), right.times(V[:kept].T).T
    sign = _signs(B.T).T * S[:kept].sqrt()
    A = torch.cat([sign.T * rows, _outside(spare_A.double(), rows)])
    return functional.pad(B * sign, (0, len(spare_A) - kept)).float(), A.float()


class Basis:
    """The QR decomposition of a matrix. Q, as large as the matrix, is never written out: half the time and memory."""

    def __init__(self, matrix: Tensor) -> None:
        self._reflections, self._tau = torch.geqrf(matrix)
        self.R = self._reflections[: matrix.shape[1]].triu()

    def times(self, columns: Tensor) -> Tensor:
        """Q times some columns."""
        reflections = self._reflections[:, : len(self._tau)]
        return torch.ormqr(reflections, self._tau, functional.pad(columns, (0, 0, 0, len(reflections) - len(columns))))


def _signs(vectors: Tensor) -> Tensor:
    """The sign of each row's largest entry, [rows, 1]."""
    return vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()


def _outside(spare_A: Tensor, rows: Tensor) -> Tensor:
    """The main directions of `spare_A` orthogonal to orthonormal `rows`, as many as these are fewer."""
    wanted = len(spare_A) - len(rows)
    if not len(rows):
        return spare_A
    _, S, V = torch.linalg.svd(spare_A - (spare_A @ rows.T) @ rows, full_matrices=False)
    main = (_signs(V) * S.unsqueeze(1) * V)[:wanted]
    return functional.pad(main, (0, 0, 0, wanted - len(main)))  # more rows than inputs: nothing is left to be learnt


def lost_products(
    factors: Sequence[Factors], start: Tensor, trained: Tensor, sent: Tensor, before: Tensor | None
) -> Tensor:
    """The part of a group's update that rounding lost, [N]; of a pair its product, as factors of the same rank.

    A product that is lost is of no use as lost factors: next round starts from others. Of a pair (B, A) that was to
    move by (b, a), and has moved by (b', a'), the loss is (B + b)(A + a) − (B + b')(A + a') and what was lost before.

    Args:
        factors: where the group's pairs lie.
        start: values before training.
        trained: what training changed.
        sent: what is sent, as the server reads it.
        before: what this returned last round, all of which `owed` has added to what was rounded; None: nothing.
    """
    lost = trained - sent if before is None else trained + before - sent
    for place in factors:
        pairs = [pair_in(values, place) for values in (start, start + trained, start + sent, lost)]
        (_, A), mine, theirs, into = pairs
        terms = [(1.0, mine), (-1.0, theirs)]
        if before is not None:
            terms.append((1.0, pair_in(before, place)))
        for part, best in zip(into, best_factors(terms, spare_A=A), strict=True):
            part.copy_(best)
    return lost


def owed(factors: Sequence[Factors], start: Tensor, lost: Tensor) -> Tensor:
    """The change of a group's values [N] that makes up for what `lost_products` says.

    Of a pair that is to gain a product P, to first order: b = P·A⁺, and a = B⁺·(P − b·A) for what lies outside the rows
    of A. Both are the least ones that do.
    """
    change = lost.clone()
    for place in factors:
        (B, A), (lost_B, lost_A), (b, a) = (pair_in(values, place) for values in (start, lost, change))
        B, A, product = B.double(), A.double(), lost_B.double() @ lost_A.double()
        move_B = product @ torch.linalg.pinv(A)
        b.copy_(move_B)
        a.copy_(torch.linalg.pinv(B, rtol=SMALL) @ (product - move_B @ A))
    return change


class Stack:
    """One group's updates, kept in wire precision until all are there: products cannot be added up in place.

    Values outside pairs are summed. The result does not depend on the order of `add` calls.

    Args:
        factors: where the group's pairs lie.
        size: how many values it has.
    """

    def __init__(self, factors: Sequence[Factors], size: int) -> None:
        self._factors = factors
        self._plain = plain_ranges(factors, size)
        self._updates: dict[int, tuple[float, Packed]] = {}

    def add(self, turn: int, coefficient: float, update: Packed) -> None:
        """Keep a copy of an update; `turn` is its place in the sum."""
        scale = None if update.scale is None else update.scale.clone()
        self._updates[turn] = coefficient, Packed(update.values.clone(), scale)

    def result(self, old: Tensor, stretch: float) -> Tensor:
        """The new flat values, all coefficients times `stretch`. A pair that nobody moved stays as it is."""
        new = old.clone()
        updates = [self._updates[turn] for turn in sorted(self._updates)]
        for start, end in self._plain:
            total = torch.zeros(end - start)
            for coefficient, update in updates:
                total.add_(unpack_part(update, start, end), alpha=coefficient)
            new[start:end].add_(total, alpha=stretch)
        for place in self._factors:
            self._renew(pair_in(new, place), place, [(stretch * k, update) for k, update in updates if k])
        return new

    def _renew(self, pair: Pair, place: Factors, updates: Sequence[tuple[float, Packed]]) -> None:
        """Replace an old pair, in place, by the best one."""
        B, A = pair
        moves = [(k, _pair_in_packed(update, place)) for k, update in updates]
        if not any(bool(part.any()) for _, move in moves for part in move):
            return
        rest = 1 - sum(k for k, _ in moves)
        terms = [(rest, pair)] if abs(rest) > ROUNDING else []
        terms += [(k, (B.double() + move_B, A.double() + move_A)) for k, (move_B, move_A) in moves]
        best_B, best_A = best_factors(terms, spare_A=A)
        B.copy_(best_B)
        A.copy_(best_A)


def _pair_in_packed(packed: Packed, place: Factors) -> Pair:
    """B and A of one pair of a packed group, float32."""
    B = unpack_part(packed, place.start_B, place.start_B + place.outputs * place.rank)
    A = unpack_part(packed, place.start_A, place.start_A + place.rank * place.inputs)
    return B.view(place.outputs, place.rank), A.view(place.rank, place.inputs)
