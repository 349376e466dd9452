"""Fixed point for sums modulo 2^16: values of many clients that add up exactly, whatever the order, and cannot wrap.

Each block of 4,096 values has a limit that all clients know: 8 times the root of the sum of their mean squares. No mean
of updates has a larger root mean square than that root, so a value reaches the limit at 8 of its deviations. A client
may use its weight's share of a limit, and weights sum to one: a sum stays within the limit and one step a client [O].

    step = limit / LEVELS        residue = floor(value / step + u) mod 2^16        u uniform in [0, 1), seeded

Rounding is stochastic, so that errors do not drift; the random numbers are a hash of the index (`maths.hashing`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedalign.maths.hashing import words

BLOCK = 4096  # values that share a limit
MOST_CLIENTS = 1024  # of a sum; each may round up by one step
LEVELS = 2**15 - 1 - MOST_CLIENTS  # steps from zero to a limit
DEVIATIONS = 8  # root mean squares at which values are clipped
SQUARE_UNIT = 2.0**50  # of mean squares: what is not zero stays so, down to 3e-8 in the root
MOST_SQUARE = 8.0  # of one client; a longer update is clipped
CHUNK = 1 << 18  # values worked on at a time; a whole number of blocks


def mean_squares(values: Tensor) -> Tensor:
    """Mean square of each block, int64 [ceil(N / BLOCK)] in units of 1 / SQUARE_UNIT, rounded up.

    >>> (mean_squares(torch.full((BLOCK + 1,), 0.5)) / SQUARE_UNIT).tolist()
    [0.25, 0.25]
    """
    squares = [block.double().square().mean() for block in values.split(BLOCK) if len(block)]
    mean_B = torch.stack(squares) if squares else torch.zeros(0, dtype=torch.float64)
    return (mean_B.clamp_max(MOST_SQUARE) * SQUARE_UNIT).ceil().long()


def limits(total: Tensor) -> Tensor:
    """Limit of each block, float64 [ceil(N / BLOCK)], of the sum over clients of their `mean_squares`.

    >>> limits(2 * mean_squares(torch.full((4,), 0.5))).tolist() == [8 * 0.5**0.5]
    True
    """
    return DEVIATIONS * (total.double() / SQUARE_UNIT).sqrt()


def encode(values: Tensor, weight: Tensor, limit: Tensor, seed: int, first: int = 0) -> tuple[Tensor, int]:
    """Weighed values as residues, int16, and how many had to be clipped.

    Args:
        values: float32 [N], weight times update.
        weight: float32 [N], each in [0, 1]: the part of the limit that a value may use.
        limit: of each block of these values.
        seed: of rounding.
        first: the index of the first value in its group, a whole number of blocks.
    """
    residues, clipped = torch.empty(len(values), dtype=torch.int16), 0
    for start in range(0, len(values), CHUNK):
        part = slice(start, start + CHUNK)
        step = _spread(limit, start, len(residues[part]))
        scaled = torch.where(step > 0, values[part].double() / step, 0)
        most = weight[part].double() * LEVELS
        clipped += int((scaled.abs() > most).sum())
        chance = words(first + start, len(scaled), seed).double() / 2**32
        residues[part] = (torch.minimum(scaled, most).maximum(-most) + chance).floor().to(torch.int16)
    return residues, clipped


def decode(residues: Tensor, limit: Tensor) -> Tensor:
    """The sum that residues stand for, float32 [N].

    Args:
        residues: int16 [N], the sum over clients modulo 2^16.
        limit: of each block.

    >>> at = limits(mean_squares(torch.tensor([1.0, -1.0])))
    >>> made, _ = encode(torch.tensor([1.0, -1.0]), torch.ones(2), at, seed=0)
    >>> bool((decode(made, at) - torch.tensor([1.0, -1.0])).abs().max() <= at / LEVELS)
    True
    """
    values = torch.empty(len(residues))
    for start in range(0, len(residues), CHUNK):
        part = residues[start : start + CHUNK]
        values[start : start + CHUNK] = (part.double() * _spread(limit, start, len(part))).float()
    return values


def _spread(limit: Tensor, start: int, length: int) -> Tensor:
    """The step at each of `length` values from `start` on."""
    blocks = limit[start // BLOCK : -(-(start + length) // BLOCK)]
    return (blocks / LEVELS).repeat_interleave(BLOCK)[:length]
