"""Fixed point for sums modulo 2^b: numbers of many clients that add up exactly, in any order, and cannot wrap.

**Updates** are modulo 2^16. Each block of 4,096 values has a limit that all clients know, and that no value of any
client exceeds. A client may use its weight's share of it, and weights sum to one: a sum stays within the limit and one
step a client [O].

    step = limit / LEVELS        residue = floor(value / step + u) mod 2^16        u uniform in [0, 1), seeded

Rounding is stochastic, so that errors do not drift; the random numbers are a hash of the index (`maths.hashing`).

**Limits** are the largest height of a block among clients, found by a sum that tells nothing else. A height is the
power of two that no value of the block exceeds. For each power a client sends a number: up to its height one drawn at
random, above it zero. A sum modulo 2^32 is random where anybody is as high, and zero where nobody is: it tells neither
who is, nor how many are. That two clients' numbers cancel, so that a limit is too low by half, is one chance in 2^32;
values are then cut, and counted. The last power is nobody's: its sum is zero, unless masks do not cancel.

A root mean square would do for a limit only with room to spare (8 of them are exceeded by one row that alone was
trained, and the sum of clients' squares grows with their number); a maximum needs none.

**Counts** are modulo 2^64, in units that the caller chooses, of at most MOST_COUNT units a client.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedalign.maths.hashing import words

BLOCK = 4096  # values that share a limit
MOST_CLIENTS = 1024  # of a sum; each may round up by one step
LEVELS = 2**15 - 1 - MOST_CLIENTS  # steps from zero to a limit
MOST_COUNT = 2**62 // MOST_CLIENTS  # units of one client's count
POWERS = 48  # powers of two that a block may have as its limit, and the one that none may
LOWEST = -37  # exponent of height 0, of blocks without a value that is not zero; the highest is 47, a limit of 1,024
CHUNK = 1 << 16  # values worked on at a time, so that they stay in cache; a whole number of blocks


def counted(values: Tensor, unit: int = 1) -> Tensor:
    """Numbers as int64 counts of 1 / `unit`, rounded; of any shape.

    >>> counted(torch.tensor([0.5, 3.0]), 4).tolist()
    [2, 12]

    Raises:
        ValueError: A sum of as many clients as there may be could wrap, or one is not finite.
    """
    scaled = values.double() * unit
    if not bool((scaled.abs() <= MOST_COUNT).all()):  # NaN included
        raise ValueError(f"a count that is not finite, or beyond {MOST_COUNT / unit:,.0f}: its sum could wrap")
    return scaled.round().long()


def heights(values: Tensor) -> Tensor:
    """Height of each block of a float32 update [N], uint8 [ceil(N / BLOCK)]; 0: all its values are zero.

    >>> limits(heights(torch.tensor([0.75, -3.0]))).tolist(), limits(heights(torch.zeros(1))).tolist()
    ([4.0], [0.0])

    Raises:
        ValueError: A value is not finite, or beyond the highest limit.
    """
    most_B = torch.stack([block.abs().amax() for block in values.split(BLOCK)]) if len(values) else values
    height_B = torch.frexp(most_B).exponent - LOWEST
    if not bool((most_B.isfinite() & (height_B < POWERS)).all()):
        raise ValueError(
            f"an update with a value that is not finite, or of {2.0 ** (LOWEST + POWERS - 1):,.0f} or more"
        )
    return torch.where(most_B > 0, height_B.clamp_min(1), 0).to(torch.uint8)


def marks(height_B: Tensor, noise: Tensor) -> Tensor:
    """A client's share of the sum that tells the largest heights, int32 [B, POWERS].

    Args:
        height_B: `heights`.
        noise: int32 [B, POWERS], uniform, and known to this client alone.
    """
    return noise * (torch.arange(POWERS) < height_B.unsqueeze(1))


def highest(total: Tensor) -> Tensor:
    """The largest height of each block, uint8 [B], of the sum of clients' marks modulo 2^32.

    Raises:
        ValueError: It is no such sum.
    """
    if bool(total[:, -1].any()):
        raise ValueError("marks where there are none: no sum of heights")
    return ((total != 0) * torch.arange(1, POWERS + 1)).amax(1).to(torch.uint8)


def limits(height_B: Tensor) -> Tensor:
    """Limit of each block, float64 [B], of the largest heights among clients; 0 where nobody's values moved."""
    return torch.where(height_B > 0, 2.0 ** (height_B.double() + LOWEST), 0)


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

    >>> at = limits(heights(torch.tensor([1.0, -1.0])))
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
